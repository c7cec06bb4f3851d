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
    /// The steps that it has refused to take, in the order of [`Step::ALL`].
    refused: [bool; Step::ALL.len()],
}

impl Descended {
    /// Notes that the VM has refused a step, and is as it was.
    pub fn refuse(&mut self, step: Step) {
        self.refused[step as usize] = true;
    }

    /// Returns whether an action leads further down, and was not refused.
    fn may_take(&self, action: IdleAction) -> bool {
        match action {
            IdleAction::End => true,
            IdleAction::Step(next) => Some(next) > self.step && !self.refused[next as usize],
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
}

impl IdlePolicy {
    const ALL: [(&'static str, IdlePolicy); 4] = [
        ("keep", IdlePolicy::Keep),
        ("end", IdlePolicy::End),
        ("suspend", IdlePolicy::Suspend),
        ("ladder", IdlePolicy::Ladder),
    ];
}

/// The text that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Unknown idle policy `{0}`; known: keep, end, suspend, ladder.")]
pub struct NoIdlePolicy(String);

impl FromStr for IdlePolicy {
    type Err = NoIdlePolicy;

    fn from_str(text: &str) -> Result<Self, NoIdlePolicy> {
        let found = IdlePolicy::ALL.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, policy)| policy).ok_or_else(|| NoIdlePolicy(text.to_owned()))
    }
}

/// The fate of a function's VMs that wait for requests, as users give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct IdleSpec {
    pub policy: IdlePolicy,
    /// `keep`, `end` and `suspend`: the time without a request, ms. None: 0 for `end`, else `--idle-timeout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_alive_ms: Option<u64>,
    /// `ladder`: a VM is parked after this time, and takes no further step before it, ms. None: 10,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub floor_ms: Option<u64>,
    /// `ladder`: a VM is suspended after this time at the latest, ms. None: 600,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap_ms: Option<u64>,
}

/// The earliest and the latest time of a ladder that names none.
const FLOOR: Duration = Duration::from_secs(10);
const CAP: Duration = Duration::from_secs(600);
/// A trimmed VM is spilled, and suspended, after so many times the time after which it was trimmed.
const SPILL_PATIENCE: u32 = 2;
const SUSPEND_PATIENCE: u32 = 4;

/// The reason why a setting makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadIdle {
    #[error("`idle.keep_alive_ms` is for the policies `keep`, `end` and `suspend`: leave it out of `ladder`.")]
    KeepAliveOfLadder,
    #[error("`idle.floor_ms` and `idle.cap_ms` are for the policy `ladder`: leave them out of others.")]
    BoundsOfOther,
    #[error("`idle.floor_ms` must be 1 or more, and `idle.cap_ms` (default: 600000) not less than it.")]
    Bounds,
}

impl IdleSpec {
    /// The policy with its default times.
    pub fn of(policy: IdlePolicy) -> IdleSpec {
        IdleSpec { policy, keep_alive_ms: None, floor_ms: None, cap_ms: None }
    }

    /// Refuses values that belong to another policy, or exclude each other.
    pub fn check(&self) -> Result<(), BadIdle> {
        let has_bounds = self.floor_ms.is_some() || self.cap_ms.is_some();
        match self.policy {
            IdlePolicy::Ladder if self.keep_alive_ms.is_some() => Err(BadIdle::KeepAliveOfLadder),
            IdlePolicy::Ladder if self.floor() > self.cap() || self.floor().is_zero() => Err(BadIdle::Bounds),
            IdlePolicy::Ladder => Ok(()),
            _ if has_bounds => Err(BadIdle::BoundsOfOther),
            _ => Ok(()),
        }
    }

    /// Returns whether its VMs may be suspended.
    pub fn suspends(&self) -> bool {
        matches!(self.policy, IdlePolicy::Suspend | IdlePolicy::Ladder)
    }

    fn floor(&self) -> Duration {
        self.floor_ms.map_or(FLOOR, Duration::from_millis)
    }

