//! Fits any policy's plan to a snapshot whose memory is in a cold pool.
//!
//! A policy's plan counts on files that can be mapped. A cold pool has none: pages that the plan maps are fetched when
//! they are touched, pages that it reads ahead are installed ahead, and pages that it packs into an image are fetched
//! from their chunks.

use super::index::Index;
use crate::snapshot::{
    BackgroundAction, Error, Extent, MemoryLayout, PageOrigin, PageSet, PageSource, Placement, PlannedExtent,
    RestorePlan, Result,
};

/// Zero pages in smaller runs than this are fetched with the pages around them: a mapping of their own costs more.
const ZERO_RUN: u64 = 512;

/// Returns `plan` with everything that came from the chain's memory files, or from images of them, fetched from the
/// chunks of `index`. Pages from other tiers stay as they are. `tip` is the index of the chain's last layer.
///
/// # Errors
/// [`Error::BadPlan`] if the plan takes pages from a place where they are not in a memory file.
pub fn lower(plan: &RestorePlan, tip: usize, layout: &MemoryLayout, index: &Index) -> Result<RestorePlan> {
    let held: PageSet =
        (0..index.chunks().len() as u32).flat_map(|chunk| index.runs(chunk)).map(|(run, _)| run).collect();
    let lowering = Lowering { plan, tip, layout, held };
    let mut extents = Vec::with_capacity(plan.extents.len());
    for item in &plan.extents {
        lowering.place(item, &mut extents)?;
    }
    let mut lowered = RestorePlan { extents, images: Vec::new(), verify: false, direct: false, ..plan.clone() };
    lowered.fault_pages = plan.fault_pages.max(index.chunk_pages());
    // Whole runs of zero pages are small or not: so a plan that was lowered before stays as it is.
    lowered.coalesce(layout);
    lowering.join_small_zeros(&mut lowered.extents);
    lowered.coalesce(layout);
    lowered.background = background(plan, &lowered);
    Ok(lowered)
}

struct Lowering<'a> {
    plan: &'a RestorePlan,
    tip: usize,
    layout: &'a MemoryLayout,
    held: PageSet,
}

impl Lowering<'_> {
    fn place(&self, item: &PlannedExtent, out: &mut Vec<PlannedExtent>) -> Result<()> {
        let Some(source) = item.source.filter(|source| is_cold(*source)) else {
            out.push(*item);
            return Ok(());
        };
        let is_of_layer = matches!(source.origin, PageOrigin::Layer(_));
        if is_of_layer && self.layout.file_offset(item.extent.first) != Some(source.offset) {
            let problem = format!(
                "{} comes from offset {} of a memory file, which has other pages there",
                item.extent, source.offset
            );
            return Err(Error::BadPlan { policy: self.plan.policy.clone(), problem });
        }
        let placement = match item.placement {
            Placement::InPlace | Placement::CowFile => Placement::Lazy,
            other => other,
        };
        let mut next = item.extent.first;
        let end = item.extent.end();
        for run in self.held.runs_in(item.extent) {
            let gap = run.first.0 - next.0;
            // Zero pages before lazy ones are joined with those before them first: the length of the whole run decides.
            let is_open = placement == Placement::Lazy && next == item.extent.first;
            if gap >= ZERO_RUN || (gap > 0 && is_open) {
                out.push(PlannedExtent::zero(Extent { first: next, pages: gap }));
                next = run.first;
            }
            let pages = run.end().0 - next.0;
            out.extend(self.cold(Extent { first: next, pages }, placement));
            next = run.end();
        }
        if next < end {
            out.push(PlannedExtent::zero(Extent { first: next, pages: end.0 - next.0 }));
        }
        Ok(())
    }

    /// The pool has a page of any layer at its offset in the memory file.
    fn cold(&self, extent: Extent, placement: Placement) -> Option<PlannedExtent> {
        let offset = self.layout.file_offset(extent.first)?;
        Some(PlannedExtent::from(extent, placement, PageSource::layer(self.tip, offset)))
    }

    /// Zero pages next to lazy ones become lazy too if they are few.
    fn join_small_zeros(&self, extents: &mut [PlannedExtent]) {
        let is_lazy = |item: Option<&PlannedExtent>| {
            item.is_some_and(|item| item.placement == Placement::Lazy && item.source.is_some_and(is_cold))
        };
        for at in 0..extents.len() {
            let item = extents[at];
            if item.placement != Placement::Zero || item.extent.pages >= ZERO_RUN {
                continue;
            }
            if (is_lazy(at.checked_sub(1).and_then(|before| extents.get(before))) || is_lazy(extents.get(at + 1)))
                && let Some(lazy) = self.cold(item.extent, Placement::Lazy)
            {
                extents[at] = lazy;
            }
        }
    }
}

