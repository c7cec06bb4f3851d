//! Balloon release: pages that the guest gives back (balloon, free page reporting and hinting) leave the host's memory,
//! read as zeros from then on, and leave the snapshot.
//!
//! The way depends on the backing of the page:
//!
//! - Anonymous memory: `MADV_DONTNEED`. The next touch gets a zero page.
//! - A private mapping of a layer's file, made by the restore or by trimming: `MADV_DONTNEED` would bring the file's
//!   bytes back, so anonymous memory is mapped over it, whole runs at once.
//! - A mapping in place on a shared tier: the same. Pages that cannot be cut out of the mapping are promoted before.
//! - Memory behind this process's userfaultfd: `MADV_DONTNEED`. The next touch is a fault again; the fault service and
//!   the background thread ask [`Released`] and install zeros.
//! - Memory behind a handler's userfaultfd: `MADV_DONTNEED`. The handler is notified (`UFFD_EVENT_REMOVE`) and decides
//!   what it answers the next fault with.
//!
//! Mapping over files costs VMAs, of which a process may have 65530 (`vm.max_map_count`). A guest that gives back every
//! other page gets at most `MAPPINGS_MAX` of them; further file pages stay where they are, and are counted.

#[cfg(test)]
mod tests;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::promote::InPlace;
use super::stall::Activity;
use crate::snapshot::{Extent, Gfn, GuestRange, PAGE_SIZE, PageSet};
use crate::sys::guest_memory::{Outcome, ReleasePages};
use crate::sys::mapping::{Reservation, count_mappings};

/// Mappings that balloon release and trimming may add up to: half of the kernel's default limit.
pub(super) const MAPPINGS_MAX: usize = 32 << 10;
/// With fewer free mappings than this, counting all mappings again is not worth its time.
pub(super) const REMAPS_WORTHWHILE: usize = 512;
/// A mapping put into the middle of another makes three of one.
pub(super) const MAPPINGS_PER_REMAP: usize = 2;
/// Runs mapped over before mappings are first counted.
const REMAPS_FIRST: usize = 4 << 10;

/// The record of pages given back. Shared by the releaser, the threads that install pages, and the capture.
#[derive(Debug, Default)]
pub struct Released(RwLock<Books>);

/// See [`Released`].
#[derive(Debug, Default)]
pub struct Books {
    /// Given back at some time: the layers' bytes for these pages no longer count.
    ever: PageSet,
    /// Given back since a capture last asked.
    fresh: PageSet,
    /// Under a private mapping of a file that took the place of anonymous memory after the restore.
    mapped_later: PageSet,
}

impl Released {
    /// Locks the record for reading. Nothing is released while the result lives, so a thread that installs pages asks
    /// and installs under it.
    pub fn read(&self) -> RwLockReadGuard<'_, Books> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all pages given back: they hold the snapshot's bytes again.
    pub fn clear(&self) {
        let mut books = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *books = Books { mapped_later: std::mem::take(&mut books.mapped_later), ..Books::default() };
    }

    /// Called when a file was mapped over `extent`, which was anonymous memory: zeros must be mapped over it when it is
    /// given back.
    pub fn note_mapped(&self, extent: Extent) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).mapped_later.insert_run(extent);
    }

    /// Takes the pages that were given back since the last call.
    pub fn take_fresh(&self) -> PageSet {
        let mut books = self.0.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut books.fresh)
    }
}

impl Books {
    /// All pages that were ever given back.
    pub fn ever(&self) -> &PageSet {
        &self.ever
    }

    /// The runs of `extent` whose bytes are still those of the snapshot.
    pub fn still_snapshot(&self, extent: Extent) -> Vec<Extent> {
        without(extent, &self.ever)
    }
}

/// The runs of `extent` that are not in `pages`.
fn without(extent: Extent, pages: &PageSet) -> Vec<Extent> {
    if pages.len_in(extent) == 0 {
        return vec![extent];
    }
    let mut runs = Vec::new();
    let mut at = extent.first;
    let end = Extent { first: extent.end(), pages: 0 };
    for run in pages.runs_in(extent).chain([end]) {
        if at < run.first {
            runs.push(Extent { first: at, pages: run.first.0 - at.0 });
        }
        at = run.end();
    }
    runs
}

/// Releases pages of one machine's memory.
pub struct Releaser {
    ranges: Vec<(GuestRange, Arc<Reservation>)>,
    /// Pages under a private mapping of a file.
    file_mapped: PageSet,
    /// The same before the first release.
    file_mapped_first: PageSet,
    /// The machine has no userfaultfd: anonymous pages between file pages may be mapped over with them.
    may_join: bool,
    remaps_left: usize,
    mappings_max: usize,
    released: Arc<Released>,
    /// Notes each release in a restored VM: if a handler outside does not read the notification, the release waits.
    activity: Option<Activity>,
    in_place: Option<Arc<InPlace>>,
}

