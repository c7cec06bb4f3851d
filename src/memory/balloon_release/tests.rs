//! Released pages of real guest memory.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::guest_ram::GuestRam;
use crate::snapshot::MemoryLayout;

fn extent(first: u64, pages: u64) -> Extent {
    Extent { first: Gfn(first), pages }
}

/// 64 pages from guest page 16 on: 32 of a file full of 7s, then 32 anonymous ones full of 9s.
fn releaser() -> (Releaser, GuestRam) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; 32 * PAGE_SIZE as usize], 0).unwrap();
    let layout = MemoryLayout::from_gpa_ranges(&[(16 * PAGE_SIZE, 64 * PAGE_SIZE)]).unwrap();
    let mut ram = GuestRam::reserve(&layout).unwrap();
    ram.map_file_private(extent(16, 32), &file, 0).unwrap();
    ram.map_anon(extent(48, 32)).unwrap();
    ram.set_mapped(vec![extent(16, 32)], true);
    let nines = vec![9; 32 * PAGE_SIZE as usize];
    ram.view().write_slice(&nines, GuestAddress(48 * PAGE_SIZE)).unwrap();
    (ram.releaser(None), ram)
}

fn first_bytes(ram: &GuestRam) -> Vec<u8> {
    (16..80).map(|page| ram.view().read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()).collect()
}

#[test]
fn released_pages_read_as_zeros_whatever_backed_them_and_the_others_stay() {
    let (mut releaser, ram) = releaser();
    assert_eq!(releaser.release(extent(40, 16)), Outcome { released: 16, ..Outcome::default() });
    assert_eq!(releaser.release(extent(16, 1)), Outcome { released: 1, ..Outcome::default() });
    let bytes = first_bytes(&ram);
    for (page, byte) in bytes.into_iter().enumerate() {
        let expected = match page {
            0 | 24..40 => 0,
            ..32 => 7,
            _ => 9,
        };
        assert_eq!(byte, expected, "{page}");
    }
    assert_eq!(ram.released().read().still_snapshot(extent(15, 30)), [extent(15, 1), extent(17, 23)]);
    assert_eq!(ram.released().take_fresh().len(), 17);
    assert!(ram.released().take_fresh().is_empty());
    assert_eq!(ram.released().read().ever().len(), 17);
}

#[test]
fn pages_outside_memory_are_counted_and_nothing_else() {
    let (mut releaser, ram) = releaser();
    let before = first_bytes(&ram);
    for (wild, outside) in [(extent(0, 16), 16), (extent(80, 1 << 40), 1 << 40), (extent(u64::MAX >> 13, 9), 9)] {
        assert_eq!(releaser.release(wild), Outcome { outside, ..Outcome::default() });
    }
    assert_eq!(first_bytes(&ram), before);
    assert_eq!(releaser.release(extent(10, 1000)), Outcome { released: 64, outside: 936, refused: 0 });
    assert_eq!(first_bytes(&ram), [0; 64]);
    assert_eq!(ram.released().take_fresh().len(), 64);
}

#[test]
fn pages_given_back_again_cost_no_mapping_and_without_allowance_file_pages_stay() {
    let (mut releaser, ram) = releaser();
    releaser.remaps_left = 2;
    for _ in 0..5 {
        assert_eq!(releaser.release(extent(20, 2)).released, 2);
    }
    assert_eq!(releaser.remaps_left, 1);
    assert!(count_mappings().unwrap() > 10);
    releaser.release(extent(30, 1));
    assert_eq!(releaser.remaps_left, 0);
    assert!(releaser.may_remap(), "this process has few mappings");
    (releaser.remaps_left, releaser.mappings_max) = (0, 1000);
    assert_eq!(releaser.release(extent(40, 20)), Outcome { released: 12, outside: 0, refused: 8 });
    assert_eq!(releaser.release(extent(20, 2)).released, 2, "that is anonymous memory already");
    let bytes = first_bytes(&ram);
    assert_eq!(bytes[..8], [7, 7, 7, 7, 0, 0, 7, 7]);
    assert_eq!(bytes[24..48], [vec![7; 8], vec![0; 12], vec![9; 4]].concat());
}
