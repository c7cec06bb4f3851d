//! The live snapshot that a session takes.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::config::control::{LiveTaken, Respond};
use crate::config::refusal::Refused;
use crate::session::Error;
use crate::session::fork::Fork;
use crate::snapshot::{Location, SnapshotKind};
use crate::vmm::capture::LiveCounts;
use crate::vmm::capture::live::LiveCapture;

/// The live snapshot that is being taken, if there is one.
pub struct LiveSlot {
    pub job: Option<Job>,
    /// Readable when the next step is due.
    pub event: Arc<EventFd>,
}

/// A live capture, and its requester.
pub struct Job {
    pub capture: LiveCapture,
    pub copy_drives: bool,
    pub purpose: Purpose,
    pub respond: Respond,
}

impl Job {
    /// Removes what was made for the snapshot, and answers its requester.
    pub fn give_up(self, refused: Refused) {
        drop(self.capture);
        drop(self.purpose);
        (self.respond)(Err(refused));
    }
}

/// The parameters of a live capture.
pub struct LiveOrder {
    pub target: Location,
    pub kind: SnapshotKind,
    /// True: the snapshot gets copies of the drives that the guest can write.
    pub copy_drives: bool,
    pub purpose: Purpose,
}

/// The use of a live capture.
pub enum Purpose {
    /// A snapshot. With `verify`, its memory is read back before the answer.
    Snapshot { verify: bool },
    /// The fork point of children.
    Fork(Box<Fork>),
}

impl LiveSlot {
    pub fn new() -> Result<Self, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?;
        Ok(LiveSlot { job: None, event: Arc::new(event) })
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
