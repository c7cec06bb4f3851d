//! Demotion: a restored machine that waits gives local memory back to the host, in steps that are short enough for a
//! running guest. Pages that it gave back come again when they are touched.

pub mod barrier;
mod error;

pub use error::NotDemotable;

use std::time::{Duration, Instant};

use crate::config::request::SpillTo;
use crate::memory::ChangeError;
use crate::memory::against_plan::parts;
use crate::memory::background::BackgroundWork;
use crate::memory::spill::{self, Spill};
use crate::memory::stall::Activity;
use crate::memory::trim::{MapsLeft, Trim};
use crate::snapshot::{Bucket, PageSet, RestorePlan};
use crate::vmm::error::Error;
use crate::vmm::machine::{Machine, Paused};
use crate::vmm::own_memory::MemoryChange;

/// Pages looked at between two looks at the clock.
const PIECE_PAGES: u64 = 32;
/// Time after which a step ends: a guest that runs stands still for it.
const STEP_TIME: Duration = Duration::from_micros(700);

/// The parameters of a demotion.
pub struct DemotionOrder<'a> {
    /// The file to which pages that differ from the snapshot go; `None`: they stay.
    pub spill_to: Option<SpillTo<'a>>,
    /// The buckets whose pages leave unless they were touched since the last barrier; `None`: all pages leave, touched
    /// or not.
    pub cold: Option<&'a [Bucket]>,
    /// The demotion ends when so many pages have left local memory; `None`: when there are no more.
    pub most_pages: Option<u64>,
    /// The plan of the restore, if there was one.
    pub plan: Option<&'a RestorePlan>,
    /// The stall watch's slot for the way back of spilled pages.
    pub activity: Activity,
}

/// A demotion that is under way.
pub struct Demotion {
    /// Pages to look at.
    pending: PageSet,
    maps_left: MapsLeft,
    spills: bool,
    /// The spill file has had no room for some pages, and the rest is not spilled.
    is_spill_full: bool,
    /// The number of pages after which it ends; `None`: when there are no more.
    most_pages: Option<u64>,
    pub counts: DemotedPages,
    buffer: Vec<u8>,
}

/// Takes the first pages of `pending`, `most` at most.
fn take_first(pending: &mut PageSet, most: u64) -> PageSet {
    let mut pages = PageSet::new();
    let mut left = most;
    while left > 0 {
        let Some(run) = pending.runs().next() else { break };
        let part = run.chunks(left).next().unwrap_or(run);
        pages.insert_run(part);
        pending.remove_run(part);
        left -= part.pages;
    }
    pages
}

impl Demotion {
    /// The number of pages that were not looked at.
    pub fn pages_left(&self) -> u64 {
        self.pending.len()
    }

    /// Returns whether pages stay because the spill file may not be longer.
    pub fn is_spill_full(&self) -> bool {
        self.is_spill_full
    }

    /// Notes that so many pages of the last step came back, because the spill file has no room for them. No further
    /// pages are spilled.
    pub fn note_spill_full(&mut self, pages: u64) {
        self.is_spill_full = true;
        self.spills = false;
        self.counts.spilled -= pages.min(self.counts.spilled);
        self.counts.written += pages;
    }

    fn is_over(&self) -> bool {
        self.pending.is_empty() || self.most_pages.is_some_and(|most| self.counts.given_back() >= most)
    }
}

/// Pages that a machine had local copies of, by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DemotedPages {
    pub dropped: u64,
    pub mapped: u64,
    pub spilled: u64,
    pub written: u64,
    pub kept: u64,
    /// Not looked at: they were touched, are in other buckets, or are copies of a pool's pages.
    pub skipped: u64,
}

impl DemotedPages {
    /// Those that have left local memory.
    pub fn given_back(&self) -> u64 {
        self.dropped + self.mapped + self.spilled
    }
}

