//! Pages in place on a tier that cannot copy on write (device DAX), and their promotion to local memory.
//!
//! Such pages are mapped shared and read-only. Who wants to write one has it promoted first: a copy in local memory takes
//! its place. VMM threads ask the [write gate](crate::sys::guest_memory::WriteGate), which is this. The guest asks nobody: its
//! write ends KVM_RUN, mostly without an address, and [`fault`] finds out what it was that the guest wrote. `operands` knows
//! what an instruction writes, `walk` the guest's page tables, `view` the rest of what a CPU looks at, and `ahead` what is
//! written without anybody being told.
//!
//! A page that is promoted, or given back by the guest, never lies in place again.

pub mod ahead;
mod counts;
pub mod fault;
mod operands;
mod view;
mod walk;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::Error;
use crate::snapshot::{Extent, Gfn, GuestRange, PageSet};
use crate::sys::guest_memory::{Memory, WriteGate};
use crate::sys::mapping::{Reservation, count_mappings};

pub use counts::{Counts, Resort};

/// 2 MiB in pages: what is promoted at once where mappings run out, and copied at once.
const BLOCK_PAGES: u64 = 512;
/// Mappings that this process may come to have for the guest's sake: half of the kernel's default limit.
const MAPPINGS_MAX: usize = 32 << 10;
/// A copy put into the middle of a mapping makes three of one.
const MAPPINGS_PER_COPY: usize = 2;
/// Copies made before mappings are first counted.
const COPIES_FIRST: usize = 4 << 10;

/// Pages that are mapped in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InPlaceExtent {
    pub extent: Extent,
    /// The mapping can be cut only at multiples of so many pages, a power of two of at most 512.
    pub align_pages: u64,
}

/// A range of guest RAM, and memory as long as it where copies are made.
#[derive(Debug)]
struct Part {
    range: GuestRange,
    memory: Arc<Reservation>,
    stage: Reservation,
}

/// What lies in place, and what is needed to change that.
#[derive(Debug)]
struct Books {
    pages: PageSet,
    /// Mappings of which no single pages can be replaced.
    coarse: Vec<InPlaceExtent>,
    /// Copies that may be made before mappings are counted again; none: whole blocks are promoted.
    copies_left: usize,
    mappings_max: usize,
}

/// The pages of one machine that lie in place.
#[derive(Debug)]
pub struct InPlace {
    parts: Vec<Part>,
    books: Mutex<Books>,
    /// Grows with every promotion: who finds it changed since he looked need not look for the culprit.
    generation: AtomicU64,
    /// Pages that lay in place at first.
    mapped_pages: u64,
    counts: Counts,
}

