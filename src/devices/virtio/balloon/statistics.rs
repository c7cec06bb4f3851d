//! Memory statistics (VIRTIO 1.2, 5.5.6.3): the driver fills a buffer and hands it over; it gets the buffer back when
//! the host wants new statistics.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use serde::{Deserialize, Serialize};

use crate::devices::Error;
use crate::devices::virtio::{Chain, Source};

/// Names of the tags, as Firecracker has them (VIRTIO 1.2, 5.5.6.4, and Linux `include/uapi/linux/virtio_balloon.h`).
const NAMES: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];
/// A statistic: its tag (16 bits), its value (64 bits), packed.
const ENTRY: usize = 10;
/// The most entries that are read: more than there are tags, because a driver may know new ones.
const ENTRIES_MAX: usize = 64;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatisticsState {
    values: [Option<u64>; NAMES.len()],
    /// The head of the driver's buffer.
    buffer: Option<u16>,
}

#[derive(Debug)]
pub struct Statistics {
    state: StatisticsState,
    timer: OwnedFd,
    updates: u64,
}

impl Statistics {
    pub fn new(state: StatisticsState) -> Result<Self, Error> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let failed = |error| Error::Event { doing: "make a timer", device: "balloon", source: io::Error::from(error) };
        Ok(Statistics { state, timer: timer.map_err(failed)?, updates: 0 })
    }

    pub fn state(&self) -> StatisticsState {
        self.state.clone()
    }

    /// The number of times that the driver has sent statistics.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    pub fn source(&self, token: u32) -> Source {
        Source { fd: self.timer.as_raw_fd(), token }
    }

    /// Requests new statistics every `seconds` from now on; 0: never.
    pub fn set_interval(&mut self, seconds: u16) {
        let interval = Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
        let timer = Itimerspec { it_interval: interval, it_value: interval };
        // The arguments are in range, so it cannot fail.
        if let Err(error) = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            tracing::error!(%error, "The balloon's timer cannot be set");
        }
    }

    /// Forgets the driver's buffer, which is its own again.
    pub fn reset(&mut self) {
        self.set_interval(0);
        self.state = StatisticsState::default();
    }

    /// Takes on a saved state; the timer is set anew by [`set_interval`](Self::set_interval).
    pub fn rewind(&mut self, state: StatisticsState) {
        self.set_interval(0);
        self.state = state;
    }

    /// Reads the driver's statistics and keeps its buffer. Returns the buffer that it had sent before, if it is still
    /// here.
    pub fn take(&mut self, chain: &Chain<'_>) -> Option<u16> {
        let mut bytes = vec![0; chain.readable.len().min(ENTRY * ENTRIES_MAX)];
        chain.readable.read_at(0, &mut bytes);
        for entry in bytes.as_chunks::<ENTRY>().0 {
            let [a, b, value @ ..] = *entry;
            if let Some(known) = self.state.values.get_mut(usize::from(u16::from_le_bytes([a, b]))) {
                *known = Some(u64::from_le_bytes(value));
            }
        }
        self.updates += 1;
        self.state.buffer.replace(chain.head)
    }

    /// The buffer to give back now, because the timer has expired.
    pub fn wanted(&mut self) -> Option<u16> {
        let mut expirations = [0; 8];
        // An error means that the timer has not expired.
        let has_expired = rustix::io::read(&self.timer, &mut expirations).is_ok();
        if has_expired { self.state.buffer.take() } else { None }
    }

    /// The driver's statistics so far, by name.
    pub fn named(&self) -> serde_json::Map<String, serde_json::Value> {
        let known = NAMES.iter().zip(self.state.values);
        known.filter_map(|(name, value)| Some(((*name).to_owned(), value?.into()))).collect()
    }
}
