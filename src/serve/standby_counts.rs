//! Counts of what became of standby VMs, by function.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::Notify;
use utoipa::ToSchema;

use super::counters::head;

/// An event in the life of a function's standby VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StandbyEvent {
    /// An invocation took a VM.
    Hit,
    /// An invocation that could have taken a VM found none ready.
    Miss,
    /// A VM was restored to stand by.
    Refill,
    /// A VM went back to its snapshot after its invocation, and stands by again.
    Rewind,
    /// A restore, a rewind or the start of a VM that stood by failed.
    Failed,
    /// A VM ended while it stood by.
    Lost,
    /// A VM that stood by made room for another VM.
    Evicted,
}

/// The counts of one function, since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct StandbyTally {
    /// Invocations that took a standby VM.
    hits: u64,
    /// Invocations by the function's own settings that found none ready.
    misses: u64,
    /// VMs restored to stand by.
    refills: u64,
    /// VMs that went back to their snapshot after an invocation, and stood by again.
    rewinds: u64,
    /// Restores, rewinds and resumptions of standby VMs that failed.
    failed: u64,
    /// VMs that ended while they stood by.
    lost: u64,
    /// VMs that stood by, and made room for others.
    evicted: u64,
}

/// The counts of all functions.
#[derive(Debug, Default)]
pub(super) struct StandbyCounts {
    functions: Mutex<BTreeMap<String, StandbyTally>>,
    /// Notified when VMs may have to be restored or ended.
    pub(super) changed: Notify,
}

impl StandbyCounts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, StandbyTally>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, func_name: &str, event: StandbyEvent) {
        let mut functions = self.lock();
        let tally = functions.entry(func_name.to_owned()).or_default();
        let counter = match event {
            StandbyEvent::Hit => &mut tally.hits,
            StandbyEvent::Miss => &mut tally.misses,
            StandbyEvent::Refill => &mut tally.refills,
            StandbyEvent::Rewind => &mut tally.rewinds,
            StandbyEvent::Failed => &mut tally.failed,
            StandbyEvent::Lost => &mut tally.lost,
            StandbyEvent::Evicted => &mut tally.evicted,
        };
        *counter += 1;
    }

    /// The counts of one function.
    pub(super) fn of(&self, func_name: &str) -> StandbyTally {
        self.lock().get(func_name).copied().unwrap_or_default()
    }

    /// Drops the counts of a removed function.
    pub(super) fn forget(&self, func_name: &str) {
        self.lock().remove(func_name);
    }

    /// Appends all counters.
    pub(super) fn write(&self, text: &mut String) -> std::fmt::Result {
        head(text, "tvmm_standby_events_total", "counter", "Events of standby VMs, by function (docs/lifecycle.md)")?;
        for (name, tally) in self.lock().iter() {
            let StandbyTally { hits, misses, refills, rewinds, failed, lost, evicted } = *tally;
            for (event, count) in [
                ("hit", hits),
                ("miss", misses),
                ("refill", refills),
                ("rewind", rewinds),
                ("failed", failed),
                ("lost", lost),
                ("evicted", evicted),
            ] {
                writeln!(text, "tvmm_standby_events_total{{function=\"{name}\",event=\"{event}\"}} {count}")?;
            }
        }
        Ok(())
    }
}
