//! The host's page cache of one file.

use std::fs::File;
use std::io;

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
