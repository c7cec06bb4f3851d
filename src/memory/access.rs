//! Access tracking: the pages that a restored guest has touched since the last barrier, by bucket.
//!
//! A touch is seen where it leaves a trace:
//!
//! - The fault service and the thread of the spill note the page of each fault.
//! - A page that was absent and is mapped again was touched. In a mapping of a file it may also be a neighbour of a
//!   touched page, because the kernel maps up to 16 at once. Pages are absent because a barrier has unmapped them, or
//!   because a demotion has given the local copy back.
//! - The first copy of a page in zero memory or in a private mapping of a file was made by a write.
//! - KVM's dirty log and the marks of guest memory have the pages written by the guest and by devices.
//!
//! Reads of a local copy leave no trace. A demotion of untouched pages gives such copies back; the next touch brings
//! the page again, and is seen.
//!
//! A touch may be the guest's, a device's, or the VMM's own, for example that of a snapshot.

use super::guest_ram::{GuestRam, Present};
use super::touches::Touched;
use crate::memory::Error;
use crate::snapshot::{
    BackgroundAction, Bucket, BucketPages, ByBucket, Chain, Fill, PageOrigin, PageSet, Placement, PlannedExtent,
    ResolvedRun, RestorePlan, SnapshotKind,
};

/// The access record of one restored machine.
#[derive(Debug)]
pub struct Access {
    /// Pages by the layer that has their bytes.
    runtime: PageSet,
    init: PageSet,
    /// Pages that were seen to be written since the restore, or that differ from the snapshot.
    execution: PageSet,
    /// Pages whose first copy is no sign of a write: the restore or a service of memory makes it. KVM finds them
    /// writable, and logs a read of one as a write.
    filled: PageSet,
    /// Of these, pages that a userfaultfd serves: each touch of an absent one is a fault that its thread notes.
    served: PageSet,
    /// Copies of a pool's pages. The pool is slower than local memory, and a touch does not bring the copy again.
    pool_copies: PageSet,
    /// Pages of files that the last barrier has unmapped and that were not touched since.
    unmapped: PageSet,
    /// Pages whose local copies demotions have given back and that were not touched since.
    away: PageSet,
    /// Pages that were touched after a demotion had given their copies back. Their reads cannot be seen again without
    /// taking them away again, so they stay.
    recalled: PageSet,
    /// Pages in local memory at the last look.
    local: PageSet,
    seen: Seen,
    /// KVM's dirty log is kept for this record.
    pub keeps_log: bool,
}

/// Touches since the last barrier.
#[derive(Debug, Default)]
struct Seen {
    read: PageSet,
    written: PageSet,
    recalled: PageSet,
}

impl Access {
    /// Begins the record of a machine that was restored from `chain` by `plan`.
    ///
    /// # Errors
    /// The page map of the snapshot cannot be read; the kernel has no PAGEMAP_SCAN (before Linux 6.7).
    pub fn begin(plan: &RestorePlan, chain: &Chain, ram: &GuestRam) -> Result<Access, Error> {
        let pages = |wanted: &dyn Fn(&PlannedExtent) -> bool| -> PageSet {
            plan.extents.iter().filter(|planned| wanted(planned)).map(|planned| planned.extent).collect()
        };
        let with_bytes = pages(&|planned| planned.source.is_some());
        let init = chain.tip().page_map()?.held().intersection(&with_bytes);
        let runtime = below_tip(chain)?.intersection(&with_bytes);
        let served = pages(&|planned| planned.placement == Placement::Lazy || planned.fill == Fill::Install);
        let is_guarded = |planned: &PlannedExtent| planned.mapped().is_some() && ram.in_place().is_some();
        let filled = pages(&|planned| planned.placement == Placement::Preload || is_guarded(planned));
        let copied_later = plan.background.iter().filter(|step| step.action == BackgroundAction::BreakCow);
        let copied_later: PageSet = copied_later.map(|step| step.extent).collect();
        let is_of_pool =
            |planned: &PlannedExtent| planned.source.is_some_and(|source| matches!(source.origin, PageOrigin::Tier(_)));
        let pool_copies = pages(&is_of_pool).intersection(&filled.union(&copied_later));
        let filled = filled.union(&copied_later).union(&served);
        // Other copies are of pages that the guest has written since the restore.
        let local = ram.present()?.own.intersection(&filled);
        Ok(Access {
            runtime,
            init,
            execution: PageSet::new(),
            filled,
            served,
            pool_copies,
            unmapped: PageSet::new(),
            away: PageSet::new(),
            recalled: PageSet::new(),
            local,
            seen: Seen::default(),
            keeps_log: false,
        })
    }

