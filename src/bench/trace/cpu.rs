//! CPU time of a service and its processes: what of a request's time is work, and what is waiting.

use std::fs;

use super::memory::children;
use crate::sys::clock::cpu_ns_of;
use crate::sys::errors::BoxError;

/// Ticks of /proc/PID/stat, ns (USER_HZ is 100 on each architecture).
const TICK_NS: u64 = 10_000_000;

/// CPU time up to a moment, ns.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuTime {
    /// That of the process itself.
    pub(super) own_ns: u64,
    /// That of the processes that it has started, those that have ended included.
    pub(super) children_ns: u64,
}

impl CpuTime {
    /// # Errors
    /// /proc does not have the times of the process.
    pub(super) fn of(pid: u32) -> Result<CpuTime, BoxError> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).map_err(|error| format!("Cannot read {path}: {error}"))?;
        let ended = ended_ticks(&stat).ok_or_else(|| format!("Cannot read {path}: it has no times of children"))?;
        let living: u64 = children(pid).into_iter().map(cpu_ns_of).sum();
        Ok(CpuTime { own_ns: cpu_ns_of(pid), children_ns: living + ended * TICK_NS })
    }

    /// The time since an earlier moment, ms: of the processes that were started, and of all.
    pub(super) fn since(self, earlier: CpuTime) -> (f64, f64) {
        let ms = |now: u64, then: u64| now.saturating_sub(then) as f64 / 1e6;
        let children = ms(self.children_ns, earlier.children_ns);
        (children, children + ms(self.own_ns, earlier.own_ns))
    }
}

/// The fields `cutime` and `cstime` of proc_pid_stat(5): the times of children that were waited for.
fn ended_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(13);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_this_process_and_of_its_children_counts() {
        assert_eq!(ended_ticks("7 (a) b) S 1 7 7 0 -1 0 1 2 3 4 50 60 7 8 20 0"), Some(15));
        assert_eq!(ended_ticks("7 (a) S 1"), None);
        let pid = std::process::id();
        let before = CpuTime::of(pid).unwrap();
        let spin = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        assert!(std::process::Command::new("sh").args(["-c", spin]).status().unwrap().success());
        let mut sum = 0_u64;
        (0..20_000_000_u64).for_each(|number| sum = std::hint::black_box(sum ^ number));
        let (children_ms, all_ms) = CpuTime::of(pid).unwrap().since(before);
        assert!(children_ms > 0.0 && all_ms > children_ms, "{children_ms} of {all_ms}");
    }
}
