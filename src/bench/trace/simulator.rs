//! The same trace without VMs: requests take the times, and VMs the memory, that a calibration has measured.
//!
//! The service is modelled as docs/trace.md describes it: turns, room, kept processes, VMs that stand by. Work shares
//! the CPUs evenly, waits for disks and other programs do not.

mod draws;
mod fleet;
mod giving;
mod jobs;
mod meter;
mod recycled;
mod slots;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use super::arrivals::Arrival;
use super::costs::{Costs, WorkloadCosts};
use super::load::Load;
use super::outcome::{Outcome, Request, Way};
use super::policy::{Fate, Processes};
use super::samples::{Samples, Work};
use super::service::Limits;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::{Descended, IdleAction, IdleRule, ReuseIntervals, Step};
use draws::Draws;
use fleet::{Fleet, State, VmId};
use jobs::{Job, Jobs};
use meter::Integral;
use recycled::Recycled;

/// Time for which the service keeps the process of a finished VM, µs of the real clock (docs/serve.md).
const KEPT_US: u64 = 1_000_000;
/// The most processes that it keeps.
const MAX_KEPT: usize = 8;
/// Requests that wait for a turn; more are refused.
const MAX_QUEUE: usize = 1024;
/// VMs that take a step at once.
const MAX_STEPS: usize = 4;

/// A simulation of one policy.
pub(super) struct Simulation<'a> {
    pub(super) load: Load<'a>,
    pub(super) costs: &'a Costs,
    pub(super) limits: Limits,
    pub(super) cpus: usize,
    /// Picks the times of requests and of other work from those that were measured.
    pub(super) seed: u64,
}

/// A request that waits for its turn.
#[derive(Clone, Copy)]
struct Asked {
    function: u32,
    at_us: f64,
    /// The share of measured times that are shorter than the request's.
    share: f64,
}

/// The way to a place for a VM.
enum Place {
    Free,
    /// The process of a finished VM comes with it.
    Process,
    /// Other VMs end or are suspended first; this is their work.
    After(Work),
}

/// A step of a VM that waits.
struct StepTimes<'a> {
    step: &'a Samples,
    /// Local memory after the step.
    mib: f64,
}

/// A VM for a request.
struct Started {
    vm: VmId,
    way: Way,
    /// The work of the request.
    work: Work,
}

/// A step that a VM takes at present.
struct Stepping {
    /// The VM will be this far down.
    to: Descended,
    /// The request that waits for the end of the step.
    waiter: Option<Asked>,
}

/// The part of a step that a VM has taken: it is offloaded bit by bit.
fn part_of(descended: Descended) -> f64 {
    if descended.offloaded > 0 { f64::from(descended.offloaded) / 100.0 } else { 1.0 }
}

/// The step to a VM that is this far down; `None`: no VM took it when the costs were measured.
fn step_times(costs: &WorkloadCosts, descended: Descended) -> Option<StepTimes<'_>> {
    let step = match descended.step? {
        Step::Parked => None,
        Step::Trimmed => costs.trimmed.as_ref(),
        Step::Spilled => costs.spilled.as_ref(),
        Step::Suspended => return Some(StepTimes { step: &costs.suspend, mib: 0.0 }),
    };
    step.map(|step| StepTimes { step: &step.step, mib: step.mib })
}

/// The state of a simulation.
struct Run<'a> {
    sim: &'a Simulation<'a>,
    costs: Vec<&'a WorkloadCosts>,
    fleet: Fleet,
    jobs: Jobs,
    memory: Integral,
    recycled: Recycled,
    /// VMs that have a process.
    vms: Integral,
    /// The steps that VMs take at present.
    steps: BTreeMap<VmId, Stepping>,
    /// VMs that are due for a step, while as many as may be take one.
    due: VecDeque<VmId>,
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
    draws: Draws,
    outcome: Outcome,
}

