//! Rewind: takes guest memory back to the snapshot that it was restored from, in place.
//!
//! The mappings of the restore stay. The pages that may differ from the snapshot are those that this process has a copy
//! of (PAGEMAP_SCAN), or, if the caller tracked them, those that were written. Each goes back in the way that its
//! placement allows:
//!
//! - `zero`: cleared, or dropped.
//! - `cow-file`, `in-place`, `preload` by broken copy-on-write: the snapshot's bytes are copied over it, or it is
//!   dropped and the file shows again. Mapped shared and promoted: copied over.
//! - `preload` by copy: copied over.
//! - `lazy`, `preload` by installing: copied over, or dropped, and the fault service serves it again. From a cold pool:
//!   dropped.
//!
//! A page that is copied over keeps its place in host memory and KVM's translation, so the next request has no fault
//! for it. A page that is dropped costs no local memory. Copies are made up to a limit; the rest is dropped.
//!
//! Pages that the guest gave back to the balloon are zeros of this process, whatever was mapped there. Files are mapped
//! over them again, and they are no longer counted as given back. Pages that were spilled go back in the same way; the
//! caller has ended the spill.

use super::against_plan::{AgainstPlan, parts};
use super::files::{Files, Mapped};
use super::guest_ram::GuestRam;
use super::reads::{self, Wanted};
use crate::memory::Error;
use crate::snapshot::{Extent, Fill, PageSet, PageSource, Placement, PlannedExtent, RestorePlan};

/// The memory to take back, and the state to bring it to. No vCPU runs and all devices are quiet.
pub struct Rewind<'a> {
    pub ram: &'a GuestRam,
    pub files: &'a Files,
    /// The plan of the restore.
    pub plan: &'a RestorePlan,
    /// The pages written since the restore, if they are known; otherwise every page that this process has a copy of
    /// goes back.
    pub written: Option<PageSet>,
    /// Pages that may stay in local memory, beside those that can only be copied over.
    pub keep_pages: u64,
}

/// Pages taken back, by the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TakenBack {
    /// Copied over with the snapshot's bytes.
    pub copied: u64,
    /// Zero pages cleared in place.
    pub cleared: u64,
    /// Given back to the host.
    pub dropped: u64,
    /// Pages that the guest had given back to the balloon, or that were spilled.
    pub returned: u64,
}

/// The way back of some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Clear,
    Copy(PageSource),
    Drop,
}

impl Rewind<'_> {
    /// Takes all pages back.
    ///
    /// # Errors
    /// The kernel has no PAGEMAP_SCAN (before Linux 6.7), or a source cannot be read. Guest memory is then neither the
    /// old nor the snapshot's.
    pub fn take_back(mut self) -> Result<TakenBack, Error> {
        let mut taken = TakenBack::default();
        let mut copies = Vec::new();
        let replaced = self.ram.released().read().ever().union(self.ram.spilled());
        // First of all: from now on the threads that install pages install the snapshot's bytes, no longer zeros.
        self.ram.released().clear();
        let mut pages = match self.written.take() {
            Some(written) => written,
            None => self.ram.own_pages()?,
        };
        pages.subtract(&replaced);
        for (planned, part) in parts(self.plan, &replaced) {
            taken.returned += part.pages;
            self.return_part(planned, part, &mut copies)?;
        }
        for (planned, part) in parts(self.plan, &pages) {
            match self.way(planned, part) {
                Way::Clear => {
                    // SAFETY: nothing else refers to guest memory (see `Rewind`); the part is anonymous memory.
                    unsafe { self.ram.bytes_mut(part) }?.fill(0);
                    taken.cleared += part.pages;
                }
                Way::Copy(source) => {
                    copies.push((part, source));
                    taken.copied += part.pages;
                }
                Way::Drop => {
                    self.ram.discard(part)?;
                    taken.dropped += part.pages;
                }
            }
        }
        let mut wanted = Vec::with_capacity(copies.len());
        for (part, source) in copies {
            // SAFETY: nothing else refers to guest memory (see `Rewind`); the parts share no page and can be written:
            // each is anonymous memory, a private mapping, or promoted.
            wanted.push(Wanted { source, bytes: unsafe { self.ram.bytes_mut(part) }? });
        }
        reads::fill(self.files, wanted, false)?;
        Ok(taken)
    }

    /// The way back of `part`, which lies in `planned`. Pages that stay local are counted against the limit.
    fn way(&mut self, planned: &PlannedExtent, part: Extent) -> Way {
        let Some(source) = planned.source_at(part.first) else {
            return if self.may_keep(part) { Way::Clear } else { Way::Drop };
        };
        let can_only_be_copied = match (planned.placement, planned.fill) {
            (Placement::Preload, Fill::Copy) => true,
            // Pages in place that were promoted no longer show the file.
            _ if planned.mapped().is_some() => self.ram.in_place().is_some(),
            _ => false,
        };
        if can_only_be_copied {
            self.keep_pages = self.keep_pages.saturating_sub(part.pages);
            return Way::Copy(source);
        }
        let is_far = self.files.cold_source(source.origin).is_some();
        if !is_far && self.may_keep(part) { Way::Copy(source) } else { Way::Drop }
    }

    fn may_keep(&mut self, part: Extent) -> bool {
        let left = self.keep_pages.checked_sub(part.pages);
        self.keep_pages = left.unwrap_or(self.keep_pages);
        left.is_some()
    }

    /// Brings back `part`, whose place other memory took. Pages that have to be copied go to `copies`.
    fn return_part(
        &self,
        planned: &PlannedExtent,
        part: Extent,
        copies: &mut Vec<(Extent, PageSource)>,
    ) -> Result<(), Error> {
        let Some(source) = planned.source_at(part.first) else {
            return self.ram.discard(part);
        };
        if planned.mapped().is_some() && self.ram.in_place().is_none() {
            let Mapped { file, base, .. } = self.files.mapping(source.origin)?;
            return self.ram.map_file_private(part, file, base + source.offset);
        }
        match (planned.placement, planned.fill) {
            (Placement::Lazy, _) | (Placement::Preload, Fill::Install) => self.ram.discard(part),
            _ => {
                copies.push((part, source));
                Ok(())
            }
        }
    }

    /// Compares the mapped pages of guest memory with the snapshot. Returns those that differ. Pages that are not
    /// mapped show their backing.
    ///
    /// # Errors
    /// The page map of this process or a source cannot be read.
    pub fn differing(&self) -> Result<PageSet, Error> {
        let mapped = self.ram.populated()?;
        let mut differing = PageSet::new();
        let mut expected = Vec::new();
        let mut comparison = AgainstPlan::new(self.ram, self.files, &mut expected);
        for (planned, part) in parts(self.plan, &mapped) {
            for piece in part.chunks(COMPARED_PAGES) {
                let runs = comparison.runs(planned, piece)?;
                runs.into_iter().filter(|(_, is_equal)| !is_equal).for_each(|(run, _)| differing.insert_run(run));
            }
        }
        Ok(differing)
    }
}

/// Pages compared at once.
const COMPARED_PAGES: u64 = 256;
