//! The load of one policy: what a replay and a simulation have in common.

use std::collections::BTreeMap;

use super::arrivals::Trace;
use super::outcome::Outcome;
use super::policy::Rules;
use super::workload::Workloads;

/// A trace, to be run by the rules of one policy.
#[derive(Clone, Copy)]
pub(super) struct Load<'a> {
    pub(super) trace: &'a Trace,
    pub(super) workloads: &'a Workloads,
    pub(super) rules: Rules,
    /// The trace runs so many times as fast as the clock; times of work are of the clock.
    pub(super) speed: f64,
}

impl Load<'_> {
    /// A moment of the trace on the real clock, µs since the start.
    pub(super) fn clock_us(&self, at_us: u64) -> f64 {
        at_us as f64 / self.speed
    }

    /// The end of the trace on the real clock, µs since the start.
    pub(super) fn end_us(&self) -> f64 {
        self.clock_us(self.trace.length_us)
    }

    /// An outcome without requests.
    pub(super) fn outcome(&self, is_simulated: bool) -> Outcome {
        Outcome {
            policy: self.rules.policy,
            is_simulated,
            requests: Vec::with_capacity(self.trace.arrivals.len()),
            replayed: Vec::new(),
            memory: Vec::new(),
            mean_local_mib: 0.0,
            mean_all_mib: None,
            mean_vms: 0.0,
            most_vms: 0,
            most_suspended: 0,
            pages: None,
            refused_steps: 0,
            repurposed: 0,
            reasons: BTreeMap::new(),
            other_cpus: None,
        }
    }
}
