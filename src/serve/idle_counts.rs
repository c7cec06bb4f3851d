//! Counts of the steps of idle VMs, by function, and the pauses between their requests.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use super::counters::head;
use super::vm::offloading::GivenBack;
use super::vm::shrinking::Shrunk;
use crate::snapshot::PAGE_SIZE;
use crate::tiering::idle::{Reuse, ReuseIntervals, Step};

/// The outcome of a step down, or of the way up from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepEnd {
    Done,
    /// It was done as far as the spill file had room.
    Partly,
    /// A request came in the middle, or the VM was ended.
    Cancelled,
    /// It could not be done, and the VM is as it was.
    Refused,
    /// It failed because the VM no longer answers, and the VM was ended.
    Failed,
}

/// The outcomes of one step of a function's VMs, since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct StepTally {
    /// Steps down that VMs have taken.
    done: u64,
    /// Steps that ended before all pages had left, because the spill files have no more space.
    partly: u64,
    /// Steps given up for a request, or because the VM was ended.
    cancelled: u64,
    /// Steps that a VM could not take: it stayed as it was.
    refused: u64,
    /// Steps that failed: the VM was ended.
    failed: u64,
    /// Steps that took longer than 10 s, whatever their end.
    slow: u64,
    /// VMs taken back from this step by a request.
    woken: u64,
    /// Those of them for which the pages were brought ahead that they had used before.
    prefetched: u64,
    /// Suspensions without a profile of the used pages: there is no space for it, the kernel does not tell these pages
    /// (before Linux 6.7), few faults map them, or the VM was booted. Their wakes bring no pages ahead.
    unprofiled: u64,
    /// VMs that could not be taken back.
    wakes_failed: u64,
    /// Memory given back to the host, bytes.
    freed_bytes: u64,
    /// Time that the steps took that were done, µs.
    took_us: u64,
}

/// The outcome of the end of a window of requests, after which a VM gives untouched memory back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowOutcome {
    Done(Shrunk),
    /// The window goes on: the windows of its VM have taken more than their share of its life.
    PutOff,
    Refused,
}

/// The ends of windows of a function's VMs, since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct WindowTally {
    /// Windows that have ended.
    done: u64,
    /// Windows whose end was put off, because the VM's windows had taken 1 % of its life.
    put_off: u64,
    /// Windows at whose end a VM could give nothing back.
    refused: u64,
    /// Memory given back to the host because the requests of a window had not touched it, bytes.
    freed_bytes: u64,
    /// Of that, memory that a later window has touched, bytes.
    recalled_bytes: u64,
    /// Memory of the buckets `runtime` and `init` that was local at the end of the last window, bytes.
    local_bytes: u64,
    /// Memory that was given back by the end of the last window, and not touched since, bytes.
    away_bytes: u64,
}

/// The outcomes of all steps of a function's VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct IdleTally {
    parked: StepTally,
    trimmed: StepTally,
    spilled: StepTally,
    suspended: StepTally,
    /// VMs that serve requests, and give untouched memory back.
    windows: WindowTally,
    /// VMs that ended because they were idle.
    ended: u64,
    /// Suspended VMs that ended because the disk space was needed for others (`--suspend-disk`).
    evicted: u64,
    pages: PageTally,
}

/// Pages of VMs that wait, by what became of them since the daemon began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct PageTally {
    /// Copies of pages that equal the snapshot, given back. Their return is not counted.
    dropped: u64,
    /// Pages that went to a file.
    spilled: u64,
    /// Pages that came back from the file.
    recalled: u64,
    /// Of these, those that came back with the first request after they had gone: it was in vain.
    regretted: u64,
}

impl IdleTally {
    fn step(&mut self, step: Step) -> &mut StepTally {
        match step {
            Step::Parked => &mut self.parked,
            Step::Trimmed => &mut self.trimmed,
            Step::Spilled => &mut self.spilled,
            Step::Suspended => &mut self.suspended,
        }
    }
}

#[derive(Debug, Default)]
struct OfFunction {
    tally: IdleTally,
    intervals: ReuseIntervals,
}

/// The counts of all functions.
#[derive(Debug, Default)]
pub(super) struct IdleCounts(Mutex<BTreeMap<String, OfFunction>>);

