//! Clocks that the standard library does not show as numbers, and times as text.

use std::time::{SystemTime, UNIX_EPOCH};

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

/// A time as RFC 3339 has it, in UTC: `2026-11-30T21:10:37.123Z`. A time before 1970 is shown as its beginning.
pub fn utc_text(time: SystemTime) -> String {
    let ms = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let seconds = ms / 1000;
    // Days since 1 March of the year 0, so that a leap day is the last one of its year.
    let days = seconds / 86_400 + 719_468;
    let era_day = days % 146_097;
    let era_year = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
    let year_day = era_day - (365 * era_year + era_year / 4 - era_year / 100);
    let march_month = (5 * year_day + 2) / 153;
    let day = year_day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = days / 146_097 * 400 + era_year + u64::from(month <= 2);
    let hour = seconds / 3600 % 24;
    let minute = seconds / 60 % 60;
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}.{:03}Z", seconds % 60, ms % 1000)
}

fn read_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that outlives the call; a clock that is gone (a thread's) leaves it at zero.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_shown_in_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_767_225_599_000, "2025-12-31T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc_text(UNIX_EPOCH + Duration::from_millis(ms)), text);
        }
    }
}
