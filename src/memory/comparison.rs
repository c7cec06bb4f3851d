//! The comparison of images with their checksums, which goes on while the guest runs: its state, for other threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::memory::Error;

/// Pause between two looks of [`Comparison::wait`].
const LOOK: Duration = Duration::from_millis(1);

/// The comparison that one background thread makes. Until it is done, guest memory may be damaged.
#[derive(Clone, Debug, Default)]
pub struct Comparison(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Every page matches.
    is_done: AtomicBool,
    /// The thread compares no more.
    has_ended: AtomicBool,
}

/// Held by the thread that compares. Dropping it ends the comparison, done or not.
#[derive(Debug)]
pub struct Comparing(Arc<State>);

impl Comparing {
    /// Notes that every page matches.
    pub fn done(&self) {
        self.0.is_done.store(true, Ordering::Release);
    }
}

impl Drop for Comparing {
    fn drop(&mut self) {
        self.0.has_ended.store(true, Ordering::Release);
    }
}

impl Comparison {
    /// Returns the part for the thread that compares.
    pub fn comparing(&self) -> Comparing {
        Comparing(self.0.clone())
    }

    /// Returns whether pages are still to be compared.
    pub fn is_under_way(&self) -> bool {
        !self.0.has_ended.load(Ordering::Acquire) && !self.0.is_done.load(Ordering::Acquire)
    }

    /// Refuses a snapshot if a page does not match its checksum, or could not be compared.
    ///
    /// # Errors
    /// [`Error::Uncompared`].
    pub fn check(&self) -> Result<(), Error> {
        // In this order: the thread may be done, and end, between the two looks.
        let has_ended = self.0.has_ended.load(Ordering::Acquire);
        if has_ended && !self.0.is_done.load(Ordering::Acquire) {
            return Err(Error::Uncompared("does not match its checksums, or could not be read"));
        }
        Ok(())
    }

    /// Waits until every page was compared.
    ///
    /// # Errors
    /// Those of [`check`](Self::check), and [`Error::Uncompared`] at `deadline`.
    pub fn wait(&self, deadline: Instant) -> Result<(), Error> {
        while self.is_under_way() {
            if Instant::now() >= deadline {
                return Err(Error::Uncompared("is still being compared with its checksums; try again"));
            }
            std::thread::sleep(LOOK);
        }
        self.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_is_waited_for_and_one_that_was_given_up_is_told() {
        let comparison = Comparison::default();
        let comparing = comparison.comparing();
        assert!(comparison.is_under_way() && comparison.check().is_ok());
        let late = comparison.wait(Instant::now()).unwrap_err();
        assert!(late.to_string().contains("try again"), "{late}");
        let waiting = std::thread::spawn({
            let comparison = comparison.clone();
            move || comparison.wait(Instant::now() + Duration::from_secs(300))
        });
        comparing.done();
        drop(comparing);
        assert!(waiting.join().unwrap().is_ok() && comparison.check().is_ok() && !comparison.is_under_way());
        let damaged = Comparison::default();
        drop(damaged.comparing());
        let told = damaged.wait(Instant::now() + Duration::from_secs(300)).unwrap_err();
        assert!(told.to_string().contains("does not match its checksums") && damaged.check().is_err(), "{told}");
    }
}
