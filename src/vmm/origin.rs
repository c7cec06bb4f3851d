//! The origin of a restored machine: all that a rewind needs to bring it back there.

use std::path::{Path, PathBuf};

use super::saved_state::SavedState;
use crate::config::DeviceConfigs;
use crate::memory::fault_service::Observer;
use crate::memory::files::Files;

/// A drive of which the restore made a copy for this machine alone.
#[derive(Clone, Debug)]
pub(crate) struct PlacedDrive {
    pub id: String,
    pub path: PathBuf,
}

/// The snapshot that a machine was restored from, as the restore applied it.
pub(crate) struct Origin {
    /// The sources of guest memory.
    pub files: Files,
    pub saved: SavedState,
    /// The configs of the devices, with the overrides of the restore.
    pub configs: DeviceConfigs,
    pub placed_drives: Vec<PlacedDrive>,
    /// True: the guest's clock was moved to the present.
    pub clock_realtime: bool,
    pub serves: PageServer,
}

/// The owner of guest memory's page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageServer {
    /// The kernel, and this process's fault service.
    Own,
    /// A fault service that records each page that the guest uses.
    Recorder,
    /// A page-fault handler in another process.
    Handler,
}

impl PageServer {
    pub fn of(handler: Option<&Path>, observer: Option<&Observer>) -> PageServer {
        match (handler, observer) {
            (Some(_), _) => PageServer::Handler,
            (None, Some(_)) => PageServer::Recorder,
            (None, None) => PageServer::Own,
        }
    }
}
