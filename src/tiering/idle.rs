//! Idle VMs: the steps by which a VM that waits for requests gives its memory back, and the time of each step.
//!
//! Everything here is a pure function of idle times, so that the service and a simulation decide alike. `docs/idle.md`
//! has the formulae.

use std::collections::VecDeque;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A step down. A request takes a VM back from any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// Its vCPUs stand still.
    Parked,
    /// Local copies of pages that equal its snapshot are given back as well.
    Trimmed,
    /// Its written pages are in a file as well.
    Spilled,
    /// It is a snapshot on the disk, and has no process.
    Suspended,
}

impl Step {
    /// All steps, from the first down.
    pub const ALL: [Step; 4] = [Step::Parked, Step::Trimmed, Step::Spilled, Step::Suspended];

    /// The name in answers and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Step::Parked => "parked",
            Step::Trimmed => "trimmed",
            Step::Spilled => "spilled",
            Step::Suspended => "suspended",
        }
    }
}

/// The way down of a VM since its last request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descended {
    /// The last step that it has taken.
    pub step: Option<Step>,
    /// The part of its local memory that was offloaded since, percent: see [`IdleAction::Offload`].
    pub offloaded: u8,
    /// The steps that it has refused to take, in the order of [`Step::ALL`].
    refused: [bool; Step::ALL.len()],
}

impl Descended {
    /// Notes that the VM has refused a step, and is as it was.
    pub fn refuse(&mut self, step: Step) {
        self.refused[step as usize] = true;
    }

    /// The way down after an action.
    pub fn after(self, action: IdleAction) -> Descended {
        match action {
            IdleAction::Step(step) => Descended { step: Some(step), ..self },
            IdleAction::Offload { percent } => Descended { step: Some(Step::Spilled), offloaded: percent, ..self },
            IdleAction::End => self,
        }
    }

    /// Returns whether an action leads further down, and was not refused.
    fn may_take(&self, action: IdleAction) -> bool {
        match action {
            IdleAction::End => true,
            IdleAction::Step(next) => Some(next) > self.step && !self.refused[next as usize],
            IdleAction::Offload { percent } => percent > self.offloaded && !self.refused[Step::Spilled as usize],
        }
    }
}

impl From<Option<Step>> for Descended {
    fn from(step: Option<Step>) -> Descended {
        Descended { step, ..Descended::default() }
    }
}

/// The fate of a VM that waits for requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum IdlePolicy {
    /// It waits for the keep-alive time, and ends.
    Keep,
    /// It ends after its answer, or after the keep-alive time if one is given.
    End,
    /// It is suspended after the keep-alive time.
    Suspend,
    /// It is parked, trimmed, spilled and suspended, at times that follow from the function's own pauses between
    /// requests.
    Ladder,
    /// FaaSMem's semi-warm period: when it was idle for longer than is usual for its function, its pages are offloaded
    /// bit by bit. It ends after the keep-alive time.
    Faasmem,
}

impl IdlePolicy {
    const ALL: [(&'static str, IdlePolicy); 5] = [
        ("keep", IdlePolicy::Keep),
        ("end", IdlePolicy::End),
        ("suspend", IdlePolicy::Suspend),
        ("ladder", IdlePolicy::Ladder),
        ("faasmem", IdlePolicy::Faasmem),
    ];
}

/// The text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Unknown idle policy `{0}`; known: keep, end, suspend, ladder, faasmem.")]
pub struct NoIdlePolicy(String);

impl FromStr for IdlePolicy {
    type Err = NoIdlePolicy;

    fn from_str(text: &str) -> Result<Self, NoIdlePolicy> {
        let found = IdlePolicy::ALL.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, policy)| policy).ok_or_else(|| NoIdlePolicy(text.to_owned()))
    }
}

/// When a VM of `ladder` that serves requests gives untouched memory back between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum GiveBack {
    /// While the host has less memory left than its reserve.
    #[default]
    Pressure,
    /// At any time. The next request to the VM brings back what it reads of that.
    Always,
}

