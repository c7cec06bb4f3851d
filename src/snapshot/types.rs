//! The nouns of guest memory: page and extent.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a page of guest memory, the unit of all counts of guest memory.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes in a huge page (2 MiB): the memory that one entry of a page directory maps, if it is aligned.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// Pages in a huge page.
pub const HUGE_PAGE_PAGES: u64 = HUGE_PAGE_SIZE / PAGE_SIZE;

/// A guest frame number: guest-physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The frame that holds guest-physical address `gpa` (bytes).
    pub fn containing(gpa: u64) -> Gfn {
        Gfn(gpa / PAGE_SIZE)
    }

    /// The guest-physical address (bytes) of the frame's first byte. Saturates for frames that cannot exist.
    pub fn gpa(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A run of pages: `[first, first + pages)`. Plain data; arithmetic saturates,
/// [`MemoryLayout::contains`](super::MemoryLayout::contains) judges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// The first page.
    pub first: Gfn,
    /// Number of pages.
    pub pages: u64,
}

impl Extent {
    /// The extent `[first, first + pages)`.
    pub fn new(first: Gfn, pages: u64) -> Extent {
        Extent { first, pages }
    }

    /// The first page after the extent.
    pub fn end(&self) -> Gfn {
        Gfn(self.first.0.saturating_add(self.pages))
    }

    /// The guest-physical address (bytes) of the first page.
    pub fn gpa(&self) -> u64 {
        self.first.gpa()
    }

    /// The length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE_SIZE)
    }

    /// True if the extent has no pages.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// True if `gfn` is one of the extent's pages.
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.first <= gfn && gfn < self.end()
    }

    /// The pages that both extents have, if any.
    pub fn intersection(&self, other: &Extent) -> Option<Extent> {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        (first < end).then(|| Extent { first, pages: end.0 - first.0 })
    }

    /// Splits the extent at every multiple of `chunk_pages` frames (0 counts as 1), ascending.
    pub fn chunks(&self, chunk_pages: u64) -> impl Iterator<Item = Extent> + use<> {
        let mut at = self.first.0;
        let end = self.end().0;
        let chunk_pages = chunk_pages.max(1);
        std::iter::from_fn(move || {
            let first = at;
            let boundary = (first / chunk_pages).saturating_add(1).saturating_mul(chunk_pages);
            at = boundary.min(end);
            (first < at).then(|| Extent { first: Gfn(first), pages: at - first })
        })
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.first, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_split_at_multiples() {
        let split: Vec<_> = Extent::new(Gfn(15), 18).chunks(16).collect();
        assert_eq!(split, [Extent::new(Gfn(15), 1), Extent::new(Gfn(16), 16), Extent::new(Gfn(32), 1)]);
        assert_eq!(Extent::new(Gfn(7), 0).chunks(16).count(), 0);
        assert_eq!(Extent::new(Gfn(u64::MAX - 1), u64::MAX).chunks(16).count(), 1);
    }
}
