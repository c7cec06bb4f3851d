//! The facts about a machine that its reports and metrics are made of.

use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::config::control::{BarrierSet, Demoted, Repurposed, Rewound};
use crate::config::fork::ForkCounts;
use crate::config::restore::{PlanFrom, RestoreRequest};
use crate::memory::ending::EndingSignal;
use crate::memory::engine::EngineReport;
use crate::memory::fault_batches::FaultBatch;
use crate::memory::fault_service::FaultCounts;
use crate::memory::guest_ram::GuestRam;
use crate::memory::spill::Spill;
use crate::session::Error;
use crate::snapshot::{Chain, ForkPoint, PAGE_SIZE, PolicyReason, RestorePlan};
use crate::sys::kvm_stats;
use crate::sys::kvm_stats::Translations;
use crate::sys::timeline::{Moments, Timeline};
use crate::tiering;
use crate::tiering::cold::ColdCounts;
use crate::tiering::costs::SourceCache;
use crate::tiering::fit::Fit;
use crate::tiering::plan_file::CostsUsed;
use crate::tiering::planner::{PlanOrigin, Planned};
use crate::tiering::pool::PoolTier;
use crate::tiering::profile::Profile;
use crate::tiering::tier::Tier;
use crate::vmm::devices::VirtioDevices;
use crate::vmm::exit_counters::ExitCounters;
use crate::vmm::machine::Machine;

/// The facts for a report, at the moment when they were taken.
pub struct Facts<'a> {
    /// `None` before there is a machine, and after its end.
    pub parts: Option<Parts<'a>>,
    /// `None` for a machine that was not restored.
    pub restored: Option<&'a Restored>,
    pub timeline: &'a Timeline,
    pub moments: &'a Moments,
    /// The outcomes of reading snapshots back.
    pub read_backs: serde_json::Value,
    /// The forks of the machine.
    pub forks: ForkCounts,
}

/// Facts about the restore, for the report.
#[derive(Clone, Debug)]
pub struct Restored {
    pub snapshot: String,
    pub policy: String,
    pub policy_reason: PolicyReason,
    pub plan: PlanOrigin,
    /// The page cache state that the plan assumes.
    pub source_cache: Option<SourceCache>,
    /// The cost numbers used for the plan, if its policy weighs any.
    pub costs: Option<CostsUsed>,
    /// The plan compared with the profile it was made from.
    pub fit: Option<Fit>,
    pub layers: usize,
    /// The pools that serve memory instead of the layers' files, by their names in the request.
    pub pools: Vec<PathBuf>,
    pub engine: EngineReport,
    /// The plan that was carried out.
    pub carried_out: RestorePlan,
    /// The profile that it was made from.
    pub profile: Option<PathBuf>,
    /// Limit on the pages that a rewind leaves in local memory: the budget of the restore.
    pub keep_pages: u64,
    /// The number of rewinds.
    pub rewinds: u64,
    pub last_rewind: Option<Rewound>,
    /// The number of demotions.
    pub demotions: u64,
    pub last_demotion: Option<Demoted>,
    /// The number of barriers.
    pub barriers: u64,
    pub last_barrier: Option<BarrierSet>,
    /// The number of times that the machine became another's.
    pub repurposed: u64,
    pub last_repurpose: Option<Repurposed>,
    /// The fork point that the machine was restored from, if it was forked: this keeps it from being swept.
    pub fork_point: Option<Arc<ForkPoint>>,
}

/// The snapshot that was opened for a restore.
pub struct Opened {
    snapshot: String,
    layers: usize,
    pools: Vec<PathBuf>,
    fork_point: Option<Arc<ForkPoint>>,
}

impl Opened {
    pub fn of(chain: &Chain, pools: &[Arc<PoolTier>], fork_point: Option<Arc<ForkPoint>>) -> Self {
        Opened {
            snapshot: chain.tip().manifest().id.to_string(),
            layers: chain.layers().len(),
            pools: pools.iter().map(|pool| pool.path().to_owned()).collect(),
            fork_point,
        }
    }
}