impl<S> Machine<S> {
    /// Finds the pages that the machine has local copies of. Nothing changes yet.
    ///
    /// # Errors
    /// [`NotDemotable`]; the kernel has no PAGEMAP_SCAN (before Linux 6.7); there can be no spill file.
    pub fn begin_demotion(&mut self, order: DemotionOrder<'_>) -> Result<Demotion, Error> {
        let DemotionOrder { spill_to, cold, most_pages, plan, activity } = order;
        let core = &mut self.core;
        core.own_memory(MemoryChange::Demote).map_err(NotDemotable::from)?;
        if spill_to.is_some() && core.services.background.as_ref().is_some_and(BackgroundWork::is_copying) {
            return Err(NotDemotable::Copying.into());
        }
        core.ram.note_used()?;
        let mut pending = core.ram.local_pages()?;
        let mut counts = DemotedPages::default();
        if let Some(buckets) = cold {
            let untouched = core.look(plan)?.untouched(&pending, buckets);
            counts.skipped = pending.len() - untouched.len();
            pending = untouched;
        }
        if let Some(SpillTo { dir, bytes_max }) = spill_to {
            let spill = match &core.services.spill {
                Some(spill) => spill,
                None => {
                    let spill = Spill::open(dir, &core.ram, activity, core.ending.clone())?;
                    core.services.spill.insert(spill)
                }
            };
            let used = spill.dir();
            if used != dir {
                return Err(NotDemotable::OtherDirectory { asked: dir.to_path_buf(), used }.into());
            }
            spill.limit(bytes_max);
        }
        let maps_left = MapsLeft::count();
        let spills = spill_to.is_some();
        Ok(Demotion { pending, maps_left, spills, is_spill_full: false, most_pages, counts, buffer: Vec::new() })
    }

    /// Writes the pages that a step has spilled. The guest may run. Returns the number of pages for which the file has
    /// no room: they are in local memory again.
    ///
    /// # Errors
    /// The file cannot be written. The pages are in local memory again, unless the machine must not run again.
    pub fn write_spilled(&self) -> Result<u64, ChangeError> {
        self.core.services.spill.as_ref().map_or(Ok(0), Spill::write)
    }

    /// Called after the last step. Returns the length of the spill file, bytes.
    pub fn settle_spilled(&self) -> u64 {
        let Some(spill) = &self.core.services.spill else { return 0 };
        spill.settle();
        spill.counts().store.file_len
    }
}

impl Machine<Paused> {
    /// Looks at some pages, and gives back those that equal the snapshot, which the machine was restored from by
    /// `plan`, and those that can be spilled, if it is asked to. Returns whether more are left.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn step_demotion(&mut self, demotion: &mut Demotion, plan: &RestorePlan) -> Result<bool, ChangeError> {
        let start = Instant::now();
        while !demotion.is_over() && start.elapsed() < STEP_TIME {
            let pages = take_first(&mut demotion.pending, PIECE_PAGES);
            self.demote_piece(demotion, plan, &pages)?;
        }
        Ok(!demotion.is_over())
    }

    fn demote_piece(
        &mut self,
        demotion: &mut Demotion,
        plan: &RestorePlan,
        pages: &PageSet,
    ) -> Result<(), ChangeError> {
        let core = &mut self.core;
        // A machine that became another's has another origin, and no demotion.
        let Some(origin) = &core.origin else { return Ok(()) };
        let Demotion { maps_left, buffer, counts, .. } = demotion;
        let mut trimmed = Trim { ram: &mut core.ram, files: &origin.files, plan, maps_left, buffer }.trim(pages)?;
        counts.dropped += trimmed.dropped;
        counts.mapped += trimmed.mapped;
        let stayed = trimmed.written.union(&trimmed.kept);
        let given = pages.difference(core.ram.released().read().ever()).difference(&stayed);
        let mut spilled = PageSet::new();
        if let Some(spill) = core.services.spill.as_ref().filter(|_| demotion.spills) {
            let mut going = PageSet::new();
            for (planned, part) in parts(plan, &stayed) {
                if spill::can_spill(planned, &core.ram) && demotion.maps_left.take() {
                    going.insert_run(part);
                }
            }
            spill.take(&mut core.ram, &going)?;
            trimmed.written.subtract(&going);
            trimmed.kept.subtract(&going);
            counts.spilled += going.len();
            spilled = going;
        }
        if let Some(access) = &mut core.access {
            access.note_demoted(&given, &spilled, &trimmed.written);
        }
        counts.written += trimmed.written.len();
        counts.kept += trimmed.kept.len();
        Ok(())
    }
}
