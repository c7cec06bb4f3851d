//! The command line.
//!
//! Owns: arguments, progress, exit codes, drawing, and printing an error's chain once.
//! Must not know: KVM, guest memory. It hands requests to `session`, `serve` and `bench`, and works on snapshots and
//! pools directly.
//! Start reading: `mod.rs` (the commands), `vm.rs` (boot and restore), `plan.rs`.

mod barrier;
mod demote;
mod encrypt;
mod failure;
mod fork;
mod guest;
mod identify;
mod inspect;
mod jail_args;
mod jailer;
mod load_args;
mod merge;
mod overrides;
mod plan;
mod pool;
mod profile;
mod repurpose;
mod rewind;
mod seccomp_args;
mod serve;
mod serve_pages;
mod session_args;
mod sign;
mod snapshot;
mod token;
mod units;
mod vm;

use crate::sys::errors::{BoxError, chain};
use crate::sys::heap;
use std::error::Error;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

use self::failure::{ArgumentConflict, MemoryLost};
use self::identify::{InputPath, Role};
use self::session_args::SessionArgs;
use crate::config::refusal::{FAULTS_VARIABLE, FaultBody, FaultCode};
use crate::session;
use crate::snapshot::{NoColdPool, UnknownPolicy};
use crate::sys::logging::{self, LogChange};
use crate::sys::lost;
use crate::sys::signals;

/// A microVM monitor with tiered snapshot restore built in.
///
/// Without a command: boots the machine of --config, or waits for commands on --api-sock.
#[derive(Debug, Parser)]
#[command(name = "tvmm", version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    boot: BootArgs,
}

/// The name by which this program is `tvmm jail`.
const JAILER: &str = "jailer";

#[derive(Debug, Args)]
struct BootArgs {
    /// The machine to boot: JSON in Firecracker's --config-file schema
    #[arg(long, alias = "config-file", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    session: SessionArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Snapshot a running VM; merge, sign and encrypt snapshots
    Snapshot(snapshot::SnapshotArgs),
    /// Restore a VM from a snapshot
    Restore(Box<vm::RestoreArgs>),
    /// Take a restored VM back to its snapshot, in place
    Rewind(rewind::RewindArgs),
    /// Give the local memory of an idle VM that equals its snapshot back to the host
    Demote(demote::DemoteArgs),
    /// Tell which memory a restored VM has touched, by bucket, and count touches from now on
    Barrier(barrier::BarrierArgs),
    /// Make copies of a running VM that go on from the same instant, each a VM of its own
    Fork(Box<fork::ForkArgs>),
    /// Make a restored VM the VM of another snapshot, in place
    Repurpose(Box<repurpose::RepurposeArgs>),
    /// Show a snapshot's contents, and verify it
    Inspect(inspect::InspectArgs),
    /// Record, show and merge profiles of the pages that a function uses
    Profile(profile::ProfileArgs),
    /// Measure the costs of memory operations on this host
    Calibrate(crate::bench::calibrate::CalibrateArgs),
    /// Show the plan that a policy makes for a snapshot, or write it to a file
    Plan(plan::PlanArgs),
    /// Keep the pages of snapshots in memory that VMs map: make pools, add, remove, list and check snapshots
    Pool(pool::PoolArgs),
    /// Serve a cold pool to VMs on other hosts
    ServePages(serve_pages::ServeArgs),
    /// Write the built-in guest kernel: an ELF that any VMM can boot
    Guest(guest::GuestArgs),
    /// Start a VMM in a jail, as Firecracker's jailer does; also by the name `jailer`
    Jail(Box<jailer::JailerArgs>),
    /// Serve functions, VMs and snapshots over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Make tokens for clients of `tvmm serve`
    Token(token::TokenArgs),
    /// Benchmark restores and policies
    Bench(crate::bench::BenchArgs),
}

impl Command {
    /// Returns whether no VM runs in this process.
    fn only_prints(&self) -> bool {
        match self {
            Command::Restore(_) | Command::Serve(_) => false,
            Command::Profile(args) => !args.runs_a_vm(),
            // It must outlive the reader of its output.
            Command::ServePages(_) => false,
            // Dispositions of signals outlive the exec of a VMM.
            Command::Jail(_) => false,
            _ => true,
        }
    }

    /// The input files that have a format of their own.
    fn inputs(&self) -> Vec<InputPath> {
        match self {
            Command::Restore(args) => args.inputs(),
            Command::Repurpose(args) => args.inputs(),
            Command::Snapshot(args) => args.inputs(),
            Command::Inspect(args) => args.inputs(),
            Command::Profile(args) => args.inputs(),
            Command::Plan(args) => args.inputs(),
            Command::Pool(args) => args.inputs(),
            Command::ServePages(args) => args.inputs(),
            Command::Calibrate(_) | Command::Rewind(_) | Command::Demote(_) | Command::Barrier(_) => Vec::new(),
            Command::Fork(_) | Command::Guest(_) | Command::Serve(_) | Command::Bench(_) => Vec::new(),
            Command::Token(_) | Command::Jail(_) => Vec::new(),
        }
    }
}

