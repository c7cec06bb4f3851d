//! `tvmm repurpose`: makes a restored VM the VM of another snapshot, in place.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::failure::ArgumentConflict;
use super::identify::InputPath;
use super::overrides::OverrideArgs;
use crate::config::control::Repurposed;
use crate::config::restore::{MemorySaid, RestoreOptions, RestoreRequest};
use crate::config::{LoadFields, MemBackend, MemBackendType};
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
pub struct RepurposeArgs {
    /// The API socket of the VM, which was restored from a snapshot
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,
    /// The snapshot whose VM it becomes; memory size, vCPUs, CPUID and devices must be those of the VM
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// The memory file of the two-file form (`mem_file_path`)
    #[arg(long, value_name = "FILE")]
    mem_file: Option<PathBuf>,
    #[command(flatten)]
    options: RestoreOptions,
    /// Log the pages that the guest writes from now on, for diff snapshots; only for a VM that does so already
    #[arg(long)]
    track_dirty_pages: bool,
    /// Move the guest's clock to the present; default: no time has passed for the guest since the snapshot
    #[arg(long)]
    clock_realtime: bool,
    /// Leave the VM paused until the API resumes it
    #[arg(long, conflicts_with = "standby")]
    paused: bool,
    /// Let the VM run when a request comes: bytes on standard input, a connection to its vsock device, or `PATCH /vm`
    /// with the state Resumed
    #[arg(long)]
    standby: bool,
    /// Compare memory, vCPUs and devices with the snapshot afterwards; a difference ends the VM
    #[arg(long)]
    compare: bool,
    #[command(flatten)]
    overrides: OverrideArgs,
}

impl RepurposeArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        InputPath::snapshot(&self.snapshot, self.mem_file.as_deref())
    }

    /// The body of the request. The VM's current directory may be another, so all paths are made absolute.
    fn fields(&self) -> Result<LoadFields, BoxError> {
        let backend = |path: &PathBuf| -> std::io::Result<MemBackend> {
            Ok(MemBackend { backend_type: MemBackendType::File, backend_path: std::path::absolute(path)? })
        };
        let mut fields = LoadFields {
            snapshot_path: std::path::absolute(&self.snapshot)?,
            mem_backend: self.mem_file.as_ref().map(backend).transpose()?,
            track_dirty_pages: self.track_dirty_pages,
            clock_realtime: self.clock_realtime,
            resume_vm: !self.paused && !self.standby,
            tvmm: RestoreOptions { standby: self.standby, ..self.options.clone() },
            ..LoadFields::default()
        };
        fields.set_overrides(self.overrides.overrides());
        for named in fields.tvmm.files_mut() {
            *named.path = std::path::absolute(&*named.path)?;
        }
        if let Some(vsock) = &mut fields.vsock_override {
            vsock.uds_path = std::path::absolute(&vsock.uds_path)?;
        }
        Ok(fields)
    }
}

/// Longest wait for the answer: a source of memory may be slow, and the VM has a limit of its own.
const TIMEOUT: Duration = Duration::from_secs(600);

pub fn run(args: &RepurposeArgs) -> Result<ExitCode, BoxError> {
    // Refused here, where the options can be named by their flags.
    let said = match &args.mem_file {
        Some(path) => MemorySaid::File { path: path.clone(), key: "--mem-file" },
        None => MemorySaid::Nothing,
    };
    let conflict = |message| ArgumentConflict { command: "repurpose", message };
    RestoreRequest::new(args.snapshot.clone(), said, args.options.clone())
        .map_err(|invalid| conflict(invalid.in_flags()))?;
    let mut body = json!(args.fields()?);
    body["compare"] = json!(args.compare);
    let repurposed = ask(&args.api_sock, &body)?;
    let ms = |us: u64| us as f64 / 1000.0;
    say!(
        "snapshot {}: repurposed in {:.2} ms (vCPUs stopped in {:.2}, snapshot opened {:.2}, former guest taken away \
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

fn ask(socket: &Path, body: &serde_json::Value) -> Result<Repurposed, BoxError> {
    let (_, answer) = Client::new(socket).request("PUT", "/tvmm/repurpose", Some(body), TIMEOUT)?;
    Ok(serde_json::from_value(answer.unwrap_or_default())?)
}
