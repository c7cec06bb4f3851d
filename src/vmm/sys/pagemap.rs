//! Which pages of this process's address space hold anything of their own (kernel document
//! `Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Entries per read: 256 KiB of pagemap, 128 MiB of address space.
const BATCH: usize = 32 * 1024;

/// `/proc/self/pagemap`, opened.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Pagemap)
    }

    /// Calls `found(first, pages)` for each maximal run of pages in `[start, start + pages × 4096)` that are present
    /// in memory or in swap, with `first` counted in pages from `start`. Pages never touched are neither; a page of
    /// a mapped file counts as present once it was touched.
    pub fn populated_runs(&self, start: *const u8, pages: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut buffer = vec![0u8; BATCH.min(pages as usize) * 8];
        let first_entry = (start as usize / PAGE) as u64;
        let (mut done, mut run_start, mut run_len) = (0u64, 0u64, 0u64);
        while done < pages {
            let want = ((pages - done) as usize).min(BATCH) * 8;
            self.0.read_exact_at(&mut buffer[..want], (first_entry + done) * 8)?;
            for (index, entry) in buffer[..want].as_chunks::<8>().0.iter().enumerate() {
                let page = done + index as u64;
                if u64::from_le_bytes(*entry) & (PRESENT | SWAPPED) == 0 {
                    continue;
                }
                if run_len > 0 && run_start + run_len == page {
                    run_len += 1;
                } else {
                    if run_len > 0 {
                        found(run_start, run_len);
                    }
                    (run_start, run_len) = (page, 1);
                }
            }
            done += (want / 8) as u64;
        }
        if run_len > 0 {
            found(run_start, run_len);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::sys::mapping::Reservation;

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
}