impl IdleCounts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, OfFunction>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, func_name: &str, change: impl FnOnce(&mut OfFunction)) {
        change(self.lock().entry(func_name.to_owned()).or_default());
    }

    /// Counts a step down.
    pub(super) fn stepped(&self, func_name: &str, step: Step, end: StepEnd) {
        self.change(func_name, |of| {
            let tally = of.tally.step(step);
            let counter = match end {
                StepEnd::Done => &mut tally.done,
                StepEnd::Partly => &mut tally.partly,
                StepEnd::Cancelled => &mut tally.cancelled,
                StepEnd::Refused => &mut tally.refused,
                StepEnd::Failed => &mut tally.failed,
            };
            *counter += 1;
        });
    }

    /// Counts a step that takes long.
    pub(super) fn slow(&self, func_name: &str, step: Step) {
        self.change(func_name, |of| of.tally.step(step).slow += 1);
    }

    /// Counts memory that a step has given back.
    pub(super) fn freed(&self, func_name: &str, step: Step, bytes: u64) {
        self.change(func_name, |of| of.tally.step(step).freed_bytes += bytes);
    }

    /// Counts the pages that a step has given back.
    pub(super) fn gave_back(&self, func_name: &str, step: Step, given: GivenBack) {
        self.change(func_name, |of| {
            of.tally.step(step).freed_bytes += PAGE_SIZE * given.pages();
            of.tally.pages.dropped += given.dropped;
            of.tally.pages.spilled += given.spilled;
        });
    }

    /// Counts spilled pages that came back. `is_first`: with the first request since they had gone.
    pub(super) fn recalled(&self, func_name: &str, pages: u64, is_first: bool) {
        self.change(func_name, |of| {
            of.tally.pages.recalled += pages;
            of.tally.pages.regretted += if is_first { pages } else { 0 };
        });
    }

    /// Counts the time of a step that was done.
    pub(super) fn took(&self, func_name: &str, step: Step, time: Duration) {
        self.change(func_name, |of| of.tally.step(step).took_us += time.as_micros() as u64);
    }

    /// Counts the end of a window of requests.
    pub(super) fn shrunk(&self, func_name: &str, outcome: WindowOutcome) {
        self.change(func_name, |of| {
            let tally = &mut of.tally.windows;
            match outcome {
                WindowOutcome::Done(Shrunk { given, recalled, local, away }) => {
                    tally.done += 1;
                    tally.freed_bytes += given;
                    tally.recalled_bytes += recalled;
                    tally.local_bytes = local;
                    tally.away_bytes = away;
                }
                WindowOutcome::PutOff => tally.put_off += 1,
                WindowOutcome::Refused => tally.refused += 1,
            }
        });
    }

    /// Counts a VM that a request has taken back from a step.
    pub(super) fn woken(&self, func_name: &str, step: Step) {
        self.change(func_name, |of| of.tally.step(step).woken += 1);
    }

    /// Counts a VM that a request has taken back, and whose pages were brought ahead.
    pub(super) fn prefetched(&self, func_name: &str, step: Step) {
        self.change(func_name, |of| of.tally.step(step).prefetched += 1);
    }

    /// Counts a step after which no pages can be brought ahead.
    pub(super) fn unprofiled(&self, func_name: &str, step: Step) {
        self.change(func_name, |of| of.tally.step(step).unprofiled += 1);
    }

    /// Counts a VM that could not be taken back from a step.
    pub(super) fn wake_failed(&self, func_name: &str, step: Step) {
        self.change(func_name, |of| of.tally.step(step).wakes_failed += 1);
    }

    /// Counts a VM that ended because it was idle.
    pub(super) fn ended(&self, func_name: &str) {
        self.change(func_name, |of| of.tally.ended += 1);
    }

    /// Counts a suspended VM that made room on the disk.
    pub(super) fn evicted(&self, func_name: &str) {
        self.change(func_name, |of| of.tally.evicted += 1);
    }

    /// Notes the pause between a VM's last answer and its next request.
    pub(super) fn reused(&self, func_name: &str, interval: Duration) {
        self.change(func_name, |of| of.intervals.add(interval));
    }

    /// The pauses up to which a VM of the function is likely to be asked again.
    pub(super) fn reuse(&self, func_name: &str) -> Reuse {
        self.lock().get(func_name).map_or_else(Reuse::default, |of| of.intervals.reuse())
    }

    /// The number of a function's pauses that are known.
    pub(super) fn intervals(&self, func_name: &str) -> usize {
        self.lock().get(func_name).map_or(0, |of| of.intervals.count())
    }

    /// The counts of one function.
    pub(super) fn of(&self, func_name: &str) -> IdleTally {
        self.lock().get(func_name).map(|of| of.tally).unwrap_or_default()
    }

    /// Drops the counts of a removed function.
    pub(super) fn forget(&self, func_name: &str) {
        self.lock().remove(func_name);
    }

    /// Appends all counters.
    pub(super) fn write(&self, text: &mut String) -> std::fmt::Result {
        let mut functions: Vec<(String, IdleTally)> =
            self.lock().iter().map(|(name, of)| (name.clone(), of.tally)).collect();
        let help = "Steps of idle VMs, by function, step and their end (docs/idle.md)";
        head(text, "tvmm_idle_steps_total", "counter", help)?;
        for (name, tally) in &mut functions {
            for step in Step::ALL {
                let StepTally { done, partly, cancelled, refused, failed, .. } = *tally.step(step);
                for (end, count) in [
                    ("done", done),
                    ("partly", partly),
                    ("cancelled", cancelled),
                    ("refused", refused),
                    ("failed", failed),
                ] {
                    let labels = format!("function=\"{name}\",step=\"{}\",end=\"{end}\"", step.name());
                    writeln!(text, "tvmm_idle_steps_total{{{labels}}} {count}")?;
                }
            }
        }
        let help = "Steps of idle VMs that took longer than 10 s";
        write_by_step(text, &mut functions, ("tvmm_idle_slow_steps_total", help), |tally| tally.slow)?;
        head(text, "tvmm_idle_wakes_total", "counter", "Idle VMs that a request took back from a step, by their end")?;
        for (name, tally) in &mut functions {
            for step in Step::ALL {
                let StepTally { woken, wakes_failed, .. } = *tally.step(step);
                for (end, count) in [("done", woken), ("failed", wakes_failed)] {
                    let labels = format!("function=\"{name}\",step=\"{}\",end=\"{end}\"", step.name());
                    writeln!(text, "tvmm_idle_wakes_total{{{labels}}} {count}")?;
                }
            }
        }
        let help = "Idle VMs whose used pages were brought ahead of a request";
        write_by_step(text, &mut functions, ("tvmm_idle_prefetches_total", help), |tally| tally.prefetched)?;
        let help = "Suspensions without a profile of the used pages";
        write_by_step(text, &mut functions, ("tvmm_idle_unprofiled_total", help), |tally| tally.unprofiled)?;
        let help = "Memory that steps of idle VMs have given back, bytes";
        write_by_step(text, &mut functions, ("tvmm_idle_freed_bytes_total", help), |tally| tally.freed_bytes)?;
        let help = "Time that steps of idle VMs took, s";
        let seconds = |tally: StepTally| tally.took_us as f64 / 1e6;
        write_by_step(text, &mut functions, ("tvmm_idle_step_seconds_total", help), seconds)?;
        head(text, "tvmm_idle_pages_total", "counter", "Pages of idle VMs, by what became of them (docs/idle.md)")?;
        for (name, tally) in &functions {
            let PageTally { dropped, spilled, recalled, regretted } = tally.pages;
            let counts = [("dropped", dropped), ("spilled", spilled), ("recalled", recalled), ("regretted", regretted)];
            for (fate, count) in counts {
                writeln!(text, "tvmm_idle_pages_total{{function=\"{name}\",fate=\"{fate}\"}} {count}")?;
            }
        }
        write_windows(text, &functions)?;
        head(text, "tvmm_idle_ends_total", "counter", "Idle VMs that ended, by reason")?;
        for (name, IdleTally { ended, evicted, .. }) in &functions {
            for (reason, count) in [("idle", ended), ("disk", evicted)] {
                writeln!(text, "tvmm_idle_ends_total{{function=\"{name}\",reason=\"{reason}\"}} {count}")?;
            }
        }
        Ok(())
    }
}

