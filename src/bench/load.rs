//! The work of other programs on the host, for the record beside a measurement.

use std::time::Duration;

use crate::sys::errors::{BoxError, refuse};

/// The time over which the load is observed: at 100 ticks a second, a twentieth of a CPU shows.
const LOOK: Duration = Duration::from_millis(200);

/// Ticks of all CPUs since the host's start (kernel `Documentation/filesystems/proc.rst`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ticks {
    cpus: u64,
    busy: u64,
    all: u64,
}

/// The number of CPUs that are in use while this process sleeps for a moment.
pub(super) fn busy_cpus() -> Result<f64, BoxError> {
    let before = now()?;
    std::thread::sleep(LOOK);
    let after = now()?;
    let all = after.all.saturating_sub(before.all);
    if all == 0 {
        return refuse("Cannot observe the load: /proc/stat does not count");
    }
    Ok(after.cpus as f64 * after.busy.saturating_sub(before.busy) as f64 / all as f64)
}

fn now() -> Result<Ticks, BoxError> {
    let text = std::fs::read_to_string("/proc/stat").map_err(|error| format!("Cannot read /proc/stat: {error}"))?;
    ticks(&text).ok_or_else(|| "Cannot observe the load: /proc/stat does not begin with the line of all CPUs".into())
}

/// Reads the first line: user, nice, system, idle, iowait, irq, softirq, steal, and guest times that are part of user.
fn ticks(stat: &str) -> Option<Ticks> {
    let mut lines = stat.lines();
    let counts = lines.next()?.strip_prefix("cpu ")?.split_whitespace().take(8).map(str::parse);
    let counts: Vec<u64> = counts.collect::<Result<_, _>>().ok()?;
    let all = counts.iter().sum();
    let idle = counts.get(3)? + counts.get(4)?;
    let cpus = lines.take_while(|line| line.starts_with("cpu")).count() as u64;
    Some(Ticks { cpus, busy: all - idle, all })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_cpus_and_cpus_that_wait_for_devices_are_not_busy() {
        let stat = "cpu  10 1 5 70 4 2 3 5 9 9\ncpu0 5 1 2 35 2 1 1 3 9 0\ncpu1 5 0 3 35 2 1 2 2 0 9\nintr 5\n";
        assert_eq!(ticks(stat), Some(Ticks { cpus: 2, busy: 26, all: 100 }));
        assert_eq!(ticks("cpu 1 2"), None);
        assert_eq!(ticks("intr 5\n"), None);
        let busy = busy_cpus().unwrap();
        assert!((0.0..=f64::from(u32::MAX)).contains(&busy), "{busy}");
    }
}
