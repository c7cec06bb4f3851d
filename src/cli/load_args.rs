//! The arguments of a load, which `tvmm restore` and `tvmm repurpose` share.

use std::path::PathBuf;

use clap::Args;

use super::identify::{InputPath, Role};
use super::overrides::OverrideArgs;
use crate::config::InvalidRestore;
use crate::config::restore::{MemorySaid, RestoreOptions, RestoreRequest, Start};
use crate::snapshot::ColdSpec;

/// The snapshot, the sources of its memory, and the settings of the VM.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The snapshot: a directory that `tvmm snapshot` made, or with --mem-file the state file of Firecracker's two
    #[arg(long, value_name = "DIR")]
    pub snapshot: PathBuf,
    /// The memory file of the two-file form (`mem_file_path`)
    #[arg(long, value_name = "FILE")]
    pub mem_file: Option<PathBuf>,
    #[command(flatten)]
    pub options: RestoreOptions,
    /// Log the pages that the guest writes from now on, for diff snapshots
    #[arg(long)]
    pub track_dirty_pages: bool,
    /// Move the guest's clock to the present; default: no time has passed for the guest since the snapshot
    #[arg(long)]
    pub clock_realtime: bool,
    /// Leave the VM paused until the API resumes it
    #[arg(long, conflicts_with = "standby")]
    pub paused: bool,
    /// Do everything but the guest's first instruction, and let it run when a request comes: bytes on standard input, a
    /// connection to its vsock device, or `PATCH /vm` with the state Resumed
    #[arg(long)]
    pub standby: bool,
    #[command(flatten)]
    pub overrides: OverrideArgs,
}

impl LoadArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        let options = &self.options;
        let profiles = options.profile.iter().map(|path| InputPath::new(path, Role::Profile));
        let plans = options.plan.iter().map(|path| InputPath::new(path, Role::Plan));
        let cold = options.cold_pools.iter().flatten().filter_map(ColdSpec::dir);
        let pools = options.pools.iter().flatten().map(PathBuf::as_path).chain(cold);
        let pools = pools.map(|path| InputPath::new(path, Role::Pool));
        let mut inputs = InputPath::snapshot(&self.snapshot, self.mem_file.as_deref());
        inputs.extend(profiles.chain(plans).chain(pools));
        inputs
    }

    /// The options in the keys of a request.
    pub fn options(&self) -> RestoreOptions {
        RestoreOptions { standby: self.standby, ..self.options.clone() }
    }

    /// The request that the arguments make.
    pub fn request(&self) -> Result<RestoreRequest, InvalidRestore> {
        let memory = match &self.mem_file {
            Some(path) => MemorySaid::File { path: path.clone(), key: "--mem-file" },
            None => MemorySaid::Nothing,
        };
        let request = RestoreRequest::new(self.snapshot.clone(), memory, self.options())?;
        Ok(RestoreRequest {
            overrides: self.overrides.overrides(),
            track_dirty_pages: self.track_dirty_pages,
            clock_realtime: self.clock_realtime,
            start: if self.paused || self.standby { request.start } else { Start::Running },
            ..request
        })
    }
}