    /// Notes the touches that `ram` shows, and those of `faulted`.
    ///
    /// # Errors
    /// The page map of this process cannot be read.
    pub fn look(&mut self, ram: &GuestRam, faulted: &Touched) -> Result<(), Error> {
        let present = ram.present()?;
        let released = ram.released().read().ever().clone();
        self.take_look(present, faulted, &released.union(ram.spilled()));
        Ok(())
    }

    /// As [`look`](Self::look). `replaced`: pages that are no longer as the plan has them.
    fn take_look(&mut self, present: Present, faulted: &Touched, replaced: &PageSet) {
        self.away.subtract(replaced);
        self.unmapped.subtract(replaced);
        let back = self.away.union(&self.unmapped).intersection(&present.own.union(&present.shared));
        // A fault brings neighbours with the page that was touched.
        let faults = faulted.read.union(&faulted.written);
        let touched = back.difference(&self.served).union(&back.intersection(&faults));
        let copied = present.own.difference(&self.local).difference(&self.filled).difference(replaced);
        let recalled = self.away.intersection(&touched);
        self.recalled.union_with(&recalled);
        self.seen.recalled.union_with(&recalled);
        self.seen.read.union_with(&touched.union(&faulted.read));
        self.note_written(&copied.union(&faulted.written));
        self.away.subtract(&back);
        self.unmapped.subtract(&back);
        self.local = present.own;
    }

    /// Notes pages that were written.
    pub fn note_written(&mut self, pages: &PageSet) {
        self.seen.written.union_with(pages);
        self.execution.union_with(pages);
    }

    /// Notes pages of KVM's log.
    pub fn note_logged(&mut self, pages: &PageSet) {
        self.seen.written.union_with(pages);
        self.execution.union_with(&pages.difference(&self.filled));
    }

    /// Notes the outcome of a part of a demotion: pages whose copies were `given` back, pages that were `spilled`, and
    /// pages that were found to be `written`.
    pub fn note_demoted(&mut self, given: &PageSet, spilled: &PageSet, written: &PageSet) {
        self.away.union_with(given);
        self.local.subtract(given);
        self.local.subtract(spilled);
        // From now on a copy of these pages is made by a write.
        let plain = given.difference(&self.served);
        self.filled.subtract(&plain);
        self.pool_copies.subtract(&plain);
        self.execution.union_with(written);
        self.execution.union_with(spilled);
    }

    /// Notes pages of files that were unmapped.
    pub fn note_unmapped(&mut self, pages: &PageSet) {
        self.unmapped.union_with(pages);
    }

    /// The pages of `pages` that are in `buckets` and were not touched since the last barrier. Unless they were
    /// written, copies of a pool's pages are left out, and pages that were given back before and were touched then.
    pub fn untouched(&self, pages: &PageSet, buckets: &[Bucket]) -> PageSet {
        let mut untouched = PageSet::new();
        buckets.iter().for_each(|bucket| untouched.union_with(&self.of(*bucket, pages)));
        untouched.subtract(&self.seen.read);
        untouched.subtract(&self.seen.written);
        let stay = self.recalled.union(&self.pool_copies).difference(&self.execution);
        untouched.difference(&stay)
    }

    /// Sets a barrier: touches count from now on. Returns the pages since the last one.
    pub fn set_barrier(&mut self) -> ByBucket<BucketPages> {
        let pages = self.pages();
        self.seen = Seen::default();
        pages
    }

    /// The pages since the last barrier.
    pub fn pages(&self) -> ByBucket<BucketPages> {
        let seen = &self.seen;
        let read = seen.read.difference(&seen.written);
        ByBucket::of(|bucket| {
            let count = |pages| self.of(bucket, pages).len();
            BucketPages {
                local: count(&self.local),
                read: count(&read),
                written: count(&seen.written),
                recalled: count(&seen.recalled),
                away: count(&self.away),
            }
        })
    }

    /// The pages of `pages` in one bucket.
    fn of(&self, bucket: Bucket, pages: &PageSet) -> PageSet {
        match bucket {
            Bucket::Runtime => pages.intersection(&self.runtime).difference(&self.execution),
            Bucket::Init => pages.intersection(&self.init).difference(&self.execution),
            Bucket::Execution => {
                let without_bytes = pages.difference(&self.runtime).difference(&self.init);
                without_bytes.union(&pages.intersection(&self.execution))
            }
        }
    }
}

