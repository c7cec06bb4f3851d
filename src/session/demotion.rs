//! The demotion of a session's machine, or the barrier that is being set for it: work in steps.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::config::control::Respond;
use crate::session::Error;
use crate::snapshot::PAGE_SIZE;
use crate::vmm::demote::Demotion;
use crate::vmm::demote::barrier::Barrier;

/// A timer that is set to less does not ring.
const SOON: Duration = Duration::from_nanos(1);

/// The work that is under way, if there is any.
pub struct DemotionSlot {
    pub job: Option<Job>,
    /// Readable when the next step is due.
    pub timer: TimerFd,
}

/// Work on guest memory in steps, for each of which a running guest stands still.
pub enum Work {
    Demote {
        demotion: Demotion,
        /// Most memory given back per second, MiB.
        rate: Option<NonZeroU64>,
    },
    SetBarrier(Barrier),
}

/// Work, and its requester.
pub struct Job {
    pub work: Work,
    pub respond: Respond,
    pub start: Instant,
    pub steps: u64,
    pub longest_pause: Duration,
}

impl Job {
    /// Returns whether no step is left.
    pub fn is_done(&self) -> bool {
        matches!(&self.work, Work::SetBarrier(barrier) if barrier.is_set())
    }

    /// The time until the next step, so that the rate of a demotion is kept.
    fn pause(&self) -> Duration {
        let Work::Demote { demotion, rate: Some(rate) } = &self.work else { return SOON };
        let bytes = demotion.counts.given_back() * PAGE_SIZE;
        due(bytes, *rate).saturating_sub(self.start.elapsed()).max(SOON)
    }
}

/// The time after which `bytes` may have been given back at `rate` MiB/s.
fn due(bytes: u64, rate: NonZeroU64) -> Duration {
    let per_second = rate.get() as f64 * (1 << 20) as f64;
    Duration::try_from_secs_f64(bytes as f64 / per_second).unwrap_or(Duration::MAX)
}

impl DemotionSlot {
    pub fn new() -> Result<Self, Error> {
        let timer = TimerFd::new().map_err(|error| Error::os("make a timer")(error.into()))?;
        Ok(DemotionSlot { job: None, timer })
    }

    /// Makes `job` the work under way, and its next step due.
    pub fn go_on(&mut self, job: Job) -> Result<(), Error> {
        let set = self.timer.reset(job.pause(), None);
        self.job = Some(job);
        set.map_err(|error| Error::os("set a timer")(error.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_rate_is_kept() {
        let due = |bytes, rate| due(bytes, NonZeroU64::new(rate).unwrap());
        assert_eq!(due(3 << 20, 2), Duration::from_millis(1500));
        assert_eq!(due(0, 1 << 44), Duration::ZERO);
        assert_eq!(due(1 << 40, u64::MAX), Duration::ZERO);
        assert_eq!(due(u64::MAX, 1), Duration::from_secs(1 << 44));
    }
}
