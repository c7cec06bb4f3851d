//! Work that shares the CPUs.

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
    /// A VM that waits has taken a step.
    Step,
}

/// Work that has begun.
#[derive(Debug)]
pub(super) struct Jobs {
    cpus: f64,
    all: Vec<(Job, f64)>,
}

/// Less work than this is none, µs: sums of fractions do not come out even.
const NONE_US: f64 = 1e-3;

impl Jobs {
    pub(super) fn new(cpus: usize) -> Jobs {
        Jobs { cpus: cpus as f64, all: Vec::new() }
    }

    /// Begins work of `ms` of one CPU.
    pub(super) fn begin(&mut self, job: Job, ms: f64) {
        self.all.push((job, ms * 1000.0));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The part of a CPU that each piece of work has.
    fn rate(&self) -> f64 {
        (self.cpus / self.all.len() as f64).min(1.0)
    }

    /// The moment at which the next work ends, if no other begins.
    pub(super) fn next_end(&self, now_us: f64) -> f64 {
        let least = self.all.iter().map(|(_, left)| *left).fold(f64::INFINITY, f64::min);
        if least.is_finite() { now_us + least / self.rate() } else { f64::INFINITY }
    }

    /// Lets `us` pass. Returns the work that has ended, in the order in which it began.
    pub(super) fn advance(&mut self, us: f64) -> Vec<Job> {
        let done = us * self.rate();
        let mut ended = Vec::new();
        self.all.retain_mut(|(job, left)| {
            *left -= done;
            if *left <= NONE_US {
                ended.push(*job);
            }
            *left > NONE_US
        });
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
}