impl Restored {
    /// The facts about the restore that `load` asked for and `engine` has carried out.
    pub fn new(load: &RestoreRequest, planned: Planned, opened: Opened, engine: EngineReport) -> Self {
        let Planned { plan, origin, source_cache, costs, fit } = planned;
        Restored {
            snapshot: opened.snapshot,
            policy: plan.policy.clone(),
            policy_reason: load.plan.policy_reason(),
            plan: origin,
            source_cache,
            costs,
            fit,
            layers: opened.layers,
            pools: opened.pools,
            engine,
            carried_out: plan,
            profile: profile_of(load),
            keep_pages: keep_pages(load),
            rewinds: 0,
            last_rewind: None,
            demotions: 0,
            last_demotion: None,
            barriers: 0,
            last_barrier: None,
            repurposed: 0,
            last_repurpose: None,
            fork_point: opened.fork_point,
        }
    }

    /// Compares the plan that was carried out with the run of `profile`.
    ///
    /// # Errors
    /// [`tiering::Error::ProfileOfOther`] for a profile of another snapshot.
    pub fn fit_of(&self, profile: &Profile) -> Result<Fit, Error> {
        if self.carried_out.snapshot != profile.snapshot {
            let error = tiering::Error::ProfileOfOther { made_for: profile.snapshot, given: self.carried_out.snapshot };
            return Err(error.into());
        }
        Ok(Fit::of(&self.carried_out, profile))
    }
}

/// The profile by which `load` places memory.
fn profile_of(load: &RestoreRequest) -> Option<PathBuf> {
    match &load.plan {
        PlanFrom::Policy(choice) => choice.profile.clone().filter(|_| choice.policy().needs_profile()),
        PlanFrom::File(_) => None,
    }
}

/// The limit of `load` on the guest pages in local memory.
fn keep_pages(load: &RestoreRequest) -> u64 {
    let mib = match &load.plan {
        PlanFrom::Policy(choice) => choice.dram_mib,
        PlanFrom::File(_) => None,
    };
    mib.map_or(u64::MAX, |mib| (mib << 20) / PAGE_SIZE)
}

/// The parts that a machine has in every state.
pub struct Parts<'a> {
    pub ram: &'a GuestRam,
    pub ending: &'a Arc<EndingSignal>,
    pub msrs_refused: &'a [u32],
    pub faults: FaultCounts,
    pub fault_batches: Vec<FaultBatch>,
    /// Counts of the requests to the cold pool, if there is one.
    pub cold: Option<ColdCounts>,
    /// Pages that have left local memory for a file.
    pub spill: Option<&'a Spill>,
    /// The share of memory that has been compared with the snapshot's checksums; null if this process does not compare.
    pub verification: serde_json::Value,
    /// True if the kernel maps only pages that were touched.
    pub single_pages: bool,
    pub virtio: &'a VirtioDevices,
    counters: &'a ExitCounters,
    vm: &'a VmFd,
}

impl<'a> Parts<'a> {
    /// KVM's counts of mapped pages; `None` on kernels without them.
    pub fn translations(&self) -> Result<Option<Translations>, Error> {
        kvm_stats::translations(self.vm).map_err(Error::os("read KVM's statistics"))
    }

    pub fn of<S>(machine: &'a Machine<S>) -> Self {
        Parts {
            ram: machine.ram(),
            ending: machine.ending(),
            msrs_refused: machine.msrs_refused(),
            faults: machine.fault_counts(),
            fault_batches: machine.fault_batches(),
            cold: machine.services().cold_counts(),
            spill: machine.services().spill(),
            verification: machine.verification(),
            single_pages: machine.maps_single_pages(),
            virtio: machine.virtio(),
            counters: machine.counters(),
            vm: machine.vm(),
        }
    }

    pub fn counters_json(&self) -> serde_json::Value {
        self.counters.json()
    }
}
