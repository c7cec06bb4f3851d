//! Threads of this process that sleep in the kernel and do not come back (proc(5), `/proc/pid/task/tid/status`).

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A thread as it was when it was last seen to run.
#[derive(Clone, Copy, Debug)]
struct Seen {
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

/// Threads that were asleep when they were last looked at, by id.
#[derive(Debug, Default)]
pub struct SleepingThreads(HashMap<u32, Seen>);

impl SleepingThreads {
    /// The first thread found to have slept for `limit` where it must not: a vCPU uninterruptibly (an idle one sleeps
    /// interruptibly), the main thread at all if it is `restoring`, otherwise in a page fault.
    pub fn look(&mut self, now: Instant, limit: Duration, restoring: bool) -> Option<String> {
        let main = std::process::id();
        let Ok(entries) = std::fs::read_dir("/proc/self/task") else { return None };
        let ids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        ids.filter_map(|id| self.look_at(id, main, now, limit, restoring)).next()
    }

    fn look_at(&mut self, id: u32, main: u32, now: Instant, limit: Duration, restoring: bool) -> Option<String> {
        // A thread may end meanwhile.
        let text = std::fs::read_to_string(format!("/proc/self/task/{id}/status")).ok()?;
        let task = parse(&text)?;
        let waits = match id == main {
            true => task.state != 'R' && (restoring || is_in_a_page_fault(id)),
            false => task.name.starts_with("vcpu") && task.state == 'D',
        };
        if !waits {
            self.0.remove(&id);
            return None;
        }
        let seen = self.0.entry(id).or_insert(Seen { switches: task.switches, since: now });
        if seen.switches != task.switches {
            *seen = Seen { switches: task.switches, since: now };
        }
        let name = match (id == main, restoring) {
            (true, true) => "The restore".to_string(),
            (true, false) => "The main loop".to_string(),
            (false, _) => task.name.replace("vcpu", "vCPU "),
        };
        (now.saturating_duration_since(seen.since) >= limit).then_some(name)
    }
}

/// Whether a thread that sleeps does so outside of any system call (proc(5), `/proc/pid/syscall`).
fn is_in_a_page_fault(id: u32) -> bool {
    std::fs::read_to_string(format!("/proc/self/task/{id}/syscall")).is_ok_and(|text| text.starts_with("-1 "))
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
    fn main_thread_that_sleeps_is_told_only_while_it_restores() {
        // The main thread of a test process waits for its tests.
        let (mut threads, start) = (SleepingThreads::default(), Instant::now());
        let limit = Duration::from_secs(3600);
        assert_eq!(threads.look(start, limit, true), None);
        assert_eq!(threads.look(start + limit, limit, false), None);
    }
}