/// The fate of a function's VMs that wait for requests, as users give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IdleSpec {
    pub policy: IdlePolicy,
    /// All but `ladder`: the time without a request, ms. None: 0 for `end`, 600,000 for `faasmem`, else
    /// `--idle-timeout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_alive_ms: Option<u64>,
    /// `ladder`: a VM is parked after this time, and takes no further step before it, ms. None: 10,000. `faasmem`:
    /// nothing is offloaded before this time. None: 60,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor_ms: Option<u64>,
    /// `ladder`: a VM is suspended after this time at the latest, ms. None: 600,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap_ms: Option<u64>,
    /// `ladder`: when a VM gives untouched memory back between requests. None: `pressure`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub give_back: Option<GiveBack>,
    /// `faasmem`: the time in which all local memory is offloaded, ms. None: 100,000, which is 1 % a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload_ms: Option<u64>,
}

/// The earliest and the latest time of a ladder that names none.
const FLOOR: Duration = Duration::from_secs(10);
const CAP: Duration = Duration::from_secs(600);
/// A trimmed VM is spilled, and suspended, after so many times the time after which it was trimmed.
const SPILL_PATIENCE: u32 = 2;
const SUSPEND_PATIENCE: u32 = 4;

/// FaaSMem's times.
const FAASMEM_FLOOR: Duration = Duration::from_secs(60);
const FAASMEM_KEEP_ALIVE: Duration = Duration::from_secs(600);
/// The time in which FaaSMem offloads all of a container: 1 % a second.
pub const FAASMEM_OFFLOAD: Duration = Duration::from_secs(100);
/// The part of a VM's memory that is offloaded at once, percent: a request to the VM waits for no more.
const BITE: u8 = 2;
const MOST_BITES: u8 = 100 / BITE;

/// The reason why a setting makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadIdle {
    #[error("`idle.keep_alive_ms` is for all policies but `ladder`: leave it out of `ladder`.")]
    KeepAliveOfLadder,
    #[error("`idle.floor_ms` is for the policies `ladder` and `faasmem`: leave it out of others.")]
    FloorOfOther,
    #[error("`idle.cap_ms` is for the policy `ladder`: leave it out of others.")]
    CapOfOther,
    #[error("`idle.give_back` is for the policy `ladder`: leave it out of others.")]
    GiveBackOfOther,
    #[error("`idle.offload_ms` is for the policy `faasmem`: leave it out of others.")]
    OffloadOfOther,
    #[error("`idle.floor_ms` must be 1 or more, and `idle.cap_ms` (default: 600000) not less than it.")]
    Bounds,
    #[error(
        "`idle.floor_ms` and `idle.offload_ms` must be 1 or more, and `idle.keep_alive_ms` (default: 600000) not less \
         than the floor (default: 60000)."
    )]
    BoundsOfFaasmem,
}

impl IdleSpec {
    /// The policy with its default times.
    pub fn of(policy: IdlePolicy) -> IdleSpec {
        IdleSpec { policy, keep_alive_ms: None, floor_ms: None, cap_ms: None, give_back: None, offload_ms: None }
    }

    /// Refuses values that belong to another policy, or exclude each other.
    pub fn check(&self) -> Result<(), BadIdle> {
        let is_ladder = self.policy == IdlePolicy::Ladder;
        let is_faasmem = self.policy == IdlePolicy::Faasmem;
        if is_ladder && self.keep_alive_ms.is_some() {
            return Err(BadIdle::KeepAliveOfLadder);
        }
        if !is_ladder && !is_faasmem && self.floor_ms.is_some() {
            return Err(BadIdle::FloorOfOther);
        }
        if !is_ladder && self.cap_ms.is_some() {
            return Err(BadIdle::CapOfOther);
        }
        if !is_ladder && self.give_back.is_some() {
            return Err(BadIdle::GiveBackOfOther);
        }
        if !is_faasmem && self.offload_ms.is_some() {
            return Err(BadIdle::OffloadOfOther);
        }
        match self.rule(Duration::MAX) {
            IdleRule::Ladder { floor, cap, .. } if floor > cap || floor.is_zero() => Err(BadIdle::Bounds),
            IdleRule::Faasmem { floor, keep_alive, offload }
                if floor > keep_alive || floor.is_zero() || offload.is_zero() =>
            {
                Err(BadIdle::BoundsOfFaasmem)
            }
            _ => Ok(()),
        }
    }

