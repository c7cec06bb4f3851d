//! Counts of events by function: the table of those that are one number an event.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::counters::head;

/// The counts of one function, since the daemon began.
pub(super) trait Tally: Copy + Default {
    type Event;
    /// The metric that has the counts, its label that names the event, and its help.
    const METRIC: (&'static str, &'static str, &'static str);

    /// The counter of an event.
    fn counter(&mut self, event: Self::Event) -> &mut u64;

    /// All counts, and the names of their events in the metric.
    fn counts(self) -> Vec<(&'static str, u64)>;
}

/// The counts of all functions.
#[derive(Debug, Default)]
pub(super) struct Tallies<T>(Mutex<BTreeMap<String, T>>);

impl<T: Tally> Tallies<T> {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, func_name: &str, event: T::Event) {
        *self.lock().entry(func_name.to_owned()).or_default().counter(event) += 1;
    }

    /// The counts of one function.
    pub(super) fn of(&self, func_name: &str) -> T {
        self.lock().get(func_name).copied().unwrap_or_default()
    }

    /// Drops the counts of a removed function.
    pub(super) fn forget(&self, func_name: &str) {
        self.lock().remove(func_name);
    }

    /// Appends all counters.
    pub(super) fn write(&self, text: &mut String) -> std::fmt::Result {
        let (metric, label, help) = T::METRIC;
        head(text, metric, "counter", help)?;
        for (name, tally) in self.lock().iter() {
            for (event, count) in tally.counts() {
                writeln!(text, "{metric}{{function=\"{name}\",{label}=\"{event}\"}} {count}")?;
            }
        }
        Ok(())
    }
}
