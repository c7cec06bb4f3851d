//! The origin of a restored machine: all that a rewind needs to bring it back there.

use std::path::PathBuf;

use super::saved_state::SavedState;
use crate::config::DeviceConfigs;
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
    /// A page-fault handler in another process serves guest memory.
    pub is_served_outside: bool,
    /// The guest's use of its memory is recorded, page by page.
    pub is_observed: bool,
}