/// Parses the arguments. Ends the process if they are not understood, or ask for help.
///
/// # Errors
/// An unknown policy or cold pool. Like a missing snapshot it ends the process with exit code 1, as the arguments were
/// understood.
fn arguments() -> Result<Cli, String> {
    let parsed = match std::env::args_os().next() {
        Some(name) if Path::new(&name).file_name() == Some(OsStr::new(JAILER)) => {
            let begin = [name, "jail".into()];
            Cli::try_parse_from(begin.into_iter().chain(std::env::args_os().skip(1)))
        }
        _ => Cli::try_parse(),
    };
    parsed.or_else(|error| {
        let cause = error.source().filter(|cause| cause.is::<UnknownPolicy>() || cause.is::<NoColdPool>());
        match cause {
            Some(unknown) => Err(unknown.to_string()),
            None => error.exit(),
        }
    })
}

/// Ends the process as clap does for arguments that exclude each other.
fn end_by_conflict(conflict: &ArgumentConflict) -> ! {
    let mut cli = Cli::command();
    cli.build();
    let command = cli.find_subcommand_mut(conflict.command).expect("callers name a command that there is");
    command.error(ErrorKind::ArgumentConflict, &conflict.message).exit()
}

/// Runs the command line. Exit code 0: success; 1: failure; 2: the arguments were not understood; [`lost::EXIT_CODE`]:
/// memory that is mapped from a file was lost; [`EXIT_CODE`](crate::sys::seccomp::EXIT_CODE): a thread made a system
/// call that its filter does not allow.
pub fn main() -> ExitCode {
    heap::use_one_for_all_threads();
    let cli = match arguments() {
        Ok(cli) => cli,
        Err(unknown) => {
            crate::sys::print::end(Some(&unknown));
            return ExitCode::FAILURE;
        }
    };
    signals::outlive_file_size_limit();
    if let Err(error) = lost::install_handler() {
        crate::sys::print::end(Some(&format!("Cannot install the handler of SIGBUS: {error}")));
        return ExitCode::FAILURE;
    }
    if cli.command.as_ref().is_some_and(Command::only_prints) {
        signals::end_with_reader();
    }
    logging::init(LogChange::default());
    let result = run(&cli);
    if let Some(conflict) = result.as_ref().err().and_then(|error| error.downcast_ref()) {
        end_by_conflict(conflict);
    }
    let result = result.and_then(|code| crate::sys::print::finish().map(|()| code).map_err(Into::into));
    let failure = result.as_ref().err().map(|error| {
        // A file of another format explains any error from reading it.
        let inputs = match &cli.command {
            Some(command) => command.inputs(),
            None => cli.boot.config.iter().map(|path| InputPath::new(path, Role::Config)).collect(),
        };
        let misused = inputs.iter().find_map(InputPath::misuse);
        told(error, misused.unwrap_or_else(|| chain(error.as_ref())))
    });
    crate::sys::print::end(failure.as_deref());
    result.unwrap_or_else(
        |error| {
            if error.is::<MemoryLost>() { ExitCode::from(lost::EXIT_CODE) } else { ExitCode::FAILURE }
        },
    )
}

/// Formats a failure for standard error: a sentence for people, or a [`FaultBody`] for the service.
fn told(error: &BoxError, fault_message: String) -> String {
    if std::env::var_os(FAULTS_VARIABLE).is_none_or(|format| format != "json") {
        return fault_message;
    }
    let code = match error.downcast_ref() {
        Some(session::Error::NoAnswer(_)) => Some(FaultCode::GuestTimeout),
        _ => FaultCode::of(error.as_ref()),
    };
    let body = FaultBody { fault_message, code };
    serde_json::to_string(&body).unwrap_or(body.fault_message)
}

fn run(cli: &Cli) -> Result<ExitCode, BoxError> {
    match &cli.command {
        None => vm::boot(&cli.boot.session, cli.boot.config.as_deref()),
        Some(Command::Restore(args)) => vm::restore(args),
        Some(Command::Rewind(args)) => rewind::run(args),
        Some(Command::Demote(args)) => demote::run(args),
        Some(Command::Barrier(args)) => barrier::run(args),
        Some(Command::Fork(args)) => fork::run(args),
        Some(Command::Repurpose(args)) => repurpose::run(args),
        Some(Command::Snapshot(args)) => snapshot::run(args),
        Some(Command::Inspect(args)) => inspect::run(args),
        Some(Command::Profile(args)) => profile::run(args),
        Some(Command::Calibrate(args)) => crate::bench::calibrate::run(args),
        Some(Command::Plan(args)) => plan::run(args),
        Some(Command::Pool(args)) => pool::run(args),
        Some(Command::ServePages(args)) => serve_pages::run(args),
        Some(Command::Guest(args)) => guest::run(args),
        Some(Command::Serve(args)) => serve::run(args),
        Some(Command::Token(args)) => token::run(args),
        Some(Command::Jail(args)) => jailer::run(args),
        Some(Command::Bench(args)) => crate::bench::run(args),
    }
}
