//! The host's page cache of one file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::mapping::Reservation;
use super::pagemap_scan;
use crate::snapshot::{CacheLookup, HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, LoadHuge, PAGE_SIZE};

/// This host's page cache.
#[derive(Clone, Copy, Debug)]
pub struct PageCache;

/// Bytes mapped at once: bounds the address space, not the folios.
const WINDOW: u64 = 1 << 30;

impl LoadHuge for PageCache {
    /// Maps the range, asks for huge pages and populates it for reading: readahead for a mapping that wants huge pages
    /// reads 2 MiB at a time into one folio (Linux `mm/filemap.c`, `do_sync_mmap_readahead`). Read(2) does not: its
    /// readahead grows folios only up to its window.
    ///
    /// The page cache of a tmpfs is all there is of its files. Populating them would give holes a page, and fail where
    /// the tmpfs is full.
    fn load_huge(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        if rustix::fs::fstatfs(file)?.f_type == libc::TMPFS_MAGIC {
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let window = (len - done).min(WINDOW) as usize;
            let memory = Reservation::new(window)?;
            memory.map_file_private(0, window, file, offset + done)?;
            let loaded = memory.advise_huge(0, window).and_then(|()| memory.populate_read(0, window));
            match loaded {
                // A kernel without huge pages (CONFIG_TRANSPARENT_HUGEPAGE) or without MADV_POPULATE_READ (5.14).
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                other => other?,
            }
            done += window as u64;
        }
        Ok(())
    }
}

impl CacheLookup for PageCache {
    fn resident_pages(&self, file: &File) -> io::Result<Option<u64>> {
        resident_pages(file)
    }

    fn is_in_huge_folios(&self, file: &File) -> io::Result<Option<bool>> {
        is_in_huge_folios(file)
    }

    fn readahead_pages(&self, file: &File) -> Option<u64> {
        readahead_pages(file)
    }
}

/// `struct cachestat_range` and `struct cachestat` of cachestat(2), Linux 6.5.
#[repr(C)]
struct CacheStatRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

const SYS_CACHESTAT: libc::c_long = 451;

/// The number of pages of `file` in the page cache; `None` if the kernel has no cachestat(2) (before 6.5), or not for
/// this file system. For a file that this user may not write and does not own, the kernel gives no number: then it is
/// estimated from a sample of pages.
pub fn resident_pages(file: &File) -> io::Result<Option<u64>> {
    // A length of 0 means up to the end of the file.
    match resident_in(file, 0, 0) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => estimated_pages(file),
        told => told,
    }
}

/// Pages sampled for the estimate.
const SAMPLES: u64 = 32;

fn estimated_pages(file: &File) -> io::Result<Option<u64>> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata()?;
    let mut asked = 0;
    let mut cached = 0;
    for sample in 0..SAMPLES {
        let offset = metadata.len() / SAMPLES * sample;
        // Holes are skipped: they say nothing about the data.
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
            Err(rustix::io::Errno::NXIO) => break,
            at => match is_cached(file, at.unwrap_or(offset))? {
                Some(is_there) => (asked, cached) = (asked + 1, cached + u64::from(is_there)),
                None => return Ok(None),
            },
        }
    }
    let held = metadata.blocks() * 512 / PAGE_SIZE;
    Ok((asked > 0).then(|| held * cached / asked.max(1)))
}

/// True if the page at `offset` can be read without waiting for the device (preadv2(2), `RWF_NOWAIT`); `None` if the
/// file system does not say.
fn is_cached(file: &File, offset: u64) -> io::Result<Option<bool>> {
    let mut byte = [0];
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    match rustix::io::preadv2(file, &mut parts, offset / PAGE_SIZE * PAGE_SIZE, rustix::io::ReadWriteFlags::NOWAIT) {
        Ok(read) => Ok(Some(read > 0)),
        Err(rustix::io::Errno::AGAIN) => Ok(Some(false)),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// As [`resident_pages`], for `[offset, offset + len)`.
pub fn resident_in(file: &File, offset: u64, len: u64) -> io::Result<Option<u64>> {
    let range = CacheStatRange { offset, len };
    let mut stat = CacheStat::default();
    // SAFETY: the kernel reads `range` and writes `stat`, both valid and of the kernel's layout, for the length of the
    // call.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) };
    if result == 0 {
        return Ok(Some(stat.cached));
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(None),
        error => Err(error),
    }
}

/// Blocks to probe, and blocks to choose them from.
const PROBED: usize = 4;
const CANDIDATES: u64 = 32;

/// True if `file` is cached in folios of 2 MiB, so that a fault maps as much: maps some blocks that are wholly cached,
/// touches one page of each, and looks whether its neighbours were mapped too. `None` if no block tells: none is
/// cached, or the kernel has no such interface.
fn is_in_huge_folios(file: &File) -> io::Result<Option<bool>> {
    let blocks = file.metadata()?.len() / HUGE_PAGE_SIZE;
    let mut huge = 0;
    let mut small = 0;
    for index in 0..CANDIDATES.min(blocks) {
        let offset = index * blocks / CANDIDATES.min(blocks) * HUGE_PAGE_SIZE;
        if !is_block_cached(file, offset)? {
            continue;
        }
        let memory = Reservation::new(HUGE_PAGE_SIZE as usize)?;
        memory.map_file_private(0, HUGE_PAGE_SIZE as usize, file, offset)?;
        match memory.populate_read(0, PAGE_SIZE as usize).and_then(|()| pagemap_scan::is_huge(memory.base())) {
            Ok(true) => huge += 1,
            Ok(false) => small += 1,
            // Kernels before PAGEMAP_SCAN (6.7) or MADV_POPULATE_READ (5.14).
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => return Ok(None),
            Err(error) => return Err(error),
        }
        if huge + small == PROBED {
            break;
        }
    }
    Ok((huge + small > 0).then_some(huge >= small))
}

/// True if a block is wholly cached. If the kernel gives this user no count, its first and last page stand for it.
fn is_block_cached(file: &File, offset: u64) -> io::Result<bool> {
    match resident_in(file, offset, HUGE_PAGE_SIZE) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            let ends = [offset, offset + HUGE_PAGE_SIZE - PAGE_SIZE].map(|at| is_cached(file, at));
            Ok(ends.into_iter().collect::<io::Result<Vec<_>>>()?.into_iter().all(|end| end == Some(true)))
        }
        told => Ok(told? == Some(HUGE_PAGE_PAGES)),
    }
}

/// The read-ahead window of the device that `file` is on, in pages, if the kernel tells (sysfs,
/// `Documentation/ABI/testing/sysfs-class-bdi`).
fn readahead_pages(file: &File) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let device = file.metadata().ok()?.dev();
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", libc::major(device), libc::minor(device));
    let kib: u64 = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some((kib / 4).clamp(1, 1 << 20))
}
