//! The commands of the API, and the taking of a snapshot. `restore.rs` has the request that loads one.

use crate::config::fork::ForkRequest;
use crate::config::patch::{BalloonQuestion, DevicePatch};
use crate::config::refusal::Refused;
use crate::config::restore::RestoreRequest;
use crate::config::{
    BootSource, CpuConfig, DeviceConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig,
};
use crate::snapshot::{Bucket, SnapshotKind};
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
    /// Count touches of memory from now on. → [`Reply::Barrier`]
    Barrier(BarrierRequest),
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
    /// True: memory, vCPUs and devices are then compared with the snapshot; a difference ends the machine. `verify` is
    /// an older name of the same.
    #[serde(alias = "verify")]
    pub compare: bool,
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
    /// Most bytes of that file, MiB; pages beyond it stay in local memory, and the demotion ends. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_mib: Option<NonZeroU64>,
    /// Most memory given back per second, MiB: a slow demotion disturbs no neighbours. Default: as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_mib_s: Option<NonZeroU64>,
    /// The demotion ends when so many pages were given back, or a few more. Default: when there are no more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_pages: Option<NonZeroU64>,
    /// True: only pages that were not touched since the last barrier leave. The restore is the first barrier.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cold: bool,
    /// The buckets whose untouched pages leave. None: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buckets: Vec<Bucket>,
}

/// A request to a restored machine to count touches of its memory from now on: the body of `PUT /tvmm/barrier`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BarrierRequest {
    /// True: pages of files are unmapped, so that reads of them are seen until the next barrier.
    pub reads: bool,
    /// True: KVM logs writes, so that all of them are seen until the next barrier, not only the first to each page.
    pub writes: bool,
    /// True: the touches since the last barrier are told, and go on being counted from there.
    pub keep: bool,
}

impl BarrierRequest {
    /// Refuses settings that exclude each other.
    ///
    /// # Errors
    /// A barrier that stays is to see more.
    pub fn check(self) -> Result<(), Refused> {
        if self.keep && (self.reads || self.writes) {
            let both = "`reads` and `writes` are for a new barrier: leave them out, or leave out `keep`.";
            return Err(Refused::bad_request(both));
        }
        Ok(())
    }
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

/// The file to which pages are spilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpillTo<'a> {
    pub dir: &'a Path,
    /// The most bytes that it may have.
    pub bytes_max: u64,
}

impl DemoteRequest {
    /// The file to spill to, if pages are to be spilled.
    ///
    /// # Errors
    /// The directory is missing, or named although nothing is spilled.
    pub fn spill_to(&self) -> Result<Option<SpillTo<'_>>, Refused> {
        let useless = |key| {
            Err(Refused::bad_request(format!("`{key}` is for `\"to\": \"spilled\"`: say that, or leave it out.")))
        };
        match (self.to, &self.spill_dir, self.spill_mib) {
            (DemotedTo::Trimmed, None, None) => Ok(None),
            (DemotedTo::Trimmed, Some(_), _) => useless("spill_dir"),
            (DemotedTo::Trimmed, None, Some(_)) => useless("spill_mib"),
            (DemotedTo::Spilled, Some(dir), mib) => {
                let bytes_max = mib.map_or(u64::MAX, |mib| mib.get().saturating_mul(1 << 20));
                Ok(Some(SpillTo { dir, bytes_max }))
            }
            (DemotedTo::Spilled, None, _) => {
                Err(Refused::bad_request("Pages can only be spilled to a directory: name it in `spill_dir`."))
            }
        }
    }

    /// The buckets whose untouched pages leave; `None` if touched pages leave as well.
    ///
    /// # Errors
    /// Buckets are named although touched pages leave as well.
    pub fn cold_buckets(&self) -> Result<Option<&[Bucket]>, Refused> {
        match (self.cold, self.buckets.as_slice()) {
            (false, []) => Ok(None),
            (true, []) => Ok(Some(&Bucket::ALL)),
            (true, buckets) => Ok(Some(buckets)),
            (false, _) => Err(Refused::bad_request("`buckets` is for `\"cold\": true`: say that, or leave it out.")),
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
    /// True: a profile of the pages that the guest has used since its restore is written beside the snapshot.
    pub profile: bool,
}