    /// Returns whether its VMs may be suspended.
    pub fn suspends(&self) -> bool {
        matches!(self.policy, IdlePolicy::Suspend | IdlePolicy::Ladder)
    }

    /// The rule, where `keep_alive` is the time of policies that name none.
    pub fn rule(&self, keep_alive: Duration) -> IdleRule {
        let given = |ms: Option<u64>| ms.map(Duration::from_millis);
        let own = given(self.keep_alive_ms);
        let floor = given(self.floor_ms);
        match self.policy {
            IdlePolicy::Keep => IdleRule::End { after: own.unwrap_or(keep_alive) },
            IdlePolicy::End => IdleRule::End { after: own.unwrap_or_default() },
            IdlePolicy::Suspend => IdleRule::Suspend { after: own.unwrap_or(keep_alive) },
            IdlePolicy::Ladder => IdleRule::Ladder {
                floor: floor.unwrap_or(FLOOR),
                cap: given(self.cap_ms).unwrap_or(CAP),
                give_back: self.give_back.unwrap_or_default(),
            },
            IdlePolicy::Faasmem => IdleRule::Faasmem {
                floor: floor.unwrap_or(FAASMEM_FLOOR),
                keep_alive: own.unwrap_or(FAASMEM_KEEP_ALIVE),
                offload: given(self.offload_ms).unwrap_or(FAASMEM_OFFLOAD),
            },
        }
    }
}

/// An action that an idle VM is due for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleAction {
    Step(Step),
    /// So much of the local memory that the VM had after its last request leaves local memory, what has left before
    /// included: copies of pages that equal the snapshot are dropped, others go to a file. A VM of which a part was
    /// offloaded is at [`Step::Spilled`].
    Offload {
        percent: u8,
    },
    /// The VM ends.
    End,
}

/// The times of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleRule {
    End { after: Duration },
    Suspend { after: Duration },
    Ladder { floor: Duration, cap: Duration, give_back: GiveBack },
    Faasmem { floor: Duration, keep_alive: Duration, offload: Duration },
}

impl IdleRule {
    /// The actions with the idle time of each, the shortest first.
    pub fn times(&self, reuse: Reuse) -> Vec<(Duration, IdleAction)> {
        match *self {
            IdleRule::End { after } => vec![(after, IdleAction::End)],
            IdleRule::Suspend { after } => vec![(after, IdleAction::Step(Step::Suspended))],
            IdleRule::Ladder { floor, cap, .. } => {
                let trim = self.delay(reuse);
                let spill = trim.saturating_mul(SPILL_PATIENCE).min(cap);
                let suspend = trim.saturating_mul(SUSPEND_PATIENCE).min(cap);
                let times =
                    [(floor, Step::Parked), (trim, Step::Trimmed), (spill, Step::Spilled), (suspend, Step::Suspended)];
                times.map(|(after, step)| (after, IdleAction::Step(step))).into()
            }
            IdleRule::Faasmem { keep_alive, offload, .. } => {
                let delay = self.delay(reuse);
                let bites = (BITE..=100).step_by(BITE.into());
                let bites = bites.map(|percent| (bite_time(delay, offload, percent), IdleAction::Offload { percent }));
                bites.take_while(|(after, _)| *after < keep_alive).chain([(keep_alive, IdleAction::End)]).collect()
            }
        }
    }

    /// The idle time up to which a VM is likely to be asked again.
    pub fn delay(&self, reuse: Reuse) -> Duration {
        match *self {
            IdleRule::End { after } | IdleRule::Suspend { after } => after,
            IdleRule::Ladder { floor, cap, .. } => reuse.expected.unwrap_or(cap).clamp(floor, cap),
            IdleRule::Faasmem { floor, keep_alive, .. } => reuse.p99.unwrap_or(floor).clamp(floor, keep_alive),
        }
    }

