//! The outcome of one policy, replayed or simulated, and its summary.

use std::collections::BTreeMap;

use serde::Serialize;

use super::arrivals::Arrival;
use super::policy::Policy;
use crate::snapshot::PAGE_SIZE;

/// A request that was sent later than this after its arrival, ms, is late: its load was not the trace's.
const LATE_MS: f64 = 20.0;

/// Bytes.
const MIB: f64 = (1 << 20) as f64;

/// The way by which a request got its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Way {
    /// A VM that waited after an earlier request, with all its memory.
    Warm,
    /// A VM that waited, and had given local copies back.
    Trimmed,
    /// A VM that waited, and whose written pages were in a file.
    Spilled,
    /// A VM that was suspended.
    Woken,
    /// A VM that stood by for its first request.
    Standby,
    /// A VM that stood by after a rewind.
    Rewound,
    /// A restore of a snapshot.
    Restored,
}

/// The end of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Request {
    /// Time from its arrival to its answer, of the real clock.
    pub(super) latency_ms: f64,
    /// Time from its arrival to its dispatch.
    pub(super) late_ms: f64,
    /// `None`: it has failed.
    pub(super) way: Option<Way>,
}

/// The arrival of a replayed request, and the life of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Replayed {
    pub(super) arrival: Arrival,
    /// The requests that its VM had answered before; `None`: it has failed.
    pub(super) vm_answered: Option<u32>,
}

/// The memory of all processes of the service at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sample {
    /// Time of the trace, s.
    pub(super) at_s: f64,
    /// Pages that no file backs, and page tables.
    pub(super) local_mib: f64,
    /// The same with the processes' parts of files; a simulator does not know them.
    pub(super) all_mib: Option<f64>,
    /// The VMs at that moment. Not each sample has them.
    pub(super) vms: Option<LivingVms>,
}

/// Numbers of VMs at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LivingVms {
    /// They have a process.
    pub(super) running: usize,
    pub(super) suspended: usize,
}

/// Pages of VMs that waited, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pages {
    /// Copies of pages that equal the snapshot, given back.
    pub(super) dropped: u64,
    /// Written pages that went to a file.
    pub(super) spilled: u64,
    /// Spilled pages that came back.
    pub(super) recalled: u64,
    /// Of these, those that came back with the very next request.
    pub(super) regretted: u64,
}

/// The outcome of a trace by one policy.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) policy: Policy,
    pub(super) is_simulated: bool,
    pub(super) requests: Vec<Request>,
    /// Of each request, in the same order. A simulator has none.
    pub(super) replayed: Vec<Replayed>,
    pub(super) memory: Vec<Sample>,
    /// Local memory, averaged over the time of the trace, MiB.
    pub(super) mean_local_mib: f64,
    /// The same with the processes' parts of files.
    pub(super) mean_all_mib: Option<f64>,
    /// VMs that have a process, averaged over the time of the trace, and the most at once.
    pub(super) mean_vms: f64,
    pub(super) most_vms: usize,
    /// The most suspended VMs at once.
    pub(super) most_suspended: usize,
    /// A simulator does not know them.
    pub(super) pages: Option<Pages>,
    /// Steps that VMs could not take.
    pub(super) refused_steps: u64,
    /// Restores in the process of a finished VM.
    pub(super) repurposed: u64,
    /// Failed requests by their reason.
    pub(super) reasons: BTreeMap<String, u64>,
    /// CPUs that other programs used just before the replay.
    pub(super) other_cpus: Option<f64>,
}

