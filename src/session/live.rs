//! The live snapshot that a session takes.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config::control::{LiveTaken, Respond};
use crate::config::request::CreateSnapshot;
use crate::session::Error;
use crate::vmm::capture::LiveCounts;
use crate::vmm::capture::live::LiveCapture;

/// The live snapshot that is being taken, if there is one.
pub struct LiveSlot {
    pub job: Option<Job>,
    /// Readable when the next step is due.
    pub event: EventFd,
}

/// A live snapshot, and its requester.
pub struct Job {
    pub capture: LiveCapture,
    pub create: CreateSnapshot,
    pub respond: Respond,
}

impl LiveSlot {
    pub fn new() -> Result<Self, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?;
        Ok(LiveSlot { job: None, event })
    }
}

/// The form of `counts` in the answer.
pub fn taken(counts: LiveCounts) -> LiveTaken {
    LiveTaken {
        passes: counts.passes,
        pages_live: counts.pages_live,
        pages_paused: counts.pages_paused,
        cut_short: counts.is_cut_short,
        window_us: counts.window_us,
    }
}
