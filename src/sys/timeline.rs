//! The time slices of a boot or a restore, as logs, reports and benchmarks share them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use serde::Serialize;
use serde_json::{Value, json};

use super::clock;

/// The time slices of a boot, restore or capture (`docs/architecture.md`, "Time slices").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Slice {
    /// Process start to `main`.
    Spawn,
    /// Arguments, configuration, log.
    Setup,
    /// KVM VM, memslots, irqchip, vCPUs, devices.
    VmCreate,
    /// Kernel image and boot parameters (boot only).
    KernelLoad,
    /// Read and verify the snapshot's state, and give it to KVM.
    StateLoad,
    /// The plan's mappings.
    Map,
    /// Copies and population before the vCPUs start.
    Preload,
    /// First `KVM_RUN` to the first exit of the guest.
    Resume,
    /// Resume to the first byte of output.
    FirstResponse,
    /// The whole request given by `--run`.
    Execute,
    /// Tear-down.
    Stop,
}

/// One measured slice: µs since process start, and µs long.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    pub slice: Slice,
    pub start_us: f64,
    pub length_us: f64,
}

/// Collects slices of this process. All times are nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Debug)]
pub struct Timeline {
    start_ns: u64,
    start_source: &'static str,
    slices: Vec<(Slice, u64, u64)>,
    /// Time at which work began again after a wait for the API.
    woken_ns: u64,
}

impl Timeline {
    /// Begins at process start. `start_us` is `CLOCK_MONOTONIC` in µs just before the process was spawned, if the
    /// parent gave it; otherwise the CPU time used so far stands in for the time since then.
    pub fn begin(start_us: Option<u64>) -> Self {
        let now = clock::monotonic_ns();
        let (start_ns, start_source) = match start_us {
            Some(us) => (us.saturating_mul(1000).min(now), "parent"),
            None => (now.saturating_sub(clock::process_cpu_ns()), "cpu_time"),
        };
        Timeline { start_ns, start_source, slices: vec![(Slice::Spawn, start_ns, now)], woken_ns: 0 }
    }

    /// The end of the last slice, where the next begins; or the end of a later wait.
    pub fn last_ns(&self) -> u64 {
        self.slices.last().map_or(self.start_ns, |&(_, _, end)| end).max(self.woken_ns)
    }

    /// Begins work that the API has asked for: the wait for it belongs to no slice.
    pub fn wake(&mut self) {
        self.woken_ns = clock::monotonic_ns();
    }

    /// Process start, in ns of `CLOCK_MONOTONIC`.
    pub fn start_ns(&self) -> u64 {
        self.start_ns
    }

    /// Turns the moments seen by vCPU threads into slices. `answered_ns`: time at which the request of `--run` was
    /// answered.
    pub fn note_moments(&mut self, moments: &Moments, answered_ns: Option<u64>) {
        let Some(entered) = moments.first_run_ns() else { return };
        self.add(Slice::Resume, self.last_ns(), moments.first_exit_ns().unwrap_or(entered));
        if let Some(wrote) = moments.first_output_ns() {
            self.add(Slice::FirstResponse, entered, wrote);
        }
        if let Some(answered) = answered_ns {
            self.add(Slice::Execute, entered, answered);
        }
    }

    /// Ends a slice now that began where the last one ended.
    pub fn lap(&mut self, slice: Slice) {
        self.add(slice, self.last_ns(), clock::monotonic_ns());
    }

    /// Adds a slice measured elsewhere.
    pub fn add(&mut self, slice: Slice, start_ns: u64, end_ns: u64) {
        self.slices.push((slice, start_ns, end_ns.max(start_ns)));
    }

    /// The source of the process start: `parent` or `cpu_time`.
    pub fn start_source(&self) -> &'static str {
        self.start_source
    }

    pub fn since_start_us(&self, ns: u64) -> f64 {
        ns.saturating_sub(self.start_ns) as f64 / 1000.0
    }

    pub fn measured(&self) -> Vec<Measured> {
        let row = |&(slice, start, end): &(Slice, u64, u64)| Measured {
            slice,
            start_us: self.since_start_us(start),
            length_us: (end - start) as f64 / 1000.0,
        };
        self.slices.iter().map(row).collect()
    }
}

/// The way in which a request comes to a machine that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Caller {
    /// Bytes on standard input.
    Console,
    /// A program connects to the vsock device.
    Vsock,
    /// The API lets the machine run.
    Api,
    /// The parent of a fork lets its child run.
    Parent,
}

/// A request that ended the wait of a machine whose guest had not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake {
    pub by: Caller,
    /// The time at which the process saw the request.
    pub asked_ns: u64,
    /// The time just before the first KVM_RUN; `None` before it.
    pub entered_ns: Option<u64>,
    /// The time of the first exit that an instruction of the guest caused; `None` before it.
    pub acted_ns: Option<u64>,
}

/// A wait that is over, or a guest that has never waited: nothing is to be noted.
const NOT_AWAITED: u64 = u64::MAX;