    /// The action that a VM which has been idle for `idle` is due for: the deepest one that it has not refused.
    pub fn due(&self, idle: Duration, vm: impl Into<Descended>, reuse: Reuse) -> Option<IdleAction> {
        if idle < self.first_time(reuse) {
            return None;
        }
        let vm = vm.into();
        if let IdleRule::Faasmem { keep_alive, offload, .. } = *self
            && idle < keep_alive
        {
            // A smaller part has left as well.
            let percent = bites_by(idle, self.delay(reuse), offload) * BITE;
            return Some(IdleAction::Offload { percent }).filter(|action| percent > 0 && vm.may_take(*action));
        }
        let due = self.times(reuse).into_iter().filter(|(after, _)| *after <= idle).map(|(_, action)| action);
        due.rev().find(|action| vm.may_take(*action))
    }

    /// An idle time before which there is no action.
    fn first_time(&self, reuse: Reuse) -> Duration {
        match *self {
            IdleRule::Ladder { floor, .. } => floor,
            _ => self.delay(reuse),
        }
    }

    /// The next action of a VM whatever its idle time: memory is short. A spilled VM is not suspended before its time,
    /// because that brings its spilled pages back into memory. All of a VM is offloaded at once.
    pub fn next(&self, vm: impl Into<Descended>) -> Option<IdleAction> {
        let vm = vm.into();
        if let IdleRule::Faasmem { .. } = self {
            return [IdleAction::Offload { percent: 100 }, IdleAction::End].into_iter().find(|next| vm.may_take(*next));
        }
        let next =
            self.times(Reuse::default()).into_iter().map(|(_, action)| action).find(|action| vm.may_take(*action));
        next.filter(|next| vm.step != Some(Step::Spilled) || *next != IdleAction::Step(Step::Suspended))
    }

    /// The idle time of the first action after `idle`.
    pub fn next_time(&self, idle: Duration, reuse: Reuse) -> Option<Duration> {
        if let IdleRule::Faasmem { keep_alive, offload, .. } = *self
            && idle < keep_alive
        {
            let delay = self.delay(reuse);
            let taken = bites_by(idle, delay, offload);
            let next = (taken < MOST_BITES).then(|| bite_time(delay, offload, (taken + 1) * BITE));
            return Some(next.map_or(keep_alive, |next| next.min(keep_alive)));
        }
        self.times(reuse).into_iter().map(|(after, _)| after).find(|after| *after > idle)
    }

    /// Returns whether its VMs are suspended in the end.
    pub fn suspends(&self) -> bool {
        matches!(self, IdleRule::Suspend { .. } | IdleRule::Ladder { .. })
    }

    /// Returns whether a VM that serves requests gives untouched memory back between them. `is_short`: the host has
    /// less memory left than its reserve.
    pub fn gives_back(&self, is_short: impl FnOnce() -> bool) -> bool {
        match self {
            IdleRule::Ladder { give_back: GiveBack::Always, .. } => true,
            IdleRule::Ladder { give_back: GiveBack::Pressure, .. } => is_short(),
            _ => false,
        }
    }

    /// Returns whether a VM ends with its answer.
    pub fn ends_at_once(&self) -> bool {
        matches!(self, IdleRule::End { after: Duration::ZERO })
    }
}

/// The pauses up to which a VM is likely to be asked again, by those of its function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reuse {
    /// The 99th percentile by nearest rank; `None` of fewer than 8 pauses.
    pub p99: Option<Duration>,
    /// The pause that one of a hundred is expected to exceed; `None` of no pause. Of 99 pauses or more it is `p99`.
    /// The n+1st of n+1 equally distributed pauses is the longest in one of n+1 cases, so that of fewer pauses it lies
    /// beyond their longest: by (100 / (n + 1))^½, for a tail P(pause > x) ~ x^-2.
    pub expected: Option<Duration>,
}

/// The idle time after which so much of a VM's local memory is offloaded.
fn bite_time(delay: Duration, offload: Duration, percent: u8) -> Duration {
    delay + offload.mul_f64(f64::from(percent) / 100.0)
}

/// The bites that a VM which has been idle for `idle` has lost: as many as [`bite_time`] says. A simulation asks too
/// often for a look at each of them.
fn bites_by(idle: Duration, delay: Duration, offload: Duration) -> u8 {
    let Some(since) = idle.checked_sub(delay) else { return 0 };
    let share = since.as_secs_f64() / offload.as_secs_f64();
    let mut bites = (share * f64::from(MOST_BITES)).min(f64::from(MOST_BITES)) as u8;
    // The division was rounded.
    while bites > 0 && bite_time(delay, offload, bites * BITE) > idle {
        bites -= 1;
    }
    while bites < MOST_BITES && bite_time(delay, offload, (bites + 1) * BITE) <= idle {
        bites += 1;
    }
    bites
}

