//! Spilled pages of real guest memory.

use std::sync::mpsc::channel;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::snapshot::MemoryLayout;
use crate::sys::guest_memory::ReleasePages;

const PAGES: u64 = 32;

/// Two groups of anonymous memory, each page full of its number plus one, all of them spilled.
fn spilled(dir: &Path) -> (Spill, GuestRam) {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, PAGES * PAGE_SIZE)]).unwrap();
    let mut ram = GuestRam::anonymous(&layout).unwrap();
    for page in 0..PAGES {
        let bytes = vec![page as u8 + 1; PAGE_SIZE as usize];
        ram.view().write_slice(&bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
    }
    let spill = Spill::open(dir, &ram, Activity::default(), Arc::new(EndingSignal::new().unwrap())).unwrap();
    spill.take(&mut ram, &[Extent { first: Gfn(0), pages: PAGES }].into_iter().collect()).unwrap();
    spill.write().unwrap();
    assert_eq!(spill.counts().store.pages_away, PAGES);
    (spill, ram)
}

/// Reads the first bytes of pages in this order, on a thread whose touches must be answered.
fn read(ram: &GuestRam, pages: impl IntoIterator<Item = u64> + Send + 'static) -> Vec<u8> {
    let view = ram.view().clone();
    let (sender, answers) = channel();
    std::thread::spawn(move || {
        let byte = |page: u64| view.read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).unwrap();
        let _ = sender.send(pages.into_iter().map(byte).collect());
    });
    answers.recv_timeout(Duration::from_secs(60)).expect("each touch is answered")
}

#[test]
fn pages_come_back_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let (spill, ram) = spilled(dir.path());
    assert_eq!(read(&ram, (0..PAGES).rev()), (1..=PAGES as u8).rev().collect::<Vec<_>>());
    // The last page is counted after its touch was answered.
    let deadline = Instant::now() + Duration::from_secs(60);
    while spill.counts().pages_back < PAGES && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(spill.counts(), SpillCounts { faults: 2, pages_back: PAGES, ..SpillCounts::default() });
}

#[test]
fn pages_of_a_group_may_lie_in_several_mappings() {
    let dir = tempfile::tempdir().unwrap();
    let (_spill, ram) = spilled(dir.path());
    // The kernel joins no mappings with different advice.
    ram.advise_small(Extent { first: Gfn(3), pages: 5 }).unwrap();
    assert_eq!(read(&ram, 0..PAGES), (1..=PAGES as u8).collect::<Vec<_>>());
}

#[test]
fn a_touch_of_a_page_that_was_given_back_is_answered_beside_its_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    let (spill, ram) = spilled(dir.path());
    let released = ram.releaser(None).release(Extent { first: Gfn(3), pages: 2 });
    assert_eq!(released.released, 2);
    assert_eq!(read(&ram, [3, 2, 4, 5]), [0, 3, 0, 6]);
    assert_eq!(spill.counts().pages_back, 14);
}
