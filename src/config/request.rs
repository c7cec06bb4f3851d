//! The commands of the API, and the taking of a snapshot. `restore.rs` has the request that loads one.

use crate::config::fork::ForkRequest;
use crate::config::patch::{BalloonQuestion, DevicePatch};
use crate::config::restore::RestoreRequest;
use crate::config::{
    BootSource, CpuConfig, DeviceConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig,
};
use crate::snapshot::SnapshotKind;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
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

/// A request to a restored machine to become that of another snapshot, in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepurposeRequest {
    pub load: RestoreRequest,
    /// True: memory, vCPUs and devices are then compared with the snapshot; a difference ends the machine.
    pub compare: bool,
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
