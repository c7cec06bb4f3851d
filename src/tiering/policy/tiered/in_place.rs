//! The budget of the CXL tier: no more pages are mapped in place from pools than the tier has. The pages least likely
//! to be touched leave first, and are fetched if they are touched after all.

use super::super::facts::PolicyFacts;
use super::super::place::{Labelled, cut, lay_over, pieces};
use super::super::touches::Touch;
use crate::snapshot::{Extent, Fill, Placement, PlannedExtent, RestorePlan};

/// Pages fetched around a fault, as in `packed`.
const FAULT_PAGES: u64 = 16;

/// Takes pages out of their place in pools until no more than `limit` are mapped in place. Pages likely to be touched
/// are copied, as long as `room` pages of local memory last; the others are left to faults.
pub fn limit(plan: &mut RestorePlan, facts: &PolicyFacts, touches: &[Touch], (limit, mut room): (u64, u64)) {
    let is_in_place = |item: &&PlannedExtent| {
        let mapped = matches!(item.placement, Placement::InPlace | Placement::CowFile);
        mapped && item.source.is_some_and(|source| facts.access(source.origin).is_some())
    };
    let mapped: u64 = plan.extents.iter().filter(is_in_place).map(|item| item.extent.pages).sum();
    let Some(mut surplus) = mapped.checked_sub(limit).filter(|surplus| *surplus > 0) else { return };
    let mut parts: Vec<(f64, PlannedExtent)> = Vec::new();
    let mut at = 0;
    for item in plan.extents.iter().filter(is_in_place) {
        pieces(item.extent, touches, &mut at, |part, touch| {
            parts.push((touch.map_or(0.0, |touch| touches[touch].touched), cut(item, part)));
        });
    }
    // The longest first: fewer mappings are cut.
    parts.sort_by(|(a, x), (b, y)| a.total_cmp(b).then(y.extent.pages.cmp(&x.extent.pages)));
    let mut moved: Vec<Labelled> = Vec::new();
    for (touched, part) in parts {
        if surplus == 0 {
            break;
        }
        let pages = part.extent.pages.min(surplus);
        let part = cut(&part, Extent { first: part.extent.first, pages });
        surplus -= pages;
        let Some(source) = part.source else { continue };
        let copied = touched >= LIKELY && pages <= room;
        room -= if copied { pages } else { 0 };
        moved.push(Labelled(if copied {
            PlannedExtent::preload(part.extent, source, Fill::Copy)
        } else {
            PlannedExtent::from(part.extent, Placement::Lazy, source)
        }));
    }
    moved.sort_unstable_by_key(|item| item.0.extent.first);
    plan.extents = lay_over(&plan.extents, &moved);
    plan.fault_pages = FAULT_PAGES;
    plan.coalesce(facts.layout);
}

/// The least probability of a touch for which a page is worth a copy: every second run.
const LIKELY: f64 = 0.5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{
        Content, Digest, Gfn, MemoryLayout, PAGE_SIZE, PageSource, PoolId, ResolvedRun, TierAccess, TierSource,
    };
    use crate::tiering::costs::Costs;

    #[test]
    fn in_place_pages_fit_the_budget_and_likely_ones_stay_longest() {
        let layout = MemoryLayout::from_gpa_ranges(&[(0, 1000 * PAGE_SIZE)]).unwrap();
        let extent = |first, pages| Extent { first: Gfn(first), pages };
        let source = PageSource::tier(0, 0);
        let resolved = [ResolvedRun { extent: extent(0, 1000), content: Content::Bytes(source) }];
        let pool = PoolId::default();
        let entry = Digest::default();
        let len = 1000 * PAGE_SIZE;
        let tiers = [TierSource { pool, entry, access: TierAccess::MapPrivate, len }];
        let costs = Costs::default();
        let facts = PolicyFacts { tiers: &tiers, ..PolicyFacts::bare(&layout, 1, &resolved, &costs) };
        let touches = [Touch { extent: extent(300, 200), touched: 1.0, written: 0.0, zero: false }];
        for (budget, room, expected) in
            [(1000, 0, [1000, 0, 0]), (200, 0, [200, 0, 800]), (50, 0, [50, 0, 950]), (50, 1000, [50, 150, 800])]
        {
            let mut plan = facts.empty_plan("tiered");
            plan.extents = vec![PlannedExtent::from(extent(0, 1000), Placement::InPlace, source)];
            limit(&mut plan, &facts, &touches, (budget, room));
            plan.validate(&layout, &[0]).unwrap();
            let counts = plan.counts();
            assert_eq!([counts.in_place, counts.preload, counts.lazy], expected, "{budget} {room}");
            let read_in_place = plan.extents.iter().filter(|item| item.placement == Placement::InPlace);
            if budget == 200 {
                assert!(read_in_place.map(|item| item.extent).eq([extent(300, 200)]));
            }
        }
    }
}