impl Simulation<'_> {
    /// # Errors
    /// The costs lack something that the policy needs.
    pub(super) fn run(&self) -> Result<Outcome, BoxError> {
        let Load { trace, workloads, rules, speed } = self.load;
        let costs = self.costs.of(workloads)?;
        if rules.processes == Processes::Shared && costs.iter().any(|costs| costs.repurposed.is_none()) {
            return refuse(format!(
                "Cannot simulate policy {}: the costs have no `repurposed`, because no process was taken over when \
                 they were measured. Replay the trace again",
                rules.policy
            ));
        }
        let end_us = self.load.end_us();
        let mut run = Run {
            sim: self,
            fleet: Fleet::new(costs.len(), self.limits),
            jobs: Jobs::new(self.cpus),
            memory: Integral::new(end_us, speed, self.costs.shells_mib),
            recycled: Recycled::default(),
            vms: Integral::new(end_us, speed, 0.0),
            steps: BTreeMap::new(),
            due: VecDeque::new(),
            idle: rules.idle(),
            pauses: vec![ReuseIntervals::default(); costs.len()],
            costs,
            queue: VecDeque::new(),
            running: 0,
            is_refilling: false,
            lacking: BTreeSet::new(),
            timers: BinaryHeap::new(),
            draws: Draws::new(self.seed),
            outcome: self.load.outcome(true),
        };
        run.fill();
        run.run_until(end_us, &trace.arrivals);
        Ok(Outcome {
            memory: run.memory.samples(),
            mean_local_mib: run.memory.mean(),
            mean_vms: run.vms.mean(),
            most_vms: run.vms.most() as usize,
            ..run.outcome
        })
    }
}

