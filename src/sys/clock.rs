//! Clocks that the standard library does not show as numbers.

/// Nanoseconds of `CLOCK_MONOTONIC`, comparable between processes of one host.
pub fn monotonic_ns() -> u64 {
    read_ns(libc::CLOCK_MONOTONIC)
}

/// Nanoseconds of CPU time this process has used since it was forked, exec included.
pub fn process_cpu_ns() -> u64 {
    read_ns(libc::CLOCK_PROCESS_CPUTIME_ID)
}

/// Nanoseconds of CPU time that another process has used, guest time included; 0 once it has ended.
pub fn cpu_ns_of(pid: u32) -> u64 {
    let mut clock = 0;
    // SAFETY: `clock` is a valid clockid_t to write to.
    match unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) } {
        0 => read_ns(clock),
        _ => 0,
    }
}

/// CPU time of one thread, readable by the others of its process.
#[derive(Clone, Copy, Debug)]
pub struct ThreadClock(libc::clockid_t);

impl ThreadClock {
    pub fn of_this_thread() -> std::io::Result<Self> {
        let mut clock = 0;
        // SAFETY: this is the thread, so it exists; `clock` is a valid clockid_t to write to.
        match unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) } {
            0 => Ok(ThreadClock(clock)),
            error => Err(std::io::Error::from_raw_os_error(error)),
        }
    }

    /// Nanoseconds used so far; 0 once the thread has ended.
    pub fn read_ns(&self) -> u64 {
        read_ns(self.0)
    }
}

fn read_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that outlives the call; a clock that is gone (a thread's) leaves it at zero.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
