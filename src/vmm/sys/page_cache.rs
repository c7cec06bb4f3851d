//! The host's page cache of one file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::mapping::Reservation;
use crate::snapshot::LoadHuge;

/// This host's page cache.
#[derive(Clone, Copy, Debug)]
pub struct PageCache;

/// Mapped at once: bounds the address space, not the folios.
const WINDOW: u64 = 1 << 30;

impl LoadHuge for PageCache {
    /// Maps the range, asks for huge pages and populates it for reading: readahead for a mapping that wants huge pages
    /// reads 2 MiB at a time into one folio (Linux `mm/filemap.c`, `do_sync_mmap_readahead`). Read(2) does not: its
    /// readahead grows folios only up to its window.
    fn load_huge(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
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

/// How many pages of `file` are in the page cache; `None` if the kernel has no cachestat(2) (before 6.5), or not for this
/// file system.
pub fn resident_pages(file: &File) -> io::Result<Option<u64>> {
    let range = CacheStatRange { offset: 0, len: 0 };
    let mut stat = CacheStat::default();
    // SAFETY: the kernel reads `range` and writes `stat`, both valid and of the kernel's layout, for the length of the
    // call; a length of 0 means up to the end of the file.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) };
    if result == 0 {
        return Ok(Some(stat.cached));
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(None),
        error => Err(error),
    }
}

/// The read-ahead window of the device that `file` is on, in pages, if the kernel tells (sysfs,
/// `Documentation/ABI/testing/sysfs-class-bdi`).
pub fn readahead_pages(file: &File) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    let device = file.metadata().ok()?.dev();
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", libc::major(device), libc::minor(device));
    let kib: u64 = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some((kib / 4).clamp(1, 1 << 20))
}
