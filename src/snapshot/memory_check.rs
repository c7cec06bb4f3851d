//! Reads the held pages of a memory file back and compares them with their checksums.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::page_map::{CHUNK_PAGES, ChunkHasher, PageMap};
use super::{Error, Extent, Gfn, MemoryLayout, PAGE_SIZE, Result};

/// How many damaged chunks a report names; it counts all of them.
const MAX_REPORTED: usize = 1024;

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Pages whose bytes were compared.
    pub pages: u64,
    /// Checksum chunks that were compared.
    pub chunks: u64,
    /// How many of them are damaged.
    pub bad_chunks: u64,
    /// The first 1024 damaged chunks, ascending.
    pub bad: Vec<BadChunk>,
}

/// A chunk whose bytes are not those that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChunk {
    /// The guest memory under the checksum, from the first held page of the chunk to the last.
    pub extent: Extent,
    /// The checksum of the bytes that were written.
    pub stored: u32,
    /// The checksum of the bytes that are there.
    pub computed: u32,
}

impl VerifyReport {
    /// Whether everything is as it was written.
    pub fn is_good(&self) -> bool {
        self.bad_chunks == 0
    }

    /// Makes damage an error.
    ///
    /// # Errors
    /// [`Error::BadMemory`] with the first damaged chunk; `object` names the snapshot in it.
    pub fn into_result(self, object: &str) -> Result<VerifyReport> {
        match self.bad.first() {
            None => Ok(self),
            Some(bad) => Err(Error::BadMemory { object: object.to_string(), bad: self.bad_chunks, first: bad.extent }),
        }
    }
}

/// Calls `progress` with the bytes done and to do; `done` is the sum over several files.
pub(crate) struct Progress<'a> {
    pub(crate) done: u64,
    pub(crate) total: u64,
    pub(crate) report: &'a mut dyn FnMut(u64, u64),
}

impl Progress<'_> {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.done += bytes;
        (self.report)(self.done, self.total);
    }
}

/// A memory file with what is needed to find a page in it.
#[derive(Clone, Copy)]
pub(crate) struct MemoryFile<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    pub(crate) layout: &'a MemoryLayout,
}

impl MemoryFile<'_> {
    /// Fills `buffer` with the pages from `first` on, which must lie in one range of the layout.
    pub(crate) fn read(&self, first: Gfn, buffer: &mut [u8]) -> Result<()> {
        let outside = || Error::malformed(&self.path.display().to_string(), format!("it has no page {first}"));
        let offset = self.layout.file_offset(first).ok_or_else(outside)?;
        self.file.read_exact_at(buffer, offset).map_err(Error::io("read", self.path))
    }

    /// Compares every held page with its checksum.
    ///
    /// Reads are one chunk (64 KiB) long on purpose: with reads of that size the kernel's readahead puts a cold file
    /// into the largest folios, which makes later page faults cheap; larger reads give smaller folios.
    pub(crate) fn verify(&self, map: &PageMap, progress: &mut Progress<'_>) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        let mut buffer = vec![0; (CHUNK_PAGES * PAGE_SIZE) as usize];
        let mut hasher = ChunkHasher::new();
        let mut unreported = 0;
        for run in map.held().runs() {
            for range_part in self.layout.split(run) {
                for part in range_part.chunks(CHUNK_PAGES) {
                    let bytes = &mut buffer[..part.bytes() as usize];
                    self.read(part.first, bytes)?;
                    hasher.update(part.first, bytes);
                    report.pages += part.pages;
                    unreported += part.bytes();
                    if unreported >= 8 << 20 {
                        progress.add(std::mem::take(&mut unreported));
                        compare(map, hasher.drain(), &mut report);
                    }
                }
            }
        }
        compare(map, hasher.finish(), &mut report);
        progress.add(unreported);
        Ok(report)
    }
}

fn compare(map: &PageMap, computed: Vec<(u64, u32)>, report: &mut VerifyReport) {
    for (chunk, computed) in computed {
        report.chunks += 1;
        // Every chunk with a held page has a checksum: PageMap::new saw to it.
        let stored = map.checksum(chunk).unwrap_or_default();
        if stored == computed {
            continue;
        }
        report.bad_chunks += 1;
        if report.bad.len() < MAX_REPORTED {
            let mut extent = Extent { first: Gfn(chunk * CHUNK_PAGES), pages: CHUNK_PAGES };
            let mut runs = map.chunk_runs(chunk);
            if let Some(first) = runs.next() {
                let end = runs.last().unwrap_or(first).end();
                extent = Extent { first: first.first, pages: end.0 - first.first.0 };
            }
            report.bad.push(BadChunk { extent, stored, computed });
        }
    }
}
