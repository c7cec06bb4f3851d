//! `tvmm demote`: a restored VM gives local memory back to the host.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::units::{TIMEOUT, mib_of_pages, ms};
use crate::config::control::Demoted;
use crate::config::request::{DemoteRequest, DemotedTo};
use crate::snapshot::Bucket;
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
    /// Limit on the size of that file, MiB; pages beyond it stay in local memory. Default: no limit
    #[arg(long, value_name = "MIB", requires = "spill_dir")]
    spill_size: Option<NonZeroU64>,
    /// Most memory given back per second
    #[arg(long, value_name = "MIB")]
    rate: Option<NonZeroU64>,
    /// End when so many pages were given back, or a few more [default: when there are no more]
    #[arg(long, value_name = "N")]
    most_pages: Option<NonZeroU64>,
    /// Print the answer of the API as JSON
    #[arg(long)]
    json: bool,
    /// Only pages leave that were not touched since the last barrier (`tvmm barrier`); the restore is the first one
    #[arg(long)]
    cold: bool,
    /// The buckets whose untouched pages leave, separated by commas [default: all]
    #[arg(long, value_name = "BUCKET", value_delimiter = ',', requires = "cold")]
    buckets: Vec<BucketName>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum BucketName {
    /// Pages of the layers below the snapshot's own
    Runtime,
    /// Pages of the snapshot's own layer
    Init,
    /// Pages written since the restore
    Execution,
}

impl From<BucketName> for Bucket {
    fn from(name: BucketName) -> Bucket {
        match name {
            BucketName::Runtime => Bucket::Runtime,
            BucketName::Init => Bucket::Init,
            BucketName::Execution => Bucket::Execution,
        }
    }
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
    let buckets = args.buckets.iter().copied().map(Bucket::from).collect();
    let request = DemoteRequest {
        to,
        spill_dir,
        spill_mib: args.spill_size,
        rate_mib_s: args.rate,
        most_pages: args.most_pages,
        cold: args.cold,
        buckets,
    };
    let body = json!(request);
    let (_, answer) = Client::new(&args.api_sock).request("PUT", "/tvmm/demote", Some(&body), TIMEOUT)?;
    let answer = answer.unwrap_or_default();
    if args.json {
        out!("{answer:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let demoted: Demoted = serde_json::from_value(answer)?;
    say!(
        "gave {:.1} MiB back in {:.2} ms ({} steps, longest pause {:.2} ms): {} pages dropped, {} mapped from their \
         files, {} spilled{}; kept: {} pages written, {} that nothing else can show; {} not looked at{}",
        mib_of_pages(demoted.pages_dropped + demoted.pages_mapped + demoted.pages_spilled),
        ms(demoted.total_us),
        demoted.steps,
        ms(demoted.longest_pause_us),
        demoted.pages_dropped,
        demoted.pages_mapped,
        demoted.pages_spilled,
        if demoted.is_spill_full { ", and no more fit into the file (--spill-size)" } else { "" },
        demoted.pages_written,
        demoted.pages_kept,
        demoted.pages_left,
        if args.cold { format!(", {} touched or of other buckets", demoted.pages_skipped) } else { String::new() },
    );
    Ok(ExitCode::SUCCESS)
}
