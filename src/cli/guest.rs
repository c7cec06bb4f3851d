//! `tvmm guest`: the built-in guest kernel as a file.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::BoxError;
use crate::vmm::guest;

#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Where to write the ELF
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn run(args: &GuestArgs) -> Result<ExitCode, BoxError> {
    std::fs::write(&args.out, guest::ELF).map_err(|error| format!("Cannot write {}: {error}", args.out.display()))?;
    println!("{}: {} bytes", args.out.display(), guest::ELF.len());
    Ok(ExitCode::SUCCESS)
}
