//! Fits plans to tiers whose mappings start and end at huge pages only (device DAX with its default alignment,
//! hugetlbfs).

use std::sync::Arc;

use super::Tier;
use crate::snapshot::{
    Extent, Gfn, MemoryLayout, PAGE_SIZE, PageOrigin, PageSource, Placement, PlannedExtent, RestorePlan,
};
use crate::tiering::policy::advance;

/// Pages fetched around a fault on pages that cannot be mapped: 64 KiB.
const FAULT_PAGES: u64 = 16;

/// Makes `plan` one that these tiers can carry out: of the pages in place, only whole aligned stretches stay mapped,
/// the rest is fetched when it is touched.
pub fn align(plan: &mut RestorePlan, layout: &MemoryLayout, tiers: &[Arc<dyn Tier>]) {
    let aligns: Vec<u64> =
        tiers.iter().map(|tier| tier.mapping().map_or(1, |mapping| mapping.align / PAGE_SIZE)).collect();
    if aligns.iter().all(|align| *align <= 1) {
        return;
    }
    plan.coalesce(layout);
    let mut out = Vec::with_capacity(plan.extents.len());
    let mut cut_any = false;
    for item in &plan.extents {
        let is_mapped = matches!(item.placement, Placement::InPlace | Placement::CowFile);
        let Some(source) = item.source.filter(|_| is_mapped) else {
            out.push(*item);
            continue;
        };
        let align = match source.origin {
            PageOrigin::Tier(index) => aligns.get(index).copied().unwrap_or(1),
            PageOrigin::Layer(_) | PageOrigin::Image(_) => 1,
        };
        if align <= 1 {
            out.push(*item);
            continue;
        }
        let pieces = pieces(item, source, align);
        cut_any |= pieces.iter().any(|piece| piece.placement == Placement::Lazy);
        out.extend(pieces);
    }
    plan.extents = out;
    if cut_any {
        plan.fault_pages = plan.fault_pages.max(FAULT_PAGES);
    }
    plan.coalesce(layout);
}

/// The part before the first aligned page, the aligned middle, and the part after it.
fn pieces(item: &PlannedExtent, source: PageSource, align: u64) -> Vec<PlannedExtent> {
    let first = item.extent.first.0;
    let end = item.extent.end().0;
    let is_congruent = first % align == source.offset / PAGE_SIZE % align;
    let start = first.next_multiple_of(align);
    let stop = end / align * align;
    let (start, stop) = if is_congruent && start < stop { (start, stop) } else { (end, end) };
    let part = |from: u64, to: u64, placement| {
        let extent = Extent { first: Gfn(from), pages: to - from };
        PlannedExtent { extent, placement, source: Some(advance(source, from - first)), ..*item }
    };
    let all =
        [part(first, start, Placement::Lazy), part(start, stop, item.placement), part(stop, end, Placement::Lazy)];
    all.into_iter().filter(|piece| piece.extent.pages > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_aligned_stretches_stay_in_place() {
        let item = |first, pages, offset: u64| {
            let source = PageSource::tier(0, offset * PAGE_SIZE);
            PlannedExtent::from(Extent { first: Gfn(first), pages }, Placement::InPlace, source)
        };
        let shape = |item: PlannedExtent| -> Vec<(u64, u64, Placement, u64)> {
            let pieces = pieces(&item, item.source.unwrap(), 512);
            let offset = |piece: &PlannedExtent| piece.source.unwrap().offset / PAGE_SIZE;
            pieces.iter().map(|p| (p.extent.first.0, p.extent.pages, p.placement, offset(p))).collect()
        };
        use Placement::{InPlace, Lazy};
        assert_eq!(shape(item(512, 1024, 0)), [(512, 1024, InPlace, 0)]);
        assert_eq!(
            shape(item(500, 1100, 1012)),
            [(500, 12, Lazy, 1012), (512, 1024, InPlace, 1024), (1536, 64, Lazy, 2048)]
        );
        assert_eq!(shape(item(512, 1024, 1)), [(512, 1024, Lazy, 1)]);
        assert_eq!(shape(item(600, 300, 88)), [(600, 300, Lazy, 88)]);
    }
}
