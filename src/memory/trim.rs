//! Trimming: local copies of pages that equal the snapshot are given back to the host.
//!
//! Nothing is written anywhere: the bytes are still in the layers, pools or images that the memory was restored from.
//! The next touch of a trimmed page brings it again, as its placement says:
//!
//! - `zero`: the copy is dropped, zeros show.
//! - `cow-file`, `in-place`, `preload` by broken copy-on-write: the copy is dropped, the file shows.
//! - `lazy`, `preload` by installing: the copy is dropped, the fault service serves the page.
//! - `preload` by copying: the file is mapped where the copy was. Pages that the guest has written in between are
//!   copied to the mapping.
//!
//! Some copies stay although they may equal the snapshot, and are counted: those that only a promotion makes writable,
//! those of a cold pool (comparing would fetch them again), copies beside memory that is served, and copies of which
//! too few lie together, or whose mappings would come near the kernel's limit.

use super::against_plan::{AgainstPlan, parts};
use super::balloon_release::{MAPPINGS_MAX, MAPPINGS_PER_REMAP, REMAPS_WORTHWHILE};
use super::files::{Files, Mapped};
use super::guest_ram::{FileMapping, GuestRam};
use crate::memory::ChangeError;
use crate::snapshot::{Extent, Fill, PAGE_SIZE, PageSet, PageSource, Placement, PlannedExtent, RestorePlan};
use crate::sys::mapping::count_mappings;

/// Pages compared at once.
const PIECE_PAGES: u64 = 512;
/// With fewer equal pages in a piece, a mapping costs more than their memory.
const MAPPED_MIN_PAGES: u64 = 16;

/// Memory to be trimmed. No vCPU runs and all devices are quiet.
pub struct Trim<'a> {
    pub ram: &'a mut GuestRam,
    pub files: &'a Files,
    /// The plan of the restore.
    pub plan: &'a RestorePlan,
    /// A process has a limit on its mappings.
    pub maps_left: &'a mut MapsLeft,
    /// Room for the bytes of sources.
    pub buffer: &'a mut Vec<u8>,
}

/// The number of pieces of memory that may still be mapped over; `None`: too few to count again.
#[derive(Debug)]
pub struct MapsLeft(Option<usize>);

impl MapsLeft {
    /// Counts this process's mappings.
    pub fn count() -> MapsLeft {
        // If they cannot be counted, no mapping is added.
        let there = count_mappings().unwrap_or(MAPPINGS_MAX);
        let left = MAPPINGS_MAX.saturating_sub(there) / MAPPINGS_PER_REMAP;
        MapsLeft((left >= REMAPS_WORTHWHILE).then_some(left))
    }

    /// Takes one; false if there is none. When all are taken, mappings are counted again: neighbours have become one.
    pub fn take(&mut self) -> bool {
        if self.0 == Some(0) {
            *self = MapsLeft::count();
        }
        let Some(left) = self.0 else { return false };
        self.0 = Some(left - 1);
        true
    }
}

/// Pages that this process had a copy of, by what became of them.
#[derive(Clone, Debug, Default)]
pub struct Trimmed {
    /// Number given back: zeros, the file or the fault service's page show again.
    pub dropped: u64,
    /// Number given back: a mapping of their file took the place of the copies.
    pub mapped: u64,
    /// Kept: they differ from the snapshot, or they were spilled and came back.
    pub written: PageSet,
    /// Kept: nothing can show their source in place of the copy.
    pub kept: PageSet,
}

/// The way to show the source of some pages.
enum Way {
    Drop,
    Map(PageSource),
    Keep,
}

