//! The demotion of a session's machine.

use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::config::control::Respond;
use crate::session::Error;
use crate::snapshot::PAGE_SIZE;
use crate::vmm::demote::Demotion;

/// A timer that is set to less does not ring.
const SOON: Duration = Duration::from_nanos(1);

/// The demotion that is under way, if there is one.
pub struct DemotionSlot {
    pub job: Option<Job>,
    /// Readable when the next step is due.
    pub timer: TimerFd,
}

/// A demotion, and its requester.
pub struct Job {
    pub demotion: Demotion,
    pub respond: Respond,
    pub start: Instant,
    pub steps: u64,
    pub longest_pause: Duration,
    /// Most memory given back per second, MiB.
    pub rate: Option<u64>,
}

impl Job {
    /// The time until the next step, so that the rate is kept.
    fn pause(&self) -> Duration {
        let Some(rate) = self.rate else { return SOON };
        let bytes = self.demotion.counts.given_back() * PAGE_SIZE;
        let due = Duration::from_secs_f64(bytes as f64 / (rate.max(1) << 20) as f64);
        due.saturating_sub(self.start.elapsed()).max(SOON)
    }
}

impl DemotionSlot {
    pub fn new() -> Result<Self, Error> {
        let timer = TimerFd::new().map_err(|error| Error::os("make a timer")(error.into()))?;
        Ok(DemotionSlot { job: None, timer })
    }

    /// Makes `job` the demotion under way, and its next step due.
    pub fn go_on(&mut self, job: Job) -> Result<(), Error> {
        let set = self.timer.reset(job.pause(), None);
        self.job = Some(job);
        set.map_err(|error| Error::os("set a timer")(error.into()))
    }
}
