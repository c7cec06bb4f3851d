//! `tvmm repurpose`: makes a restored VM the VM of another snapshot, in place.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::failure::ArgumentConflict;
use super::identify::InputPath;
use super::load_args::LoadArgs;
use super::units::{TIMEOUT, ms};
use crate::config::control::Repurposed;
use crate::config::{InvalidRestore, LoadFields, MemBackend, MemBackendType};
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

const SNAPSHOT_HELP: &str =
    "The snapshot whose VM it becomes; memory size, vCPUs, CPUID and devices must be those of the VM";
const TRACK_HELP: &str =
    "Log the pages that the guest writes from now on, for diff snapshots; only for a VM that does so already";

#[derive(Debug, Args)]
#[command(
    mut_arg("snapshot", |snapshot| snapshot.help(SNAPSHOT_HELP)),
    mut_arg("track_dirty_pages", |track| track.help(TRACK_HELP))
)]
pub struct RepurposeArgs {
    /// The API socket of the VM, which was restored from a snapshot
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,
    #[command(flatten)]
    load: LoadArgs,
    /// Compare memory, vCPUs and devices with the snapshot afterwards; a difference ends the VM
    #[arg(long)]
    compare: bool,
    /// Drop input that the former guest has not taken and output of it that waits for its reader; default: the next
    /// guest gets the input, and the output is written first
    #[arg(long)]
    discard_console: bool,
    /// Print the answer of the API as JSON
    #[arg(long)]
    json: bool,
}

impl RepurposeArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        self.load.inputs()
    }

    /// The body of the request. The VM's current directory may be another, so all paths are made absolute.
    fn fields(&self) -> Result<LoadFields, BoxError> {
        let load = &self.load;
        let backend = |path: &PathBuf| -> std::io::Result<MemBackend> {
            Ok(MemBackend { backend_type: MemBackendType::File, backend_path: std::path::absolute(path)? })
        };
        let mut fields = LoadFields {
            snapshot_path: std::path::absolute(&load.snapshot)?,
            mem_backend: load.mem_file.as_ref().map(backend).transpose()?,
            track_dirty_pages: load.track_dirty_pages,
            clock_realtime: load.clock_realtime,
            resume_vm: !load.paused && !load.standby,
            tvmm: load.options(),
            ..LoadFields::default()
        };
        fields.set_overrides(load.overrides.overrides());
        for named in fields.tvmm.files_mut() {
            *named.path = std::path::absolute(&*named.path)?;
        }
        if let Some(vsock) = &mut fields.vsock_override {
            vsock.uds_path = std::path::absolute(&vsock.uds_path)?;
        }
        Ok(fields)
    }
}

pub fn run(args: &RepurposeArgs) -> Result<ExitCode, BoxError> {
    // Refused here, where the options can be named by their flags.
    let conflict = |invalid: InvalidRestore| ArgumentConflict { command: "repurpose", message: invalid.in_flags() };
    args.load.request().map_err(conflict)?;
    let mut body = json!(args.fields()?);
    body["compare"] = json!(args.compare);
    body["discard_console"] = json!(args.discard_console);
    let (_, answer) = Client::new(&args.api_sock).request("PUT", "/tvmm/repurpose", Some(&body), TIMEOUT)?;
    let answer = answer.unwrap_or_default();
    if args.json {
        out!("{answer:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let repurposed: Repurposed = serde_json::from_value(answer)?;
    say!(
        "snapshot {}: repurposed in {:.2} ms (vCPUs stopped in {:.2}, snapshot opened {:.2}, former guest ended \
         {:.2}, memory {:.2}, state {:.2}){}",
        repurposed.snapshot.get(..16).unwrap_or(&repurposed.snapshot),
        ms(repurposed.total_us),
        ms(repurposed.stop_us),
        ms(repurposed.prepare_us),
        ms(repurposed.release_us),
        ms(repurposed.memory_us),
        ms(repurposed.state_us),
        if args.compare { "; the VM equals its snapshot" } else { "" }
    );
    Ok(ExitCode::SUCCESS)
}