impl InPlace {
    /// The books of `mapped`, which was mapped shared and read-only into the memory of `ranges`.
    pub fn new(
        ranges: impl Iterator<Item = (GuestRange, Arc<Reservation>)>,
        mapped: &[InPlaceExtent],
    ) -> io::Result<Self> {
        let part = |(range, memory): (GuestRange, Arc<Reservation>)| {
            let stage = Reservation::new(memory.len())?;
            stage.map_anon(0, stage.len())?;
            stage.advise_small(0, stage.len())?;
            Ok::<_, io::Error>(Part { range, memory, stage })
        };
        let parts = ranges.map(part).collect::<io::Result<Vec<_>>>()?;
        let pages: PageSet = mapped.iter().map(|mapped| mapped.extent).collect();
        let mapped_pages = pages.len();
        let coarse = mapped.iter().copied().filter(|mapped| mapped.align_pages > 1).collect();
        let books = Books { pages, coarse, copies_left: COPIES_FIRST, mappings_max: MAPPINGS_MAX };
        let (books, generation) = (Mutex::new(books), AtomicU64::new(0));
        Ok(InPlace { parts, books, generation, mapped_pages, counts: Counts::default() })
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Pages that lie in place now.
    pub fn pages(&self) -> u64 {
        self.lock().pages.len()
    }

    /// How many pages lay in place, how many do, and how the others were promoted (or given back).
    pub fn json(&self) -> serde_json::Value {
        let mut json = self.counts.json();
        json["mapped_pages"] = self.mapped_pages.into();
        json["in_place_pages"] = self.pages().into();
        json
    }

    /// Changes whenever something was promoted.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Promotes what of `wanted` lies in place, and what cannot be told apart from it. Returns how many pages.
    pub fn promote(&self, wanted: &[Extent]) -> io::Result<u64> {
        let mut books = self.lock();
        let mut done = 0;
        for extent in wanted {
            let grown: Vec<Extent> = books.pages.runs_in(*extent).collect();
            for run in grown.into_iter().map(|run| books.grow(run)).collect::<Vec<_>>() {
                done += self.promote_runs(&mut books, run)?;
            }
        }
        Ok(done)
    }

    /// As [`promote`](Self::promote), counted.
    pub fn promote_as(&self, resort: Resort, extent: Extent) -> io::Result<()> {
        let promoted = self.promote(&[extent])?;
        self.counts.add(resort, promoted);
        Ok(())
    }

    /// Whether something of `extent` lies in place.
    pub fn has(&self, extent: Extent) -> bool {
        self.lock().pages.len_in(extent) > 0
    }

    /// Promotes everything. Returns how many pages.
    pub fn promote_all(&self) -> io::Result<u64> {
        let all: Vec<Extent> = self.parts.iter().map(|part| part.range.extent()).collect();
        self.promote(&all)
    }

    /// Promotes what of `extent` lies in place.
    fn promote_runs(&self, books: &mut Books, extent: Extent) -> io::Result<u64> {
        let runs: Vec<Extent> = books.pages.runs_in(extent).collect();
        let mut done = 0;
        for piece in runs.iter().flat_map(|run| run.chunks(BLOCK_PAGES)) {
            let Some(part) = self.parts.iter().find(|part| part.range.extent().contains(piece.first)) else { continue };
            let offset = (piece.gpa() - part.range.gpa) as usize;
            // SAFETY: what is in the books is mapped read-only, so that nobody can write it, and only who holds the lock
            // on the books changes that. The mapping covers whole runs: parts are disjoint ranges of the layout, and the
            // extents that were mapped lie within one each.
            unsafe { part.memory.copy_locally(&part.stage, offset, piece.bytes() as usize)? };
            books.pages.remove_run(piece);
            books.copies_left = books.copies_left.saturating_sub(1);
            done += piece.pages;
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        Ok(done)
    }

    /// A write that KVM's emulator could not do, and takes for one to a device. Whether it was to RAM, where it is now.
    pub fn take_emulated(&self, memory: &Memory, gpa: u64, data: &[u8]) -> bool {
        let at = GuestAddress(gpa);
        if !memory.check_range(at, data.len(), Permissions::Write) {
            return false;
        }
        let page = Extent { first: Gfn::containing(gpa), pages: 1 };
        let Ok(promoted) = self.promote(&[page]) else { return false };
        self.counts.add(Resort::Emulated, promoted);
        memory.write_slice(data, at).is_ok()
    }

    /// Puts zero pages in the place of `run`, which lies within one range of RAM, for a guest that gives it back. What of
    /// its mappings cannot be cut there is promoted before.
    pub fn replace_by_zeros(&self, run: Extent) -> io::Result<()> {
        let mut books = self.lock();
        let last = Extent { first: Gfn(run.end().0.saturating_sub(1)), pages: 1 };
        for edge in [Extent { pages: 1, ..run }, last] {
            let block = books.align(edge);
            if run.intersection(&block) != Some(block) {
                self.promote_runs(&mut books, block)?;
            }
        }
        let part = self.parts.iter().find(|part| part.range.extent().intersection(&run) == Some(run));
        let part = part.ok_or(io::ErrorKind::InvalidInput)?;
        part.memory.map_anon((run.gpa() - part.range.gpa) as usize, run.bytes() as usize)?;
        books.pages.remove_run(run);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WriteGate for InPlace {
    fn open(&self, gpa: u64, len: u64) -> io::Result<()> {
        let Some(last) = gpa.checked_add(len.saturating_sub(1)).filter(|_| len > 0) else { return Ok(()) };
        let first = Gfn::containing(gpa);
        let pages = Gfn::containing(last).0 - first.0 + 1;
        let promoted = self.promote(&[Extent { first, pages }])?;
        self.counts.add(Resort::Device, promoted);
        Ok(())
    }
}

impl Books {
    /// `run` and what its mapping cannot be cut from.
    fn align(&self, run: Extent) -> Extent {
        let meets = |coarse: &&InPlaceExtent| coarse.extent.intersection(&run).is_some();
        let align = self.coarse.iter().filter(meets).map(|coarse| coarse.align_pages).max().unwrap_or(1);
        whole_blocks(run, align)
    }

    /// What is promoted for the sake of `run`: whole blocks where mappings run out.
    fn grow(&mut self, run: Extent) -> Extent {
        if self.copies_left == 0 {
            let there = count_mappings().unwrap_or(self.mappings_max);
            self.copies_left = self.mappings_max.saturating_sub(there) / MAPPINGS_PER_COPY;
        }
        let run = self.align(run);
        if self.copies_left == 0 { whole_blocks(run, BLOCK_PAGES) } else { run }
    }
}

fn whole_blocks(run: Extent, align: u64) -> Extent {
    let first = run.first.0 / align * align;
    Extent { first: Gfn(first), pages: run.end().0.next_multiple_of(align) - first }
}

/// Says why promotion failed, in the room's words.
fn failed(source: io::Error) -> Error {
    Error::Os { doing: "give pages in place a copy in local memory", source }
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
