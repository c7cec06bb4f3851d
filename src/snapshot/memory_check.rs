//! Reads the held pages of a memory file back and compares them with their checksums.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::files::Durability;
use super::page_map::{CHUNK_PAGES, ChunkHasher, PageMap};
use super::zero_pages::nonzero_runs;
use super::{
    Digest, Error, Extent, Gfn, HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, MemoryLayout, PAGE_SIZE, PageSet, Result, files,
};

/// Pages read and checksummed at once, 512 KiB: large against a system call, small against the CPU's cache.
pub(crate) const READ_PAGES: u64 = 128;

/// Limit of the damaged chunks that a report names; it counts all of them.
const MAX_REPORTED: usize = 1024;

/// Bytes verified between two calls of the progress function.
const PROGRESS_STEP: u64 = 8 << 20;

/// The result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Pages whose bytes were compared.
    pub pages: u64,
    /// Checksum chunks that were compared.
    pub chunks: u64,
    /// Number of damaged chunks.
    pub bad_chunks: u64,
    /// The first 1024 damaged chunks, ascending.
    pub bad: Vec<BadChunk>,
    /// Pages that the layer does not hold and that are not zero in its memory file. A policy that maps the file there
    /// shows them to the guest.
    pub stray_pages: u64,
    /// The first 1024 runs of stray pages, ascending.
    pub strays: Vec<Extent>,
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
    /// True if all bytes are as they were written.
    pub fn is_good(&self) -> bool {
        self.bad_chunks == 0 && self.stray_pages == 0
    }

    /// Makes damage an error.
    ///
    /// # Errors
    /// [`Error::BadMemory`] with the first damaged chunk, [`Error::StrayPages`] with the first page that should be
    /// zero; `object` names the snapshot in it.
    pub fn into_result(self, object: &str) -> Result<VerifyReport> {
        let object = object.to_string();
        match (self.bad.first(), self.strays.first()) {
            (None, None) => Ok(self),
            (Some(bad), _) => Err(Error::BadMemory { object, bad: self.bad_chunks, first: bad.extent }),
            (None, Some(first)) => Err(Error::StrayPages { object, pages: self.stray_pages, first: *first }),
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

/// Fills the bytes from an offset of a memory file on.
pub type ReadAt<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>;

/// A memory file with the layout by which a page is found in it.
#[derive(Clone, Copy)]
pub(crate) struct MemoryFile<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    pub(crate) layout: &'a MemoryLayout,
}

impl MemoryFile<'_> {
    /// Fills `buffer` with the pages from `first` on, which must lie in one range of the layout.
    pub(crate) fn read(&self, first: Gfn, buffer: &mut [u8]) -> Result<()> {
        self.read_by(first, buffer, &mut |offset, bytes| self.file.read_exact_at(bytes, offset))
    }

    fn read_by(&self, first: Gfn, buffer: &mut [u8], read: ReadAt<'_>) -> Result<()> {
        let outside = || Error::malformed(&self.path.display().to_string(), format!("it has no page {first}"));
        let offset = self.layout.file_offset(first).ok_or_else(outside)?;
        read(offset, buffer).map_err(Error::io("read guest memory from", self.path))
    }

    /// Compares one chunk with its checksum, reading by `read`. Returns how many pages it holds.
    ///
    /// # Errors
    /// [`Error::OtherMemory`].
    pub(crate) fn check_chunk(&self, map: &PageMap, chunk: u64, buffer: &mut [u8], read: ReadAt<'_>) -> Result<u64> {
        let (pages, computed) = self.load_chunk_by(map, chunk, buffer, read)?;
        if map.checksum(chunk) == Some(computed) {
            Ok(pages)
        } else {
            Err(Error::OtherMemory { path: self.path.to_path_buf(), extent: held_span(map, chunk) })
        }
    }

    /// The checksums of the chunks with a page of `held`, ascending, from the bytes just written.
    ///
    /// The guest may run meanwhile: checksumming costs it no pause. The bytes come from the page cache, where `write`
    /// put them; what the disk makes of them is compared with these checksums afterwards. An error of the disk in
    /// between is reported by `fsync` on the same descriptor; only bytes that were written out, dropped for want of
    /// memory, read back wrong and not reported would go unnoticed.
    pub(crate) fn checksums(&self, held: &PageSet) -> Result<Vec<u32>> {
        let mut hasher = ChunkHasher::new();
        let mut buffer = vec![0; (READ_PAGES * PAGE_SIZE) as usize];
        for run in held.runs() {
            for part in self.layout.split(run).flat_map(|extent| extent.chunks(READ_PAGES)) {
                let bytes = &mut buffer[..part.bytes() as usize];
                self.read(part.first, bytes)?;
                hasher.update(part.first, bytes);
            }
        }
        Ok(hasher.finish().into_iter().map(|(_, crc)| crc).collect())
    }

    /// Makes the file as durable as asked, and returns its [`checksums`](Self::checksums): both at once, if a thread
    /// can be started.
    pub(crate) fn sync_and_checksum(&self, held: &PageSet, durability: Durability) -> Result<Vec<u32>> {
        if durability == Durability::Unsynced {
            return self.checksums(held);
        }
        let sync = || self.file.sync_all().map_err(Error::io("sync", self.path));
        std::thread::scope(|scope| {
            let syncing = std::thread::Builder::new().name("sync".into()).spawn_scoped(scope, sync);
            let checksums = self.checksums(held);
            match syncing {
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
                // The host has no thread left.
                Err(_) => sync()?,
            }
            checksums
        })
    }

    /// The 2 MiB blocks of which at least a quarter is held, joined: worth a huge folio each.
    pub(crate) fn dense_blocks(&self, map: &PageMap) -> Vec<Extent> {
        let mut dense: Vec<Extent> = Vec::new();
        for block in self.layout.extents().flat_map(|range| range.chunks(HUGE_PAGE_PAGES)) {
            let whole = block.pages == HUGE_PAGE_PAGES && block.first.0.is_multiple_of(HUGE_PAGE_PAGES);
            let aligned = self.layout.file_offset(block.first).is_some_and(|at| at % HUGE_PAGE_SIZE == 0);
            if !whole || !aligned || map.held().len_in(block) < HUGE_PAGE_PAGES / 4 {
                continue;
            }
            match dense.last_mut() {
                Some(last) if last.end() == block.first && self.layout.contains(join(*last, block)) => {
                    last.pages += block.pages;
                }
                _ => dense.push(block),
            }
        }
        dense
    }

    /// Compares every held page with its checksum.
    ///
    /// Reads one chunk (64 KiB) at a time on purpose, small holes in it included (and all of it if half of it is
    /// held): with reads of that size and no gaps the kernel's readahead puts a cold file into the largest folios,
    /// which makes later page faults cheap. Larger reads give smaller folios, and so do reads of single pages.
    pub(crate) fn verify(&self, map: &PageMap, progress: &mut Progress<'_>) -> Result<VerifyReport> {
        let mut report = VerifyReport::default();
        let mut buffer = vec![0; (CHUNK_PAGES * PAGE_SIZE) as usize];
        let mut unreported = 0;
        for (chunk, stored) in map.checksums() {
            let (pages, computed) = self.load_chunk(map, chunk, &mut buffer)?;
            report.chunks += 1;
            report.pages += pages;
            if computed != stored {
                report.bad_chunks += 1;
                if report.bad.len() < MAX_REPORTED {
                    report.bad.push(BadChunk { extent: held_span(map, chunk), stored, computed });
                }
            }
            unreported += pages * PAGE_SIZE;
            if unreported >= PROGRESS_STEP {
                progress.add(std::mem::take(&mut unreported));
            }
        }
        progress.add(unreported);
        Ok(report)
    }

    /// Notes in `report` the pages that are not held and yet have bytes. Holes of the file are skipped, not read.
    pub(crate) fn find_strays(&self, held: &PageSet, report: &mut VerifyReport) -> Result<()> {
        let mut buffer = vec![0; (READ_PAGES * PAGE_SIZE) as usize];
        let rest = self.unheld_data(held)?;
        for part in rest.runs().flat_map(|run| self.layout.split(run)).flat_map(|run| run.chunks(READ_PAGES)) {
            let bytes = &mut buffer[..part.bytes() as usize];
            self.read(part.first, bytes)?;
            for run in nonzero_runs(part.first, bytes) {
                report.stray_pages += run.pages;
                if report.strays.len() < MAX_REPORTED {
                    report.strays.push(run);
                }
            }
        }
        Ok(())
    }

    /// BLAKE3 of the pages of `held`, ascending, joined without gaps.
    pub(crate) fn digest(&self, held: &PageSet) -> Result<Digest> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; (READ_PAGES * PAGE_SIZE) as usize];
        for part in held.runs().flat_map(|run| self.layout.split(run)).flat_map(|run| run.chunks(READ_PAGES)) {
            let bytes = &mut buffer[..part.bytes() as usize];
            self.read(part.first, bytes)?;
            hasher.update(bytes);
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
    }

    /// The pages that are neither held nor in a hole of the file: zeros, if the file is intact.
    pub(crate) fn unheld_data(&self, held: &PageSet) -> Result<PageSet> {
        Ok(self.data_pages()?.difference(held))
    }

    /// The first of `pages`, which lie in one range of the layout, that are not zero. `read` reads into the start of
    /// `buffer`.
    pub(crate) fn first_nonzero(&self, pages: Extent, buffer: &mut [u8], read: ReadAt<'_>) -> Result<Option<Extent>> {
        let bytes = &mut buffer[..pages.bytes() as usize];
        self.read_by(pages.first, bytes, read)?;
        Ok(nonzero_runs(pages.first, bytes).first().copied())
    }

    /// The pages that are not in a hole of the file.
    fn data_pages(&self) -> Result<PageSet> {
        let mut pages = PageSet::new();
        for range in self.layout.ranges() {
            let start = range.file_offset;
            let end = range.file_offset + range.len;
            let mut at = start;
            while let Some(data) =
                files::data_in(self.file, at..end).map_err(Error::io("look for holes in", self.path))?
            {
                let first = (data.start - start) / PAGE_SIZE;
                let last = (data.end - start).div_ceil(PAGE_SIZE);
                pages.insert_run(Extent { first: Gfn(range.gpa / PAGE_SIZE + first), pages: last - first });
                at = data.end;
            }
        }
        Ok(pages)
    }

    /// Reads the held pages of a chunk, each to its place in `buffer`, which has room for a chunk. Returns how many
    /// they are, and the checksum of what is there.
    pub(super) fn load_chunk(&self, map: &PageMap, chunk: u64, buffer: &mut [u8]) -> Result<(u64, u32)> {
        self.load_chunk_by(map, chunk, buffer, &mut |offset, bytes| self.file.read_exact_at(bytes, offset))
    }

    /// As [`load_chunk`](Self::load_chunk), with the bytes read by `read`, whole pages at multiples of pages in
    /// `buffer`.
    fn load_chunk_by(&self, map: &PageMap, chunk: u64, buffer: &mut [u8], read: ReadAt<'_>) -> Result<(u64, u32)> {
        let mut pages = 0;
        let mut crc = 0;
        for part in self.layout.split(chunk_extent(chunk)) {
            let runs: Vec<Extent> = map.held().runs_in(part).collect();
            let (Some(first), Some(last)) = (runs.first(), runs.last()) else { continue };
            let held: u64 = runs.iter().map(|run| run.pages).sum();
            let mut span = Extent { first: first.first, pages: last.end().0 - first.first.0 };
            if 2 * held >= CHUNK_PAGES {
                span = part;
            }
            self.read_by(span.first, &mut buffer[place_in(chunk, span)], read)?;
            for run in &runs {
                crc = crc32c::crc32c_append(crc, &buffer[place_in(chunk, *run)]);
            }
            pages += held;
        }
        Ok((pages, crc))
    }
}

/// The place of a chunk's pages in a buffer with room for a chunk.
pub(super) fn place_in(chunk: u64, part: Extent) -> Range<usize> {
    let at = (part.first.0 - chunk * CHUNK_PAGES) * PAGE_SIZE;
    at as usize..(at + part.bytes()) as usize
}

fn join(run: Extent, next: Extent) -> Extent {
    Extent { first: run.first, pages: run.pages + next.pages }
}

fn chunk_extent(chunk: u64) -> Extent {
    Extent { first: Gfn(chunk.saturating_mul(CHUNK_PAGES)), pages: CHUNK_PAGES }
}

/// From the first held page of a chunk to the last.
pub(super) fn held_span(map: &PageMap, chunk: u64) -> Extent {
    let mut runs = map.chunk_runs(chunk);
    let Some(first) = runs.next() else { return chunk_extent(chunk) };
    let end = runs.last().unwrap_or(first).end();
    Extent { first: first.first, pages: end.0 - first.first.0 }
}
