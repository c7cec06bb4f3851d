//! Memory that VMs have given back, and that others get without the host's having to provide it.

use std::collections::VecDeque;

/// Time after which a guest's kernel reports free memory to its host, which takes it away (page_reporting.c), µs.
const REPORTED_US: f64 = 2e6;

/// Memory that was given back at a moment.
#[derive(Debug)]
struct Free {
    at_us: f64,
    mib: f64,
}

/// The memory that was given back lately, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Recycled(VecDeque<Free>);

impl Recycled {
    /// Notes memory that was given back.
    pub(super) fn give(&mut self, at_us: f64, mib: f64) {
        if mib > 0.0 {
            self.forget(at_us);
            self.0.push_back(Free { at_us, mib });
        }
    }

    /// Takes memory, what was given back last first. Returns how much of it is fresh.
    pub(super) fn take(&mut self, now_us: f64, mib: f64) -> f64 {
        self.forget(now_us);
        let mut fresh_mib = mib;
        while fresh_mib > 0.0 {
            let Some(last) = self.0.back_mut() else { break };
            let taken = last.mib.min(fresh_mib);
            fresh_mib -= taken;
            last.mib -= taken;
            if last.mib <= 0.0 {
                self.0.pop_back();
            }
        }
        fresh_mib
    }

    fn forget(&mut self, now_us: f64) {
        while self.0.front().is_some_and(|free| free.at_us + REPORTED_US < now_us) {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_fresh_unless_it_was_given_back_lately() {
        let mut recycled = Recycled::default();
        assert_eq!(recycled.take(0.0, 5.0), 5.0);
        recycled.give(0.0, 4.0);
        recycled.give(1e6, 3.0);
        assert_eq!(recycled.take(1.5e6, 5.0), 0.0);
        assert_eq!(recycled.take(2.5e6, 1.0), 1.0, "the rest was reported");
        recycled.give(3e6, 2.0);
        recycled.give(3e6, -1.0);
        assert_eq!((recycled.take(4e6, 3.0), recycled.take(4e6, 3.0)), (1.0, 3.0));
    }
}
