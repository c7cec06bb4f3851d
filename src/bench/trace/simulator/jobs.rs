//! Work that shares the CPUs.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::fleet::VmId;
use crate::bench::trace::outcome::Way;

/// One piece of work, which one CPU does.
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
    /// A VM that has finished gives its memory back, and its process is kept.
    Retire {
        vm: VmId,
    },
    /// A VM that waits takes a step.
    Step {
        vm: VmId,
    },
}

/// The end of a piece of work.
#[derive(Debug)]
struct End {
    /// [`Jobs::had_us`] at the end.
    had_us: f64,
    /// Pieces that end together end in the order in which they began.
    number: u64,
    job: Job,
}

impl Ord for End {
    fn cmp(&self, other: &End) -> Ordering {
        self.had_us.total_cmp(&other.had_us).then(self.number.cmp(&other.number))
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
    begun: u64,
}

/// Less work than this is none, µs: sums of fractions do not come out even.
const NONE_US: f64 = 1e-3;

impl Jobs {
    pub(super) fn new(cpus: usize) -> Jobs {
        Jobs { cpus: cpus as f64, had_us: 0.0, ends: BinaryHeap::new(), begun: 0 }
    }

    /// Begins work of `ms` of one CPU.
    pub(super) fn begin(&mut self, job: Job, ms: f64) {
        let had_us = self.had_us + ms * 1000.0;
        self.ends.push(Reverse(End { had_us, number: self.begun, job }));
        self.begun += 1;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The part of a CPU that each piece of work has.
    fn rate(&self) -> f64 {
        (self.cpus / self.ends.len() as f64).min(1.0)
    }

    /// The moment at which the next work ends, if no other begins.
    pub(super) fn next_end(&self, now_us: f64) -> f64 {
        self.ends.peek().map_or(f64::INFINITY, |Reverse(end)| now_us + (end.had_us - self.had_us) / self.rate())
    }

    /// Lets `us` pass. Returns the work that has ended.
    pub(super) fn advance(&mut self, us: f64) -> Vec<Job> {
        let mut ended = Vec::new();
        if self.is_empty() {
            return ended;
        }
        self.had_us += us * self.rate();
        while self.ends.peek().is_some_and(|Reverse(end)| end.had_us <= self.had_us + NONE_US) {
            ended.extend(self.ends.pop().map(|Reverse(end)| end.job));
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_pieces_of_work_share_two_cpus() {
        let mut jobs = Jobs::new(2);
        for vm in 0..3 {
            jobs.begin(Job::End { vm }, if vm == 2 { 4.0 } else { 2.0 });
        }
        assert_eq!(jobs.next_end(0.0), 3000.0);
        assert_eq!(jobs.advance(3000.0), [Job::End { vm: 0 }, Job::End { vm: 1 }]);
        assert_eq!(jobs.next_end(3000.0), 5000.0);
        assert_eq!(jobs.advance(2000.0), [Job::End { vm: 2 }]);
        assert!(jobs.is_empty() && jobs.next_end(5000.0).is_infinite());
    }

    #[test]
    fn work_that_begins_later_ends_after_shorter_work_that_was_there() {
        let mut jobs = Jobs::new(1);
        jobs.begin(Job::End { vm: 0 }, 2.0);
        assert_eq!(jobs.advance(1000.0), []);
        jobs.begin(Job::End { vm: 1 }, 1.5);
        assert_eq!(jobs.next_end(1000.0), 3000.0);
        assert_eq!(jobs.advance(2000.0), [Job::End { vm: 0 }]);
        assert_eq!(jobs.next_end(3000.0), 3500.0);
        assert_eq!(jobs.advance(500.0), [Job::End { vm: 1 }]);
    }
}