/// Appends a counter, by its name and help, of each step of each function.
fn write_by_step<T: std::fmt::Display>(
    text: &mut String,
    functions: &mut [(String, IdleTally)],
    (name, help): (&str, &str),
    value: impl Fn(StepTally) -> T,
) -> std::fmt::Result {
    head(text, name, "counter", help)?;
    for (function, tally) in functions {
        for step in Step::ALL {
            let value = value(*tally.step(step));
            writeln!(text, "{name}{{function=\"{function}\",step=\"{}\"}} {value}", step.name())?;
        }
    }
    Ok(())
}

/// Appends the counters of windows.
fn write_windows(text: &mut String, functions: &[(String, IdleTally)]) -> std::fmt::Result {
    let help = "Windows of requests after which a VM gave untouched memory back, by their end";
    head(text, "tvmm_windows_total", "counter", help)?;
    for (name, IdleTally { windows, .. }) in functions {
        let WindowTally { done, put_off, refused, .. } = *windows;
        for (end, count) in [("done", done), ("put_off", put_off), ("refused", refused)] {
            writeln!(text, "tvmm_windows_total{{function=\"{name}\",end=\"{end}\"}} {count}")?;
        }
    }
    let help =
        "Untouched memory that VMs gave back while they served requests, and what of it was touched later, bytes";
    head(text, "tvmm_window_bytes_total", "counter", help)?;
    for (name, IdleTally { windows, .. }) in functions {
        for (way, bytes) in [("freed", windows.freed_bytes), ("recalled", windows.recalled_bytes)] {
            writeln!(text, "tvmm_window_bytes_total{{function=\"{name}\",way=\"{way}\"}} {bytes}")?;
        }
    }
    Ok(())
}
