//! `tvmm token`: tokens for clients of `tvmm serve`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::serve::{Role, Secret, Token, read_tokens};
use crate::snapshot::append_private;
use crate::sys::errors::{BoxError, refuse};

#[derive(Debug, Args)]
pub struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token: print its secret, which is not kept anywhere, and its line for the file of `tvmm serve --tokens`
    New(NewArgs),
}

#[derive(Debug, Args)]
struct NewArgs {
    /// Name of the token in the audit log
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Rights of its clients
    #[arg(long, value_enum, value_name = "ROLE")]
    role: Role,
    /// Limit on its requests a second; more are answered 429 [default: none]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_requests: Option<u32>,
    /// Limit on its invocations, and starts and forks of VMs, at once, those that wait for their turn included; more
    /// are answered 429 [default: none]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_running: Option<u32>,
    /// Append the line to this token file, which is made with mode 0600 if it does not exist, and print only the secret
    #[arg(long, value_name = "FILE")]
    add: Option<PathBuf>,
}

pub fn run(args: &TokenArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        TokenCommand::New(args) => new(args),
    }
}

fn new(args: &NewArgs) -> Result<ExitCode, BoxError> {
    let secret = Secret::new();
    let token = Token {
        name: args.name.clone(),
        role: args.role,
        sha256: secret.digest(),
        max_requests_per_s: args.max_requests,
        max_running: args.max_running,
    };
    token.check().map_err(|problem| format!("Cannot make a token: {problem}"))?;
    match &args.add {
        Some(file) => {
            add(file, &token)?;
            out!("{}", secret.reveal());
        }
        None => {
            out!("{}", secret.reveal());
            out!("{}", token.line());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Appends the line of a token to a file that the service could read before.
fn add(path: &Path, token: &Token) -> Result<(), BoxError> {
    let mut file = append_private(path)?;
    if read_tokens(path)?.iter().any(|other| other.name == token.name) {
        return refuse(format!(
            "Cannot add to {}: it has a token with the name `{}`. Choose another --name, or remove its line",
            path.display(),
            token.name
        ));
    }
    let mut line = token.line() + "\n";
    // The last line may have been written by hand, without its end.
    if std::fs::read(path)?.last().is_some_and(|last| *last != b'\n') {
        line.insert(0, '\n');
    }
    file.write_all(line.as_bytes()).map_err(|error| format!("Cannot write {}: {error}", path.display()))?;
    file.sync_all().map_err(|error| format!("Cannot write {}: {error}", path.display()))?;
    Ok(())
}