/// The pages whose bytes are in a layer below the tip of `chain`, or may be if the layers below are not there.
fn below_tip(chain: &Chain) -> Result<PageSet, Error> {
    let tip = chain.tip();
    if tip.manifest().kind == SnapshotKind::Full {
        return Ok(PageSet::new());
    }
    if chain.layers().len() > 1 {
        let is_below = |run: &ResolvedRun| run.content.layer().is_some_and(|layer| layer < chain.tip_index());
        return Ok(chain.resolve()?.iter().filter(|run| is_below(run)).map(|run| run.extent).collect());
    }
    let map = tip.page_map()?;
    let all: PageSet = chain.layout().extents().collect();
    Ok(all.difference(map.held()).difference(map.zero()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Extent, Gfn};

    fn pages(gfns: std::ops::Range<u64>) -> PageSet {
        PageSet::from_iter([Extent { first: Gfn(gfns.start), pages: gfns.end - gfns.start }])
    }

    /// Runtime: 0 to 9. Init: 10 to 29, of which a fault service serves 20 to 29. Zeros: from 30 on.
    fn access() -> Access {
        Access {
            runtime: pages(0..10),
            init: pages(10..30),
            execution: PageSet::new(),
            filled: pages(20..30),
            served: pages(20..30),
            pool_copies: PageSet::new(),
            unmapped: PageSet::new(),
            away: PageSet::new(),
            recalled: PageSet::new(),
            local: PageSet::new(),
            seen: Seen::default(),
            keeps_log: false,
        }
    }

    fn look(access: &mut Access, own: PageSet, shared: PageSet, faulted: PageSet) {
        let faulted = Touched { read: faulted, written: PageSet::new() };
        access.take_look(Present { own, shared }, &faulted, &PageSet::new());
    }

    #[test]
    fn pages_that_come_back_were_touched() {
        let mut access = access();
        access.note_demoted(&pages(0..4), &PageSet::new(), &PageSet::new());
        access.note_unmapped(&pages(10..14));
        look(&mut access, PageSet::new(), pages(2..12), PageSet::new());
        let at = access.set_barrier();
        let runtime = BucketPages { read: 2, recalled: 2, away: 2, ..BucketPages::default() };
        assert_eq!(at.runtime, runtime);
        assert_eq!(at.init, BucketPages { read: 2, ..BucketPages::default() });
        // Nothing more comes.
        look(&mut access, PageSet::new(), pages(2..12), PageSet::new());
        assert_eq!(access.set_barrier().runtime, BucketPages { away: 2, ..BucketPages::default() });
    }

    #[test]
    fn neighbours_of_a_served_page_come_back_untouched() {
        let mut access = access();
        access.note_demoted(&pages(20..28), &PageSet::new(), &PageSet::new());
        look(&mut access, pages(20..24), PageSet::new(), pages(21..22));
        assert_eq!(access.untouched(&pages(20..24), &[Bucket::Init]).len(), 3);
        let init = access.set_barrier().init;
        assert_eq!(init, BucketPages { local: 4, read: 1, recalled: 1, away: 4, ..BucketPages::default() });
    }

    #[test]
    fn written_pages_move_to_the_bucket_of_the_execution() {
        let mut access = access();
        // Of the copies, those of 20 to 24 were made by the fault service.
        look(&mut access, pages(8..25), PageSet::new(), pages(20..21));
        access.note_logged(&pages(23..24));
        assert_eq!(access.untouched(&pages(8..25), &[Bucket::Runtime]), PageSet::new());
        assert_eq!(access.untouched(&pages(8..25), &[Bucket::Init, Bucket::Execution]).len(), 3);
        let at = access.set_barrier();
        assert_eq!(at.execution, BucketPages { local: 12, written: 12, ..BucketPages::default() });
        assert_eq!(at.init, BucketPages { local: 5, read: 1, written: 1, ..BucketPages::default() });
        assert_eq!(access.untouched(&pages(8..25), &[Bucket::Execution]).len(), 12);
        // A page that has always been zero, and is read.
        look(&mut access, pages(8..25), PageSet::new(), pages(40..41));
        assert_eq!(access.set_barrier().execution, BucketPages { local: 12, read: 1, ..BucketPages::default() });
    }
}
