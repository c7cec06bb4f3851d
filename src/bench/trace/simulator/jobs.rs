//! Work that shares the CPUs, and waits that do not.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::fleet::VmId;
use crate::bench::trace::outcome::Way;
use crate::bench::trace::samples::Work;

/// One piece of work, which one CPU does, and the wait after it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Job {
    Request {
        vm: VmId,
        way: Way,
        arrived_us: f64,
    },
    /// A VM is restored to stand by.
    Refill {
        vm: VmId,
    },
    Rewind {
        vm: VmId,
    },
    End {
        vm: VmId,
    },
    /// The memory of a VM that ends goes.
    Fade {
        vm: VmId,
    },
    /// A VM that has finished gives its memory back, and its process is kept.
    Retire {
        vm: VmId,
    },
    /// A VM that waits takes a step.
    Step {
        vm: VmId,
    },
    /// A VM gives back memory that its requests have not touched. Requests are served meanwhile.
    Give {
        vm: VmId,
    },
}

/// The end of a piece of work on a CPU, or of its wait.
#[derive(Debug)]
struct End {
    /// [`Jobs::had_us`] at the end of work, [`Jobs::now_us`] at that of a wait.
    at_us: f64,
    /// The wait after the work.
    wait_us: f64,
    /// Pieces that end together end in the order in which they began.
    number: u64,
    job: Job,
}

impl Ord for End {
    fn cmp(&self, other: &End) -> Ordering {
        self.at_us.total_cmp(&other.at_us).then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for End {
    fn partial_cmp(&self, other: &End) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for End {
    fn eq(&self, other: &End) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for End {}

/// Work that has begun.
#[derive(Debug)]
pub(super) struct Jobs {
    cpus: f64,
    /// The CPU time that a piece would have had which began at the start and never ended, µs: all pieces have the same
    /// share, so that each ends at a value that is known when it begins.
    had_us: f64,
    ends: BinaryHeap<Reverse<End>>,
    /// The time, µs, and the work that waits by its end.
    now_us: f64,
    waits: BinaryHeap<Reverse<End>>,
    begun: u64,
}

/// Less work than this is none, µs: sums of fractions do not come out even.
const NONE_US: f64 = 1e-3;

impl Jobs {
    pub(super) fn new(cpus: usize) -> Jobs {
        let cpus = cpus as f64;
        Jobs { cpus, had_us: 0.0, ends: BinaryHeap::new(), now_us: 0.0, waits: BinaryHeap::new(), begun: 0 }
    }

    /// Begins a job: it works on a CPU, then it waits.
    pub(super) fn begin(&mut self, job: Job, work: Work) {
        let at_us = self.had_us + work.cpu_ms * 1000.0;
        let wait_us = (work.ms - work.cpu_ms) * 1000.0;
        self.ends.push(Reverse(End { at_us, wait_us, number: self.begun, job }));
        self.begun += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty() && self.waits.is_empty()
    }

    /// The part of a CPU that each piece of work has.
    fn rate(&self) -> f64 {
        (self.cpus / self.ends.len() as f64).min(1.0)
    }

    /// The moment at which the next work or wait ends, if no other begins.
    pub(super) fn next_end(&self) -> f64 {
        let of_work = self.ends.peek().map(|Reverse(end)| self.now_us + (end.at_us - self.had_us) / self.rate());
        let of_wait = self.waits.peek().map(|Reverse(end)| end.at_us);
        of_work.unwrap_or(f64::INFINITY).min(of_wait.unwrap_or(f64::INFINITY))
    }

    /// Lets time pass until `to_us`, which is no later than [`next_end`](Self::next_end). Returns the jobs that have
    /// ended.
    pub(super) fn advance(&mut self, to_us: f64) -> Vec<Job> {
        if !self.ends.is_empty() {
            self.had_us += (to_us - self.now_us) * self.rate();
        }
        self.now_us = to_us;
        let mut ended = Vec::new();
        // Late in a long trace a moment's last digit is more than the work that is left.
        let is_over = |jobs: &Jobs, end: &End| {
            let left_us = end.at_us - jobs.had_us;
            left_us <= NONE_US || jobs.now_us + left_us / jobs.rate() <= to_us
        };
        while self.ends.peek().is_some_and(|Reverse(end)| is_over(self, end)) {
            let Some(Reverse(end)) = self.ends.pop() else { break };
            if end.wait_us > NONE_US {
                self.waits.push(Reverse(End { at_us: to_us + end.wait_us, ..end }));
            } else {
                ended.push(end.job);
            }
        }
        while self.waits.peek().is_some_and(|Reverse(end)| end.at_us <= to_us) {
            ended.extend(self.waits.pop().map(|Reverse(end)| end.job));
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(ms: f64) -> Work {
        Work { ms, cpu_ms: ms }
    }

    #[test]
    fn three_pieces_of_work_share_two_cpus() {
        let mut jobs = Jobs::new(2);
        for vm in 0..3 {
            jobs.begin(Job::End { vm }, cpu(if vm == 2 { 4.0 } else { 2.0 }));
        }
        assert_eq!(jobs.next_end(), 3000.0);
        assert_eq!(jobs.advance(3000.0), [Job::End { vm: 0 }, Job::End { vm: 1 }]);
        assert_eq!(jobs.next_end(), 5000.0);
        assert_eq!(jobs.advance(5000.0), [Job::End { vm: 2 }]);
        assert!(jobs.is_empty() && jobs.next_end().is_infinite());
    }

    #[test]
    fn work_that_begins_later_ends_after_shorter_work_that_was_there() {
        let mut jobs = Jobs::new(1);
        jobs.begin(Job::End { vm: 0 }, cpu(2.0));
        assert_eq!(jobs.advance(1000.0), []);
        jobs.begin(Job::End { vm: 1 }, cpu(1.5));
        assert_eq!(jobs.next_end(), 3000.0);
        assert_eq!(jobs.advance(3000.0), [Job::End { vm: 0 }]);
        assert_eq!(jobs.next_end(), 3500.0);
        assert_eq!(jobs.advance(3500.0), [Job::End { vm: 1 }]);
    }

    #[test]
    fn waits_take_no_cpu() {
        let mut jobs = Jobs::new(1);
        jobs.begin(Job::End { vm: 0 }, Work { ms: 5.0, cpu_ms: 1.0 });
        jobs.begin(Job::End { vm: 1 }, cpu(2.0));
        assert_eq!(jobs.next_end(), 2000.0);
        assert_eq!(jobs.advance(2000.0), [], "it waits from now on");
        assert_eq!(jobs.next_end(), 3000.0);
        assert_eq!(jobs.advance(3000.0), [Job::End { vm: 1 }]);
        assert_eq!(jobs.next_end(), 6000.0);
        assert_eq!(jobs.advance(6000.0), [Job::End { vm: 0 }]);
        assert!(jobs.is_empty());
    }

    #[test]
    fn work_ends_however_late_in_a_trace_it_is() {
        let mut jobs = Jobs::new(2);
        let late_us = 320_000_000.0 * 1e9;
        jobs.advance(late_us);
        for vm in 0..300 {
            jobs.begin(Job::End { vm }, cpu(0.1 + vm as f64 / 7.0));
        }
        let mut ended = 0;
        for _ in 0..300 {
            let end_us = jobs.next_end();
            ended += jobs.advance(end_us).len();
        }
        assert!(ended == 300 && jobs.is_empty(), "{ended}");
    }
}