    fn cap(&self) -> Duration {
        self.cap_ms.map_or(CAP, Duration::from_millis)
    }

    /// The rule, where `keep_alive` is the time of policies that name none.
    pub fn rule(&self, keep_alive: Duration) -> IdleRule {
        let own = self.keep_alive_ms.map(Duration::from_millis);
        match self.policy {
            IdlePolicy::Keep => IdleRule::End { after: own.unwrap_or(keep_alive) },
            IdlePolicy::End => IdleRule::End { after: own.unwrap_or_default() },
            IdlePolicy::Suspend => IdleRule::Suspend { after: own.unwrap_or(keep_alive) },
            IdlePolicy::Ladder => IdleRule::Ladder { floor: self.floor(), cap: self.cap() },
        }
    }
}

/// An action that an idle VM is due for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleAction {
    Step(Step),
    /// The VM ends.
    End,
}

/// The times of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdleRule {
    End { after: Duration },
    Suspend { after: Duration },
    Ladder { floor: Duration, cap: Duration },
}

impl IdleRule {
    /// The actions with the idle time of each, the shortest first. `p99`: see [`ReuseIntervals::p99`].
    pub fn times(&self, p99: Option<Duration>) -> Vec<(Duration, IdleAction)> {
        match *self {
            IdleRule::End { after } => vec![(after, IdleAction::End)],
            IdleRule::Suspend { after } => vec![(after, IdleAction::Step(Step::Suspended))],
            IdleRule::Ladder { floor, cap } => {
                let trim = self.delay(p99);
                let spill = trim.saturating_mul(SPILL_PATIENCE).min(cap);
                let suspend = trim.saturating_mul(SUSPEND_PATIENCE).min(cap);
                let times =
                    [(floor, Step::Parked), (trim, Step::Trimmed), (spill, Step::Spilled), (suspend, Step::Suspended)];
                times.map(|(after, step)| (after, IdleAction::Step(step))).into()
            }
        }
    }

    /// The idle time up to which a VM is likely to be asked again.
    pub fn delay(&self, p99: Option<Duration>) -> Duration {
        match *self {
            IdleRule::End { after } | IdleRule::Suspend { after } => after,
            IdleRule::Ladder { floor, cap } => p99.unwrap_or(floor).clamp(floor, cap),
        }
    }

    /// The action that a VM which has been idle for `idle` is due for: the deepest one that it has not refused.
    pub fn due(&self, idle: Duration, vm: impl Into<Descended>, p99: Option<Duration>) -> Option<IdleAction> {
        let vm = vm.into();
        let due = self.times(p99).into_iter().filter(|(after, _)| *after <= idle).map(|(_, action)| action);
        due.rev().find(|action| vm.may_take(*action))
    }

    /// The next action of a VM whatever its idle time: memory is short. A spilled VM is not suspended before its time,
    /// because that brings its spilled pages back into memory.
    pub fn next(&self, vm: impl Into<Descended>) -> Option<IdleAction> {
        let vm = vm.into();
        let next = self.times(None).into_iter().map(|(_, action)| action).find(|action| vm.may_take(*action));
        next.filter(|next| vm.step != Some(Step::Spilled) || *next != IdleAction::Step(Step::Suspended))
    }

    /// The idle time of the first action after `idle`.
    pub fn next_time(&self, idle: Duration, p99: Option<Duration>) -> Option<Duration> {
        self.times(p99).into_iter().map(|(after, _)| after).find(|after| *after > idle)
    }

    /// Returns whether its VMs are suspended in the end.
    pub fn suspends(&self) -> bool {
        !matches!(self, IdleRule::End { .. })
    }

    /// Returns whether a VM ends with its answer.
    pub fn ends_at_once(&self) -> bool {
        matches!(self, IdleRule::End { after: Duration::ZERO })
    }
}

/// Pauses between the answers of a function's VMs and the next requests to them.
#[derive(Clone, Debug, Default)]
pub struct ReuseIntervals {
    last: VecDeque<Duration>,
    /// Made anew with each interval: it is asked for far more often.
    p99: Option<Duration>,
}

