//! The same trace without VMs: requests take the times, and VMs the memory, that a calibration has measured.
//!
//! The service is modelled as docs/trace.md describes it: turns, room, kept processes, VMs that stand by. Work shares
//! the CPUs evenly, and all of it is taken to be work of CPUs.

mod fleet;
mod jobs;
mod meter;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use super::arrivals::{Arrival, Trace};
use super::costs::{Costs, StepCosts, WorkloadCosts};
use super::outcome::{Outcome, Request, Way};
use super::policy::{Fate, Processes, Rules};
use super::service::Limits;
use super::workload::Workloads;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::{IdleAction, IdleRule, ReuseIntervals, Step};
use fleet::{Fleet, State, VmId};
use jobs::{Job, Jobs};
use meter::{Integral, Meter};

/// Time for which the service keeps the process of a finished VM, µs of the real clock (docs/serve.md).
const KEPT_US: u64 = 1_000_000;
/// The most processes that it keeps.
const MAX_KEPT: usize = 8;
/// Requests that wait for a turn; more are refused.
const MAX_QUEUE: usize = 1024;

/// A simulation of one policy.
pub(super) struct Simulation<'a> {
    pub(super) trace: &'a Trace,
    pub(super) workloads: &'a Workloads,
    pub(super) costs: &'a Costs,
    pub(super) rules: Rules,
    pub(super) limits: Limits,
    pub(super) cpus: usize,
    /// The trace runs so many times as fast as the clock; times of work are of the clock.
    pub(super) speed: f64,
}

/// A request that waits for its turn.
#[derive(Clone, Copy)]
struct Asked {
    function: u32,
    at_us: f64,
}

/// The way to a place for a VM.
enum Place {
    Free,
    /// The process of a finished VM comes with it.
    Process,
    /// Another VM ends first; this is its work, ms.
    After(f64),
}

/// The state of a simulation.
struct Run<'a> {
    sim: &'a Simulation<'a>,
    costs: Vec<&'a WorkloadCosts>,
    fleet: Fleet,
    jobs: Jobs,
    meter: Integral,
    /// When VMs that wait take their steps.
    idle: Option<IdleRule>,
    /// Pauses between requests, by function.
    pauses: Vec<ReuseIntervals>,
    queue: VecDeque<Asked>,
    /// Turns that are taken.
    running: usize,
    is_refilling: bool,
    /// Functions whose sets may lack VMs.
    lacking: BTreeSet<u32>,
    /// Moments at which VMs that wait take a step, and kept processes end, unless they are used before.
    timers: BinaryHeap<Reverse<(u64, VmId)>>,
    outcome: Outcome,
}

impl Simulation<'_> {
    /// # Errors
    /// The costs lack something that the policy needs.
    pub(super) fn run(&self) -> Result<Outcome, BoxError> {
        let costs = self.costs.of(self.workloads)?;
        let shares = self.rules.processes == Processes::Shared;
        if shares && costs.iter().any(|costs| costs.repurposed_ms.is_none()) {
            return refuse(format!(
                "Cannot simulate policy {}: the costs have no `repurposed_ms`, because no process was taken over when \
                 they were measured. Replay the trace again",
                self.rules.policy
            ));
        }
        let outcome = Outcome {
            policy: self.rules.policy,
            is_simulated: true,
            requests: Vec::with_capacity(self.trace.arrivals.len()),
            memory: Vec::new(),
            mean_local_mib: 0.0,
            mean_all_mib: None,
            repurposed: 0,
            reasons: BTreeMap::new(),
            other_cpus: None,
        };
        let end_us = self.clock_us(self.trace.length_us);
        let mut run = Run {
            sim: self,
            fleet: Fleet::new(costs.len(), self.limits),
            costs,
            jobs: Jobs::new(self.cpus),
            meter: Integral::new(end_us, self.speed, self.costs.shells_mib),
            idle: self.rules.idle(),
            pauses: vec![ReuseIntervals::default(); self.workloads.of.len()],
            queue: VecDeque::new(),
            running: 0,
            is_refilling: false,
            lacking: BTreeSet::new(),
            timers: BinaryHeap::new(),
            outcome,
        };
        run.fill();
        run.run_until(end_us);
        let Meter { samples, mean_mib } = run.meter.finish();
        Ok(Outcome { memory: samples, mean_local_mib: mean_mib, ..run.outcome })
    }

    /// A moment of the trace on the real clock, µs.
    fn clock_us(&self, at_us: u64) -> f64 {
        at_us as f64 / self.speed
    }
}

