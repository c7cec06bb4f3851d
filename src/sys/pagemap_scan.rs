//! The ioctl `PAGEMAP_SCAN` (kernel `Documentation/admin-guide/mm/pagemap.rst`, Linux 6.7): lists mapped pages in runs,
//! instead of eight bytes a page.

use std::fs::File;
use std::io;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::held;
use crate::snapshot::PAGE_SIZE;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);
ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArg);

const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO_PAGE: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;

/// Regions taken at once.
const REGIONS: usize = 4096;

/// The kind of a mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// A page of a file as it is in the page cache, or the kernel's page of zeros.
    Shared,
    /// A page of this process's own.
    Own,
}

/// Returns whether a scan failed because the kernel has no PAGEMAP_SCAN (before Linux 6.7).
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY))
}

/// Returns whether the kernel has PAGEMAP_SCAN.
///
/// # Errors
/// A scan fails for another reason.
pub fn is_supported() -> io::Result<bool> {
    let mine = 0_u8;
    let start = (&raw const mine).map_addr(|addr| addr - addr % PAGE_SIZE as usize);
    match mapped_runs(start, 1, |_, _, _| {}) {
        Err(error) if is_unsupported(&error) => Ok(false),
        scanned => scanned.map(|()| true),
    }
}

/// True if the page at `start` is mapped as part of a huge one. For errors see [`is_unsupported`].
pub fn is_huge(start: *const u8) -> io::Result<bool> {
    let file = held::open(held::PAGEMAP)?;
    let mut region = Region::default();
    let mut scan = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start: start as u64,
        end: start as u64 + PAGE_SIZE,
        vec: &raw mut region as u64,
        vec_len: 1,
        category_mask: IS_PRESENT,
        return_mask: IS_HUGE,
        ..ScanArg::default()
    };
    // SAFETY: the struct has the kernel's layout (asserted above) and lives through the call; the kernel writes at most
    // one region to `vec`, which is one. It only looks at the scanned page.
    let count = unsafe { ioctl_with_mut_ref(&file, PAGEMAP_SCAN(), &mut scan) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(count == 1 && region.categories & IS_HUGE != 0)
}

/// Calls `found(first, pages, what)` for each run of pages of `[start, start + pages × 4096)` that is mapped or in
/// swap, ascending, with `first` counted in pages from `start`. For errors see [`is_unsupported`].
pub fn mapped_runs(start: *const u8, pages: u64, found: impl FnMut(u64, u64, Mapped)) -> io::Result<()> {
    PagemapScan::open()?.mapped_runs(start, pages, found)
}

/// The page map of this process, opened for several scans.
pub struct PagemapScan {
    file: File,
    regions: Vec<Region>,
}

impl PagemapScan {
    pub fn open() -> io::Result<PagemapScan> {
        Ok(PagemapScan { file: held::open(held::PAGEMAP)?, regions: vec![Region::default(); REGIONS] })
    }

    /// See [`mapped_runs`].
    pub fn mapped_runs(
        &mut self,
        start: *const u8,
        pages: u64,
        mut found: impl FnMut(u64, u64, Mapped),
    ) -> io::Result<()> {
        let base = start as u64;
        let end = base + pages * PAGE_SIZE;
        let mut at = base;
        while at < end {
            let mut scan = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                category_anyof_mask: IS_PRESENT | IS_SWAPPED,
                return_mask: IS_FILE | IS_ZERO_PAGE,
                ..ScanArg::default()
            };
            // SAFETY: the struct has the kernel's layout (asserted above) and lives through the call; the kernel writes
            // at most `vec_len` regions to `vec`, which has as many. It only looks at the scanned range.
            let count = unsafe { ioctl_with_mut_ref(&self.file, PAGEMAP_SCAN(), &mut scan) };
            if count < 0 {
                return Err(io::Error::last_os_error());
            }
            for region in self.regions.iter().take(count as usize) {
                let what = if region.categories == 0 { Mapped::Own } else { Mapped::Shared };
                found((region.start - base) / PAGE_SIZE, (region.end - region.start) / PAGE_SIZE, what);
            }
            // The kernel has made progress or is at the end; otherwise this would go on for ever.
            if scan.walk_end <= at {
                break;
            }
            at = scan.walk_end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::mapping::Reservation;

    #[test]
    fn a_kernel_with_the_call_is_known_to_have_it() {
        let scanned = mapped_runs(std::ptr::null(), 1, |_, _, _| {});
        assert_eq!(is_supported().unwrap(), scanned.is_ok());
    }

    #[test]
    fn copies_files_and_the_zero_page_are_told_apart() {
        let page = PAGE_SIZE as usize;
        let file = tempfile::tempfile().unwrap();
        file.set_len(32 * PAGE_SIZE).unwrap();
        let memory = Reservation::new(64 * page).unwrap();
        memory.map_file_private(0, 32 * page, &file, 0).unwrap();
        memory.map_anon(32 * page, 32 * page).unwrap();
        // SAFETY: the reservation is only used by this test.
        unsafe {
            memory.bytes_mut(3 * page, 1).unwrap()[0] = 1;
            memory.bytes_mut(40 * page, 1).unwrap()[0] = 1;
            std::hint::black_box(std::ptr::read_volatile(memory.bytes(50 * page, 1).unwrap().as_ptr()));
        }
        let mut runs = Vec::new();
        mapped_runs(memory.base(), 64, |first, pages, what| runs.push((first, pages, what))).unwrap();
        assert_eq!(runs, [(3, 1, Mapped::Own), (40, 1, Mapped::Own), (50, 1, Mapped::Shared)]);
    }
}
