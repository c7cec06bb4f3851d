//! For files that are not cached: the loading set from a compact image in one sequential read, the rest behind a
//! userfaultfd, so that a scattered set costs neither seeks nor mappings.

use super::super::facts::PolicyFacts;
use super::super::model::{GROUP_PAGES, copied_page_ns, group_ns};
use super::super::place::{Packed, lay_over};
use super::super::touches::Touch;
use crate::snapshot::{
    Content, Extent, Fill, Gfn, HUGE_PAGE_PAGES, Placement, PlannedExtent, Policy, ResolvedRun, RestorePlan,
};
use crate::tiering::costs::Costs;

/// Pages fetched around a fault: these pages are not expected to be touched, but if one is, its neighbours may be.
const FAULT_PAGES: u64 = 16;

/// True if the image has these pages: held pages, and zero pages where reading them costs less than their faults.
pub fn is_packed(costs: &Costs, touch: &Touch) -> bool {
    !touch.zero || copied_page_ns(costs, false) + costs.populated_touch_ns < costs.anon_read_fault_ns
}

/// The pages of an image besides the held and touched ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extras {
    /// Zero pages, and the rest of groups, where that pays by the costs of one page.
    Paying,
    /// None, as in `reap` and `aquifer`. Extras may pay page by page and yet not all together.
    None,
}

/// The plan with the image's pages brought in by `fill`.
pub fn plan(facts: &PolicyFacts, touches: &[Touch], fill: Fill, extras: Extras) -> RestorePlan {
    let is_packed = |touch: &Touch| match extras {
        Extras::Paying => is_packed(facts.costs, touch),
        Extras::None => !touch.zero,
    };
    let loading = touches.iter().filter(|touch| is_packed(touch)).map(|touch| touch.extent);
    let mut runs = PageRuns::new(facts);
    loading.flat_map(|extent| facts.layout.split(extent)).for_each(|extent| runs.push(extent));
    let runs = if extras == Extras::Paying { with_groups(facts, runs.runs) } else { runs.runs };
    let image = Packed::new(runs);
    let over = facts.placed(&image, |extent, source| PlannedExtent::preload(extent, source, fill));
    let mut touched_zero = touches.iter().filter(|touch| !is_packed(touch)).map(|touch| touch.extent).peekable();
    let mut is_touched = |run: Extent| {
        while touched_zero.next_if(|zero| zero.end() <= run.first).is_some() {}
        touched_zero.peek().is_some_and(|zero| zero.first < run.end())
    };
    let base: Vec<PlannedExtent> = facts.resolved.iter().map(|run| rest(facts, run, is_touched(run.extent))).collect();
    let mut plan = facts.empty_plan(Policy::Tiered.name());
    plan.extents = lay_over(&base, &over);
    plan.coalesce(facts.layout);
    plan.images = facts.images(image);
    plan.fault_pages = FAULT_PAGES;
    plan
}

/// Ascending pages as runs that cross no range's end; a page added twice counts once.
struct PageRuns<'a> {
    facts: &'a PolicyFacts<'a>,
    runs: Vec<Extent>,
}

impl<'a> PageRuns<'a> {
    fn new(facts: &'a PolicyFacts<'a>) -> Self {
        PageRuns { facts, runs: Vec::new() }
    }

    /// Adds pages that start at or after the start of the last ones.
    fn push(&mut self, extent: Extent) {
        let layout = self.facts.layout;
        match self.runs.last_mut() {
            Some(last)
                if extent.first <= last.end() && layout.range_of(last.first) == layout.range_of(extent.first) =>
            {
                last.pages = last.pages.max(extent.end().0 - last.first.0);
            }
            _ => self.runs.push(extent),
        }
    }
}

/// The extra cost of the pages of a group if the group is completed; less than 0 where that pays.
pub fn completing_ns(costs: &Costs, pages: u64) -> f64 {
    let more = (GROUP_PAGES - pages) * copied_page_ns(costs, false) + group_ns(costs);
    more as f64 - (pages * costs.populated_alone_ns) as f64
}

/// The number of pages that the runs (ascending) have of each group that they do not have whole, ascending by group.
pub fn parts_of_groups(runs: &[Extent]) -> Vec<(u64, u64)> {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    let mut add = |number: u64, pages: u64| match parts.last_mut() {
        Some(last) if last.0 == number => last.1 += pages,
        _ => parts.push((number, pages)),
    };
    for run in runs {
        let first = run.first.0;
        let end = run.end().0;
        let head = first.next_multiple_of(GROUP_PAGES).min(end);
        let tail = end / GROUP_PAGES * GROUP_PAGES;
        if first < head {
            add(first / GROUP_PAGES, head - first);
        }
        if tail >= head && tail < end {
            add(tail / GROUP_PAGES, end - tail);
        }
    }
    parts.retain(|(_, pages)| *pages < GROUP_PAGES);
    parts
}

/// The runs with groups completed where that pays: the guest's touches of a whole group are one fault.
fn with_groups(facts: &PolicyFacts, runs: Vec<Extent>) -> Vec<Extent> {
    let pays = |pages: u64| completing_ns(facts.costs, pages) + (GROUP_PAGES - pages) as f64 * facts.page_ns < 0.0;
    let parts = parts_of_groups(&runs);
    let group = |number: u64| Extent { first: Gfn(number * GROUP_PAGES), pages: GROUP_PAGES };
    let paying = parts.into_iter().filter(|(_, pages)| pays(*pages));
    let mut groups = paying.map(|(number, _)| group(number)).filter(|group| facts.layout.contains(*group)).peekable();
    if groups.peek().is_none() {
        return runs;
    }
    let mut all = PageRuns::new(facts);
    for run in runs {
        while let Some(group) = groups.next_if(|group| group.first <= run.first) {
            all.push(group);
        }
        all.push(run);
    }
    groups.for_each(|group| all.push(group));
    all.runs
}

/// Zero runs stay anonymous where they are long or touched; short ones would only cut the userfaultfd's range.
fn rest(facts: &PolicyFacts, run: &ResolvedRun, is_touched: bool) -> PlannedExtent {
    match run.content {
        Content::Bytes(source) => PlannedExtent::from(run.extent, Placement::Lazy, source),
        Content::Zero => {
            let keep = run.extent.pages >= HUGE_PAGE_PAGES || is_touched;
            match facts.hole(run.extent.first) {
                Some(source) if !keep => PlannedExtent::from(run.extent, Placement::Lazy, source),
                _ => PlannedExtent::zero(run.extent),
            }
        }
    }
}
