//! `tvmm guest`: the built-in guest kernels as files.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use crate::config::guest;
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct GuestArgs {
    /// Write the ELF of the guest that boots by default to this file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the ELF of the guest with the twelve functions to this file
    #[arg(long, value_name = "FILE")]
    functions: Option<PathBuf>,
}

pub fn run(args: &GuestArgs) -> Result<ExitCode, BoxError> {
    for (path, elf) in [(&args.out, guest::ELF), (&args.functions, guest::FUNCTIONS_ELF)] {
        if let Some(path) = path {
            write(path, elf)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, elf: &[u8]) -> Result<(), BoxError> {
    std::fs::write(path, elf).map_err(|error| format!("Cannot write {}: {error}", path.display()))?;
    out!("{}: {} bytes", path.display(), elf.len());
    Ok(())
}
