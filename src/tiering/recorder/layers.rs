//! FaaSnap's recorder: pages that come into the host's page cache, in layers.

use crate::snapshot::{PageSet, SnapshotId};
use crate::tiering::profile::{MAX_LAYERS, Order, Profile, RecorderKind};

/// A layer is closed when this many pages have come (FaaSnap's `mincore_size`).
pub const LAYER_PAGES: u64 = 1024;

/// Layers of pages, each closed when it is large enough.
#[derive(Clone, Debug, Default)]
pub struct Layering {
    layers: Vec<PageSet>,
    seen: PageSet,
}

impl Layering {
    pub fn new() -> Layering {
        Layering::default()
    }

    /// Takes the pages resident now: a new layer if they are [`LAYER_PAGES`] more than when the last layer was closed.
    pub fn look(&mut self, resident: &PageSet) {
        let new = resident.difference(&self.seen);
        if new.len() >= LAYER_PAGES {
            self.close(new);
        }
    }

    fn close(&mut self, new: PageSet) {
        self.seen.union_with(&new);
        let is_full = self.layers.len() == MAX_LAYERS;
        match self.layers.last_mut() {
            Some(last) if is_full => last.union_with(&new),
            _ => self.layers.push(new),
        }
    }

    /// Makes the pages resident at the function's end the last layer, however small. Pages that are zero in the
    /// snapshot (not in `nonzero`) are left out, as FaaSnap leaves them: reading a hole of the memory file fills the
    /// page cache too.
    pub fn finish(mut self, resident: &PageSet, nonzero: &PageSet) -> Vec<PageSet> {
        let rest = resident.difference(&self.seen);
        self.close(rest);
        let layers = self.layers.into_iter().map(|layer| layer.intersection(nonzero));
        layers.filter(|layer| !layer.is_empty()).collect()
    }
}

/// A profile of layers. Its pages are unclassified, because residency does not tell reads from writes.
pub fn from_layers(snapshot: SnapshotId, function: &str, layers: Vec<PageSet>) -> Profile {
    let mut profile = Profile::new(snapshot, RecorderKind::Mincore, function);
    profile.unclassified = layers.iter().fold(PageSet::new(), |all, layer| all.union(layer));
    profile.order = Order::Layers(layers);
    profile
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Extent, Gfn};

    fn pages(first: u64, pages: u64) -> PageSet {
        [Extent { first: Gfn(first), pages }].into_iter().collect()
    }

    #[test]
    fn a_layer_is_closed_at_1024_pages_and_the_last_at_the_end() {
        let mut layering = Layering::new();
        layering.look(&pages(0, 1023));
        layering.look(&pages(0, 1500));
        layering.look(&pages(0, 2000));
        let layers = layering.finish(&pages(0, 2001), &pages(10, 1_000_000));
        assert_eq!(layers, [pages(10, 1490), pages(1500, 501)]);
        let profile = from_layers(SnapshotId::default(), "f", layers);
        assert!(!profile.knows_classes() && !profile.knows_order());
        assert_eq!(Profile::from_bytes(profile.to_bytes().unwrap()).unwrap(), profile);
    }

    #[test]
    fn nothing_resident_is_no_layer() {
        assert!(Layering::new().finish(&PageSet::new(), &pages(0, 10)).is_empty());
    }

    #[test]
    fn the_last_layer_takes_the_excess() {
        let mut layering = Layering::new();
        for index in 1..=MAX_LAYERS as u64 + 5 {
            layering.look(&pages(0, index * LAYER_PAGES));
        }
        let all = pages(0, (MAX_LAYERS as u64 + 5) * LAYER_PAGES);
        let layers = layering.finish(&all, &all);
        assert_eq!(layers.len(), MAX_LAYERS);
        assert_eq!(layers.last().unwrap().len(), 6 * LAYER_PAGES);
    }
}
