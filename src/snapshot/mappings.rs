//! The mappings that a plan makes of guest memory. The restore engine makes them, the estimate of a plan counts them.

use std::ops::Range;

use super::{
    Extent, Fill, InPlaceMapping, MemoryLayout, PageSource, Placement, PlannedExtent, RestorePlan, TierAccess,
    TierSource,
};

/// The folios in which the bytes of a mapped file should come into the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folios {
    /// The kernel's choice.
    Usual,
    /// Folios of 2 MiB.
    Huge,
    /// Either will do.
    Any,
}

impl Folios {
    fn joined(self, next: Folios) -> Option<Folios> {
        match (self, next) {
            (Folios::Any, other) | (other, Folios::Any) => Some(other),
            (one, other) => (one == other).then_some(one),
        }
    }
}

/// The content of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Anonymous memory.
    Anonymous,
    /// The bytes of a file from `source` on.
    File {
        source: PageSource,
        folios: Folios,
        /// Mapped read-only: the VMM promotes a page before it is written. Otherwise the kernel copies it.
        shared: bool,
    },
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub extent: Extent,
    pub view: View,
    /// The plan's extents that lie in it, by index.
    pub items: Range<usize>,
}

impl Mapping {
    /// Takes in the next extent of the plan, if one mapping can show both.
    fn join(&mut self, next: Extent, view: View, layout: &MemoryLayout) -> bool {
        let joined = match (self.view, view) {
            (View::Anonymous, View::Anonymous) => Some(View::Anonymous),
            (
                View::File { source, folios, shared },
                View::File { source: next_source, folios: next_folios, shared: next_shared },
            ) => {
                let continues = source.continues_at(self.extent.bytes(), next_source);
                let folios = folios.joined(next_folios).filter(|_| continues && shared == next_shared);
                folios.map(|folios| View::File { source, folios, shared })
            }
            _ => None,
        };
        let both = Extent { first: self.extent.first, pages: self.extent.pages + next.pages };
        match joined.filter(|_| self.extent.end() == next.first && layout.contains(both)) {
            Some(view) => {
                *self = Mapping { extent: both, view, items: self.items.start..self.items.end + 1 };
                true
            }
            None => false,
        }
    }
}

impl PlannedExtent {
    /// The source that is mapped for these pages, if one is, and the folios that it is to be cached in.
    pub fn mapped(&self) -> Option<(PageSource, Folios)> {
        let folios = match (self.placement, self.fill) {
            (Placement::CowFile, _) => Folios::Usual,
            (Placement::InPlace, _) => Folios::Huge,
            (Placement::Preload, Fill::BreakCow) => Folios::Any,
            (Placement::Zero | Placement::Lazy | Placement::Preload, _) => return None,
        };
        Some((self.source?, folios))
    }
}

impl RestorePlan {
    /// Returns the fewest mappings that show everything, ascending. `in_place` is the mapping of pages placed in place
    /// where their tier leaves the choice. The plan is valid for `layout`.
    pub fn mappings<'a>(
        &'a self,
        layout: &'a MemoryLayout,
        in_place: InPlaceMapping,
    ) -> impl Iterator<Item = Mapping> + 'a {
        let view_of = move |item: &PlannedExtent| match item.mapped() {
            Some((source, folios)) => {
                let is_chosen = in_place == InPlaceMapping::Shared && item.placement == Placement::InPlace;
                let access = TierSource::access_of(&self.tiers, source.origin);
                View::File { source, folios, shared: is_chosen || access == Some(TierAccess::MapShared) }
            }
            None => View::Anonymous,
        };
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.extents.get(at)?;
            let mut mapping = Mapping { extent: first.extent, view: view_of(first), items: at..at + 1 };
            while let Some(next) = self.extents.get(mapping.items.end)
                && mapping.join(next.extent, view_of(next), layout)
            {}
            at = mapping.items.end;
            Some(mapping)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Gfn, PAGE_SIZE, SnapshotId};

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    fn source(layer: usize, page: u64) -> PageSource {
        PageSource::layer(layer, page * PAGE_SIZE)
    }

    #[test]
    fn neighbours_share_a_mapping_where_one_can_show_both() {
        let layout =
            MemoryLayout::from_gpa_ranges(&[(0, 100 * PAGE_SIZE), (100 * PAGE_SIZE, 100 * PAGE_SIZE)]).unwrap();
        let file = |first, pages, placement| PlannedExtent::from(extent(first, pages), placement, source(0, first));
        let mut plan = RestorePlan::new(SnapshotId::default(), "p", vec![]);
        plan.extents = vec![
            PlannedExtent::preload(extent(0, 10), source(0, 0), Fill::BreakCow),
            file(10, 10, Placement::InPlace),
            file(20, 10, Placement::CowFile),
            PlannedExtent::from(extent(30, 10), Placement::CowFile, source(0, 31)),
            PlannedExtent::from(extent(40, 10), Placement::CowFile, source(1, 41)),
            PlannedExtent::preload(extent(50, 20), source(1, 0), Fill::Copy),
            file(70, 10, Placement::Lazy),
            PlannedExtent::zero(extent(80, 20)),
            PlannedExtent::zero(extent(100, 100)),
        ];
        let shown = plan
            .mappings(&layout, InPlaceMapping::Private)
            .map(|mapping| match mapping.view {
                View::Anonymous => (mapping.items, None),
                View::File { source, folios, .. } => (mapping.items, Some((source, folios))),
            })
            .collect::<Vec<_>>();
        let expected = [
            (0..2, Some((source(0, 0), Folios::Huge))),
            (2..3, Some((source(0, 20), Folios::Usual))),
            (3..4, Some((source(0, 31), Folios::Usual))),
            (4..5, Some((source(1, 41), Folios::Usual))),
            (5..8, None),
            // Another range of guest memory.
            (8..9, None),
        ];
        assert_eq!(shown, expected);
        // One extent of a mapping that has to be read-only.
        let mappings = plan.mappings(&layout, InPlaceMapping::Shared);
        assert_eq!(mappings.count(), expected.len() + 1);
    }
}
