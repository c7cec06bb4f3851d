//! `tvmm rewind`: takes a restored VM back to its snapshot, in place.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::units::{TIMEOUT, ms};
use crate::config::control::Rewound;
use crate::config::request::RewindRequest;
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
pub struct RewindArgs {
    /// The API socket of the VM, which was restored from a snapshot
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,
    /// Compare memory, vCPUs and devices with the snapshot afterwards; a difference ends the VM
    #[arg(long, alias = "verify")]
    compare: bool,
    /// Print the answer of the API as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: &RewindArgs) -> Result<ExitCode, BoxError> {
    let body = json!(RewindRequest { compare: args.compare });
    let (_, answer) = Client::new(&args.api_sock).request("PUT", "/tvmm/rewind", Some(&body), TIMEOUT)?;
    let answer = answer.unwrap_or_default();
    if args.json {
        out!("{answer:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let rewound: Rewound = serde_json::from_value(answer)?;
    say!(
        "rewound in {:.2} ms (vCPUs stopped in {:.2}, state {:.2}, memory {:.2}): {} pages copied, {} cleared, {} \
         dropped, {} back from the balloon{}",
        ms(rewound.total_us),
        ms(rewound.stop_us),
        ms(rewound.state_us),
        ms(rewound.memory_us),
        rewound.pages_copied,
        rewound.pages_cleared,
        rewound.pages_dropped,
        rewound.pages_returned,
        if args.compare { "; the VM equals its snapshot" } else { "" }
    );
    Ok(ExitCode::SUCCESS)
}
