use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::memory::guest_ram::GuestRam;
use crate::snapshot::MemoryLayout;

const MIB: u64 = 1 << 20;

fn extent(first: u64, pages: u64) -> Extent {
    Extent { first: Gfn(first), pages }
}

/// A file in which each page holds its number, in all words.
fn numbered(pages: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        file.write_all_at(&page.to_le_bytes().repeat(512), page * 4096).unwrap();
    }
    file
}

/// 8 MiB, all in place, of a numbered file.
fn in_place(align_pages: u64) -> GuestRam {
    let layout = MemoryLayout::from_gpa_ranges(&[(0, 8 * MIB)]).unwrap();
    let mut ram = GuestRam::reserve(&layout).unwrap();
    let all = extent(0, 2048);
    ram.map_in_place(all, &numbered(2048), 0).unwrap();
    ram.set_mapped(vec![all], false);
    ram.guard(&[InPlaceExtent { extent: all, align_pages }]).unwrap();
    ram
}

fn word(ram: &GuestRam, page: u64) -> u64 {
    ram.view().read_obj(GuestAddress(page * 4096 + 8)).unwrap()
}

fn left(ram: &GuestRam) -> u64 {
    ram.in_place().unwrap().pages()
}

/// Mappings of this process within the memory of `ram`.
fn mappings(ram: &GuestRam) -> usize {
    let (range, base) = ram.slots().next().unwrap();
    let start = base as u64;
    let end = base as u64 + range.len;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps.lines().filter_map(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
    starts.filter(|at| (start..end).contains(at)).count()
}

#[test]
fn pages_are_promoted_when_they_are_written_and_no_others() {
    let ram = in_place(1);
    assert_eq!((left(&ram), word(&ram, 77), mappings(&ram)), (2048, 77, 1));
    ram.view().write_obj(5_u64, GuestAddress(77 * 4096)).unwrap();
    assert_eq!((left(&ram), word(&ram, 77), word(&ram, 78)), (2047, 77, 78));
    assert_eq!(ram.view().read_obj::<u64>(GuestAddress(77 * 4096)).unwrap(), 5);
    ram.view().write_slice(&[1; 8192], GuestAddress(100 * 4096 + 10)).unwrap();
    assert_eq!(left(&ram), 2044, "it touches three pages");
    assert!(ram.view().write_slice(&[1; 10], GuestAddress(8 * MIB - 5)).is_err(), "the end of memory");
    assert!(ram.view().write_slice(&[1; 10], GuestAddress(u64::MAX - 3)).is_err());
    assert!(ram.boot_view().is_err(), "there is no way past the gate");
}

#[test]
fn neighbours_share_one_mapping() {
    let ram = in_place(1);
    for page in (500..900).chain((100..400).rev()) {
        ram.view().write_obj(page, GuestAddress(page * 4096)).unwrap();
    }
    assert_eq!(left(&ram), 2048 - 700);
    assert!(mappings(&ram) <= 5, "{} mappings", mappings(&ram));
    (0..2048).for_each(|page| assert_eq!(word(&ram, page), page));
}

#[test]
fn mappings_that_cannot_be_cut_are_promoted_in_blocks() {
    let ram = in_place(512);
    ram.view().write_obj(5_u64, GuestAddress(600 * 4096)).unwrap();
    assert_eq!((left(&ram), mappings(&ram)), (2048 - 512, 3));
    // Given back: a part of a block is promoted first, and the rest of the block keeps its bytes.
    let mut releaser = ram.releaser(None);
    use crate::sys::guest_memory::ReleasePages;
    assert_eq!(releaser.release(extent(1030, 10)).released, 10);
    assert_eq!((left(&ram), word(&ram, 1029), word(&ram, 1030), word(&ram, 1040)), (1024, 1029, 0, 1040));
    assert_eq!(releaser.release(extent(1536, 512)).released, 512);
    assert_eq!((left(&ram), word(&ram, 1536), word(&ram, 2047)), (512, 0, 0));
    ram.view().write_obj(3_u64, GuestAddress(1536 * 4096)).unwrap();
    assert_eq!((left(&ram), word(&ram, 511)), (512, 511));
}

#[test]
fn whole_blocks_are_promoted_where_mappings_run_out() {
    let ram = in_place(1);
    let in_place = ram.in_place().unwrap();
    {
        let mut books = in_place.lock();
        (books.copies_left, books.mappings_max) = (3, 0);
    }
    for page in [10, 20, 30, 40] {
        ram.view().write_obj(page, GuestAddress(page * 4096)).unwrap();
    }
    assert_eq!(left(&ram), 2048 - 512, "three pages, then the block");
    (0..2048).for_each(|page| assert_eq!(word(&ram, page), page));
    assert_eq!(in_place.promote_all().unwrap(), 1536);
    assert_eq!((in_place.promote_all().unwrap(), left(&ram)), (0, 0));
}

#[test]
fn who_reads_while_pages_are_promoted_sees_nothing_else() {
    let ram = in_place(1);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut rounds = 0_u64;
                while !done.load(Ordering::Relaxed) || rounds == 0 {
                    (0..2048).for_each(|page| assert_eq!(word(&ram, page), page));
                    rounds += 1;
                }
            });
        }
        // Two who promote the same pages, from both ends.
        let writers = [false, true].map(|down| {
            let ram = &ram;
            scope.spawn(move || {
                for step in 0..2048_u64 {
                    let page = if down { 2047 - step } else { step };
                    let place = GuestAddress(page * 4096 + 16 + 8 * u64::from(down));
                    ram.view().write_obj(page + 1, place).unwrap();
                }
            })
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    for page in 0..2048 {
        let words: [u64; 2] = [16, 24].map(|at| ram.view().read_obj(GuestAddress(page * 4096 + at)).unwrap());
        assert_eq!(words, [page + 1; 2], "a write was lost");
    }
    assert_eq!(left(&ram), 0);
}

#[test]
fn write_that_kvm_takes_for_one_to_a_device_reaches_memory_if_it_lies_there() {
    let ram = in_place(1);
    let in_place = ram.in_place().unwrap();
    assert!(in_place.take_emulated(ram.view(), 4096 * 3, &[9; 8]));
    assert_eq!((ram.view().read_obj::<u8>(GuestAddress(4096 * 3 + 7)).unwrap(), left(&ram)), (9, 2047));
    for outside in [8 * MIB - 4, 8 * MIB, 0xfee0_0000, u64::MAX - 2] {
        assert!(!in_place.take_emulated(ram.view(), outside, &[9; 8]), "{outside:#x}");
    }
}