/// The numbers of an outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Summary {
    /// The name of the outcome in tables.
    #[serde(skip)]
    pub(super) title: String,
    pub(super) policy: String,
    pub(super) simulated: bool,
    pub(super) requests: usize,
    pub(super) failed: usize,
    pub(super) late: usize,
    pub(super) warm: usize,
    pub(super) trimmed: usize,
    pub(super) spilled: usize,
    pub(super) woken: usize,
    pub(super) standby: usize,
    pub(super) rewound: usize,
    /// Restores, those in the process of a finished VM included.
    pub(super) restored: usize,
    pub(super) repurposed: u64,
    pub(super) p50_ms: f64,
    pub(super) p95_ms: f64,
    pub(super) p99_ms: f64,
    pub(super) mean_local_mib: f64,
    pub(super) peak_local_mib: f64,
    /// With the processes' parts of files.
    pub(super) mean_all_mib: Option<f64>,
    pub(super) mean_vms: f64,
    pub(super) most_vms: usize,
    pub(super) most_suspended: usize,
    /// VMs with a process for each GiB of local memory, by the means.
    pub(super) vms_per_gib: f64,
    /// Memory of VMs that waited which was given back: copies that equal the snapshot, and pages that went to a file.
    pub(super) dropped_mib: Option<f64>,
    pub(super) spilled_mib: Option<f64>,
    /// Spilled memory that came back, and the part that the very next request brought back.
    pub(super) recalled_mib: Option<f64>,
    pub(super) regretted_mib: Option<f64>,
    pub(super) refused_steps: u64,
    /// CPUs that other programs used just before the replay.
    pub(super) other_cpus: Option<f64>,
}

impl Outcome {
    /// The name of the outcome: a simulation is told from a replay.
    pub(super) fn title(&self) -> String {
        if self.is_simulated { format!("{} (simulated)", self.policy) } else { self.policy.to_string() }
    }

    /// Latencies of the answered requests, ascending.
    pub(super) fn latencies(&self) -> Vec<f64> {
        let answered = self.requests.iter().filter(|request| request.way.is_some());
        let mut latencies: Vec<f64> = answered.map(|request| request.latency_ms).collect();
        latencies.sort_unstable_by(f64::total_cmp);
        latencies
    }

    /// `latencies`: those of the answered requests, ascending.
    pub(super) fn summary(&self, latencies: &[f64]) -> Summary {
        let mib = |pages: &dyn Fn(&Pages) -> u64| self.pages.map(|all| (pages(&all) * PAGE_SIZE) as f64 / MIB);
        let count = |way: Option<Way>| self.requests.iter().filter(|request| request.way == way).count();
        Summary {
            title: self.title(),
            policy: self.policy.to_string(),
            simulated: self.is_simulated,
            requests: self.requests.len(),
            failed: count(None),
            late: self.requests.iter().filter(|request| request.late_ms > LATE_MS).count(),
            warm: count(Some(Way::Warm)),
            trimmed: count(Some(Way::Trimmed)),
            spilled: count(Some(Way::Spilled)),
            woken: count(Some(Way::Woken)),
            standby: count(Some(Way::Standby)),
            rewound: count(Some(Way::Rewound)),
            restored: count(Some(Way::Restored)),
            repurposed: self.repurposed,
            p50_ms: rank(latencies, 0.5),
            p95_ms: rank(latencies, 0.95),
            p99_ms: rank(latencies, 0.99),
            mean_local_mib: self.mean_local_mib,
            peak_local_mib: self.memory.iter().map(|sample| sample.local_mib).fold(0.0, f64::max),
            mean_all_mib: self.mean_all_mib,
            mean_vms: self.mean_vms,
            most_vms: self.most_vms,
            most_suspended: self.most_suspended,
            vms_per_gib: if self.mean_local_mib > 0.0 { self.mean_vms / self.mean_local_mib * 1024.0 } else { 0.0 },
            dropped_mib: mib(&|pages| pages.dropped),
            spilled_mib: mib(&|pages| pages.spilled),
            recalled_mib: mib(&|pages| pages.recalled),
            regretted_mib: mib(&|pages| pages.regretted),
            refused_steps: self.refused_steps,
            other_cpus: self.other_cpus,
        }
    }
}

/// The number at a share of `sorted`, by nearest rank; 0 without numbers.
pub(super) fn rank(sorted: &[f64], share: f64) -> f64 {
    sorted.get(((sorted.len() as f64 * share).ceil() as usize).max(1) - 1).copied().unwrap_or_default()
}
