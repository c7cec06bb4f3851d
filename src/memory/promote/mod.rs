//! Pages in place on a tier that cannot copy on write (device DAX), and their promotion to local memory.
//!
//! Such pages are mapped shared and read-only. Before the first write a page is promoted: a copy in local memory takes
//! its place. VMM threads go through the [write gate](crate::sys::guest_memory::WriteGate), which [`InPlace`]
//! implements. A write of the guest ends KVM_RUN, mostly without an address, and [`fault`] finds the page. `operands`
//! lists the memory that an instruction writes, `walk` the guest's page tables, `view` the other structures that a CPU
//! reads and writes, and `ahead` the pages that KVM writes without a report.
//!
//! A page that is promoted, or given back by the guest, never lies in place again.

pub mod ahead;
mod counts;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
pub mod fault;
mod operands;
mod view;
mod walk;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::Error;
use crate::snapshot::{Extent, Gfn, GuestRange, HUGE_PAGE_PAGES, PageSet};
use crate::sys::guest_memory::{Memory, WriteGate};
use crate::sys::mapping::{Reservation, count_mappings};

pub use counts::{Counts, Resort};

/// The unit of promotion when mappings run out, and of copying.
const BLOCK_PAGES: u64 = HUGE_PAGE_PAGES;
/// Mappings that promotion may add up to: half of the kernel's default limit.
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

/// A range of guest RAM, and a staging area of the same length where copies are made.
#[derive(Debug)]
struct Part {
    range: GuestRange,
    memory: Arc<Reservation>,
    stage: Reservation,
}

/// The pages in place, and the allowance of mappings.
#[derive(Debug)]
struct Books {
    pages: PageSet,
    /// Mappings that can be cut only at multiples of more than one page.
    coarse: Vec<InPlaceExtent>,
    /// Copies that may be made before mappings are counted again; 0: whole blocks are promoted.
    copies_left: usize,
    mappings_max: usize,
}

/// The pages of one machine that lie in place.
#[derive(Debug)]
pub struct InPlace {
    parts: Vec<Part>,
    books: Mutex<Books>,
    /// Grows with every promotion: a vCPU that finds it changed since its exit enters the guest again without a search.
    generation: AtomicU64,
    /// Pages in place at the start.
    mapped_pages: u64,
    counts: Counts,
}

impl InPlace {
    /// Records `mapped`, which was mapped shared and read-only into the memory of `ranges`.
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
        let books = Mutex::new(books);
        let generation = AtomicU64::new(0);
        Ok(InPlace { parts, books, generation, mapped_pages, counts: Counts::default() })
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Returns the number of pages in place now.
    pub fn pages(&self) -> u64 {
        self.lock().pages.len()
    }

    /// Counts for reports: pages in place at the start and now, and promotions by cause (or given back).
    pub fn json(&self) -> serde_json::Value {
        let mut json = self.counts.json();
        json["mapped_pages"] = self.mapped_pages.into();
        json["in_place_pages"] = self.pages().into();
        json
    }

    /// Changes with every promotion.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Promotes the pages of `wanted` in place, and those that its mappings cannot be cut from. Returns the number of
    /// pages.
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

    /// Returns whether a page of `extent` lies in place.
    pub fn has(&self, extent: Extent) -> bool {
        self.lock().pages.len_in(extent) > 0
    }

    /// Promotes all pages. Returns their number.
    pub fn promote_all(&self) -> io::Result<u64> {
        let all: Vec<Extent> = self.parts.iter().map(|part| part.range.extent()).collect();
        self.promote(&all)
    }

    /// Promotes the pages of `extent` in place.
    fn promote_runs(&self, books: &mut Books, extent: Extent) -> io::Result<u64> {
        let runs: Vec<Extent> = books.pages.runs_in(extent).collect();
        let mut done = 0;
        for piece in runs.iter().flat_map(|run| run.chunks(BLOCK_PAGES)) {
            let Some(part) = self.parts.iter().find(|part| part.range.extent().contains(piece.first)) else { continue };
            let offset = (piece.gpa() - part.range.gpa) as usize;
            // SAFETY: pages in the books are mapped read-only, so nothing can write them, and only the holder of the
            // lock on the books changes that. The mapping covers whole runs: parts are disjoint ranges of the layout,
            // and each extent that was mapped lies within one of them.
            unsafe { part.memory.copy_locally(&part.stage, offset, piece.bytes() as usize)? };
            books.pages.remove_run(piece);
            books.copies_left = books.copies_left.saturating_sub(1);
            done += piece.pages;
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        Ok(done)
    }

    /// Takes a write that KVM's emulator reports as one to a device. Returns true if it was to RAM and has been done
    /// there.
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

    /// Puts zero pages in the place of `run`, which lies within one range of RAM, for the balloon. Pages whose mapping
    /// cannot be cut there are promoted before.
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
    /// `run`, extended to where its mapping can be cut.
    fn align(&self, run: Extent) -> Extent {
        let meets = |coarse: &&InPlaceExtent| coarse.extent.intersection(&run).is_some();
        let align = self.coarse.iter().filter(meets).map(|coarse| coarse.align_pages).max().unwrap_or(1);
        whole_blocks(run, align)
    }

    /// The pages to promote for `run`: whole blocks when mappings run out.
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
