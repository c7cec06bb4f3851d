//! `tiered`: tvmm's own policy. Pages that are only read are mapped in place, pages that will be written get a private
//! copy before the guest runs, zero pages are anonymous memory. Any page is placed another way if that costs less:
//! every choice minimises the expected time to the end of the first request, from the costs of this host and the odds
//! of the profile.
//!
//! The cheapest way through memory is searched block by block ([`path`]), with the ways of each stretch priced by one
//! model ([`super::model`]). The shapes of the other policies are priced by the same model; where one is cheaper, that
//! is the plan. `docs/policies.md` has the formulae.

mod fresh;
mod in_place;
mod packed;
mod path;
mod units;

use packed::Extras;

use super::budget::Budget;
use super::estimate::{Estimate, estimate};
use super::facts::PolicyFacts;
use super::model::copied_page_ns;
use super::touches::{Touch, expected};
use super::{eager, faasnap, reap};
use crate::snapshot::{
    Content, Extent, Fill, HUGE_PAGE_PAGES, PageOrigin, PageSource, Placement, PlannedExtent, Policy, RestorePlan,
};
use crate::tiering::Error;
use crate::tiering::costs::SourceCache;
use crate::tiering::profile::Profile;

/// Steps of the search for the price of local memory that meets a budget: doublings, then halvings of the interval.
const DOUBLINGS: u32 = 40;
const BISECTIONS: u32 = 6;

pub fn plan(facts: &PolicyFacts, profile: &Profile, budget: &Budget) -> Result<RestorePlan, Error> {
    let touches = expected(profile, facts.resolved);
    let written = touches.iter().filter(|touch| touch.written > 0.0).map(|touch| touch.extent.pages).sum();
    // Written pages need local memory whenever they are read; pages preloaded besides must fit into the rest.
    let limit = budget.dram_pages.unwrap_or(u64::MAX);
    let Some(extra_limit) = limit.checked_sub(written) else {
        return Err(Error::BudgetTooSmall { pages: limit, least: written });
    };
    let facts = &PolicyFacts { page_ns: budget.dram_page_ns as f64, ..*facts };
    let search = Search { touches: &touches, extra_limit };
    let mut best = search.within_budget(facts);
    // Time, and the worth of local memory.
    let worth = |expected: &Estimate| expected.total_ns() + facts.page_ns * expected.pages_preloaded_unwritten as f64;
    if facts.page_ns > 0.0 {
        // Priced stretch by stretch, local memory may seem dearer than it is in the whole plan.
        let fastest = search.at_price(facts, 0.0);
        if search.fits(&fastest.1) && worth(&fastest.1) < worth(&best.1) {
            best = fastest;
        }
    }
    let floors = Floors::of(facts, &touches);
    // Each shape with the least it can cost: making and pricing one takes as long as the whole search above. The search
    // itself cannot find images (Aquifer's shape is `packed` without extras), nor one userfaultfd over everything, zero
    // pages included, which needs the fewest mappings.
    let shapes: [(f64, &dyn Fn() -> RestorePlan); 6] = [
        (floors.eager, &|| RestorePlan { extents: eager::plan(facts), ..facts.empty_plan(Policy::Tiered.name()) }),
        (floors.regions, &|| faasnap::plan(facts, profile)),
        (floors.copy, &|| packed::plan(facts, &touches, Fill::Copy, Extras::Paying)),
        (floors.copy, &|| packed::plan(facts, &touches, Fill::Copy, Extras::None)),
        (floors.install, &|| packed::plan(facts, &touches, Fill::Install, Extras::Paying)),
        (floors.reap, &|| reap::plan(facts, profile)),
    ];
    for (floor, make) in shapes {
        if floor >= worth(&best.1) {
            continue;
        }
        let plan = make();
        let expected = estimate(&plan, facts, &touches);
        if search.fits(&expected) && worth(&expected) < worth(&best.1) {
            best = (plan, expected);
        }
    }
    if facts.costs.cache == SourceCache::Cold {
        for_cold_files(&mut best, facts, &touches);
    }
    if let Some(limit) = budget.cxl_pages {
        let room = extra_limit.saturating_sub(best.1.pages_preloaded_unwritten);
        in_place::limit(&mut best.0, facts, &touches, (limit, room));
    }
    let huge = fresh::blocks(facts, &touches, &best.0.extents);
    Ok(RestorePlan { policy: Policy::Tiered.name().to_string(), huge, ..best.0 })
}

/// Factor by which a plan may cost more, for effects that the model does not have.
const UNSEEN: f64 = 1.04;

/// For uncached files: reads copied pages past the page cache, and makes mappings want huge folios. A mapping that does
/// not makes the kernel read ahead in small folios, far into the blocks of its neighbours, which the model does not
/// have: measured, a few such faults made a dense read of 64 MiB three times slower.
fn for_cold_files(best: &mut (RestorePlan, Estimate), facts: &PolicyFacts, touches: &[Touch]) {
    best.0.direct = true;
    // Images are mapped as they are: their pages are not aligned with the guest's huge pages.
    let is_plain = |item: &PlannedExtent| {
        let is_packed = |source: PageSource| matches!(source.origin, PageOrigin::Image(_));
        item.placement == Placement::CowFile && item.source.is_some_and(|source| !is_packed(source))
    };
    if !best.0.extents.iter().any(is_plain) {
        return;
    }
    let mut plan = best.0.clone();
    plan.extents.iter_mut().filter(|item| is_plain(item)).for_each(|item| item.placement = Placement::InPlace);
    plan.coalesce(facts.layout);
    let expected = estimate(&plan, facts, touches);
    if expected.total_ns() <= best.1.total_ns() * UNSEEN {
        *best = (plan, expected);
    }
}

