//! The reason why a guest ended, and the signal that tells the main loop.

use crate::sys::lost;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The reason why a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest pulled the reset line.
    Reset,
    /// The guest turned itself off.
    PowerOff,
    /// A triple fault: `reboot=t` resets by one, and a guest whose memory or stack is lost ends in one.
    TripleFault,
    /// KVM cannot go on.
    Failed(String),
    /// Guest memory cannot be read any more, or differs from what was captured.
    MemoryLost(String),
}

/// Called when the guest ends.
pub(crate) type OnEnd = Box<dyn FnOnce() + Send>;

/// Tells the main loop that the guest has ended. vCPU threads and devices call it; the first reason stands.
pub struct EndingSignal {
    ending: Mutex<Option<Ending>>,
    event: EventFd,
    on_end: Mutex<Option<OnEnd>>,
}

impl std::fmt::Debug for EndingSignal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("EndingSignal").field("event", &self.event).finish_non_exhaustive()
    }
}

impl EndingSignal {
    pub fn new() -> std::io::Result<Self> {
        Ok(EndingSignal { ending: Mutex::new(None), event: EventFd::new(EFD_NONBLOCK)?, on_end: Mutex::new(None) })
    }

    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Returns the reason if the guest has ended. An eventfd pulled without a reason is the reset line's.
    pub fn take(&self) -> Option<Ending> {
        let pulled = self.event.read().is_ok();
        if let Some(reason) = lost::touched() {
            return Some(Ending::MemoryLost(reason));
        }
        let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner).take();
        ending.or(pulled.then_some(Ending::Reset))
    }

    /// Returns whether the guest has ended. The reason stays for [`take`](Self::take).
    pub fn has_come(&self) -> bool {
        match self.event.read() {
            Ok(count) => self.event.write(count).is_ok(),
            Err(_) => self.ending.lock().unwrap_or_else(PoisonError::into_inner).is_some(),
        }
    }

    /// Ends the guest for this reason, unless another came first.
    pub fn end(&self, ending: Ending) {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ending);
        // A full counter means that the main loop has been told already.
        let _ = self.event.write(1);
        // Called after the reason is set, because the thread that this call releases looks for it.
        if let Some(call) = self.lock_on_end().take() {
            call();
        }
    }

    /// Sets a call to make once when the guest ends, on the thread that ends it.
    pub fn on_end(&self, call: Option<OnEnd>) {
        *self.lock_on_end() = call;
    }

    pub(crate) fn lock_on_end(&self) -> MutexGuard<'_, Option<OnEnd>> {
        self.on_end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
