//! `tvmm snapshot`: asks a running VM to snapshot itself; `tvmm snapshot merge` flattens a chain, `sign` and `keygen`
//! sign snapshots.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::encrypt;
use super::identify::InputPath;
use super::merge;
use super::sign;
use super::units::mib;
use crate::sys::api_client::Client;
use crate::sys::errors::{BoxError, chain, refuse};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    command: Option<SnapshotCommand>,
    /// The API socket of the VM
    #[arg(long, required = true, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// The directory to make: it must not exist
    #[arg(long, required = true, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Only the pages changed since the VM's last snapshot, or since the one it was restored from
    #[arg(long)]
    diff: bool,
    /// Resume the VM afterwards; default: the VM stays paused
    #[arg(long, conflicts_with = "live")]
    resume: bool,
    /// Write memory while the VM runs: it stands still only for its state and the last pages, and runs on
    #[arg(long)]
    live: bool,
    /// Copy the drives that the guest can write (by reflink where the file system has it)
    #[arg(long)]
    copy_drives: bool,
    /// Return only after the memory was read back from the disk and compared with what was written; without it, the VM
    /// compares after this command has returned, and reports the outcome in `GET /tvmm/report`
    #[arg(long)]
    verify: bool,
    /// Also write a profile of the pages that the guest has used since its restore; a restore by it brings them ahead
    #[arg(long, conflicts_with = "live")]
    profile: bool,
    /// Print the answer of the API as JSON
    #[arg(long)]
    json: bool,
}

impl SnapshotArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        match &self.command {
            Some(SnapshotCommand::Merge(args)) => args.inputs(),
            Some(SnapshotCommand::Sign(args)) => args.inputs(),
            Some(SnapshotCommand::Encrypt(args)) => args.inputs(),
            Some(SnapshotCommand::Keygen(_)) | None => Vec::new(),
        }
    }
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Flatten a full snapshot and its diffs into one full snapshot
    Merge(merge::MergeArgs),
    /// Sign a snapshot, for restores that trust only some keys (docs/signatures.md)
    Sign(sign::SignArgs),
    /// Write an encrypted copy of a snapshot, for storage that others can read (docs/encryption.md)
    Encrypt(encrypt::EncryptArgs),
    /// Make a pair of keys in the format of minisign
    Keygen(sign::KeygenArgs),
}

/// Enough for reading and writing a large guest's memory and syncing it to a slow disk.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3600);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

pub fn run(args: &SnapshotArgs) -> Result<ExitCode, BoxError> {
    match (&args.command, &args.api_sock, &args.out) {
        (Some(SnapshotCommand::Merge(merge)), _, _) => merge::run(merge),
        (Some(SnapshotCommand::Sign(args)), _, _) => sign::run(args),
        (Some(SnapshotCommand::Encrypt(args)), _, _) => encrypt::run(args),
        (Some(SnapshotCommand::Keygen(args)), _, _) => sign::keygen(args),
        (None, Some(socket), Some(out)) => take(&Client::new(socket), args, out),
        _ => refuse("Give --api-sock and --out"),
    }
}

fn take(client: &Client, args: &SnapshotArgs, out: &std::path::Path) -> Result<ExitCode, BoxError> {
    // The VMM's current directory may be another.
    let out = std::path::absolute(out)?;
    let info = client.request("GET", "/", None, REQUEST_TIMEOUT)?.1.unwrap_or_default();
    let is_stopped_here = info["state"] == "Running" && !args.live;
    if is_stopped_here {
        client.request("PATCH", "/vm", Some(&json!({ "state": "Paused" })), REQUEST_TIMEOUT)?;
    }
    let body = json!({
        "snapshot_path": out,
        "snapshot_type": if args.diff { "Diff" } else { "Full" },
        "tvmm": { "resume": args.resume, "copy_drives": args.copy_drives, "verify": args.verify,
            "live": args.live, "profile": args.profile },
    });
    let taken = client.request("PUT", "/snapshot/create", Some(&body), SNAPSHOT_TIMEOUT);
    let taken = match taken {
        Ok((_, taken)) => taken.unwrap_or(Value::Null),
        Err(error) => {
            // A VM that ran before is resumed, whatever the outcome of its snapshot.
            let resumed = json!({ "state": "Resumed" });
            if is_stopped_here && let Err(also) = client.request("PATCH", "/vm", Some(&resumed), REQUEST_TIMEOUT) {
                return refuse(format!("{} Cannot resume the VM either: {}", chain(&error), chain(&also)));
            }
            return Err(error.into());
        }
    };
    if args.json {
        out!("{taken:#}");
        return Ok(ExitCode::SUCCESS);
    }
    out!("{}", out.display());
    if let (Some(id), Some(bytes)) = (taken["id"].as_str(), taken["memory_bytes"].as_u64()) {
        let stood = taken["capture_us"].as_u64().unwrap_or(0) as f64 / 1000.0;
        let mib = mib(bytes);
        say!("snapshot {}: {mib:.1} MiB of pages; the VM stood still for {stood:.1} ms", &id[..id.len().min(16)]);
        match taken["profile"].as_str() {
            Some(path) => say!("profile {path}"),
            None if args.profile => {
                say!(
                    "No profile was written: pages were copied before the guest ran, and not by a profile; or a few \
                     faults map the used pages, which is cheaper than to bring them ahead (docs/profiles.md)"
                )
            }
            None => {}
        }
        if taken["live"]["cut_short"] == true {
            let pages = taken["live"]["pages_paused"].as_u64().unwrap_or(0);
            say!("The guest writes memory faster than it is saved: {pages} pages were copied while the VM stood still");
        }
    }
    Ok(ExitCode::SUCCESS)
}