/// Lower bounds of the cost of plans of other shapes.
struct Floors {
    /// Everything held is copied.
    eager: f64,
    /// The loading set is installed from an image, past the page cache.
    install: f64,
    /// The loading set is copied from an image.
    copy: f64,
    /// Touched pages are installed from an image, zero pages too.
    reap: f64,
    /// The loading set is mapped from an image, each region a mapping.
    regions: f64,
}

impl Floors {
    fn of(facts: &PolicyFacts, touches: &[Touch]) -> Floors {
        let costs = facts.costs;
        let held = facts.resolved.iter().filter(|run| run.content != Content::Zero).map(|run| run.extent.pages);
        let held_touches = || touches.iter().filter(|touch| !touch.zero);
        let loading = || touches.iter().filter(|touch| packed::is_packed(costs, touch));
        let mut region_end: Option<u64> = None;
        let mut regions = 0;
        for touch in held_touches() {
            regions += u64::from(region_end.is_none_or(|end| touch.extent.first.0 - end >= faasnap::GAP_PAGES));
            region_end = Some(touch.extent.end().0);
        }
        let mut runs: Vec<Extent> = Vec::new();
        for touch in loading() {
            match runs.last_mut() {
                Some(last) if last.end() == touch.extent.first => last.pages += touch.extent.pages,
                _ => runs.push(touch.extent),
            }
        }
        let times = |ns: u64, count: u64| ns as f64 * count as f64;
        let small_page = copied_page_ns(costs, false);
        let read_page = copied_page_ns(costs, true).min(small_page);
        let pages = loading().map(|touch| touch.extent.pages).sum();
        let expected = |touch: &Touch| touch.extent.pages as f64 * touch.touched;
        let touched: f64 = held_touches().map(expected).sum();
        let small_touches = loading().map(expected).sum::<f64>() * costs.populated_touch_ns as f64;
        // Each page of a group that is not whole is a fault of its own, or its group is completed. That is certain only
        // for pages that are touched in every run.
        let always = loading().all(|touch| touch.touched >= 1.0);
        let alone = |(_, pages): (u64, u64)| {
            let apart = pages * (costs.populated_alone_ns.saturating_sub(costs.populated_touch_ns));
            (apart as f64 + packed::completing_ns(costs, pages).min(0.0)).max(0.0)
        };
        let parts = if always { packed::parts_of_groups(&runs) } else { Vec::new() };
        let faults: f64 = small_touches + parts.into_iter().map(alone).sum::<f64>();
        // Only a run that has a whole block is read into huge pages.
        let is_small = runs.iter().all(|run| run.pages < HUGE_PAGE_PAGES);
        let copy = |run: &Extent| times(if run.pages < HUGE_PAGE_PAGES { small_page } else { read_page }, run.pages);
        let file_page = costs.file_read_fault_ns.min(costs.cow_fault_ns);
        Floors {
            eager: times(read_page, held.sum()),
            install: times(costs.uffd_copy_ns + costs.device_sequential_page_ns, pages) + faults,
            reap: times(
                costs.uffd_copy_ns + costs.device_sequential_page_ns,
                held_touches().map(|t| t.extent.pages).sum(),
            ),
            // Blocks that are read whole have no small pages.
            copy: runs.iter().map(copy).sum::<f64>() + if is_small { faults } else { 0.0 },
            regions: times(costs.vma_ns, regions) + touched * file_page as f64,
        }
    }
}

struct Search<'a> {
    touches: &'a [Touch],
    /// Pages that may be preloaded besides the written ones.
    extra_limit: u64,
}

impl Search<'_> {
    fn fits(&self, expected: &Estimate) -> bool {
        expected.pages_preloaded_unwritten <= self.extra_limit
    }

    /// The cheapest plan with each extra page of local memory at `page_ns`.
    fn at_price(&self, facts: &PolicyFacts, page_ns: f64) -> (RestorePlan, Estimate) {
        let facts = PolicyFacts { page_ns, ..*facts };
        let mut plan = facts.empty_plan(Policy::Tiered.name());
        plan.extents = path::Field::new(&facts, self.touches).cheapest();
        plan.coalesce(facts.layout);
        let expected = estimate(&plan, &facts, self.touches);
        (plan, expected)
    }

    /// The cheapest plan that fits the budget: local memory gets the lowest price, from that of the facts on, at which
    /// the plan fits.
    fn within_budget(&self, facts: &PolicyFacts) -> (RestorePlan, Estimate) {
        let least = facts.page_ns;
        let mut best = self.at_price(facts, least);
        let mut low = least;
        let mut high = least.max(25.0) * 2.0;
        for _ in 0..DOUBLINGS {
            if self.fits(&best.1) {
                break;
            }
            (low, high) = (high, high * 2.0);
            best = self.at_price(facts, high);
        }
        if low == least {
            return best;
        }
        for _ in 0..BISECTIONS {
            let middle = (low + high) / 2.0;
            let plan = self.at_price(facts, middle);
            if self.fits(&plan.1) {
                (best, high) = (plan, middle);
            } else {
                low = middle;
            }
        }
        best
    }
}