impl Run<'_> {
    /// Lets VMs stand by before the first request, as far as there is room.
    fn fill(&mut self) {
        let Some(set) = self.sim.rules.standby else { return };
        for function in 0..self.costs.len() as u32 {
            for _ in 0..set.min {
                let mem_mib = self.mem_mib(function);
                if !self.fleet.has_room(mem_mib) {
                    return;
                }
                let mib = self.costs[function as usize].standby_mib;
                let vm = self.fleet.add(function, mem_mib, mib);
                self.meter.add(mib);
                self.fleet.set(vm, State::Ready, 0);
            }
        }
    }

    fn run_until(&mut self, end_us: f64) {
        let mut next = 0;
        let mut now = 0.0;
        loop {
            let arrival = self.sim.trace.arrivals.get(next);
            let arrives = arrival.map_or(f64::INFINITY, |arrival| self.sim.clock_us(arrival.at_us));
            let done = self.jobs.next_end(now);
            let timer = self.timers.peek().map_or(f64::INFINITY, |Reverse((at, _))| *at as f64);
            let at = arrives.min(done).min(timer);
            if !at.is_finite() || (arrival.is_none() && self.jobs.is_empty() && at >= end_us) {
                return;
            }
            self.meter.advance(at);
            let ended = self.jobs.advance(at - now);
            now = at;
            for job in ended {
                self.end_job(job, now);
            }
            if timer <= now {
                self.time_out(now);
            }
            if let Some(arrival) = arrival.filter(|_| arrives <= now) {
                next += 1;
                self.arrive(arrival, now);
            }
            self.begin_waiting(now);
        }
    }

    fn mem_mib(&self, function: u32) -> u64 {
        self.costs[function as usize].workload.mem_mib
    }

    fn arrive(&mut self, arrival: &Arrival, now: f64) {
        let function = arrival.function;
        if self.running >= self.sim.limits.max_running && self.queue.len() >= MAX_QUEUE {
            self.fail(now, now);
            return;
        }
        self.queue.push_back(Asked { function, at_us: now });
    }

    fn fail(&mut self, arrived: f64, now: f64) {
        *self.outcome.reasons.entry("status 429".to_string()).or_default() += 1;
        self.outcome.requests.push(Request { latency_ms: (now - arrived) / 1000.0, late_ms: 0.0, way: None });
    }

    /// Gives turns to requests that wait, then to a VM that is to stand by.
    fn begin_waiting(&mut self, now: f64) {
        while self.running < self.sim.limits.max_running {
            let Some(asked) = self.queue.pop_front() else { break };
            self.begin(asked, now);
        }
        if self.queue.is_empty() && self.running < self.sim.limits.max_running && !self.is_refilling {
            self.refill(now);
        }
    }

    /// Begins a request that has its turn.
    fn begin(&mut self, asked: Asked, now: f64) {
        let Asked { function, at_us } = asked;
        let costs = self.costs[function as usize];
        let started = if let Some(vm) = self.fleet.idle(function) {
            self.wake(vm, now)
        } else if let Some(vm) = self.fleet.first_ready(function) {
            self.lacking.insert(function);
            let is_rewound = self.fleet.has_served(vm);
            self.grow(vm, costs.used_mib);
            if is_rewound {
                Some((vm, Way::Rewound, costs.rewound_ms))
            } else {
                Some((vm, Way::Standby, costs.standby_ms))
            }
        } else {
            self.restore(function)
        };
        let Some((vm, way, ms)) = started else {
            self.fail(at_us, now);
            return;
        };
        self.fleet.set(vm, State::Busy, now as u64);
        self.running += 1;
        self.jobs.begin(Job::Request { vm, way, arrived_us: at_us }, ms);
    }

    /// Takes a VM that waits back from its step; `None`: there is no room for it.
    fn wake(&mut self, vm: VmId, now: f64) -> Option<(VmId, Way, f64)> {
        let function = self.fleet.function(vm);
        let costs = self.costs[function as usize];
        let pause_us = (now as u64).saturating_sub(self.fleet.since(vm));
        self.pauses[function as usize].add(Duration::from_micros(pause_us));
        match self.fleet.step(vm) {
            None | Some(Step::Parked) => Some((vm, Way::Warm, costs.warm_ms)),
            Some(Step::Trimmed) => {
                self.grow(vm, costs.used_mib);
                Some((vm, Way::Trimmed, costs.trimmed.map_or(costs.warm_ms, |step| step.request_ms)))
            }
            Some(Step::Spilled) => {
                self.grow(vm, costs.used_mib);
                Some((vm, Way::Spilled, costs.spilled.map_or(costs.warm_ms, |step| step.request_ms)))
            }
            Some(Step::Suspended) => {
                let end_ms = match self.place(function)? {
                    Place::Free | Place::Process => 0.0,
                    Place::After(end_ms) => end_ms,
                };
                self.remove(vm);
                let vm = self.fleet.add(function, self.mem_mib(function), 0.0);
                self.grow(vm, costs.woken_mib);
                Some((vm, Way::Woken, costs.woken_ms + end_ms))
            }
        }
    }

    /// Makes a VM for a request; `None`: there is no room for it.
    fn restore(&mut self, function: u32) -> Option<(VmId, Way, f64)> {
        let costs = self.costs[function as usize];
        let ms = match self.place(function)? {
            Place::Free => costs.restored_ms,
            Place::Process => {
                self.outcome.repurposed += 1;
                costs.repurposed_ms.unwrap_or(costs.restored_ms)
            }
            Place::After(end_ms) => costs.restored_ms + end_ms,
        };
        let vm = self.fleet.add(function, self.mem_mib(function), 0.0);
        self.grow(vm, costs.used_mib);
        Some((vm, Way::Restored, ms))
    }

    /// A VM's memory changes.
    fn grow(&mut self, vm: VmId, mib: f64) {
        self.meter.add(self.fleet.set_memory(vm, mib));
    }

    fn remove(&mut self, vm: VmId) {
        self.meter.add(-self.fleet.remove(vm));
    }

    /// Finds a place for a VM as the service does: a kept process of its shape, free room, or that of a VM that ends or
    /// is suspended.
    fn place(&mut self, function: u32) -> Option<Place> {
        let mem_mib = self.mem_mib(function);
        if let Some(spare) = self.fleet.spare(Some(mem_mib)) {
            self.remove(spare);
            return Some(Place::Process);
        }
        let mut work_ms = None;
        let suspends = self.idle.is_some_and(|rule| rule.suspends());
        while !self.fleet.has_room(mem_mib) {
            let spare = self.fleet.spare(None);
            let victim =
                spare.or_else(|| self.fleet.oldest(State::Idle)).or_else(|| self.fleet.oldest(State::Ready))?;
            let of = self.fleet.function(victim);
            if self.fleet.is(victim, State::Ready) {
                self.lacking.insert(of);
            }
            if suspends && self.fleet.is(victim, State::Idle) {
                self.fleet.descend(victim, Step::Suspended);
                self.grow(victim, 0.0);
                work_ms = Some(work_ms.unwrap_or(0.0) + self.costs[of as usize].suspend_ms);
                continue;
            }
            let is_fit = self.mem_mib(of) == mem_mib && self.sim.rules.processes == Processes::Shared;
            self.remove(victim);
            if is_fit {
                return Some(Place::Process);
            }
            work_ms = Some(work_ms.unwrap_or(0.0) + self.costs[of as usize].end_ms);
        }
        Some(work_ms.map_or(Place::Free, Place::After))
    }

    /// Begins to restore one VM that is to stand by, if there is free room for it.
    fn refill(&mut self, now: f64) {
        let Some(set) = self.sim.rules.standby else { return };
        while let Some(function) = self.lacking.first().copied() {
            let will_come = if self.sim.rules.fate == Fate::Rewinds { self.fleet.in_use(function) } else { 0 };
            if self.fleet.ready(function) + will_come >= set.min {
                self.lacking.remove(&function);
                continue;
            }
            let costs = self.costs[function as usize];
            let mem_mib = self.mem_mib(function);
            let spare = self.fleet.spare(Some(mem_mib));
            let ms = match spare {
                Some(spare) => {
                    self.remove(spare);
                    self.outcome.repurposed += 1;
                    costs.repurposed_ms.unwrap_or(costs.restored_ms) - costs.warm_ms
                }
                None if self.fleet.has_room(mem_mib) => costs.restored_ms - costs.warm_ms,
                None => return,
            };
            let vm = self.fleet.add(function, mem_mib, 0.0);
            self.grow(vm, costs.standby_mib);
            self.fleet.set(vm, State::Refilled, now as u64);
            self.is_refilling = true;
            self.running += 1;
            self.jobs.begin(Job::Refill { vm }, ms.max(0.0));
            return;
        }
    }

    fn end_job(&mut self, job: Job, now: f64) {
        match job {
            Job::Request { vm, way, arrived_us } => {
                let latency_ms = (now - arrived_us) / 1000.0;
                self.outcome.requests.push(Request { latency_ms, late_ms: 0.0, way: Some(way) });
                self.running -= 1;
                self.answered(vm, now);
            }
            Job::Refill { vm } => {
                self.running -= 1;
                self.is_refilling = false;
                self.fleet.set(vm, State::Ready, now as u64);
            }
            Job::Rewind { vm } => {
                let function = self.fleet.function(vm);
                let most = self.sim.rules.standby.map_or(0, |set| set.max);
                if self.fleet.ready(function) < most {
                    self.grow(vm, self.costs[function as usize].rewound_mib);
                    self.fleet.set(vm, State::Ready, now as u64);
                } else {
                    self.finish(vm, now);
                }
            }
            Job::End { vm } => self.remove(vm),
            Job::Step => {}
        }
    }

    /// Lets a VM go on after its answer.
    fn answered(&mut self, vm: VmId, now: f64) {
        self.fleet.serve(vm);
        let function = self.fleet.function(vm);
        match self.sim.rules.fate {
            Fate::Waits(_) => {
                self.fleet.set(vm, State::Idle, now as u64);
                self.time_next(vm, Duration::ZERO);
            }
            Fate::Ends => self.finish(vm, now),
            Fate::Rewinds => {
                self.fleet.set(vm, State::Returns, now as u64);
                self.jobs.begin(Job::Rewind { vm }, self.costs[function as usize].rewind_ms);
            }
        }
    }

    /// Ends a VM, or keeps its process for another one.
    fn finish(&mut self, vm: VmId, now: f64) {
        if self.sim.rules.processes == Processes::Shared && self.fleet.count_spares() < MAX_KEPT {
            self.fleet.set(vm, State::Spare, now as u64);
            self.arm(vm, now as u64 + KEPT_US);
        } else {
            self.end(vm, now);
        }
    }

    /// Sets the time of the next step of a VM that has waited for `idle`.
    fn time_next(&mut self, vm: VmId, idle: Duration) {
        let p99 = self.pauses[self.fleet.function(vm) as usize].p99();
        let next = self.idle.and_then(|rule| rule.next_time(idle, p99));
        if let Some(after) = next {
            // A moment later: times are cut to whole microseconds.
            self.arm(vm, self.fleet.since(vm) + after.as_micros() as u64 + 1);
        }
    }

    /// Sets the next timer of a VM.
    fn arm(&mut self, vm: VmId, at_us: u64) {
        self.fleet.arm(vm, at_us);
        self.timers.push(Reverse((at_us, vm)));
    }

    /// Lets VMs that wait take the steps that are due, and ends kept processes whose time is over.
    fn time_out(&mut self, now: f64) {
        while let Some(Reverse((at, vm))) = self.timers.peek().copied().filter(|Reverse((at, _))| *at as f64 <= now) {
            self.timers.pop();
            if !self.fleet.is_armed(vm, at) {
                // It was used meanwhile.
                continue;
            }
            if self.fleet.is(vm, State::Spare) {
                self.end(vm, now);
            } else if self.fleet.is(vm, State::Idle) {
                let function = self.fleet.function(vm) as usize;
                let idle = Duration::from_micros(at.saturating_sub(self.fleet.since(vm)));
                let p99 = self.pauses[function].p99();
                match self.idle.and_then(|rule| rule.due(idle, self.fleet.step(vm), p99)) {
                    Some(IdleAction::End) => self.finish(vm, now),
                    Some(IdleAction::Step(step)) => {
                        self.descend(vm, step);
                        self.time_next(vm, idle);
                    }
                    None => self.time_next(vm, idle),
                }
            }
        }
    }

    /// Lets a VM that waits take a step. The memory goes at once; the work is done beside that of requests. A step that
    /// no VM took when the costs were measured is not taken.
    fn descend(&mut self, vm: VmId, step: Step) {
        let costs = self.costs[self.fleet.function(vm) as usize];
        let suspended = StepCosts { request_ms: costs.woken_ms, step_ms: costs.suspend_ms, mib: 0.0 };
        let taken = match step {
            Step::Parked => return self.fleet.descend(vm, step),
            Step::Trimmed => costs.trimmed,
            Step::Spilled => costs.spilled,
            Step::Suspended => Some(suspended),
        };
        if let Some(StepCosts { step_ms, mib, .. }) = taken {
            self.fleet.descend(vm, step);
            self.grow(vm, mib);
            self.jobs.begin(Job::Step, step_ms);
        }
    }

    fn end(&mut self, vm: VmId, now: f64) {
        let end_ms = self.costs[self.fleet.function(vm) as usize].end_ms;
        self.fleet.set(vm, State::Leaving, now as u64);
        self.jobs.begin(Job::End { vm }, end_ms);
    }
}
