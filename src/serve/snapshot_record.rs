//! The record of a snapshot.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fault::Fault;
use super::function::Function;
use crate::snapshot::{Location, derived_dir};

/// A stored snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct SnapshotRecord {
    #[serde(rename = "ssId")]
    pub(super) ss_id: String,
    /// The VM that it was taken of.
    #[serde(rename = "vmId")]
    pub(super) vm_id: String,
    /// `Full` or `Diff`.
    pub(super) snapshot_type: String,
    /// The snapshot that this diff builds on.
    pub(super) parent: Option<String>,
    /// True if it is full although a diff was asked for, because the chain had become long.
    #[serde(default)]
    pub(super) compacted: bool,
    /// The snapshot that it is a copy of.
    pub(super) copy_of: Option<String>,
    /// The identity that plans and profiles are bound to. Copies share it.
    pub(super) identity: String,
    /// Bytes of guest memory it holds.
    pub(super) memory_bytes: u64,
    /// Time for which the VM stood still, µs.
    pub(super) capture_us: u64,
    pub(super) created_unix_ms: u64,
    /// The drives that it contains copies of: each VM restored from it gets its own.
    #[serde(default)]
    pub(super) drive_copies: Vec<String>,
    /// The function at that time.
    pub(super) function: Function,
}

impl SnapshotRecord {
    /// Returns whether VMs restored from it get their own images.
    ///
    /// # Errors
    /// They would need images and the snapshot has none (it was taken by a daemon that took no copies): the guest would
    /// write to the function's image itself.
    pub(super) fn has_drive_copies(&self) -> Result<bool, Fault> {
        let has_copies = !self.drive_copies.is_empty();
        if self.function.writes_image() && !has_copies {
            return Err(Fault::conflict(format!(
                "Snapshot `{}` has no copy of the image that its guest writes to: take the snapshot again.",
                self.ss_id
            )));
        }
        Ok(has_copies)
    }
}

/// The directory of files derived from a snapshot.
pub(super) fn derived(dir: &Path) -> PathBuf {
    derived_dir(&Location::Dir(dir.to_owned()))
}