/// Moments of the guest that other threads see first; each is kept once, in ns of `CLOCK_MONOTONIC`.
#[derive(Debug)]
pub struct Moments {
    first_run: OnceLock<u64>,
    first_exit: OnceLock<u64>,
    first_output: AtomicU64,
    /// The request for which the guest waited. Written while the vCPUs are parked.
    woken: Mutex<Option<(Caller, u64)>>,
    /// The first KVM_RUN after that request; 0 while it is awaited.
    woken_run: AtomicU64,
    /// The first exit by the guest after that request; 0 while it is awaited.
    woken_exit: AtomicU64,
}

impl Default for Moments {
    fn default() -> Self {
        Moments {
            first_run: OnceLock::new(),
            first_exit: OnceLock::new(),
            first_output: AtomicU64::new(0),
            woken: Mutex::new(None),
            woken_run: AtomicU64::new(NOT_AWAITED),
            woken_exit: AtomicU64::new(NOT_AWAITED),
        }
    }
}

impl Moments {
    pub fn guest_entered(&self) {
        self.first_run.get_or_init(clock::monotonic_ns);
        note_once(&self.woken_run);
    }

    pub fn guest_exited(&self) {
        self.first_exit.get_or_init(clock::monotonic_ns);
    }

    /// Called at each exit that an instruction of the guest has caused.
    pub fn guest_acted(&self) {
        note_once(&self.woken_exit);
    }

    /// Called when a machine, whose vCPUs are parked, begins to wait for its next request.
    pub fn await_request(&self) {
        self.begin_anew(0);
    }

    /// Called when a machine, whose vCPUs are parked, is about to run another guest at once.
    pub fn forget_request(&self) {
        self.begin_anew(NOT_AWAITED);
    }

    fn begin_anew(&self, moment: u64) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.woken_run.store(moment, Ordering::Relaxed);
        self.woken_exit.store(moment, Ordering::Relaxed);
    }

    /// Called when a request comes, before the vCPUs go on. Does nothing if the guest has run since
    /// [`await_request`](Self::await_request).
    pub fn note_request(&self, by: Caller, asked_ns: u64) {
        if self.woken_run.load(Ordering::Relaxed) == 0 {
            *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = Some((by, asked_ns));
        }
    }

    /// The last request that ended a wait; `None` if there was none, and while the machine waits.
    pub fn wake(&self) -> Option<Wake> {
        let (by, asked_ns) = (*self.woken.lock().unwrap_or_else(PoisonError::into_inner))?;
        let noted = |moment: &AtomicU64| Some(moment.load(Ordering::Relaxed)).filter(|&ns| ns != 0);
        Some(Wake { by, asked_ns, entered_ns: noted(&self.woken_run), acted_ns: noted(&self.woken_exit) })
    }

    pub fn guest_wrote(&self) {
        note_once(&self.first_output);
    }

    pub fn first_run_ns(&self) -> Option<u64> {
        self.first_run.get().copied()
    }

    pub fn first_exit_ns(&self) -> Option<u64> {
        self.first_exit.get().copied()
    }

    pub fn first_output_ns(&self) -> Option<u64> {
        Some(self.first_output.load(Ordering::Relaxed)).filter(|&ns| ns != 0)
    }
}

/// Notes the present if `moment` is awaited.
fn note_once(moment: &AtomicU64) {
    if moment.load(Ordering::Relaxed) == 0 {
        // Another vCPU may have been first.
        let _ = moment.compare_exchange(0, clock::monotonic_ns(), Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// A complete event of Chrome's trace format ("Trace Event Format", ph = X). `times_us`: begin and length.
pub fn chrome_event(name: &str, category: &str, pid: u32, times_us: [f64; 2]) -> Value {
    json!({ "name": name, "cat": category, "ph": "X", "pid": pid, "tid": 1, "ts": times_us[0], "dur": times_us[1] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_only_for_a_guest_that_waits_for_it() {
        let moments = Moments::default();
        moments.note_request(Caller::Api, 5);
        moments.guest_entered();
        moments.guest_acted();
        assert_eq!(moments.wake(), None, "the guest has never waited");
        moments.await_request();
        assert_eq!(moments.wake(), None, "no request has come");
        moments.note_request(Caller::Vsock, 5);
        assert_eq!(moments.wake(), Some(Wake { by: Caller::Vsock, asked_ns: 5, entered_ns: None, acted_ns: None }));
        moments.guest_entered();
        moments.guest_acted();
        let wake = moments.wake().unwrap();
        assert!(wake.entered_ns > Some(5) && wake.acted_ns >= wake.entered_ns, "{wake:?}");
        moments.guest_entered();
        moments.guest_acted();
        moments.note_request(Caller::Api, 7);
        assert_eq!(moments.wake(), Some(wake), "the guest has run: a pause by the API is no wait");
        moments.await_request();
        moments.note_request(Caller::Console, 9);
        assert_eq!(moments.wake().map(|wake| (wake.by, wake.entered_ns)), Some((Caller::Console, None)));
        moments.forget_request();
        moments.note_request(Caller::Api, 11);
        assert_eq!(moments.wake(), None, "the next guest runs without a request");
    }
}
