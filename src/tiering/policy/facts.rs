//! The facts that all policies decide on.

use super::place;
use super::place::{Labelled, Packed, advance};
use crate::snapshot::{
    Content, Extent, Gfn, ImageSpec, MemoryLayout, PageOrigin, PageSource, Placement, PlannedExtent, ResolvedRun,
    RestorePlan, SnapshotId, TierAccess, TierSource,
};
use crate::tiering::costs::Costs;

/// The facts that policies use of a chain, without its files.
#[derive(Clone, Copy)]
pub struct PolicyFacts<'a> {
    pub snapshot: SnapshotId,
    pub layout: &'a MemoryLayout,
    /// Number of layers; never 0.
    pub layers: usize,
    pub tiers: &'a [TierSource],
    pub resolved: &'a [ResolvedRun],
    pub costs: &'a Costs,
    /// The worth, ns, of a page of local memory that no profiled write needs.
    pub page_ns: f64,
}

impl<'a> PolicyFacts<'a> {
    pub fn empty_plan(&self, policy: &str) -> RestorePlan {
        RestorePlan { tiers: self.tiers.to_vec(), ..RestorePlan::new(self.snapshot, policy, Vec::new()) }
    }

    /// The source of zeros for a page that is zero in the snapshot: a hole of the tip's memory file. `None` with tiers,
    /// because memory files may not exist then.
    pub fn hole(&self, first: Gfn) -> Option<PageSource> {
        let tip = self.layers.checked_sub(1).filter(|_| self.tiers.is_empty())?;
        place::hole(self.layout, tip, first)
    }

    /// The access of the tier with these bytes; `None` if no tier has them.
    pub fn access(&self, origin: PageOrigin) -> Option<TierAccess> {
        TierSource::access_of(self.tiers, origin)
    }

    /// Pages mapped on demand: as `cow-file` where the kernel copies written pages, else in place.
    pub fn mapped(&self, extent: Extent, source: PageSource) -> PlannedExtent {
        let placement = match self.access(source.origin) {
            None | Some(TierAccess::MapPrivate) => Placement::CowFile,
            Some(TierAccess::MapShared) => Placement::InPlace,
            Some(TierAccess::Fetch) => Placement::Lazy,
        };
        PlannedExtent::from(extent, placement, source)
    }

    /// Pages in place where their source can be mapped.
    pub fn in_place(&self, extent: Extent, source: PageSource) -> PlannedExtent {
        let is_mapped = self.access(source.origin) != Some(TierAccess::Fetch);
        PlannedExtent::from(extent, if is_mapped { Placement::InPlace } else { Placement::Lazy }, source)
    }

    /// The placed pages of an image: taken from the image, or, with tiers, from where they are, because a pool is an
    /// image already.
    pub fn placed(&self, packed: &Packed, place: impl Fn(Extent, PageSource) -> PlannedExtent) -> Vec<Labelled> {
        if self.tiers.is_empty() {
            return packed.placed(place);
        }
        let mut extents = packed.spec.extents.clone();
        extents.sort_unstable_by_key(|extent| extent.first);
        let mut placed = Vec::with_capacity(extents.len());
        let mut at = 0;
        for extent in extents {
            while self.resolved.get(at).is_some_and(|run| run.extent.end() <= extent.first) {
                at += 1;
            }
            for run in self.resolved[at..].iter().take_while(|run| run.extent.first < extent.end()) {
                if let (Content::Bytes(source), Some(part)) = (run.content, run.extent.intersection(&extent)) {
                    let source = advance(source, part.first.0 - run.extent.first.0);
                    placed.push(Labelled(place(part, source)));
                }
            }
        }
        placed
    }

    /// True if all pages come from the memory file of one full snapshot.
    pub fn is_one_file(&self) -> bool {
        self.layers == 1 && self.tiers.is_empty()
    }

    /// The plan's list of images: empty if the image would be empty, or there are tiers.
    pub fn images(&self, packed: Packed) -> Vec<ImageSpec> {
        let is_empty = !self.tiers.is_empty() || packed.spec.extents.iter().all(Extent::is_empty);
        if is_empty { Vec::new() } else { vec![packed.spec] }
    }

    #[cfg(test)]
    pub fn bare(
        layout: &'a MemoryLayout,
        layers: usize,
        resolved: &'a [ResolvedRun],
        costs: &'a Costs,
    ) -> PolicyFacts<'a> {
        PolicyFacts { snapshot: SnapshotId::default(), layout, layers, tiers: &[], resolved, costs, page_ns: 0.0 }
    }
}
