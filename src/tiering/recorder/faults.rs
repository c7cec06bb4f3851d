//! The exact recorder: every first touch and every first write, as the fault service reports them.

use std::sync::{Arc, Mutex, PoisonError};

use crate::snapshot::{Extent, Gfn, PageSet, SnapshotId};
use crate::tiering::fault::{FaultKind, FaultObserver};
use crate::tiering::profile::{Order, PAGES_PER_TIME, Profile, RecorderKind};

#[derive(Clone, Copy, Debug)]
struct Event {
    gfn: Gfn,
    kind: FaultKind,
    at_ns: u64,
}

/// A log of faults. One clone observes, another makes the profile.
#[derive(Clone, Debug, Default)]
pub struct FaultLog {
    events: Arc<Mutex<Vec<Event>>>,
}

impl FaultObserver for FaultLog {
    fn fault(&mut self, gfn: Gfn, kind: FaultKind, at_ns: u64) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(Event { gfn, kind, at_ns });
    }
}

impl FaultLog {
    pub fn new() -> FaultLog {
        FaultLog::default()
    }

    /// The profile of the pages touched up to `until_ns` (CLOCK_MONOTONIC).
    ///
    /// Two vCPUs that touch a missing page at once fault twice; the page counts once, and as written if either wrote.
    pub fn profile(&self, snapshot: SnapshotId, function: &str, until_ns: u64) -> Profile {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut profile = Profile::new(snapshot, RecorderKind::Uffd, function);
        let mut seen = PageSet::new();
        let mut order = Vec::<Extent>::new();
        let mut start_ns = 0;
        for event in events.iter().filter(|event| event.at_ns <= until_ns) {
            if event.kind != FaultKind::Read {
                profile.written.insert(event.gfn);
            }
            if seen.contains(event.gfn) {
                continue;
            }
            if seen.is_empty() {
                start_ns = event.at_ns;
            }
            if seen.len().is_multiple_of(PAGES_PER_TIME) {
                profile.times_ns.push(event.at_ns.saturating_sub(start_ns));
            }
            seen.insert(event.gfn);
            match order.last_mut() {
                Some(last) if last.end() == event.gfn => last.pages += 1,
                _ => order.push(Extent { first: event.gfn, pages: 1 }),
            }
        }
        profile.read = seen.difference(&profile.written);
        profile.order = Order::Exact(order);
        profile
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn profile_of(events: &[(u64, FaultKind)]) -> Profile {
        let log = FaultLog::new();
        let mut observer = log.clone();
        events.iter().enumerate().for_each(|(at, (gfn, kind))| observer.fault(Gfn(*gfn), *kind, 100 + at as u64));
        log.profile(SnapshotId::default(), "f", u64::MAX)
    }

    fn pages(gfns: &[u64]) -> PageSet {
        gfns.iter().map(|gfn| Gfn(*gfn)).collect()
    }

    #[test]
    fn a_read_that_is_written_later_is_written_and_keeps_its_place() {
        use FaultKind::{Read, Write, WriteProtect};
        let profile = profile_of(&[(7, Read), (3, Write), (8, Read), (9, Read), (7, WriteProtect), (9, Read)]);
        assert_eq!((profile.read.clone(), profile.written.clone()), (pages(&[8, 9]), pages(&[3, 7])));
        let extent = |first, pages| Extent { first: Gfn(first), pages };
        assert_eq!(profile.order, Order::Exact(vec![extent(7, 1), extent(3, 1), extent(8, 2)]));
        assert_eq!(profile.times_ns, [0]);
        assert!(profile.knows_classes() && profile.knows_order());
    }

    #[test]
    fn faults_after_the_answer_do_not_count() {
        let log = FaultLog::new();
        let mut observer = log.clone();
        observer.fault(Gfn(1), FaultKind::Read, 10);
        observer.fault(Gfn(1), FaultKind::WriteProtect, 20);
        observer.fault(Gfn(2), FaultKind::Read, 20);
        let profile = log.profile(SnapshotId::default(), "f", 15);
        assert_eq!((profile.read, profile.written), (pages(&[1]), PageSet::new()));
    }

    proptest! {
        #[test]
        fn any_sequence_makes_a_profile_that_can_be_saved(events in prop::collection::vec((0_u64..100, 0_usize..3),
        0..400)) {
            let kinds = [FaultKind::Read, FaultKind::Write, FaultKind::WriteProtect];
            let events: Vec<_> = events.into_iter().map(|(gfn, kind)| (gfn, kinds[kind])).collect();
            let profile = profile_of(&events);
            prop_assert_eq!(Profile::from_bytes(profile.to_bytes().unwrap()).unwrap(), profile);
        }
    }
}
