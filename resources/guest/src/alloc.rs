//! The allocator of physical pages.

use core::ops::Range;
use tvmm_guest::PAGE_SIZE;
use tvmm_guest::frames::{Error, FreeList, Run};
use tvmm_guest::memmap::MemoryMap;

unsafe extern "C" {
    static __kernel_end: u8;
}

/// Allocation starts here: the kernel has the 2 MiB blocks it lies in for itself, so that its own writes never split a
/// huge page that holds data.
const BLOCK: u64 = 2 << 20;
const FREE_RUNS_MAX: usize = 1024;

/// All usable pages above the kernel.
pub struct Pages {
    free: FreeList<FREE_RUNS_MAX>,
    init_on_free: bool,
}

impl Pages {
    pub const fn new() -> Self {
        Self { free: FreeList::new(), init_on_free: false }
    }

    pub fn init(&mut self, map: &MemoryMap, init_on_free: bool) -> Result<(), Error> {
        self.init_on_free = init_on_free;
        let kernel_end = (&raw const __kernel_end) as u64;
        for range in map.pages_above(kernel_end.next_multiple_of(BLOCK)) {
            self.free.free(Run { first: range.start / PAGE_SIZE, pages: range.len() / PAGE_SIZE })?;
        }
        Ok(())
    }

    pub fn free_pages(&self) -> u64 {
        self.free.free_pages()
    }

    /// The lowest run of `pages` contiguous pages; they are not touched.
    pub fn alloc(&mut self, pages: u64) -> Result<Run, Error> {
        self.free.alloc(pages)
    }

    /// Pages of the longest free run.
    #[cfg(feature = "functions")]
    pub fn longest(&self) -> u64 {
        self.free.longest()
    }

    /// The lowest free pages, at most `pages`; they are not touched.
    pub fn alloc_up_to(&mut self, pages: u64) -> Result<Run, Error> {
        self.free.alloc_up_to(pages)
    }

    /// Takes pages back, zeroed if the kernel was booted with `init_on_free=1`.
    ///
    /// # Safety
    /// The pages are no longer in use.
    pub unsafe fn free(&mut self, run: Run) -> Result<(), Error> {
        self.free.free(run)?;
        if self.init_on_free {
            // SAFETY: they were allocated, so they are RAM and mapped; they are no longer in use (caller).
            unsafe { core::ptr::write_bytes(address(run) as *mut u8, 0, (run.pages * PAGE_SIZE) as usize) };
        }
        Ok(())
    }

    /// Takes back pages that were never touched.
    pub fn free_untouched(&mut self, run: Run) -> Result<(), Error> {
        self.free.free(run)
    }
}

/// Physical = virtual address of a run.
pub const fn address(run: Run) -> u64 {
    run.first * PAGE_SIZE
}

/// Frame numbers of a run.
pub const fn frames(run: Run) -> Range<u64> {
    run.first..run.first + run.pages
}
