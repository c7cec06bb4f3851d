//! The commands of the API, and how a snapshot is taken. `restore.rs` says how one is loaded.

use crate::config::patch::{BalloonQuestion, DevicePatch};
use crate::config::restore::RestoreRequest;
use crate::config::{
    BootSource, CpuConfig, DeviceConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// How long a guest may wait for a page when nobody says otherwise.
pub const DEFAULT_FAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Who are you and what do you do? → [`Reply::InstanceInfo`]
    InstanceInfo,
    /// → [`Reply::Version`]
    Version,
    /// → [`Reply::MachineConfig`]
    GetMachineConfig,
    /// → [`Reply::VmConfig`]
    GetVmConfig,
    /// Replace what the guest boots. Already validated.
    PutBootSource(BootSource),
    /// Replace the shape of the machine. Already validated.
    PutMachineConfig(MachineConfig),
    /// Change the shape of the machine: see [`MachineConfig::patched`].
    PatchMachineConfig(MachineConfigPatch),
    /// Add a device to the machine that will boot, or replace the one with its id. Validated as part of the whole.
    PutDevice(DeviceConfig),
    /// Change a device of the machine that runs.
    PatchDevice(DevicePatch),
    /// Replace the CPU template.
    PutCpuConfig(CpuConfig),
    /// → [`Reply::Balloon`]
    AskBalloon(BalloonQuestion),
    /// What the machine costs and where its time went. → [`Reply::Report`]
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
}

/// Where a snapshot is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotPaths {
    /// The snapshot directory, or, if `memory` is given, the file of the VM state.
    pub snapshot: PathBuf,
    /// The file of guest memory in Firecracker's two-file form; absent for a snapshot directory.
    pub memory: Option<PathBuf>,
}

/// Which pages a snapshot holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotKind {
    /// All pages that are not zero.
    #[default]
    Full,
    /// The pages changed since the snapshot before.
    Diff,
}

/// How to save a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSnapshot {
    /// Where to.
    pub location: SnapshotPaths,
    /// Which pages.
    pub kind: SnapshotKind,
    /// Whether the machine runs on afterwards; if not it stays paused.
    pub resume: bool,
    /// Whether the snapshot takes copies of the drives that the guest can write.
    pub copy_drives: bool,
    /// Whether the answer waits until the memory was read back from the disk and compared.
    pub verify: bool,
}
