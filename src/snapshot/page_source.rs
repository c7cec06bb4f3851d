//! The place of a page's bytes.

/// The layer, tier or image that has a page's bytes. Layers sort before tiers, and tiers before images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageOrigin {
    /// A layer's memory file, by the layer's index in the chain; the base is 0.
    Layer(usize),
    /// A tier's data, by the index of the tier in the plan's [`tiers`](super::RestorePlan::tiers).
    Tier(usize),
    /// A file packed from the snapshot's pages, by its index in the plan's [`images`](super::RestorePlan::images).
    Image(usize),
}

/// The place of a page's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageSource {
    pub origin: PageOrigin,
    /// Offset in the layer's memory file, in the tier's data, or in the image, bytes.
    pub offset: u64,
}

impl PageSource {
    /// Bytes of a layer's memory file.
    pub fn layer(index: usize, offset: u64) -> Self {
        PageSource { origin: PageOrigin::Layer(index), offset }
    }

    /// Bytes of a tier's data.
    pub fn tier(index: usize, offset: u64) -> Self {
        PageSource { origin: PageOrigin::Tier(index), offset }
    }

    /// Bytes of an image.
    pub fn image(index: usize, offset: u64) -> Self {
        PageSource { origin: PageOrigin::Image(index), offset }
    }

    /// Returns true if `next` comes `bytes` behind this source in the same layer, tier or image.
    pub fn continues_at(self, bytes: u64, next: PageSource) -> bool {
        self.origin == next.origin && self.offset.checked_add(bytes) == Some(next.offset)
    }
}
