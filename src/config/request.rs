//! What can be asked of a VM: the commands of the API, and how a snapshot is taken or loaded.

use crate::config::overrides::Overrides;
use crate::config::patch::{BalloonQuestion, DevicePatch};
use crate::config::{
    BootSource, CpuConfig, DeviceConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig,
};
use crate::snapshot::{InPlaceMapping, Verify};
use std::path::PathBuf;
use std::time::Duration;

/// How long a guest may wait for a page when nobody says otherwise.
pub const DEFAULT_FAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// The restore policy when none is asked for.
pub const DEFAULT_POLICY: &str = "firecracker";

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
    LoadSnapshot(Box<LoadSnapshot>),
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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

/// How to restore a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Where from.
    pub location: SnapshotPaths,
    /// The name of the restore policy.
    pub policy: String,
    /// The profile the policy works from.
    pub profile: Option<PathBuf>,
    /// A plan made before (`tvmm plan --out`), instead of a policy's.
    pub plan: Option<PathBuf>,
    /// Where plans and working-set images are kept, instead of beside the snapshot.
    pub plan_dir: Option<PathBuf>,
    /// What things cost on this host, instead of the last calibration or the built-in numbers.
    pub costs: Option<PathBuf>,
    /// The most local memory a plan may use, MiB.
    pub dram_mib: Option<u64>,
    /// The most memory of the CXL tier a plan may use, MiB.
    pub cxl_mib: Option<u64>,
    /// µs that a request may take longer to save a MiB of local memory; if it is not said, what the policy takes by default.
    pub dram_price_us: Option<u64>,
    /// How pages in place are mapped.
    pub in_place_mapping: InPlaceMapping,
    /// When the memory is compared with the snapshot's checksums.
    pub verify: Verify,
    /// Cold pools that hold the snapshot's memory, nearest first: the memory files are not read then.
    pub cold: ColdPools,
    /// Pools to take guest memory from instead of the snapshot's files, in order of preference.
    pub pools: Vec<PathBuf>,
    /// The socket of a page-fault handler outside that serves guest memory instead of any policy.
    pub handler: Option<PathBuf>,
    /// What this clone's devices are to have on the host's side.
    pub overrides: Overrides,
    /// Whether KVM logs the pages the guest writes from now on.
    pub track_dirty_pages: bool,
    /// Whether the guest's clock goes on to the present; if not, no time has passed for it.
    pub clock_realtime: bool,
    /// Whether the machine runs afterwards; if not it is paused.
    pub resume: bool,
}

/// The cold pools of a restore, nearest first, and where what comes from other hosts is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColdPools {
    pub pools: Vec<String>,
    pub cache: Option<PathBuf>,
    /// The most the cache may hold, MiB.
    pub cache_mib: Option<u64>,
}
