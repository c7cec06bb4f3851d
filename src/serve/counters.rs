//! Counts of events, as Prometheus' text format shows them.

use std::fmt::Write;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::snapshot::CopyMethod;
use crate::tiering::idle::Step;

/// Upper ends of the histogram's buckets, s.
const BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, f64::INFINITY];

/// The origin of an invocation's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// It ran already.
    Vm,
    /// It was restored.
    Snapshot,
    /// It was booted.
    Boot,
    /// It was restored to be recorded.
    Recording,
    /// It stood by.
    Standby,
    /// It was idle, and parked.
    Parked,
    /// It was idle, parked, and had given local copies back.
    Trimmed,
    /// It was idle, and its written pages were in a file.
    Spilled,
    /// It was suspended.
    Suspended,
}

impl Origin {
    const ALL: [Origin; 9] = [
        Origin::Vm,
        Origin::Snapshot,
        Origin::Boot,
        Origin::Recording,
        Origin::Standby,
        Origin::Parked,
        Origin::Trimmed,
        Origin::Spilled,
        Origin::Suspended,
    ];

    /// The origin of an idle VM that was taken back from a step.
    pub(super) fn of_idle(step: Option<Step>) -> Origin {
        match step {
            None => Origin::Vm,
            Some(Step::Parked) => Origin::Parked,
            Some(Step::Trimmed) => Origin::Trimmed,
            Some(Step::Spilled) => Origin::Spilled,
            Some(Step::Suspended) => Origin::Suspended,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Origin::Vm => "vm",
            Origin::Snapshot => "snapshot",
            Origin::Boot => "boot",
            Origin::Recording => "recording",
            Origin::Standby => "standby",
            Origin::Parked => Step::Parked.name(),
            Origin::Trimmed => Step::Trimmed.name(),
            Origin::Spilled => Step::Spilled.name(),
            Origin::Suspended => Step::Suspended.name(),
        }
    }

    /// Returns whether the VM was restored for the invocation, then or ahead.
    pub(super) fn is_restore(self) -> bool {
        matches!(self, Origin::Snapshot | Origin::Standby | Origin::Suspended)
    }
}

/// The end of a rewind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RewindEnd {
    /// The VM is its snapshot again.
    Done,
    /// The VM cannot go back, and is as it was.
    Refused,
    /// The VM has ended.
    Failed,
}

impl RewindEnd {
    const ALL: [RewindEnd; 3] = [RewindEnd::Done, RewindEnd::Refused, RewindEnd::Failed];

    fn name(self) -> &'static str {
        match self {
            RewindEnd::Done => "done",
            RewindEnd::Refused => "refused",
            RewindEnd::Failed => "failed",
        }
    }
}

#[derive(Debug, Default)]
struct Histogram {
    counts: [AtomicU64; BUCKETS.len()],
    sum_us: AtomicU64,
}

/// Counts of events since the daemon began.
#[derive(Debug, Default)]
pub(super) struct Counters {
    durations: [Histogram; Origin::ALL.len()],
    /// Invocations by status.
    statuses: Mutex<std::collections::BTreeMap<u16, u64>>,
    pub(super) vms_started: AtomicU64,
    pub(super) vms_killed: AtomicU64,
    /// Forks, each of any number of VMs.
    pub(super) vms_forked: AtomicU64,
    pub(super) snapshots_made: AtomicU64,
    pub(super) snapshots_compacted: AtomicU64,
    pub(super) connections_refused: AtomicU64,
    /// Rewinds of VMs, by [`RewindEnd`].
    rewinds: [AtomicU64; RewindEnd::ALL.len()],
    /// Drives copied for VMs, by [`CopyMethod`].
    drive_copies: [AtomicU64; CopyMethod::ALL.len()],
}

impl Counters {
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a successful answer after `us`.
    pub(super) fn took(&self, origin: Origin, us: u64) {
        let histogram = &self.durations[origin as usize];
        let bucket = BUCKETS.iter().position(|&end| us as f64 / 1e6 <= end).unwrap_or(BUCKETS.len() - 1);
        Counters::count(&histogram.counts[bucket]);
        histogram.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// Counts an answer with this status.
    pub(super) fn answered(&self, status: u16) {
        *self.statuses.lock().unwrap_or_else(PoisonError::into_inner).entry(status).or_default() += 1;
    }

    /// Counts a rewind.
    pub(super) fn rewound(&self, end: RewindEnd) {
        Counters::count(&self.rewinds[end as usize]);
    }

    /// Counts a VM's own image.
    pub(super) fn copied_drive(&self, method: &str) {
        let methods = CopyMethod::ALL.iter().zip(&self.drive_copies);
        methods.filter(|(known, _)| known.name() == method).for_each(|(_, counter)| Counters::count(counter));
    }

    /// Appends all counters.
    pub(super) fn write(&self, text: &mut String) -> std::fmt::Result {
        head(text, "tvmm_invocations_total", "counter", "Invocations answered, by HTTP status")?;
        for (status, count) in self.statuses.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            writeln!(text, "tvmm_invocations_total{{status=\"{status}\"}} {count}")?;
        }
        let name = "tvmm_invocation_duration_seconds";
        head(
            text,
            name,
            "histogram",
            "Request to answer of invocations that were answered well, by origin of their VM",
        )?;
        for origin in Origin::ALL {
            let histogram = &self.durations[origin as usize];
            let origin = origin.name();
            let mut sum = 0;
            for (end, count) in BUCKETS.iter().zip(&histogram.counts) {
                sum += count.load(Ordering::Relaxed);
                let end = if end.is_finite() { end.to_string() } else { "+Inf".into() };
                writeln!(text, "{name}_bucket{{origin=\"{origin}\",le=\"{end}\"}} {sum}")?;
            }
            let seconds = histogram.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
            writeln!(text, "{name}_sum{{origin=\"{origin}\"}} {seconds}")?;
            writeln!(text, "{name}_count{{origin=\"{origin}\"}} {sum}")?;
        }
        head(text, "tvmm_drive_copies_total", "counter", "Drives copied for a VM, by how")?;
        for (method, counter) in CopyMethod::ALL.iter().zip(&self.drive_copies) {
            let method = method.name();
            let count = counter.load(Ordering::Relaxed);
            writeln!(text, "tvmm_drive_copies_total{{method=\"{method}\"}} {count}")?;
        }
        head(text, "tvmm_rewinds_total", "counter", "Rewinds of VMs to their snapshots, by their end")?;
        for end in RewindEnd::ALL {
            let count = self.rewinds[end as usize].load(Ordering::Relaxed);
            writeln!(text, "tvmm_rewinds_total{{end=\"{}\"}} {count}", end.name())?;
        }
        for (name, what, counter) in [
            ("tvmm_vms_started_total", "VMs booted or restored", &self.vms_started),
            ("tvmm_vms_killed_total", "VMs ended because of what their guest did or did not do", &self.vms_killed),
            ("tvmm_forks_total", "Forks of VMs", &self.vms_forked),
            ("tvmm_snapshots_made_total", "Snapshots taken", &self.snapshots_made),
            (
                "tvmm_snapshots_compacted_total",
                "Full snapshots taken in place of diffs on long chains",
                &self.snapshots_compacted,
            ),
            ("tvmm_connections_refused_total", "Connections turned away", &self.connections_refused),
        ] {
            head(text, name, "counter", what)?;
            writeln!(text, "{name} {}", counter.load(Ordering::Relaxed))?;
        }
        Ok(())
    }
}

/// Appends the lines that introduce a metric.
pub(super) fn head(text: &mut String, name: &str, kind: &str, help: &str) -> std::fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}")
}