impl Releaser {
    pub fn new(
        ranges: Vec<(GuestRange, Arc<Reservation>)>,
        file_mapped: PageSet,
        may_join: bool,
        released: Arc<Released>,
        activity: Option<Activity>,
    ) -> Self {
        let remaps_left = REMAPS_FIRST;
        let mappings_max = MAPPINGS_MAX;
        let in_place = None;
        let file_mapped_first = file_mapped.clone();
        Releaser {
            ranges,
            file_mapped,
            file_mapped_first,
            may_join,
            remaps_left,
            mappings_max,
            released,
            activity,
            in_place,
        }
    }

    /// Adds the record of the pages in place, which promotion keeps.
    pub fn with_in_place(self, in_place: Option<Arc<InPlace>>) -> Self {
        Releaser { in_place, ..self }
    }

    /// Returns whether one more run may be mapped over. When the allowance is used up, mappings are counted again:
    /// neighbours that were mapped one by one have become one mapping.
    fn may_remap(&mut self) -> bool {
        if self.remaps_left == 0 {
            let there = count_mappings().unwrap_or(self.mappings_max);
            let left = self.mappings_max.saturating_sub(there) / MAPPINGS_PER_REMAP;
            self.remaps_left = if left >= REMAPS_WORTHWHILE { left } else { 0 };
        }
        self.remaps_left > 0
    }

    /// Releases `part`, which lies in the range at `index`.
    fn release_part(&mut self, index: usize, part: Extent, books: &mut Books) -> Outcome {
        let mut outcome = Outcome::default();
        let mut files: Vec<Extent> = self.file_mapped.runs_in(part).collect();
        if books.mapped_later.len_in(part) > 0 {
            let all: PageSet = files.into_iter().chain(books.mapped_later.runs_in(part)).collect();
            files = all.runs().collect();
        }
        if self.may_join
            && let Some(first) = files.first()
            && let Some(last) = files.last()
        {
            files = vec![Extent { first: first.first, pages: last.end().0 - first.first.0 }];
        }
        let others = without(part, &files.iter().copied().collect());
        for (run, is_file) in files.into_iter().map(|run| (run, true)).chain(others.into_iter().map(|run| (run, false)))
        {
            if is_file && !self.may_remap() {
                outcome.refused += run.pages;
                continue;
            }
            let (range, memory) = &self.ranges[index];
            let offset = (run.gpa() - range.gpa) as usize;
            let len = run.bytes() as usize;
            let done = match (&self.in_place, is_file) {
                (Some(in_place), true) => in_place.replace_by_zeros(run),
                (None, true) => memory.map_anon(offset, len),
                (_, false) => memory.discard(offset, len),
            };
            // Recorded even after a failure: pages may have changed.
            books.fresh.insert_run(run);
            match done {
                Ok(()) => {
                    books.ever.insert_run(run);
                    outcome.released += run.pages;
                }
                Err(error) => {
                    let gpa = run.gpa();
                    let pages = run.pages;
                    tracing::warn!(gpa, pages, %error, "Pages cannot be given back to the host");
                    outcome.refused += run.pages;
                    continue;
                }
            }
            if is_file {
                self.file_mapped.remove_run(run);
                books.mapped_later.remove_run(run);
                self.remaps_left -= 1;
            }
        }
        outcome
    }
}

impl ReleasePages for Releaser {
    fn rewind(&mut self) {
        self.file_mapped = self.file_mapped_first.clone();
    }

    fn release(&mut self, extent: Extent) -> Outcome {
        let mut outcome = Outcome { outside: extent.pages, ..Outcome::default() };
        let released = self.released.clone();
        for index in 0..self.ranges.len() {
            let range = self.ranges[index].0;
            let whole = Extent { first: Gfn(range.gpa / PAGE_SIZE), pages: range.len / PAGE_SIZE };
            let Some(part) = whole.intersection(&extent) else { continue };
            let _waits = self.activity.as_ref().map(|activity| activity.gives_back(part));
            let mut books = released.0.write().unwrap_or_else(PoisonError::into_inner);
            let of_part = self.release_part(index, part, &mut books);
            outcome.released += of_part.released;
            outcome.refused += of_part.refused;
            outcome.outside -= part.pages;
        }
        outcome
    }
}
