//! Counts of what became of standby VMs, by function.

use serde::Serialize;
use tokio::sync::Notify;
use utoipa::ToSchema;

use super::tallies::{Tallies, Tally};

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
    pub(super) events: Tallies<StandbyTally>,
    /// Notified when VMs may have to be restored or ended.
    pub(super) changed: Notify,
}

impl Tally for StandbyTally {
    type Event = StandbyEvent;
    const METRIC: (&'static str, &'static str, &'static str) =
        ("tvmm_standby_events_total", "event", "Events of standby VMs, by function (docs/lifecycle.md)");

    fn counter(&mut self, event: StandbyEvent) -> &mut u64 {
        match event {
            StandbyEvent::Hit => &mut self.hits,
            StandbyEvent::Miss => &mut self.misses,
            StandbyEvent::Refill => &mut self.refills,
            StandbyEvent::Rewind => &mut self.rewinds,
            StandbyEvent::Failed => &mut self.failed,
            StandbyEvent::Lost => &mut self.lost,
            StandbyEvent::Evicted => &mut self.evicted,
        }
    }

    fn counts(self) -> Vec<(&'static str, u64)> {
        let StandbyTally { hits, misses, refills, rewinds, failed, lost, evicted } = self;
        vec![
            ("hit", hits),
            ("miss", misses),
            ("refill", refills),
            ("rewind", rewinds),
            ("failed", failed),
            ("lost", lost),
            ("evicted", evicted),
        ]
    }
}