/// Returns true for the bytes of memory files and of their images, which the pool has.
fn is_cold(source: PageSource) -> bool {
    matches!(source.origin, PageOrigin::Layer(_) | PageOrigin::Image(_))
}

/// The plan's steps, cut to the new extents, each with the action that fits its extent.
fn background(plan: &RestorePlan, lowered: &RestorePlan) -> Vec<crate::snapshot::Background> {
    let mut steps = Vec::with_capacity(plan.background.len());
    for step in &plan.background {
        let at = lowered.extents.partition_point(|item| item.extent.end() <= step.extent.first);
        for item in lowered.extents[at..].iter().take_while(|item| item.extent.first < step.extent.end()) {
            let Some(extent) = item.extent.intersection(&step.extent) else { continue };
            let action = match item.placement {
                Placement::Lazy => BackgroundAction::Install,
                Placement::CowFile | Placement::InPlace => step.action,
                Placement::Zero | Placement::Preload => continue,
            };
            steps.push(crate::snapshot::Background { action, extent });
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Sample, sample};
    use super::*;
    use crate::snapshot::{Background, Fill, Gfn, ImageSpec, PAGE_SIZE};

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    /// A plan with one extent of each kind over the sample's pages.
    fn plan(sample: &Sample) -> RestorePlan {
        let source = |first: u64| PageSource::layer(0, first * PAGE_SIZE);
        let mut plan = RestorePlan::new(sample.index.snapshot(), "test", vec![]);
        plan.images = vec![ImageSpec { extents: vec![extent(64, 64)] }];
        plan.extents = vec![
            PlannedExtent::from(extent(0, 64), Placement::InPlace, source(0)),
            PlannedExtent::preload(extent(64, 64), PageSource::image(0, 0), Fill::Install),
            PlannedExtent::from(extent(128, 3968), Placement::CowFile, source(128)),
        ];
        plan.background = vec![Background { action: BackgroundAction::ReadAhead, extent: extent(0, 64) }];
        plan
    }

    #[test]
    fn mapped_pages_are_fetched_and_long_zero_runs_are_not() {
        let sample = sample();
        let lowered = lower(&plan(&sample), 0, sample.index.layout(), &sample.index).unwrap();
        lowered.validate(sample.index.layout(), &[4096 * PAGE_SIZE]).unwrap();
        assert!(lowered.images.is_empty());
        assert_eq!(lowered.fault_pages, sample.index.chunk_pages());
        let counts = lowered.counts();
        assert_eq!((counts.in_place, counts.cow_file), (0, 0));
        // The last two of the 64 are zero.
        assert_eq!(counts.preload, 62);
        // The sample has pages up to 1100 and at 4000; the pages between are zero.
        assert!(counts.zero > 2000, "{counts:?}");
        assert!(lowered.background.iter().all(|step| step.action == BackgroundAction::Install));
        assert_eq!(lowered.background.iter().map(|step| step.extent.pages).sum::<u64>(), 64);
        assert_eq!(lower(&lowered, 0, sample.index.layout(), &sample.index).unwrap(), lowered, "lowered twice");
    }

    #[test]
    fn plan_with_pages_from_elsewhere_in_a_memory_file_is_refused() {
        let sample = sample();
        let mut plan = plan(&sample);
        plan.extents[0].source = Some(PageSource::layer(0, PAGE_SIZE));
        assert!(matches!(lower(&plan, 0, sample.index.layout(), &sample.index), Err(Error::BadPlan { .. })));
    }
}
