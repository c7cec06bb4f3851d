//! For files that are not cached: the loading set from a compact image in one sequential read, the rest behind a
//! userfaultfd, so that a scattered set costs neither seeks nor mappings.

use super::super::Ground;
use super::super::place::{BLOCK_PAGES, Packed, hole, lay_over};
use super::super::touches::Touch;
use crate::snapshot::{Content, Fill, PageSet, Placement, PlannedExtent, ResolvedRun, RestorePlan};

/// Pages fetched around a fault: nobody expects these pages, but where one is wanted its neighbours may be.
const FAULT_PAGES: u64 = 16;

/// The plan with the image's pages brought in by `fill`.
pub fn plan(ground: &Ground, touches: &[Touch], fill: Fill) -> RestorePlan {
    let loading = touches.iter().filter(|touch| !touch.zero).map(|touch| touch.extent);
    let mut runs: Vec<crate::snapshot::Extent> = Vec::new();
    for extent in loading.flat_map(|extent| ground.layout.split(extent)) {
        match runs.last_mut() {
            Some(last)
                if last.end() == extent.first
                    && ground.layout.range_of(last.first) == ground.layout.range_of(extent.first) =>
            {
                last.pages += extent.pages;
            }
            _ => runs.push(extent),
        }
    }
    let image = Packed::new(runs);
    let over = image.placed(ground.layers, |extent, source| PlannedExtent::preload(extent, source, fill));
    let touched_zero: PageSet = touches.iter().filter(|touch| touch.zero).map(|touch| touch.extent).collect();
    let base: Vec<PlannedExtent> = ground.resolved.iter().map(|run| rest(ground, run, &touched_zero)).collect();
    let mut plan = ground.empty_plan(super::NAME);
    plan.extents = lay_over(&base, &over);
    plan.coalesce(ground.layout);
    plan.images = ground.images(image);
    plan.fault_pages = FAULT_PAGES;
    plan
}

/// Zero runs stay anonymous where they are long or touched; short ones would only cut the userfaultfd's range.
fn rest(ground: &Ground, run: &ResolvedRun, touched_zero: &PageSet) -> PlannedExtent {
    match run.content {
        Content::Layer(source) => PlannedExtent::from(run.extent, Placement::Lazy, source),
        Content::Zero => {
            let keep = run.extent.pages >= BLOCK_PAGES || touched_zero.len_in(run.extent) > 0;
            match hole(ground.layout, ground.layers - 1, run.extent.first) {
                Some(source) if !keep => PlannedExtent::from(run.extent, Placement::Lazy, source),
                _ => PlannedExtent::zero(run.extent),
            }
        }
    }
}
