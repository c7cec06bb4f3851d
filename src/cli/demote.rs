//! `tvmm demote`: a restored VM gives local memory back to the host.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::units::{TIMEOUT, mib_of_pages, ms};
use crate::config::control::Demoted;
use crate::config::request::{DemoteRequest, DemotedTo};
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
pub struct DemoteArgs {
    /// The API socket of the VM, which was restored from a snapshot
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,
    /// The pages that leave local memory: those that equal the snapshot, or also those that differ from it
    #[arg(long, value_name = "STATE", default_value = "trimmed", requires_if("spilled", "spill_dir"))]
    to: State,
    /// The directory of the file that pages are spilled to. It has no name there, and ends with the VM
    #[arg(long, value_name = "DIR")]
    spill_dir: Option<PathBuf>,
    /// Most memory given back per second
    #[arg(long, value_name = "MIB")]
    rate: Option<NonZeroU64>,
    /// End when so many pages were given back, or a few more [default: when there are no more]
    #[arg(long, value_name = "N")]
    most_pages: Option<NonZeroU64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum State {
    Trimmed,
    Spilled,
}

pub fn run(args: &DemoteArgs) -> Result<ExitCode, BoxError> {
    let to = match args.to {
        State::Trimmed => DemotedTo::Trimmed,
        State::Spilled => DemotedTo::Spilled,
    };
    // The VM may have another working directory.
    let spill_dir = args.spill_dir.as_ref().map(std::path::absolute).transpose()?;
    let body = json!(DemoteRequest { to, spill_dir, rate_mib_s: args.rate, most_pages: args.most_pages });
    let (_, answer) = Client::new(&args.api_sock).request("PUT", "/tvmm/demote", Some(&body), TIMEOUT)?;
    let demoted: Demoted = serde_json::from_value(answer.unwrap_or_default())?;
    say!(
        "gave {:.1} MiB back in {:.2} ms ({} steps, longest pause {:.2} ms): {} pages dropped, {} mapped from their \
         files, {} spilled; kept: {} pages written, {} that nothing else can show; {} not looked at",
        mib_of_pages(demoted.pages_dropped + demoted.pages_mapped + demoted.pages_spilled),
        ms(demoted.total_us),
        demoted.steps,
        ms(demoted.longest_pause_us),
        demoted.pages_dropped,
        demoted.pages_mapped,
        demoted.pages_spilled,
        demoted.pages_written,
        demoted.pages_kept,
        demoted.pages_left,
    );
    Ok(ExitCode::SUCCESS)
}
