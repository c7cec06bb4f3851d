//! Barriers: the touches of a restored machine's memory count from a barrier on, until the next one.

use std::time::Instant;

use super::{NotDemotable, STEP_TIME, take_first};
use crate::config::request::BarrierRequest;
use crate::memory::ChangeError;
use crate::memory::access::Access;
use crate::memory::spill::Spill;
use crate::snapshot::{BucketPages, ByBucket, PageSet, RestorePlan};
use crate::vmm::error::Error;
use crate::vmm::machine::{Core, Machine, Paused};
use crate::vmm::own_memory::{MemoryChange, NotItsOwn};

/// Pages of files that are unmapped between two looks at the clock.
const PIECE_PAGES: u64 = 512;

/// A barrier that is being set.
pub struct Barrier {
    /// Pages of files to unmap.
    pending: PageSet,
    /// Pages that were unmapped, so that reads of them are seen.
    pub unmapped: u64,
    /// Pages since the last barrier.
    pub pages: ByBucket<BucketPages>,
    /// False: it only tells the pages since the last one, which stays.
    pub is_new: bool,
}

impl Barrier {
    /// Returns whether no pages are left to unmap.
    pub fn is_set(&self) -> bool {
        self.pending.is_empty()
    }
}

impl<S> Machine<S> {
    /// Sets a barrier for a machine that was restored by `plan`: touches count from now on. If reads are to be seen,
    /// call [`step_barrier`](Machine::step_barrier) until it says that nothing is left.
    ///
    /// # Errors
    /// [`NotDemotable`]; the kernel has no PAGEMAP_SCAN (before Linux 6.7); KVM cannot log writes.
    pub fn begin_barrier(&mut self, request: BarrierRequest, plan: Option<&RestorePlan>) -> Result<Barrier, Error> {
        let core = &mut self.core;
        let access = core.look(plan)?;
        if request.keep {
            let pages = access.pages();
            return Ok(Barrier { pending: PageSet::new(), unmapped: 0, pages, is_new: false });
        }
        let pages = access.set_barrier();
        access.keeps_log = false;
        if request.writes {
            core.log_writes()?;
            core.access.iter_mut().for_each(|access| access.keeps_log = true);
        } else {
            core.stop_logging()?;
        }
        let mut pending = PageSet::new();
        if request.reads {
            core.ram.note_used()?;
            pending = core.file_pages()?;
        }
        Ok(Barrier { pending, unmapped: 0, pages, is_new: true })
    }
}

impl Machine<Paused> {
    /// Unmaps some pages of files. Returns whether more are left.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn step_barrier(&mut self, barrier: &mut Barrier) -> Result<bool, ChangeError> {
        let start = Instant::now();
        let core = &mut self.core;
        while !barrier.pending.is_empty() && start.elapsed() < STEP_TIME {
            let pages = take_first(&mut barrier.pending, PIECE_PAGES);
            let unmapped = core.ram.unmap_clean(&pages).map_err(ChangeError::Kept)?;
            barrier.unmapped += unmapped.len();
            core.access.iter_mut().for_each(|access| access.note_unmapped(&unmapped));
        }
        Ok(!barrier.is_set())
    }
}

impl Core {
    /// Notes the touches up to now in the access record, which begins with the first call.
    pub(super) fn look(&mut self, plan: Option<&RestorePlan>) -> Result<&mut Access, Error> {
        let mut access = match self.access.take() {
            Some(access) => access,
            None => {
                let origin = self.own_memory(MemoryChange::Track).map_err(NotDemotable::from)?;
                let plan = plan.ok_or(NotItsOwn::Booted(MemoryChange::Track)).map_err(NotDemotable::from)?;
                Access::begin(plan, origin.files.chain(), &self.ram)?
            }
        };
        let looked = self.look_for(&mut access);
        // Also after an error: the touches up to now are in it.
        let access = self.access.insert(access);
        looked.map(|()| access)
    }

    fn look_for(&mut self, access: &mut Access) -> Result<(), Error> {
        let log = self.read_dirty_log()?;
        self.lineage.add_changed(&log.pages);
        self.clear_dirty_log(&log)?;
        access.note_logged(&log.pages);
        access.note_written(&self.note_device_writes());
        let mut faulted = self.services.counters.take_touched();
        if let Some(spilled) = self.services.spill.as_ref().map(Spill::take_touched) {
            faulted.read.union_with(&spilled.read);
            faulted.written.union_with(&spilled.written);
        }
        Ok(access.look(&self.ram, &faulted)?)
    }

    /// The pages that show a file which is mapped copy-on-write.
    fn file_pages(&self) -> Result<PageSet, Error> {
        if self.ram.in_place().is_some() {
            return Ok(PageSet::new());
        }
        let mapped: PageSet = self.ram.mappings().map(|mapping| mapping.extent).collect();
        Ok(self.ram.present()?.shared.intersection(&mapped))
    }
}
