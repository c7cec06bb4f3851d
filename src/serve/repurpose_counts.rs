//! Counts of the processes that were to serve a VM of another function, by the function of that VM.

use serde::Serialize;
use utoipa::ToSchema;

use super::tallies::{Tallies, Tally};

/// The outcome for the process of a finished VM that was there when another VM was needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RepurposeEnd {
    /// It became the VM.
    Done,
    /// Its machine has another shape, so it was ended to make room.
    Unfit,
    /// It refused to become the VM, and was ended.
    Refused,
    /// It failed half-way, and was ended.
    Failed,
}

/// The counts of one function, since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct RepurposeTally {
    /// VMs of the function that took over the process of a finished VM.
    done: u64,
    /// Finished VMs that were ended for a VM of the function, because their machines have another shape.
    unfit: u64,
    /// Processes that refused to become a VM of the function. They were ended, and a new one was used.
    refused: u64,
    /// Processes that failed to become a VM of the function. They were ended, and a new one was used.
    failed: u64,
}

/// The counts of all functions.
pub(super) type RepurposeCounts = Tallies<RepurposeTally>;

impl Tally for RepurposeTally {
    type Event = RepurposeEnd;
    const METRIC: (&'static str, &'static str, &'static str) = (
        "tvmm_repurposes_total",
        "end",
        "Processes of finished VMs that were there for another VM, by its function (docs/serve.md)",
    );

    fn counter(&mut self, end: RepurposeEnd) -> &mut u64 {
        match end {
            RepurposeEnd::Done => &mut self.done,
            RepurposeEnd::Unfit => &mut self.unfit,
            RepurposeEnd::Refused => &mut self.refused,
            RepurposeEnd::Failed => &mut self.failed,
        }
    }

    fn counts(self) -> Vec<(&'static str, u64)> {
        let RepurposeTally { done, unfit, refused, failed } = self;
        vec![("done", done), ("unfit", unfit), ("refused", refused), ("failed", failed)]
    }
}
