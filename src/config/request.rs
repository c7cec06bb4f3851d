//! The commands of the API, and the taking of a snapshot. `restore.rs` has the request that loads one.

use crate::config::fork::ForkRequest;
use crate::config::patch::{BalloonQuestion, DevicePatch};
use crate::config::refusal::Refused;
use crate::config::restore::RestoreRequest;
use crate::config::{
    BootSource, CpuConfig, DeviceConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig,
};
use crate::snapshot::SnapshotKind;
use serde::{Deserialize, Serialize};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;
use utoipa::ToSchema;

/// Default limit of a guest's wait for a page.
pub const DEFAULT_FAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A command to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Identity and state. → [`Reply::InstanceInfo`]
    InstanceInfo,
    /// → [`Reply::Version`]
    Version,
    /// → [`Reply::MachineConfig`]
    GetMachineConfig,
    /// → [`Reply::VmConfig`]
    GetVmConfig,
    /// Replace the boot source. Already validated.
    PutBootSource(BootSource),
    /// Replace the shape of the machine. Already validated.
    PutMachineConfig(MachineConfig),
    /// Change the shape of the machine: see [`MachineConfig::patched`].
    PatchMachineConfig(MachineConfigPatch),
    /// Add a device to the machine that will boot, or replace the one with its id. Validated as part of the whole.
    PutDevice(DeviceConfig),
    /// Change a device of the running machine.
    PatchDevice(DevicePatch),
    /// Replace the CPU template.
    PutCpuConfig(CpuConfig),
    /// → [`Reply::Balloon`]
    AskBalloon(BalloonQuestion),
    /// Costs and time slices of the machine. → [`Reply::Report`]
    Report,
    /// Set up logging.
    PutLogger(LoggerConfig),
    /// Set up metrics.
    PutMetrics(MetricsConfig),
    /// Build the machine and let it run.
    InstanceStart,
    /// Press Ctrl+Alt+Del in the guest.
    SendCtrlAltDel,
    /// Write metrics now.
    FlushMetrics,
    /// Stop all vCPUs. Answered when they have stopped.
    Pause,
    /// Let all vCPUs run again.
    Resume,
    /// Save a paused machine. → [`Reply::Snapshot`]
    CreateSnapshot(CreateSnapshot),
    /// Become the machine of a snapshot.
    LoadSnapshot(Box<RestoreRequest>),
    /// Go back to the snapshot that the machine was restored from. → [`Reply::Rewound`]
    Rewind(RewindRequest),
    /// Make copies of the machine that run on from this instant. → [`Reply::Forked`]
    Fork(Box<ForkRequest>),
    /// Give local memory back to the host. → [`Reply::Demoted`]
    Demote(DemoteRequest),
    /// Give the guest's memory back to the host; only a repurposing follows.
    Vacate,
    /// Become the machine of another snapshot, in place. → [`Reply::Repurposed`]
    Repurpose(Box<RepurposeRequest>),
}

/// The location of a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotPaths {
    /// The snapshot directory, or, if `memory` is given, the file of the VM state.
    pub snapshot: PathBuf,
    /// The file of guest memory in Firecracker's two-file form; absent for a snapshot directory.
    pub memory: Option<PathBuf>,
}

/// A request to take a machine back to its snapshot: the body of `PUT /tvmm/rewind`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewindRequest {
    /// True: memory, vCPUs and devices are then compared with the snapshot; a difference ends the machine.
    pub verify: bool,
}

/// A request to a restored machine to give local memory back: the body of `PUT /tvmm/demote`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemoteRequest {
    #[serde(default)]
    pub to: DemotedTo,
    /// The directory of the file to which pages are spilled. The file has no name and ends with the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_dir: Option<PathBuf>,
    /// Most memory given back per second, MiB: a slow demotion disturbs no neighbours. Default: as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_mib_s: Option<NonZeroU64>,
    /// The demotion ends when so many pages were given back, or a few more. Default: when there are no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_pages: Option<NonZeroU64>,
}

/// The state to which a machine is demoted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DemotedTo {
    /// Copies of pages that equal the snapshot are given back.
    #[default]
    Trimmed,
    /// Also pages that differ: they go to a file.
    Spilled,
}

impl DemoteRequest {
    /// The directory to spill to, if pages are to be spilled.
    ///
    /// # Errors
    /// The directory is missing, or named although nothing is spilled.
    pub fn spill_to(&self) -> Result<Option<&Path>, Refused> {
        match (self.to, &self.spill_dir) {
            (DemotedTo::Trimmed, None) => Ok(None),
            (DemotedTo::Spilled, Some(dir)) => Ok(Some(dir)),
            (DemotedTo::Spilled, None) => {
                Err(Refused::bad_request("Pages can only be spilled to a directory: name it in `spill_dir`."))
            }
            (DemotedTo::Trimmed, Some(_)) => {
                Err(Refused::bad_request("`spill_dir` is for `\"to\": \"spilled\"`: say that, or leave it out."))
            }
        }
    }
}

/// A request to a restored machine to give its guest up: the body of `PUT /tvmm/vacate`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VacateRequest {}

/// A request to a restored machine to become that of another snapshot, in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepurposeRequest {
    pub load: RestoreRequest,
    /// True: memory, vCPUs and devices are then compared with the snapshot; a difference ends the machine.
    pub compare: bool,
    /// True: bytes of the console that the former guest has not taken, or that no reader has taken of it, are dropped.
    pub discard_console: bool,
}

/// A request to save a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSnapshot {
    /// The new snapshot's location.
    pub location: SnapshotPaths,
    /// The kind of the snapshot.
    pub kind: SnapshotKind,
    /// True: the machine runs on afterwards; false: it stays paused.
    pub resume: bool,
    /// True: the snapshot gets copies of the drives that the guest can write.
    pub copy_drives: bool,
    /// True: the answer comes only after the memory was read back from the disk and compared.
    pub verify: bool,
    /// True: a running machine is saved while it runs.
    pub live: bool,
}