impl Trim<'_> {
    /// Trims `pages`, each of which this process has or had a copy of.
    ///
    /// # Errors
    /// See [`ChangeError`]; kept if a source cannot be read.
    pub fn trim(&mut self, pages: &PageSet) -> Result<Trimmed, ChangeError> {
        // Pages given back to the balloon are zeros, whatever the snapshot has there.
        let pages = pages.difference(self.ram.released().read().ever());
        // A page that was spilled has the spill behind it, not the snapshot.
        let came_back = pages.intersection(self.ram.spilled());
        let pages = pages.difference(&came_back);
        let mut trimmed = Trimmed { written: came_back, ..Trimmed::default() };
        let mut mapped = Vec::new();
        for (planned, part) in parts(self.plan, &pages) {
            for piece in part.chunks(PIECE_PAGES) {
                match self.way(planned, piece) {
                    Way::Drop => self.drop_equal(planned, piece, &mut trimmed)?,
                    Way::Map(source) => mapped.extend(self.map_equal(planned, piece, source, &mut trimmed)?),
                    Way::Keep => trimmed.kept.insert_run(piece),
                }
            }
        }
        if !mapped.is_empty() {
            self.ram.note_mappings(mapped);
            let files = self.files.mapped_files(self.ram.mappings()).map_err(ChangeError::Lost)?;
            self.ram.watch(files).map_err(ChangeError::Lost)?;
        }
        Ok(trimmed)
    }

    fn way(&self, planned: &PlannedExtent, piece: Extent) -> Way {
        let Some(source) = planned.source_at(piece.first) else { return Way::Drop };
        if self.files.cold_source(source.origin).is_some() {
            return Way::Keep;
        }
        let is_guarded = planned.mapped().is_some() && self.ram.in_place().is_some();
        match (planned.placement, planned.fill) {
            (Placement::Preload, Fill::Copy) if self.ram.is_plain() && is_copy_of_file(planned, self.files) => {
                Way::Map(source)
            }
            (Placement::Preload, Fill::Copy) => Way::Keep,
            _ if is_guarded => Way::Keep,
            _ => Way::Drop,
        }
    }

    fn drop_equal(&mut self, planned: &PlannedExtent, piece: Extent, trimmed: &mut Trimmed) -> Result<(), ChangeError> {
        let runs = AgainstPlan::new(self.ram, self.files, self.buffer).runs(planned, piece);
        for (run, is_equal) in runs.map_err(ChangeError::Kept)? {
            if is_equal {
                self.ram.discard(run).map_err(ChangeError::Lost)?;
                trimmed.dropped += run.pages;
            } else {
                trimmed.written.insert_run(run);
            }
        }
        Ok(())
    }

    /// Maps `source` over the copied pages of `piece`. Returns the mapping, if there is one.
    fn map_equal(
        &mut self,
        planned: &PlannedExtent,
        piece: Extent,
        source: PageSource,
        trimmed: &mut Trimmed,
    ) -> Result<Option<FileMapping>, ChangeError> {
        let runs = AgainstPlan::new(self.ram, self.files, self.buffer).runs(planned, piece);
        let runs = runs.map_err(ChangeError::Kept)?;
        let written: Vec<Extent> = runs.iter().filter(|(_, is_equal)| !is_equal).map(|(run, _)| *run).collect();
        written.iter().for_each(|run| trimmed.written.insert_run(*run));
        let equal_pages = piece.pages - written.iter().map(|run| run.pages).sum::<u64>();
        if equal_pages < MAPPED_MIN_PAGES || !self.maps_left.take() {
            let equal = runs.iter().filter(|(_, is_equal)| *is_equal);
            equal.for_each(|(run, _)| trimmed.kept.insert_run(*run));
            return Ok(None);
        }
        let mut saved = Vec::with_capacity(written.len());
        for run in written {
            // SAFETY: no vCPU runs and all devices are quiet (see `Trim`).
            saved.push((run, unsafe { self.ram.bytes(run) }.map_err(ChangeError::Kept)?.to_vec()));
        }
        let Mapped { file, base, .. } = self.files.mapping(source.origin).map_err(ChangeError::Kept)?;
        let offset = base + source.offset;
        self.ram.map_file_private(piece, file, offset).map_err(ChangeError::Lost)?;
        for (run, bytes) in saved {
            // SAFETY: as above; the pages are a private mapping.
            unsafe { self.ram.bytes_mut(run) }.map_err(ChangeError::Lost)?.copy_from_slice(&bytes);
        }
        self.ram.released().note_mapped(piece);
        trimmed.mapped += equal_pages;
        Ok(Some(FileMapping { extent: piece, origin: source.origin, offset }))
    }
}

/// Returns whether the pages of `planned` were copied from a file that can be mapped page by page, with copies of
/// written pages made by the kernel.
pub fn is_copy_of_file(planned: &PlannedExtent, files: &Files) -> bool {
    let is_copied = planned.placement == Placement::Preload && planned.fill == Fill::Copy;
    let Some(source) = planned.source.filter(|_| is_copied) else { return false };
    let is_copied_on_write = match files.tier(source.origin) {
        Some(tier) => tier.mapping().is_some_and(|mapping| mapping.copy_on_write),
        None => files.cold_source(source.origin).is_none(),
    };
    is_copied_on_write && files.mapping(source.origin).is_ok_and(|mapping| mapping.align == PAGE_SIZE)
}
