//! Counts of the processes that were to serve a VM of another function, by the function of that VM.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use utoipa::ToSchema;

use super::counters::head;

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
#[derive(Debug, Default)]
pub(super) struct RepurposeCounts(Mutex<BTreeMap<String, RepurposeTally>>);

impl RepurposeCounts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, RepurposeTally>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, func_name: &str, end: RepurposeEnd) {
        let mut functions = self.lock();
        let tally = functions.entry(func_name.to_owned()).or_default();
        let counter = match end {
            RepurposeEnd::Done => &mut tally.done,
            RepurposeEnd::Unfit => &mut tally.unfit,
            RepurposeEnd::Refused => &mut tally.refused,
            RepurposeEnd::Failed => &mut tally.failed,
        };
        *counter += 1;
    }

    /// The counts of one function.
    pub(super) fn of(&self, func_name: &str) -> RepurposeTally {
        self.lock().get(func_name).copied().unwrap_or_default()
    }

    /// Drops the counts of a removed function.
    pub(super) fn forget(&self, func_name: &str) {
        self.lock().remove(func_name);
    }

    /// Appends all counters.
    pub(super) fn write(&self, text: &mut String) -> std::fmt::Result {
        let help = "Processes of finished VMs that were there for another VM, by its function (docs/serve.md)";
        head(text, "tvmm_repurposes_total", "counter", help)?;
        for (name, tally) in self.lock().iter() {
            let RepurposeTally { done, unfit, refused, failed } = *tally;
            for (end, count) in [("done", done), ("unfit", unfit), ("refused", refused), ("failed", failed)] {
                writeln!(text, "tvmm_repurposes_total{{function=\"{name}\",end=\"{end}\"}} {count}")?;
            }
        }
        Ok(())
    }
}
