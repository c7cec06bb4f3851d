//! Finds the pages of this process's address space that hold anything of their own (kernel document
//! `Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::held;
use crate::snapshot::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Entries per read: 256 KiB of pagemap, 128 MiB of address space.
const BATCH: usize = 32 * 1024;

/// "Page is file-page or shared-anon", "page exclusively mapped".
const FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;

/// `/proc/PID/pagemap`, opened.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens that of this process.
    pub fn open() -> io::Result<Self> {
        held::open(held::PAGEMAP).map(Pagemap)
    }

    /// Opens that of another process, which this one may inspect.
    pub fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Pagemap)
    }

    /// Calls `found(first, pages)` for each maximal run of pages in `[start, start + pages × 4096)` that are present
    /// in memory or in swap, with `first` counted in pages from `start`. Pages never touched are neither; a page of
    /// a mapped file counts as present once it was touched.
    pub fn populated_runs(&self, start: *const u8, pages: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut run_start = 0u64;
        let mut run_len = 0u64;
        self.entries(start as u64, pages, |page, entry| {
            if entry & (PRESENT | SWAPPED) == 0 {
                return;
            }
            if run_len > 0 && run_start + run_len == page {
                run_len += 1;
            } else {
                if run_len > 0 {
                    found(run_start, run_len);
                }
                (run_start, run_len) = (page, 1);
            }
        })?;
        if run_len > 0 {
            found(run_start, run_len);
        }
        Ok(())
    }

    /// The number of pages of `[start, start + pages × 4096)`, mapped from a file and not shared by fork, that show the
    /// file's own memory. For persistent memory mapped by small pages (DAX) the kernel tells neither that a page is a
    /// file's nor which file's, and counts it in no process's memory; copies are exclusive.
    pub fn shown_pages(&self, start: u64, pages: u64) -> io::Result<u64> {
        let mut shown = 0;
        self.entries(start, pages, |_, entry| {
            shown += u64::from(entry & PRESENT != 0 && (entry & FILE != 0 || entry & EXCLUSIVE == 0));
        })?;
        Ok(shown)
    }

    /// Calls `look(page, entry)` for each page, counted from `start`.
    fn entries(&self, start: u64, pages: u64, mut look: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut buffer = vec![0u8; BATCH.min(pages as usize) * 8];
        let first_entry = start / PAGE as u64;
        let mut done = 0;
        while done < pages {
            let want = ((pages - done) as usize).min(BATCH) * 8;
            self.0.read_exact_at(&mut buffer[..want], (first_entry + done) * 8)?;
            for (page, entry) in (done..).zip(buffer[..want].as_chunks::<8>().0) {
                look(page, u64::from_le_bytes(*entry));
            }
            done += (want / 8) as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::Reservation;

    #[test]
    fn populated_runs_are_exactly_the_touched_pages() {
        let memory = Reservation::new(64 * PAGE).unwrap();
        memory.map_anon(0, 64 * PAGE).unwrap();
        for page in [0usize, 5, 6, 7, 63] {
            // SAFETY: the reservation is only used by this test.
            unsafe { memory.bytes_mut(page * PAGE, 1).unwrap()[0] = 1 };
        }
        let mut runs = Vec::new();
        Pagemap::open().unwrap().populated_runs(memory.base(), 64, |first, pages| runs.push((first, pages))).unwrap();
        assert_eq!(runs, [(0, 1), (5, 3), (63, 1)]);
    }

    #[test]
    fn pages_of_a_file_are_told_from_copies() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 * PAGE as u64).unwrap();
        let memory = Reservation::new(32 * PAGE).unwrap();
        memory.map_file_private(0, 32 * PAGE, &file, 0).unwrap();
        for page in 0..32 {
            // SAFETY: the reservation is only used by this test.
            unsafe {
                std::hint::black_box(std::ptr::read_volatile(memory.bytes(page * PAGE, 1).unwrap().as_ptr()));
                if page < 5 {
                    memory.bytes_mut(page * PAGE, 1).unwrap()[0] = 1;
                }
            }
        }
        let pagemap = Pagemap::of(std::process::id()).unwrap();
        assert_eq!(pagemap.shown_pages(memory.base() as u64, 32).unwrap(), 27);
    }
}
