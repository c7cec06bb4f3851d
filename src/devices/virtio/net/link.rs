//! The guest's cable: the tap, as long as the host has it.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tap::Tap;
use crate::devices::Error;
use crate::devices::virtio::Io;

/// The tap of an interface, and the means to have the interface look at it again.
pub struct Link {
    /// The interface's id, for the log.
    interface: String,
    pub tap: Tap,
    /// The tap has been deleted.
    is_lost: bool,
    /// Written when there is more work than one turn allows, or limits have changed.
    again: EventFd,
}

impl Link {
    pub fn new(interface: &str, tap: Tap) -> Result<Self, Error> {
        let failed = |source| Error::Event { doing: "make an eventfd", device: "network interface", source };
        let again = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        Ok(Link { interface: interface.to_owned(), tap, is_lost: false, again })
    }

    /// True if the tap has been deleted.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// The descriptor that becomes readable when the interface shall look again at frames.
    pub fn again(&self) -> &EventFd {
        &self.again
    }

    /// Makes the device thread look again at frames that wait behind a limit, or for another turn.
    pub fn look_again(&self) {
        // A full counter means that it will.
        let _ = self.again.write(1);
    }

    /// The tap has been deleted: the guest's cable is out, for as long as this process lives.
    pub fn lose(&mut self, io: &mut Io<'_>) {
        if !std::mem::replace(&mut self.is_lost, true) {
            tracing::warn!(interface = self.interface, tap = self.tap.name(), "The tap is gone; the link is down");
            io.signal_config();
        }
    }
}
