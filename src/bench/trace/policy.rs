//! The fates of VMs between requests. The replay and the simulator decide by the same rules.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::tiering::idle::{BadIdle, GiveBack, IdlePolicy, IdleRule, IdleSpec};

/// A fate of VMs between requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    /// A VM waits for the next request of its function, for the keep-alive time.
    Keep,
    /// A VM ends after its request.
    End,
    /// As `End`, and the process may become the next VM.
    Repurpose,
    /// VMs stand by for their first request, and end after it.
    Standby,
    /// VMs stand by, and go back to their snapshot after each request.
    Rewind,
    /// A VM that waits is suspended, and woken by the next request.
    Suspend,
    /// A VM that waits gives its memory back step by step.
    Ladder,
    /// As `Ladder`, and a VM that serves requests gives untouched memory back between them.
    Shrink,
    /// A VM that waits for longer than is usual for its function is offloaded bit by bit, as FaaSMem does it.
    Faasmem,
}

impl Policy {
    pub(super) const ALL: [Policy; 9] = [
        Policy::Keep,
        Policy::End,
        Policy::Repurpose,
        Policy::Standby,
        Policy::Rewind,
        Policy::Suspend,
        Policy::Ladder,
        Policy::Faasmem,
        Policy::Shrink,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Policy::Keep => "keep",
            Policy::End => "end",
            Policy::Repurpose => "repurpose",
            Policy::Standby => "standby",
            Policy::Rewind => "rewind",
            Policy::Suspend => "suspend",
            Policy::Ladder => "ladder",
            Policy::Faasmem => "faasmem",
            Policy::Shrink => "shrink",
        }
    }

    /// The index of its colour in charts.
    pub(super) fn colour(self) -> usize {
        Policy::ALL.iter().position(|policy| *policy == self).unwrap_or_default()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Policy, String> {
        let names = Policy::ALL.map(Policy::name).join(", ");
        Policy::ALL.into_iter().find(|policy| policy.name() == name).ok_or_else(|| format!("known policies: {names}"))
    }
}

/// The fate of a VM after its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It waits for the next one as the service's policy for idle VMs says.
    Waits(IdleSpec),
    Ends,
    /// It goes back to its snapshot and stands by.
    Rewinds,
}

/// The processes of VMs that have finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Processes {
    /// They may become other VMs.
    Shared,
    End,
}

/// VMs of each function that stand by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) min: usize,
    pub(super) max: usize,
}

/// Times of VMs that wait, ms of the real clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// `keep` and `faasmem`: time without a request until the end. `ladder`: the time of the last step, at the latest.
    pub(super) keep_alive_ms: u64,
    /// `suspend`: time without a request until the suspension. `ladder`: the time of the first step. `faasmem`: the
    /// earliest time at which a VM begins to be offloaded.
    pub(super) floor_ms: u64,
    /// `faasmem`: the time in which all of a VM is offloaded.
    pub(super) offload_ms: u64,
}

/// A policy with its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) policy: Policy,
    pub(super) fate: Fate,
    pub(super) standby: Option<Set>,
    pub(super) processes: Processes,
}

impl Rules {
    /// `standby`: VMs of each function that stand by, by policies that have such.
    ///
    /// # Errors
    /// The service does not take these times.
    pub(super) fn new(policy: Policy, times: Times, standby: usize) -> Result<Rules, BadIdle> {
        let set = Some(Set { min: standby, max: standby * 4 });
        let after = |policy, ms| Fate::Waits(IdleSpec { keep_alive_ms: Some(ms), ..IdleSpec::of(policy) });
        let steps = IdleSpec {
            floor_ms: Some(times.floor_ms),
            cap_ms: Some(times.keep_alive_ms),
            ..IdleSpec::of(IdlePolicy::Ladder)
        };
        let shrink = IdleSpec { give_back: Some(GiveBack::Always), ..steps };
        let faasmem = IdleSpec {
            keep_alive_ms: Some(times.keep_alive_ms),
            floor_ms: Some(times.floor_ms),
            offload_ms: Some(times.offload_ms),
            ..IdleSpec::of(IdlePolicy::Faasmem)
        };
        let rules = |fate, standby, processes| Rules { policy, fate, standby, processes };
        let rules = match policy {
            Policy::Keep => rules(after(IdlePolicy::Keep, times.keep_alive_ms), None, Processes::Shared),
            Policy::End => rules(Fate::Ends, None, Processes::End),
            Policy::Repurpose => rules(Fate::Ends, None, Processes::Shared),
            Policy::Standby => rules(Fate::Ends, set, Processes::Shared),
            Policy::Rewind => rules(Fate::Rewinds, set, Processes::Shared),
            Policy::Suspend => rules(after(IdlePolicy::Suspend, times.floor_ms), None, Processes::Shared),
            Policy::Ladder => rules(Fate::Waits(steps), None, Processes::Shared),
            Policy::Shrink => rules(Fate::Waits(shrink), None, Processes::Shared),
            Policy::Faasmem => rules(Fate::Waits(faasmem), None, Processes::Shared),
        };
        if let Fate::Waits(spec) = rules.fate {
            spec.check()?;
        }
        Ok(rules)
    }

    /// The settings of a function of the service.
    pub(super) fn of_function(&self) -> Map<String, Value> {
        let mut settings = Map::new();
        if let Some(Set { min, max }) = self.standby {
            settings.insert("standby".to_string(), json!({ "min": min, "max": max }));
            let after = if self.fate == Fate::Rewinds { "rewind" } else { "end" };
            settings.insert("after".to_string(), json!(after));
        }
        if let Fate::Waits(spec) = self.fate {
            settings.insert("idle".to_string(), json!(spec));
        }
        settings
    }

    /// The value `keep` of an invocation; `None` where the function's settings decide.
    pub(super) fn keep(&self) -> Option<bool> {
        (self.fate == Fate::Ends && self.standby.is_none()).then_some(false)
    }

    /// The times of the steps of VMs that wait; `None`: none waits.
    pub(super) fn idle(&self) -> Option<IdleRule> {
        match self.fate {
            Fate::Waits(spec) => Some(spec.rule(Duration::MAX)),
            Fate::Ends | Fate::Rewinds => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times { keep_alive_ms: 600, floor_ms: 10, offload_ms: 100 };

    #[test]
    fn policies_have_names_and_rules() {
        for policy in Policy::ALL {
            assert_eq!(policy.name().parse(), Ok(policy));
            let rules = Rules::new(policy, TIMES, 1).unwrap();
            let settings = rules.of_function();
            let decides = settings.contains_key("standby") || settings.contains_key("idle");
            assert_eq!(rules.keep().is_none(), decides, "{policy}");
            assert_eq!(rules.idle().is_some(), settings.contains_key("idle"), "{policy}");
        }
        assert!("restore".parse::<Policy>().unwrap_err().contains("keep, end"));
        assert!(Rules::new(Policy::Ladder, Times { floor_ms: 700, ..TIMES }, 1).is_err());
    }
}