impl Run<'_> {
    /// Lets VMs stand by before the first request, as far as there is room.
    fn fill(&mut self) {
        let Some(set) = self.sim.load.rules.standby else { return };
        for function in 0..self.costs.len() as u32 {
            for _ in 0..set.min {
                let mem_mib = self.mem_mib(function);
                if !self.fleet.has_room(mem_mib) {
                    return;
                }
                let mib = self.costs[function as usize].standby_mib;
                let vm = self.fleet.add(function, mem_mib, mib);
                self.memory.add(mib);
                self.fleet.set(vm, State::Ready, 0);
            }
        }
    }

    fn run_until(&mut self, end_us: f64, arrivals: &[Arrival]) {
        let mut next = 0;
        loop {
            self.vms.set(self.fleet.living() as f64);
            self.outcome.most_suspended = self.outcome.most_suspended.max(self.fleet.suspended());
            let arrival = arrivals.get(next);
            let arrives = arrival.map_or(f64::INFINITY, |arrival| self.sim.load.clock_us(arrival.at_us));
            let done = self.jobs.next_end();
            let timer = self.timers.peek().map_or(f64::INFINITY, |Reverse((at, _))| *at as f64);
            let now = arrives.min(done).min(timer);
            if !now.is_finite() || (arrival.is_none() && self.jobs.is_empty() && now >= end_us) {
                self.memory.advance(end_us);
                self.vms.advance(end_us);
                return;
            }
            self.memory.advance(now);
            self.vms.advance(now);
            let ended = self.jobs.advance(now);
            for job in ended {
                self.end_job(job, now);
            }
            if timer <= now {
                self.time_out(now);
            }
            if let Some(arrival) = arrival.filter(|_| arrives <= now) {
                self.arrive(arrival, next as u64, now);
                next += 1;
            }
            self.begin_waiting(now);
        }
    }

    fn mem_mib(&self, function: u32) -> u64 {
        self.costs[function as usize].workload.mem_mib
    }

    fn arrive(&mut self, arrival: &Arrival, number: u64, now: f64) {
        let function = arrival.function;
        if self.running >= self.sim.limits.max_running && self.queue.len() >= MAX_QUEUE {
            self.fail(now, now);
            return;
        }
        self.queue.push_back(Asked { function, at_us: now, share: self.draws.of_request(number) });
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
        let Asked { function, share, .. } = asked;
        let costs = self.costs[function as usize];
        self.running += 1;
        let started = if let Some(vm) = self.fleet.idle(function) {
            let pause_us = (now as u64).saturating_sub(self.fleet.since(vm));
            self.pauses[function as usize].add(Duration::from_micros(pause_us));
            if let Some(stepping) = self.steps.get_mut(&vm) {
                stepping.waiter = Some(asked);
                self.fleet.claim(vm);
                return;
            }
            self.wake(vm, share)
        } else if let Some(vm) = self.fleet.first_ready(function) {
            self.lacking.insert(function);
            let is_rewound = self.fleet.has_served(vm);
            self.set_memory(vm, if is_rewound { costs.reused_mib } else { costs.used_mib });
            Some(if is_rewound {
                Started { vm, way: Way::Rewound, work: costs.rewound.at(share) }
            } else {
                Started { vm, way: Way::Standby, work: costs.standby.at(share) }
            })
        } else {
            self.restore(function, share)
        };
        self.start(asked, started, now);
    }

    /// Starts a request in the VM that was found for it, or fails it: there was no room for one.
    fn start(&mut self, asked: Asked, started: Option<Started>, now: f64) {
        let Some(Started { vm, way, work }) = started else {
            self.running -= 1;
            self.fail(asked.at_us, now);
            return;
        };
        self.fleet.set(vm, State::Busy, now as u64);
        self.jobs.begin(Job::Request { vm, way, arrived_us: asked.at_us }, work);
    }

    /// Takes a VM that waits back from its step; `None`: there is no room for it.
    fn wake(&mut self, vm: VmId, share: f64) -> Option<Started> {
        let costs = self.costs[self.fleet.function(vm) as usize];
        let descended = self.fleet.descended(vm);
        if descended.step == Some(Step::Suspended) {
            return self.wake_suspended(vm, share);
        }
        let full_mib = self.fleet.full_mib(vm);
        // Memory that the last window has given back, and the request touches, comes back first.
        let window = self.fleet.giving(vm).and_then(|giving| giving.touched(costs.windows()));
        let warm = window.map_or(&costs.warm, |window| &window.request).at(share);
        let warm_mib = window.map_or(full_mib, |window| window.after_mib.max(full_mib));
        let (way, step) = match descended.step {
            Some(Step::Trimmed) => (Way::Trimmed, costs.trimmed.as_ref()),
            Some(Step::Spilled) => (Way::Spilled, costs.spilled.as_ref()),
            _ => (Way::Warm, None),
        };
        let Some(step) = step else {
            self.set_memory(vm, warm_mib);
            return Some(Started { vm, way, work: warm });
        };
        // Of a VM that is being offloaded, only a part has left.
        let part = part_of(descended);
        self.set_memory(vm, full_mib + part * (step.after_mib.min(full_mib) - full_mib));
        Some(Started { vm, way, work: warm.towards(step.request.at(share), part) })
    }

    /// Restores a VM that was suspended.
    fn wake_suspended(&mut self, vm: VmId, share: f64) -> Option<Started> {
        let function = self.fleet.function(vm);
        let costs = self.costs[function as usize];
        let room = match self.place(function)? {
            Place::Free | Place::Process => Work::default(),
            Place::After(work) => work,
        };
        self.remove(vm);
        let vm = self.fleet.add(function, self.mem_mib(function), 0.0);
        self.set_memory(vm, costs.woken_mib);
        Some(Started { vm, way: Way::Woken, work: costs.woken.at(share) + room })
    }

    /// Makes a VM for a request; `None`: there is no room for it.
    fn restore(&mut self, function: u32, share: f64) -> Option<Started> {
        let costs = self.costs[function as usize];
        let work = match self.place(function)? {
            Place::Free => costs.restored.at(share),
            Place::Process => {
                self.outcome.repurposed += 1;
                costs.repurposed.as_ref().unwrap_or(&costs.restored).at(share)
            }
            Place::After(work) => costs.restored.at(share) + work,
        };
        let vm = self.fleet.add(function, self.mem_mib(function), 0.0);
        let fresh = self.fresh(costs, costs.used_mib, share);
        self.set_memory(vm, costs.starting_mib.unwrap_or(costs.used_mib));
        Some(Started { vm, way: Way::Restored, work: work + fresh })
    }

    /// The work of a restore that is due to memory which no other VM has given back lately.
    fn fresh(&mut self, costs: &WorkloadCosts, mib: f64, share: f64) -> Work {
        let fresh_mib = self.recycled.take(self.memory.now_us(), mib);
        let Some(grown) = costs.grown.as_ref().filter(|_| costs.used_mib > 0.0) else { return Work::default() };
        grown.at(share).without(costs.restored.at(share)).part(fresh_mib / costs.used_mib)
    }

    fn set_memory(&mut self, vm: VmId, mib: f64) {
        let more = self.fleet.set_memory(vm, mib);
        self.changed(more);
    }

    fn remove(&mut self, vm: VmId) {
        let mib = self.fleet.remove(vm);
        self.changed(-mib);
    }

    /// Notes that local memory has grown by so much, or shrunk.
    fn changed(&mut self, more_mib: f64) {
        self.recycled.give(self.memory.now_us(), -more_mib);
        self.memory.add(more_mib);
    }

    /// Finds a place for a VM as the service does: a kept process of its shape, free room, or that of VMs that end or
    /// are suspended.
    fn place(&mut self, function: u32) -> Option<Place> {
        let mem_mib = self.mem_mib(function);
        if let Some(spare) = self.fleet.spare(Some(mem_mib)) {
            self.remove(spare);
            return Some(Place::Process);
        }
        let mut work = None;
        while !self.fleet.has_room(mem_mib) {
            let idle = || self.fleet.longest_idle();
            let victim = self.fleet.spare(None).or_else(idle).or_else(|| self.fleet.oldest(State::Ready))?;
            let of = self.fleet.function(victim);
            let costs = self.costs[of as usize];
            if self.fleet.is(victim, State::Idle) && self.idle.is_some_and(|rule| rule.suspends()) {
                // It takes no further step, also if one is under way.
                self.steps.remove(&victim);
                self.set_memory(victim, 0.0);
                self.fleet.descend(victim, Some(Step::Suspended).into());
                work = Some(work.unwrap_or_default() + self.draws.next(&costs.suspend));
                continue;
            }
            if self.fleet.is(victim, State::Ready) {
                self.lacking.insert(of);
            }
            let is_fit = self.mem_mib(of) == mem_mib && self.sim.load.rules.processes == Processes::Shared;
            self.remove(victim);
            if is_fit {
                return Some(Place::Process);
            }
            work = Some(work.unwrap_or_default() + self.draws.next(&costs.end));
        }
        Some(work.map_or(Place::Free, Place::After))
    }

    /// Begins to restore one VM that is to stand by, if there is free room for it.
    fn refill(&mut self, now: f64) {
        let Some(set) = self.sim.load.rules.standby else { return };
        while let Some(function) = self.lacking.first().copied() {
            let will_come = if self.sim.load.rules.fate == Fate::Rewinds { self.fleet.in_use(function) } else { 0 };
            if self.fleet.ready(function) + will_come >= set.min {
                self.lacking.remove(&function);
                continue;
            }
            let costs = self.costs[function as usize];
            let mem_mib = self.mem_mib(function);
            let spare = self.fleet.spare(Some(mem_mib));
            let times = match spare {
                Some(spare) => {
                    self.remove(spare);
                    self.outcome.repurposed += 1;
                    costs.repurposed.as_ref().unwrap_or(&costs.restored)
                }
                None if self.fleet.has_room(mem_mib) => &costs.restored,
                None => return,
            };
            let share = self.draws.share();
            let work = times.at(share).without(costs.warm.at(share)) + self.fresh(costs, costs.standby_mib, share);
            let vm = self.fleet.add(function, mem_mib, 0.0);
            self.set_memory(vm, costs.standby_mib);
            self.fleet.set(vm, State::Refilled, now as u64);
            self.is_refilling = true;
            self.running += 1;
            self.jobs.begin(Job::Refill { vm }, work);
            return;
        }
    }

    fn end_job(&mut self, job: Job, now: f64) {
        match job {
            Job::Request { vm, way, arrived_us } => {
                let latency_ms = (now - arrived_us) / 1000.0;
                self.outcome.requests.push(Request { latency_ms, late_ms: 0.0, way: Some(way) });
                self.running -= 1;
                self.answered(vm, way, now);
            }
            Job::Refill { vm } => {
                self.running -= 1;
                self.is_refilling = false;
                self.fleet.set(vm, State::Ready, now as u64);
            }
            Job::Rewind { vm } => {
                let function = self.fleet.function(vm);
                let most = self.sim.load.rules.standby.map_or(0, |set| set.max);
                if self.fleet.ready(function) < most {
                    self.set_memory(vm, self.costs[function as usize].rewound_mib);
                    self.fleet.set(vm, State::Ready, now as u64);
                } else {
                    self.finish(vm, now);
                }
            }
            Job::End { vm } => self.remove(vm),
            Job::Fade { vm } => {
                let costs = self.costs[self.fleet.function(vm) as usize];
                self.set_memory(vm, 0.0);
                let share = self.draws.share();
                self.jobs.begin(Job::End { vm }, costs.end.at(share).without(costs.gone.at(share)));
            }
            Job::Retire { vm } => {
                let function = self.fleet.function(vm);
                let kept_mib = self.costs[function as usize].kept.as_ref().map_or(0.0, |kept| kept.mib);
                self.set_memory(vm, kept_mib);
                self.fleet.set(vm, State::Spare, now as u64);
                self.arm(vm, now as u64 + KEPT_US);
            }
            Job::Step { vm } => self.end_step(vm, now),
            Job::Give { vm } => {
                let costs = self.costs[self.fleet.function(vm) as usize];
                let given = self.fleet.giving(vm).and_then(|giving| giving.ended(costs.windows(), now));
                let fewer = given.map_or(0.0, |window| self.fleet.shrink(vm, window.mib));
                self.changed(fewer);
            }
        }
    }

    /// Lets a VM go on after its answer.
    fn answered(&mut self, vm: VmId, way: Way, now: f64) {
        self.fleet.serve(vm);
        let costs = self.costs[self.fleet.function(vm) as usize];
        if way == Way::Restored {
            self.set_memory(vm, costs.used_mib);
        }
        match self.sim.load.rules.fate {
            Fate::Waits(_) => {
                self.fleet.set(vm, State::Idle, now as u64);
                self.give_back(vm, now);
                self.look(vm, now as u64);
            }
            Fate::Ends => self.finish(vm, now),
            Fate::Rewinds => {
                self.fleet.set(vm, State::Returns, now as u64);
                let work = self.draws.next(&costs.rewind);
                self.jobs.begin(Job::Rewind { vm }, work);
            }
        }
    }

    /// Lets a VM give back what the requests of its window have not touched, if the window is over. Memory is never
    /// short.
    fn give_back(&mut self, vm: VmId, now: f64) {
        if !self.idle.is_some_and(|rule| rule.gives_back(|| false)) {
            return;
        }
        let costs = self.costs[self.fleet.function(vm) as usize];
        let window = self.fleet.giving(vm).and_then(|giving| giving.after_request(costs.windows(), now));
        let Some(window) = window else { return };
        let work = self.draws.next(&window.give);
        self.jobs.begin(Job::Give { vm }, work);
    }

    /// Ends a VM, or keeps its process for another one.
    fn finish(&mut self, vm: VmId, now: f64) {
        let costs = self.costs[self.fleet.function(vm) as usize];
        match &costs.kept {
            Some(kept)
                if self.sim.load.rules.processes == Processes::Shared && self.fleet.count_spares() < MAX_KEPT =>
            {
                self.fleet.set(vm, State::Leaving, now as u64);
                let work = self.draws.next(&kept.vacate);
                self.jobs.begin(Job::Retire { vm }, work);
            }
            _ => self.end(vm, now),
        }
    }

    /// Sets the next timer of a VM.
    fn arm(&mut self, vm: VmId, at_us: u64) {
        self.fleet.arm(vm, at_us);
        self.timers.push(Reverse((at_us, vm)));
    }

    /// Looks at VMs whose timers have come, and ends kept processes whose time is over.
    fn time_out(&mut self, now: f64) {
        while let Some(Reverse((at, vm))) = self.timers.peek().copied().filter(|Reverse((at, _))| *at as f64 <= now) {
            self.timers.pop();
            if !self.fleet.is_armed(vm, at) {
                // It was used meanwhile.
                continue;
            }
            if self.fleet.is(vm, State::Spare) {
                self.end(vm, now);
            } else {
                self.look(vm, now as u64);
            }
        }
    }

    /// Lets a VM that waits take the step that is due, or sets the time of its next one.
    fn look(&mut self, vm: VmId, now_us: u64) {
        let Some(rule) = self.idle.filter(|_| self.fleet.is(vm, State::Idle) && !self.fleet.is_stepping(vm)) else {
            return;
        };
        let idle = Duration::from_micros(now_us.saturating_sub(self.fleet.since(vm)));
        let reuse = self.pauses[self.fleet.function(vm) as usize].reuse();
        let descended = self.fleet.descended(vm);
        let to = match rule.due(idle, descended, reuse) {
            Some(IdleAction::End) => return self.finish(vm, now_us as f64),
            Some(action) => descended.after(action),
            None => {
                // A moment later: times are cut to whole microseconds.
                let next_us = rule.next_time(idle, reuse).map(|after| after.as_micros() as u64 + 1);
                next_us.into_iter().for_each(|after_us| self.arm(vm, self.fleet.since(vm) + after_us));
                return;
            }
        };
        if self.steps.len() >= MAX_STEPS {
            self.due.push_back(vm);
        } else {
            self.descend(vm, to, now_us);
        }
    }

    /// Lets a VM that waits begin a step. One that no VM took when the costs were measured is refused.
    fn descend(&mut self, vm: VmId, to: Descended, now_us: u64) {
        let before = self.fleet.descended(vm);
        let step = match (to.step, step_times(self.costs[self.fleet.function(vm) as usize], to)) {
            (Some(Step::Parked), _) => None,
            (_, Some(times)) => {
                let part = part_of(to) - f64::from(before.offloaded) / 100.0;
                Some(self.draws.next(times.step).part(part))
            }
            (step, None) => {
                let mut refused = before;
                step.into_iter().for_each(|step| refused.refuse(step));
                self.fleet.descend(vm, refused);
                return self.look(vm, now_us);
            }
        };
        match step {
            None => {
                self.fleet.descend(vm, to);
                self.look(vm, now_us);
            }
            Some(step) => {
                self.fleet.begin_step(vm);
                self.steps.insert(vm, Stepping { to, waiter: None });
                self.jobs.begin(Job::Step { vm }, step);
            }
        }
    }

    /// The memory that a step frees goes at its end. A request that has waited for it takes the VM back.
    fn end_step(&mut self, vm: VmId, now: f64) {
        // A VM that was suspended meanwhile, because it made room, takes no other step.
        if let Some(stepping) = self.steps.remove(&vm) {
            self.reach(vm, stepping, now);
        }
        while self.steps.len() < MAX_STEPS {
            let Some(vm) = self.due.pop_front() else { break };
            self.look(vm, now as u64);
        }
    }

    /// Lets a VM be where its step leads.
    fn reach(&mut self, vm: VmId, Stepping { to, waiter }: Stepping, now: f64) {
        // A suspension is given up for a request. A VM that has ended meanwhile is not there.
        let is_given_up = waiter.is_some() && to.step == Some(Step::Suspended);
        if let Some(StepTimes { mib, .. }) =
            step_times(self.costs[self.fleet.function(vm) as usize], to).filter(|_| !is_given_up)
        {
            let full_mib = self.fleet.full_mib(vm);
            self.set_memory(vm, full_mib + part_of(to) * (mib.min(full_mib) - full_mib));
            self.fleet.descend(vm, to);
        }
        match waiter {
            Some(asked) => {
                let started = self.wake(vm, asked.share);
                self.start(asked, started, now);
            }
            None => self.look(vm, now as u64),
        }
    }

    fn end(&mut self, vm: VmId, now: f64) {
        let costs = self.costs[self.fleet.function(vm) as usize];
        self.fleet.set(vm, State::Leaving, now as u64);
        let work = self.draws.next(&costs.gone);
        self.jobs.begin(Job::Fade { vm }, work);
    }
}
