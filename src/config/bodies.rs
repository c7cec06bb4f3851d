//! Bodies of API requests that `tvmm serve` sends to its VMs: written once, so that both ends agree.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::snapshot::SnapshotKind;

/// The states that `PATCH /vm` brings a machine to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WantedState {
    Paused,
    Resumed,
}

/// The body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmBody {
    pub state: WantedState,
}

/// The actions of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    InstanceStart,
    SendCtrlAltDel,
    FlushMetrics,
}

/// The body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionBody {
    pub action_type: ActionType,
}

/// Fields of `PUT /snapshot/create` that Firecracker's body does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateExtension {
    /// Resume the machine afterwards.
    #[serde(default)]
    pub resume: bool,
    /// Copy the drives that the guest can write.
    #[serde(default)]
    pub copy_drives: bool,
    /// Answer only after the memory was read back from the disk and compared with what was written.
    #[serde(default)]
    pub verify: bool,
    /// Save a running machine while it runs: it stands still only for its state and the last pages.
    #[serde(default)]
    pub live: bool,
    /// Also write a profile of the pages that the guest has used since its restore, beside the snapshot.
    #[serde(default)]
    pub profile: bool,
}

/// The names of the kinds of snapshot in Firecracker's API.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SnapshotKind")]
enum SnapshotType {
    Full,
    Diff,
}

/// The body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateBody {
    pub snapshot_path: PathBuf,
    /// Required by Firecracker; here its absence means that `snapshot_path` is a snapshot directory.
    pub mem_file_path: Option<PathBuf>,
    #[serde(default, with = "SnapshotType")]
    pub snapshot_type: SnapshotKind,
    #[serde(default)]
    pub tvmm: CreateExtension,
}
