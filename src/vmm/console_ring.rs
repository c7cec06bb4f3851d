//! Console bytes that KVM collects in a ring without an exit. They are taken out at each exit of a vCPU, and by the
//! main loop while a vCPU runs for long without an exit.
//!
//! KVM does not notify about bytes in the ring, so a timer polls it. Exits of vCPUs arm the timer (a driver reads the
//! line status, an exit, before it writes). It keeps going while bytes come or vCPUs use the CPU, and stops when the
//! guest halts: an idle VM costs nothing.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::buses::Buses;
use super::exit_counters::ExitCounters;
use crate::sys::clock::ThreadClock;
use crate::sys::coalesced::CoalescedRing;

/// Longest time that a byte waits for the main loop while its guest computes.
const PERIOD: Duration = Duration::from_millis(8);
/// vCPUs that use less than this share of a period count as halted.
const IDLE_SHARE: u32 = 50;

/// The ring, and the timer that polls it.
pub struct ConsoleRing {
    ring: CoalescedRing,
    buses: Arc<Buses>,
    counters: Arc<ExitCounters>,
    timer: OwnedFd,
    is_armed: AtomicBool,
    /// CPU time of the threads of all vCPUs.
    clocks: Mutex<Vec<ThreadClock>>,
    used_ns: AtomicU64,
}

impl ConsoleRing {
    pub fn new(ring: CoalescedRing, buses: Arc<Buses>, counters: Arc<ExitCounters>) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let clocks = Mutex::default();
        Ok(ConsoleRing { ring, buses, counters, timer, is_armed: AtomicBool::new(false), clocks, used_ns: 0.into() })
    }

    /// Passes the bytes in the ring to the serial port, in order. Returns whether there were any.
    pub fn drain(&self) -> bool {
        self.ring.drain(|port, data| self.counters.io_coalesced.count(self.buses.pio.write(port, data)))
    }

    /// Called by the thread of each vCPU before it runs the guest.
    pub fn add_this_thread(&self) {
        if let Ok(clock) = ThreadClock::of_this_thread() {
            self.clocks.lock().unwrap_or_else(PoisonError::into_inner).push(clock);
        }
    }

    /// Bytes may come without an exit from now on.
    pub fn expect_bytes(&self) {
        if !self.is_armed.load(Ordering::Relaxed) && !self.is_armed.swap(true, Ordering::Relaxed) {
            let value = Timespec { tv_sec: 0, tv_nsec: PERIOD.as_nanos() as i64 };
            let times = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            // The call fails only for invalid times.
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &times);
        }
    }

    /// Takes bytes out of the ring. Called by the main loop when the timer is readable.
    pub fn tick(&self) {
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        self.is_armed.store(false, Ordering::Relaxed);
        let has_drained = self.drain();
        let clocks = self.clocks.lock().unwrap_or_else(PoisonError::into_inner);
        let used_ns: u64 = clocks.iter().map(ThreadClock::read_ns).sum();
        let since = used_ns.saturating_sub(self.used_ns.swap(used_ns, Ordering::Relaxed));
        if has_drained || since > (PERIOD / IDLE_SHARE).as_nanos() as u64 {
            self.expect_bytes();
        }
    }
}

impl AsRawFd for ConsoleRing {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
