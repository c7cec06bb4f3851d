//! Helpers that policies share: cutting extents, laying some over others, packing pages into an image.

use crate::snapshot::{
    Content, Extent, Gfn, ImageSpec, MemoryLayout, PAGE_SIZE, PageSource, Placement, PlannedExtent, ResolvedRun,
};

/// Places every held run by `held` and every zero run as zero.
pub fn by_content(resolved: &[ResolvedRun], held: impl Fn(Extent, PageSource) -> PlannedExtent) -> Vec<PlannedExtent> {
    let place = |run: &ResolvedRun| match run.content {
        Content::Zero => PlannedExtent::zero(run.extent),
        Content::Bytes(source) => held(run.extent, source),
    };
    resolved.iter().map(place).collect()
}

/// One extent per range of the memory file of a full snapshot, zero pages included: they are holes of the file, so the
/// page map need not even be read.
pub fn whole_file(layout: &MemoryLayout, placement: Placement) -> Vec<PlannedExtent> {
    let place = |range: &crate::snapshot::GuestRange| {
        PlannedExtent::from(range.extent(), placement, PageSource::layer(0, range.file_offset))
    };
    layout.ranges().iter().map(place).collect()
}

/// The source `pages` pages further on.
pub fn advance(source: PageSource, pages: u64) -> PageSource {
    PageSource { offset: source.offset.saturating_add(pages.saturating_mul(PAGE_SIZE)), ..source }
}

/// The part of `item` that is `part`, which lies within it.
pub fn cut(item: &PlannedExtent, part: Extent) -> PlannedExtent {
    let skipped = part.first.0.saturating_sub(item.extent.first.0);
    PlannedExtent { extent: part, source: item.source.map(|source| advance(source, skipped)), ..*item }
}

/// Calls `piece(part, label)` for every piece of `extent`, ascending: the parts that `labels` (ascending, disjoint)
/// have, with their index, and the parts between them. `at` is the first label that may matter; it moves on.
pub fn pieces(
    extent: Extent,
    labels: &[impl AsRef<Extent>],
    at: &mut usize,
    mut piece: impl FnMut(Extent, Option<usize>),
) {
    let mut next = extent.first;
    while labels.get(*at).is_some_and(|label| label.as_ref().end() <= next) {
        *at += 1;
    }
    while next < extent.end() {
        let label = labels.get(*at).map(AsRef::as_ref).filter(|label| label.first < extent.end());
        let (end, found) = match label {
            Some(label) if label.first <= next => (label.end().min(extent.end()), Some(*at)),
            Some(label) => (label.first, None),
            None => (extent.end(), None),
        };
        piece(Extent { first: next, pages: end.0 - next.0 }, found);
        next = end;
        if labels.get(*at).is_some_and(|label| label.as_ref().end() <= next) {
            *at += 1;
        }
    }
}

/// An extent as a label of its own.
#[derive(Clone, Copy, Debug)]
pub struct Labelled(pub PlannedExtent);

impl AsRef<Extent> for Labelled {
    fn as_ref(&self) -> &Extent {
        &self.0.extent
    }
}

/// `base` with the pages of `over` (ascending, disjoint) placed as in `over`.
pub fn lay_over(base: &[PlannedExtent], over: &[Labelled]) -> Vec<PlannedExtent> {
    let mut out = Vec::with_capacity(base.len() + 2 * over.len());
    let mut at = 0;
    for item in base {
        pieces(item.extent, over, &mut at, |part, label| {
            out.push(cut(label.map_or(item, |label| &over[label].0), part));
        });
    }
    out
}

/// An image and where its pages are.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    pub spec: ImageSpec,
    offsets: Vec<u64>,
    len: u64,
}

impl Packed {
    /// Extents packed in this order. They must not share pages.
    pub fn new(extents: impl IntoIterator<Item = Extent>) -> Packed {
        let mut packed = Packed::default();
        for extent in extents {
            packed.offsets.push(packed.len);
            packed.len = packed.len.saturating_add(extent.bytes());
            packed.spec.extents.push(extent);
        }
        packed
    }

    /// Every extent of the image, which is the plan's first, placed by `place`, ascending.
    pub fn placed(&self, place: impl Fn(Extent, PageSource) -> PlannedExtent) -> Vec<Labelled> {
        let each = self.spec.extents.iter().zip(&self.offsets);
        let mut placed: Vec<Labelled> =
            each.map(|(extent, offset)| Labelled(place(*extent, PageSource::image(0, *offset)))).collect();
        placed.sort_unstable_by_key(|item| item.0.extent.first);
        placed
    }
}

/// Joins runs (ascending) that are fewer than `gap` pages apart and in one range, if `free` allows the pages between to
/// be taken in.
pub fn merge_gaps(
    runs: impl IntoIterator<Item = Extent>,
    gap: u64,
    layout: &MemoryLayout,
    free: impl Fn(Extent) -> bool,
) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    for run in runs {
        if let Some(last) = out.last_mut() {
            let between = Extent { first: last.end(), pages: run.first.0.saturating_sub(last.end().0) };
            let joined = Extent { first: last.first, pages: run.end().0 - last.first.0 };
            if between.pages < gap && layout.contains(joined) && (between.is_empty() || free(between)) {
                *last = joined;
                continue;
            }
        }
        out.push(run);
    }
    out
}

/// The source of zeros for a page that is zero in the snapshot: a hole of the tip's memory file. The tip does not hold
/// a zero page, and a page that a layer does not hold is a hole of its file.
pub fn hole(layout: &MemoryLayout, tip: usize, first: Gfn) -> Option<PageSource> {
    Some(PageSource::layer(tip, layout.file_offset(first)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    #[test]
    fn laying_over_cuts_and_keeps_sources_in_step() {
        let from = |first, pages, layer, offset: u64| {
            let source = PageSource::layer(layer, offset * PAGE_SIZE);
            PlannedExtent::from(extent(first, pages), Placement::CowFile, source)
        };
        let base = [from(0, 10, 0, 0), from(10, 10, 1, 10)];
        let over = [Labelled(from(2, 3, 2, 0)), Labelled(from(8, 4, 2, 3)), Labelled(from(19, 1, 2, 7))];
        let expected = [
            from(0, 2, 0, 0),
            from(2, 3, 2, 0),
            from(5, 3, 0, 5),
            from(8, 2, 2, 3),
            from(10, 2, 2, 5),
            from(12, 7, 1, 12),
            from(19, 1, 2, 7),
        ];
        assert_eq!(lay_over(&base, &over), expected);
    }

    #[test]
    fn gaps_are_merged_when_short_free_and_in_one_range() {
        let layout =
            MemoryLayout::from_gpa_ranges(&[(0, 100 * PAGE_SIZE), (100 * PAGE_SIZE, 100 * PAGE_SIZE)]).unwrap();
        let runs = [extent(0, 2), extent(33, 1), extent(66, 1), extent(99, 1), extent(101, 1)];
        let merged = merge_gaps(runs, 32, &layout, |_| true);
        assert_eq!(merged, [extent(0, 34), extent(66, 1), extent(99, 1), extent(101, 1)]);
        assert_eq!(merge_gaps(runs, 32, &layout, |_| false), runs);
    }
}