impl ReuseIntervals {
    /// The most that are kept: the last ones.
    const MOST: usize = 256;
    /// The fewest from which a percentile is taken.
    const FEWEST: usize = 8;

    pub fn add(&mut self, interval: Duration) {
        if self.last.len() == Self::MOST {
            self.last.pop_front();
        }
        self.last.push_back(interval);
        if self.last.len() >= Self::FEWEST {
            let mut sorted: Vec<Duration> = self.last.iter().copied().collect();
            sorted.sort_unstable();
            let rank = (sorted.len() * 99).div_ceil(100);
            self.p99 = sorted.get(rank - 1).copied();
        }
    }

    /// The number of intervals that are kept.
    pub fn count(&self) -> usize {
        self.last.len()
    }

    /// The 99th percentile by nearest rank; `None` of fewer than 8 intervals.
    pub fn p99(&self) -> Option<Duration> {
        self.p99
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn ladder() -> IdleRule {
        IdleRule::Ladder { floor: 10 * S, cap: 600 * S }
    }

    #[test]
    fn a_ladder_follows_the_intervals_between_its_floor_and_its_cap() {
        let times = |p99: Option<Duration>| -> Vec<u64> {
            ladder().times(p99).into_iter().map(|(after, _)| after.as_secs()).collect()
        };
        assert_eq!(times(None), [10, 10, 20, 40]);
        assert_eq!(times(Some(S)), [10, 10, 20, 40]);
        assert_eq!(times(Some(60 * S)), [10, 60, 120, 240]);
        assert_eq!(times(Some(300 * S)), [10, 300, 600, 600]);
        assert_eq!(times(Some(7200 * S)), [10, 600, 600, 600]);
    }

    #[test]
    fn a_vm_takes_the_deepest_step_that_is_due_and_none_twice() {
        let due = |idle: u64, step| ladder().due(idle as u32 * S, step, Some(60 * S));
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
        assert_eq!(ladder().next_time(60 * S, Some(60 * S)), Some(120 * S));
        let end = IdleRule::End { after: 5 * S };
        assert_eq!(end.due(5 * S, Some(Step::Trimmed), None), Some(IdleAction::End));
        assert_eq!(end.due(4 * S, None, None), None);
    }

    #[test]
    fn a_refused_step_leaves_the_others_to_be_taken() {
        let step = |step| Some(IdleAction::Step(step));
        let mut vm = Descended::default();
        let due = |idle: u64, vm: Descended| ladder().due(idle as u32 * S, vm, Some(60 * S));
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
        assert_eq!((suspend.due(9 * S, vm, None), suspend.next(vm)), (None, None));
        let end = IdleRule::End { after: S };
        assert_eq!((end.due(9 * S, vm, None), end.next(vm)), (Some(IdleAction::End), Some(IdleAction::End)));
    }

    #[test]
    fn the_percentile_is_of_the_last_intervals() {
        let mut intervals = ReuseIntervals::default();
        (1..8).for_each(|s| intervals.add(s * S));
        assert_eq!(intervals.p99(), None);
        intervals.add(8 * S);
        assert_eq!(intervals.p99(), Some(8 * S));
        (0..256).for_each(|s| intervals.add(s * S));
        assert_eq!((intervals.count(), intervals.p99()), (256, Some(253 * S)));
    }

    #[test]
    fn settings_of_another_policy_are_refused() {
        let read = |text: &str| serde_json::from_str::<IdleSpec>(text).unwrap();
        for (text, bad) in [
            (r#"{"policy":"ladder","keep_alive_ms":1}"#, BadIdle::KeepAliveOfLadder),
            (r#"{"policy":"keep","floor_ms":1}"#, BadIdle::BoundsOfOther),
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
        assert_eq!("ladder".parse(), Ok(IdlePolicy::Ladder));
        assert!("later".parse::<IdlePolicy>().unwrap_err().to_string().contains("keep, end, suspend, ladder"));
    }
}
