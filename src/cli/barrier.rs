//! `tvmm barrier`: tells which memory a restored VM has touched since the last barrier, and sets a new one.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::units::{TIMEOUT, ms};
use crate::config::control::BarrierSet;
use crate::config::request::BarrierRequest;
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
pub struct BarrierArgs {
    /// The API socket of the VM, which was restored from a snapshot
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,
    /// Unmap the pages of files, so that the next barrier tells which of them were read
    #[arg(long)]
    reads: bool,
    /// Let KVM log writes, so that the next barrier tells all pages that were written, not only those written first
    #[arg(long)]
    writes: bool,
    /// Tell the touches since the last barrier, which stays
    #[arg(long, conflicts_with_all = ["reads", "writes"])]
    keep: bool,
    /// Print the answer of the API as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &BarrierArgs) -> Result<ExitCode, BoxError> {
    let body = json!(BarrierRequest { reads: args.reads, writes: args.writes, keep: args.keep });
    let (_, answer) = Client::new(&args.api_sock).request("PUT", "/tvmm/barrier", Some(&body), TIMEOUT)?;
    let answer = answer.unwrap_or_default();
    if args.json {
        out!("{answer:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let set: BarrierSet = serde_json::from_value(answer)?;
    let buckets = [("runtime", set.buckets.runtime), ("init", set.buckets.init), ("execution", set.buckets.execution)];
    for (name, pages) in buckets {
        say!(
            "{name}: {} pages local; since the last barrier {} read, {} written, {} recalled; {} away",
            pages.local,
            pages.read,
            pages.written,
            pages.recalled,
            pages.away
        );
    }
    if args.keep {
        return Ok(ExitCode::SUCCESS);
    }
    say!(
        "set a barrier in {:.2} ms ({} steps, longest pause {:.2} ms), {} pages unmapped",
        ms(set.total_us),
        set.steps,
        ms(set.longest_pause_us),
        set.pages_unmapped
    );
    Ok(ExitCode::SUCCESS)
}