/// Pauses between the answers of a function's VMs and the next requests to them.
#[derive(Clone, Debug, Default)]
pub struct ReuseIntervals {
    last: VecDeque<Duration>,
    /// The same, ascending: the percentile is asked for far more often than an interval is added.
    sorted: Vec<Duration>,
}

impl ReuseIntervals {
    /// The most that are kept: the last ones.
    const MOST: usize = 256;
    /// The fewest from which a percentile is taken.
    const FEWEST: usize = 8;

    pub fn add(&mut self, interval: Duration) {
        if self.last.len() == Self::MOST
            && let Some(oldest) = self.last.pop_front()
            && let Ok(at) = self.sorted.binary_search(&oldest)
        {
            self.sorted.remove(at);
        }
        self.last.push_back(interval);
        let at = self.sorted.partition_point(|other| *other < interval);
        self.sorted.insert(at, interval);
    }

    /// The number of intervals that are kept.
    pub fn count(&self) -> usize {
        self.last.len()
    }

    /// Returns up to which pause a VM is likely to be asked again.
    pub fn reuse(&self) -> Reuse {
        let count = self.sorted.len();
        let rank = (count * 99).div_ceil(100);
        let Some(percentile) = rank.checked_sub(1).map(|at| self.sorted[at]) else { return Reuse::default() };
        let beyond = (100.0 / (count + 1) as f64).sqrt().max(1.0);
        Reuse { p99: (count >= Self::FEWEST).then_some(percentile), expected: Some(percentile.mul_f64(beyond)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);
    /// A function without pauses.
    const NEW: Reuse = Reuse { p99: None, expected: None };

    fn usual(pause: Duration) -> Reuse {
        Reuse { p99: Some(pause), expected: Some(pause) }
    }

    fn ladder() -> IdleRule {
        IdleRule::Ladder { floor: 10 * S, cap: 600 * S, give_back: GiveBack::Pressure }
    }

    #[test]
    fn a_ladder_follows_the_intervals_between_its_floor_and_its_cap() {
        let times = |expected: Option<Duration>| -> Vec<u64> {
            let reuse = Reuse { p99: None, expected };
            ladder().times(reuse).into_iter().map(|(after, _)| after.as_secs()).collect()
        };
        assert_eq!(times(None), [10, 600, 600, 600]);
        assert_eq!(times(Some(S)), [10, 10, 20, 40]);
        assert_eq!(times(Some(60 * S)), [10, 60, 120, 240]);
        assert_eq!(times(Some(300 * S)), [10, 300, 600, 600]);
        assert_eq!(times(Some(7200 * S)), [10, 600, 600, 600]);
    }

    #[test]
    fn a_vm_takes_the_deepest_step_that_is_due_and_none_twice() {
        let due = |idle: u64, step| ladder().due(idle as u32 * S, step, usual(60 * S));
        let step = |step| Some(IdleAction::Step(step));
        assert_eq!(due(9, None), None);
        assert_eq!(due(10, None), step(Step::Parked));
        assert_eq!(due(59, Some(Step::Parked)), None);
        assert_eq!(due(60, Some(Step::Parked)), step(Step::Trimmed));
        assert_eq!(due(120, Some(Step::Trimmed)), step(Step::Spilled));
        assert_eq!(due(240, None), step(Step::Suspended));
        assert_eq!(due(9000, Some(Step::Suspended)), None);
        assert_eq!(ladder().next(None), step(Step::Parked));
        assert_eq!(ladder().next(Some(Step::Trimmed)), step(Step::Spilled));
        assert_eq!(ladder().next(Some(Step::Spilled)), None);
        assert_eq!(ladder().next_time(60 * S, usual(60 * S)), Some(120 * S));
        let end = IdleRule::End { after: 5 * S };
        assert_eq!(end.due(5 * S, Some(Step::Trimmed), NEW), Some(IdleAction::End));
        assert_eq!(end.due(4 * S, None, NEW), None);
    }

    #[test]
    fn a_semi_warm_vm_is_offloaded_bit_by_bit_and_ends_at_its_keep_alive_time() {
        let rule = IdleRule::Faasmem { floor: 60 * S, keep_alive: 600 * S, offload: 100 * S };
        let times = rule.times(NEW);
        assert_eq!((times.len(), times[0]), (51, (62 * S, IdleAction::Offload { percent: 2 })));
        assert_eq!(times[49..], [(160 * S, IdleAction::Offload { percent: 100 }), (600 * S, IdleAction::End)]);
        let part = |percent| Some(IdleAction::Offload { percent });
        let at = |offloaded| Descended { step: Some(Step::Spilled), offloaded, ..Descended::default() };
        assert_eq!(rule.due(61 * S, None, NEW), None);
        assert_eq!(rule.due(62 * S, None, NEW), part(2));
        assert_eq!(rule.due(63 * S, at(2), NEW), None);
        assert_eq!(rule.due(111 * S, at(2), NEW), part(50));
        assert_eq!(rule.due(599 * S, at(98), NEW), part(100));
        assert_eq!((rule.due(599 * S, at(100), NEW), rule.due(600 * S, at(100), NEW)), (None, Some(IdleAction::End)));
        // It is usual for the function that a VM waits for long: only so much is offloaded before the end.
        let long = usual(570 * S);
        assert_eq!((rule.due(571 * S, None, long), rule.due(599 * S, None, long)), (None, part(28)));
        assert_eq!(rule.due(600 * S, None, usual(9000 * S)), Some(IdleAction::End));
        assert_eq!((rule.next_time(60 * S, NEW), rule.next_time(62 * S, NEW)), (Some(62 * S), Some(64 * S)));
        assert_eq!((rule.next_time(200 * S, NEW), rule.next_time(600 * S, NEW)), (Some(600 * S), None));
        // Memory is short.
        assert_eq!((rule.next(None), rule.next(at(100))), (part(100), Some(IdleAction::End)));
        let mut refused = Descended::default();
        refused.refuse(Step::Spilled);
        assert_eq!((rule.due(599 * S, refused, NEW), rule.next(refused)), (None, Some(IdleAction::End)));
    }

    proptest! {
        #[test]
        fn the_bites_of_a_vm_follow_from_its_times(
            floor in 1_u64..1000, keep_alive in 1000_u64..3000, offload in 1_u64..2000, idle in 0_u64..4_000_000,
            p99 in prop::option::of(0_u64..4000), offloaded in 0_u8..50,
        ) {
            let ms = Duration::from_millis;
            let rule = IdleRule::Faasmem { floor: ms(floor), keep_alive: ms(keep_alive), offload: ms(offload) };
            let reuse = Reuse { p99: p99.map(ms), expected: None };
            let mut idle = Duration::from_micros(idle);
            // Moments at which a bite is due matter most.
            for _ in 0..3 {
                let vm = Descended { step: Some(Step::Spilled), offloaded: offloaded * 2, ..Descended::default() };
                let times = rule.times(reuse);
                let due = times.iter().rev().find(|(after, action)| *after <= idle && vm.may_take(*action));
                prop_assert_eq!(rule.due(idle, vm, reuse), due.map(|(_, action)| *action));
                let next = times.iter().map(|(after, _)| *after).find(|after| *after > idle);
                prop_assert_eq!(rule.next_time(idle, reuse), next);
                idle = next.unwrap_or_default();
            }
        }
    }

    #[test]
    fn a_refused_step_leaves_the_others_to_be_taken() {
        let step = |step| Some(IdleAction::Step(step));
        let mut vm = Descended::default();
        let due = |idle: u64, vm: Descended| ladder().due(idle as u32 * S, vm, usual(60 * S));
        assert_eq!(due(240, vm), step(Step::Suspended));
        vm.refuse(Step::Suspended);
        assert_eq!(due(240, vm), step(Step::Spilled));
        assert_eq!(due(60, vm), step(Step::Trimmed));
        vm.step = Some(Step::Parked);
        vm.refuse(Step::Spilled);
        assert_eq!(due(9000, vm), step(Step::Trimmed));
        vm.step = Some(Step::Trimmed);
        assert_eq!((due(9000, vm), ladder().next(vm)), (None, None));
        // A VM whose pages cannot be trimmed or spilled is suspended all the same, also if memory is short.
        let mut booted = Descended::from(Some(Step::Parked));
        booted.refuse(Step::Trimmed);
        assert_eq!(ladder().next(booted), step(Step::Spilled));
        booted.refuse(Step::Spilled);
        assert_eq!((due(120, booted), due(240, booted)), (None, step(Step::Suspended)));
        assert_eq!(ladder().next(booted), step(Step::Suspended));
        let suspend = IdleRule::Suspend { after: S };
        assert_eq!((suspend.due(9 * S, vm, NEW), suspend.next(vm)), (None, None));
        let end = IdleRule::End { after: S };
        assert_eq!((end.due(9 * S, vm, NEW), end.next(vm)), (Some(IdleAction::End), Some(IdleAction::End)));
    }

    #[test]
    fn the_percentile_is_of_the_last_intervals() {
        let mut intervals = ReuseIntervals::default();
        assert_eq!(intervals.reuse(), NEW);
        (1..8).for_each(|s| intervals.add(s * S));
        assert_eq!(intervals.reuse().p99, None);
        intervals.add(8 * S);
        assert_eq!(intervals.reuse().p99, Some(8 * S));
        (0..256).for_each(|s| intervals.add(s * S));
        assert_eq!((intervals.count(), intervals.reuse()), (256, usual(253 * S)));
    }

    #[test]
    fn a_pause_longer_than_those_that_are_known_is_expected() {
        let mut intervals = ReuseIntervals::default();
        let expected: Vec<_> = (0..99)
            .map(|_| {
                intervals.add(10 * S);
                intervals.reuse().expected.unwrap().as_secs()
            })
            .collect();
        // (100 / 2)^½, (100 / 4)^½, (100 / 9)^½ and (100 / 25)^½ times the longest.
        assert_eq!((expected[0], expected[2], expected[7], expected[23]), (70, 50, 33, 20));
        assert!(expected.is_sorted_by(|one, next| one >= next));
        assert_eq!(expected[98], 10);
    }

    #[test]
    fn settings_of_another_policy_are_refused() {
        let read = |text: &str| serde_json::from_str::<IdleSpec>(text).unwrap();
        for (text, bad) in [
            (r#"{"policy":"ladder","keep_alive_ms":1}"#, BadIdle::KeepAliveOfLadder),
            (r#"{"policy":"keep","floor_ms":1}"#, BadIdle::FloorOfOther),
            (r#"{"policy":"faasmem","cap_ms":1}"#, BadIdle::CapOfOther),
            (r#"{"policy":"ladder","offload_ms":1}"#, BadIdle::OffloadOfOther),
            (r#"{"policy":"faasmem","keep_alive_ms":5000}"#, BadIdle::BoundsOfFaasmem),
            (r#"{"policy":"faasmem","offload_ms":0}"#, BadIdle::BoundsOfFaasmem),
            (r#"{"policy":"ladder","floor_ms":700000}"#, BadIdle::Bounds),
            (r#"{"policy":"ladder","floor_ms":0}"#, BadIdle::Bounds),
        ] {
            assert_eq!(read(text).check(), Err(bad), "{text}");
        }
        let rule = |text: &str| read(text).rule(60 * S);
        assert!(rule(r#"{"policy":"end"}"#).ends_at_once());
        assert_eq!(rule(r#"{"policy":"keep"}"#), IdleRule::End { after: 60 * S });
        assert_eq!(rule(r#"{"policy":"suspend","keep_alive_ms":2000}"#), IdleRule::Suspend { after: 2 * S });
        assert_eq!(rule(r#"{"policy":"ladder"}"#), ladder());
        let faasmem = IdleRule::Faasmem { floor: 60 * S, keep_alive: 600 * S, offload: 100 * S };
        assert_eq!(rule(r#"{"policy":"faasmem"}"#), faasmem);
        assert_eq!(read(r#"{"policy":"faasmem"}"#).check(), Ok(()));
        assert_eq!("ladder".parse(), Ok(IdlePolicy::Ladder));
        assert!("later".parse::<IdlePolicy>().unwrap_err().to_string().contains("keep, end, suspend, ladder, faasmem"));
    }
}
