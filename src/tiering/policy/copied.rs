//! The plan of a fork's children that get copies of pages ahead: the file of the fork point is mapped private, as by
//! `firecracker`, and copy-on-write of these pages is broken before the guest runs.

use super::facts::PolicyFacts;
use super::firecracker;
use super::place::{Labelled, lay_over};
use crate::snapshot::{Extent, Fill, PageSet, PageSource, PlannedExtent, RestorePlan};

/// The plan for a chain of one layer.
pub fn plan(facts: &PolicyFacts, pages: &PageSet) -> RestorePlan {
    let copy = |extent: Extent| {
        let source = PageSource::layer(0, facts.layout.file_offset(extent.first)?);
        Some(Labelled(PlannedExtent::preload(extent, source, Fill::BreakCow)))
    };
    let runs = pages.runs().flat_map(|run| facts.layout.split(run).collect::<Vec<_>>());
    let copied: Vec<Labelled> = runs.filter_map(copy).collect();
    RestorePlan { extents: lay_over(&firecracker::plan(facts), &copied), ..facts.empty_plan("fork") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Gfn, MemoryLayout, PAGE_SIZE, Placement};
    use crate::tiering::costs::Costs;

    #[test]
    fn pages_are_copied_and_all_others_mapped() {
        let layout = MemoryLayout::from_gpa_ranges(&[(0, 8 * PAGE_SIZE), (16 * PAGE_SIZE, 8 * PAGE_SIZE)]).unwrap();
        let costs = Costs::default();
        let facts = PolicyFacts::bare(&layout, 1, &[], &costs);
        let pages: PageSet = [Extent::new(Gfn(2), 3), Extent::new(Gfn(16), 1)].into_iter().collect();
        let plan = plan(&facts, &pages);
        plan.validate(&layout, &[16 * PAGE_SIZE]).unwrap();
        let placed =
            plan.extents.iter().map(|planned| (planned.extent.first.0, planned.extent.pages, planned.placement));
        let expected = [
            (0, 2, Placement::CowFile),
            (2, 3, Placement::Preload),
            (5, 3, Placement::CowFile),
            (16, 1, Placement::Preload),
            (17, 7, Placement::CowFile),
        ];
        assert_eq!(placed.collect::<Vec<_>>(), expected);
        assert_eq!(plan.extents[3].source.unwrap().offset, 8 * PAGE_SIZE);
    }
}
