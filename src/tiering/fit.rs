//! Compares a plan with a run: the pages that it brought ahead in vain, and the touched pages that it left.
//!
//! The kernel does not tell whether a page that was put into memory ahead was touched: its page tables say so only
//! where the hardware walks them, and a hypervisor walks its own. So a plan is compared with the profile of a run: an
//! exact count of pages, of that run. It holds for another run as far as runs agree (`tvmm profile merge` says how
//! far).

use serde::{Deserialize, Serialize};

use super::profile::Profile;
use crate::snapshot::{BackgroundAction, PageSet, Placement, RestorePlan};

/// The use that a run made of some pages of a plan. The last four add up to the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    pub pages: u64,
    /// Read and never written.
    pub read: u64,
    /// Written, whether or not read before.
    pub written: u64,
    /// Touched, but the recorder could not tell a read from a write.
    pub unclassified: u64,
    /// Not touched, as far as the recorder saw; see [`Fit::sees_reads`].
    pub untouched: u64,
}

impl Touched {
    /// Pages touched in any way.
    pub fn touched(&self) -> u64 {
        self.read + self.written + self.unclassified
    }

    fn of(pages: &PageSet, profile: &Profile) -> Touched {
        let shared = |class: &PageSet| pages.intersection(class).len();
        let read = shared(&profile.read);
        let written = shared(&profile.written);
        let unclassified = shared(&profile.unclassified);
        let untouched = pages.len().saturating_sub(read + written + unclassified);
        Touched { pages: pages.len(), read, written, unclassified, untouched }
    }
}

/// A plan compared with a run, by placement. Each page of the plan counts once, except under `ahead`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fit {
    /// The function that was run, and the recorder.
    pub function: String,
    pub recorder: String,
    /// Runs the profile stands for; a page counts as touched or written if it was in any of them.
    pub runs: u32,
    /// True if the recorder saw reads. If not, `untouched` means not written.
    pub sees_reads: bool,
    /// In local memory before the guest ran: `untouched` ones were preloaded for nothing.
    pub preload: Touched,
    /// Mapped from the tier: `untouched` ones were in place and never read.
    pub in_place: Touched,
    /// Mapped from the layer's file: touched ones were page faults.
    pub cow_file: Touched,
    /// Behind the userfaultfd: touched ones were its faults, as far as `ahead` was not faster.
    pub lazy: Touched,
    /// Anonymous: touched ones were page faults without I/O.
    pub zero: Touched,
    /// Of all these, pages that the second thread made local while the guest ran.
    pub ahead: Touched,
}

impl Fit {
    /// Rows of a table: placement, and the counts.
    pub fn rows(&self) -> [(&'static str, Touched); 6] {
        [
            ("preload", self.preload),
            ("in place", self.in_place),
            ("cow-file", self.cow_file),
            ("lazy", self.lazy),
            ("zero", self.zero),
            ("made local in the background", self.ahead),
        ]
    }

    /// Compares `plan` with the run of `profile`. The caller checks that both are of one snapshot.
    pub fn of(plan: &RestorePlan, profile: &Profile) -> Fit {
        let placed = |placement: Placement| {
            let items = plan.extents.iter().filter(|item| item.placement == placement);
            Touched::of(&items.map(|item| item.extent).collect(), profile)
        };
        let local = |action: BackgroundAction| action != BackgroundAction::ReadAhead;
        let ahead: PageSet = plan.background.iter().filter(|step| local(step.action)).map(|step| step.extent).collect();
        Fit {
            function: profile.function.clone(),
            recorder: profile.recorder.name().to_string(),
            runs: profile.runs,
            sees_reads: profile.sees_reads,
            preload: placed(Placement::Preload),
            in_place: placed(Placement::InPlace),
            cow_file: placed(Placement::CowFile),
            lazy: placed(Placement::Lazy),
            zero: placed(Placement::Zero),
            ahead: Touched::of(&ahead, profile),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Background, Extent, Fill, Gfn, PageSource, PlannedExtent, SnapshotId};
    use crate::tiering::profile::RecorderKind;

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    #[test]
    fn every_page_is_counted_by_placement_and_by_the_runs_use() {
        let source = PageSource::layer(0, 0);
        let extents = vec![
            PlannedExtent::preload(extent(0, 10), source, Fill::Copy),
            PlannedExtent::from(extent(10, 10), Placement::InPlace, source),
            PlannedExtent::from(extent(20, 10), Placement::CowFile, source),
            PlannedExtent::from(extent(30, 10), Placement::Lazy, source),
            PlannedExtent::zero(extent(40, 10)),
            PlannedExtent::preload(extent(50, 2), source, Fill::Install),
        ];
        let mut plan = RestorePlan::new(SnapshotId::default(), "test", extents);
        for (action, extent) in [
            (BackgroundAction::Install, extent(32, 4)),
            (BackgroundAction::BreakCow, extent(20, 1)),
            (BackgroundAction::ReadAhead, extent(10, 10)),
        ] {
            plan.background.push(Background { action, extent });
        }
        let mut profile = Profile::new(SnapshotId::default(), RecorderKind::Uffd, "f");
        profile.read = [extent(8, 4), extent(33, 1)].into_iter().collect();
        profile.written = [extent(0, 1), extent(20, 10), extent(45, 1)].into_iter().collect();
        profile.unclassified = [extent(50, 1)].into_iter().collect();
        let fit = Fit::of(&plan, &profile);
        let row = |row: Touched| (row.pages, row.read, row.written, row.unclassified, row.untouched);
        assert_eq!(row(fit.preload), (12, 2, 1, 1, 8));
        assert_eq!(row(fit.in_place), (10, 2, 0, 0, 8));
        assert_eq!(row(fit.cow_file), (10, 0, 10, 0, 0));
        assert_eq!(row(fit.lazy), (10, 1, 0, 0, 9));
        assert_eq!(row(fit.zero), (10, 0, 1, 0, 9));
        assert_eq!(row(fit.ahead), (5, 1, 1, 0, 3));
        let all: u64 = fit.rows()[..5].iter().map(|(_, row)| row.touched()).sum();
        assert_eq!(all, profile.working_set().len());
    }
}
