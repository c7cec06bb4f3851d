//! Threads of this process that sleep in the kernel for too long (proc(5), `/proc/pid/task/tid/status`).

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::sys::held;

/// A thread as it was when it was last seen to run.
#[derive(Clone, Copy, Debug)]
struct LastRun {
    switches: u64,
    since: Instant,
}

/// One thread now.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Task {
    name: String,
    state: char,
    /// Context switches so far: a thread that has not been switched to has not run.
    switches: u64,
}

/// The key under which all threads that work on memory count as one: the main thread and its readers.
const MAIN_WORK: u32 = 0;
/// Threads that take no part in that.
const BYSTANDERS: [&str; 2] = ["stalls", "api"];

/// The sleeping threads of the last look, by id.
#[derive(Debug, Default)]
pub struct SleepingThreads(HashMap<u32, LastRun>);

impl SleepingThreads {
    /// Names a thread that has slept for `limit` and must not: a vCPU uninterruptibly (an idle vCPU sleeps
    /// interruptibly), the main thread in a page fault, and, during `main_work`, all threads at once.
    pub fn look(&mut self, now: Instant, limit: Duration, main_work: Option<&str>) -> Option<String> {
        let tasks = tasks();
        let mut stuck = None;
        for (id, task) in &tasks {
            let is_main = *id == std::process::id();
            let name = if is_main && main_work.is_none() && task.state != 'R' && is_in_a_page_fault(*id) {
                "The main loop".to_string()
            } else if !is_main && task.state == 'D' && task.name.starts_with("vcpu") {
                task.name.replace("vcpu", "vCPU ")
            } else {
                self.0.remove(id);
                continue;
            };
            if self.has_slept(*id, task.switches, now) >= limit {
                stuck.get_or_insert(name);
            }
        }
        let workers = || tasks.iter().map(|(_, task)| task).filter(|task| !BYSTANDERS.contains(&task.name.as_str()));
        let Some(work) = main_work.filter(|_| !workers().any(|task| task.state == 'R')) else {
            self.0.remove(&MAIN_WORK);
            return stuck;
        };
        if self.has_slept(MAIN_WORK, workers().map(|task| task.switches).sum(), now) >= limit {
            stuck.get_or_insert(format!("The {work}"));
        }
        stuck
    }

    /// Returns for how long the thread is known to have slept; `switches` are its context switches so far.
    fn has_slept(&mut self, id: u32, switches: u64, now: Instant) -> Duration {
        let seen = self.0.entry(id).or_insert(LastRun { switches, since: now });
        if seen.switches != switches {
            *seen = LastRun { switches, since: now };
        }
        now.saturating_duration_since(seen.since)
    }
}

/// The threads of this process.
fn tasks() -> Vec<(u32, Task)> {
    let Ok(entries) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    // A thread may end meanwhile.
    let task = |id| parse(&std::fs::read_to_string(format!("/proc/self/task/{id}/status")).ok()?);
    ids.filter_map(|id| Some((id, task(id)?))).collect()
}

/// Returns whether a sleeping thread is outside of any system call (proc(5), `/proc/pid/syscall`).
fn is_in_a_page_fault(id: u32) -> bool {
    let begins = b"-1 ";
    if let Some(main) = held::get(held::MAIN_SYSCALL).filter(|_| id == std::process::id()) {
        let mut text = [0; 3];
        return main.read_exact_at(&mut text, 0).is_ok() && text == *begins;
    }
    std::fs::read(format!("/proc/self/task/{id}/syscall")).is_ok_and(|text| text.starts_with(begins))
}

fn parse(status: &str) -> Option<Task> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let count = |name: &str| field(name)?.parse::<u64>().ok();
    Some(Task {
        name: field("Name")?.to_string(),
        state: field("State")?.chars().next()?,
        switches: count("voluntary_ctxt_switches")? + count("nonvoluntary_ctxt_switches")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_of_a_thread_is_read() {
        let text =
            "Name:\tvcpu3\nState:\tD (disk sleep)\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(parse(text), Some(Task { name: "vcpu3".into(), state: 'D', switches: 7 }));
        assert!(parse("Name:\tx\n").is_none());
        assert!(parse(&std::fs::read_to_string("/proc/thread-self/status").unwrap()).is_some());
    }

    #[test]
    fn who_is_switched_to_has_not_slept() {
        let mut threads = SleepingThreads::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let seen: Vec<u64> = [(5, 0), (5, 10), (6, 20), (6, 25)]
            .into_iter()
            .map(|(switches, at)| threads.has_slept(7, switches, after(at)).as_secs())
            .collect();
        assert_eq!(seen, [0, 10, 0, 5]);
    }

    #[test]
    fn process_that_works_is_not_stuck() {
        let mut threads = SleepingThreads::default();
        let start = Instant::now();
        for _ in 0..3 {
            // This thread runs while it looks.
            assert_eq!(threads.look(start, Duration::ZERO, Some("restore")), None);
            assert_eq!(threads.look(start, Duration::ZERO, None), None);
        }
    }
}
