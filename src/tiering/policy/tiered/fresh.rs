//! Which zero memory is to come in huge pages: one fault then brings 512 pages, and
//! those of them that nobody needs cost nothing but local memory.
//!
//! That pays where a profile says that enough of a block will be written, and it may pay behind memory that is written
//! densely: an allocator that has filled what it had goes on there when the next input is larger (a run recorded with
//! one input says nothing of that). What nobody touches costs nothing: huge pages, too, come with the first touch.

use super::super::Ground;
use super::super::estimate::tally;
use super::super::model::AnonBlock;
use super::super::place::BLOCK_PAGES;
use super::super::touches::Touch;
use crate::snapshot::{Extent, Gfn, Placement, PlannedExtent};

/// Stretches of written memory may have gaps of so many pages (512 KiB).
const GAP_PAGES: u64 = 128;

/// The blocks of `extents` that are zero memory and had better come whole, as ascending runs.
pub fn blocks(ground: &Ground, touches: &[Touch], extents: &[PlannedExtent]) -> Vec<Extent> {
    let written = stretches(touches);
    let mut out: Vec<Extent> = Vec::new();
    let (mut at, mut next) = (0, 0);
    for item in extents.iter().filter(|item| item.placement == Placement::Zero) {
        let (first, end) = (item.extent.first.0.next_multiple_of(BLOCK_PAGES), item.extent.end().0);
        for number in first / BLOCK_PAGES..end / BLOCK_PAGES {
            let block = Extent { first: Gfn(number * BLOCK_PAGES), pages: BLOCK_PAGES };
            while touches.get(at).is_some_and(|touch| touch.extent.end() <= block.first) {
                at += 1;
            }
            while written.get(next).is_some_and(|stretch| grown_end(stretch) <= block.first.0) {
                next += 1;
            }
            let grows = written.get(next).is_some_and(|stretch| stretch.end() <= block.first);
            if !(grows || pays(ground, touches, block, at)) {
                continue;
            }
            match out.last_mut() {
                Some(last) if last.end() == block.first => last.pages += block.pages,
                _ => out.push(block),
            }
        }
    }
    out
}

/// Whether the pages of `block` that a profile expects cost more one by one.
fn pays(ground: &Ground, touches: &[Touch], block: Extent, at: usize) -> bool {
    if touches.get(at).is_none_or(|touch| touch.extent.first >= block.end()) {
        return false;
    }
    let zero = tally(block, touches, &mut at.clone());
    let cost = |huge| AnonBlock { zero, huge, ..AnonBlock::default() }.cost(ground.costs).total();
    let unwritten = (1.0 - zero.idle) * zero.unwritten as f64;
    cost(true) + ground.page_ns * unwritten < cost(false)
}

/// Stretches of at least a block most of which will be written.
fn stretches(touches: &[Touch]) -> Vec<Extent> {
    let mut all: Vec<(Extent, u64)> = Vec::new();
    for touch in touches.iter().filter(|touch| touch.written >= 0.5) {
        let Extent { first, pages } = touch.extent;
        match all.last_mut() {
            Some((last, written)) if first.0 - last.end().0 <= GAP_PAGES => {
                last.pages = touch.extent.end().0 - last.first.0;
                *written += pages;
            }
            _ => all.push((touch.extent, pages)),
        }
    }
    let is_dense = |(stretch, written): &(Extent, u64)| stretch.pages >= BLOCK_PAGES && written * 2 >= stretch.pages;
    all.into_iter().filter(is_dense).map(|(stretch, _)| stretch).collect()
}

/// How far a stretch may grow: to twice its length.
fn grown_end(stretch: &Extent) -> u64 {
    stretch.end().0.saturating_add(stretch.pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Content, MemoryLayout, PAGE_SIZE, PageSource, ResolvedRun};
    use crate::tiering::costs::Costs;

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    fn touch(extent: Extent, written: f64) -> Touch {
        Touch { extent, touched: 1.0, written, zero: extent.first.0 >= 4096 }
    }

    /// The blocks of a guest of 16 blocks, the first 8 of which hold something.
    fn chosen(touches: &[Touch], page_ns: f64) -> Vec<Extent> {
        let layout = MemoryLayout::from_gpa_ranges(&[(0, 8192 * PAGE_SIZE)]).unwrap();
        let source = PageSource { layer: 0, offset: 0 };
        let resolved = [
            ResolvedRun { extent: extent(0, 4096), content: Content::Layer(source) },
            ResolvedRun { extent: extent(4096, 4096), content: Content::Zero },
        ];
        let costs = Costs::default();
        let ground = Ground { page_ns, ..Ground::bare(&layout, 1, &resolved, &costs) };
        let held = PlannedExtent::from(extent(0, 4096), Placement::CowFile, source);
        blocks(&ground, touches, &[held, PlannedExtent::zero(extent(4096, 4096))])
    }

    #[test]
    fn blocks_that_will_be_written_come_whole_and_at_a_price_only_the_full_ones() {
        let touches = [touch(extent(4096, 3), 1.0), touch(extent(5120, 400), 1.0), touch(extent(6144, 60), 1.0)];
        assert_eq!(chosen(&touches, 0.0), [extent(5120, 512), extent(6144, 512)]);
        assert_eq!(chosen(&touches, 1000.0), [extent(5120, 512)]);
        assert_eq!(chosen(&[], 0.0), []);
    }

    #[test]
    fn memory_behind_a_written_stretch_comes_whole_up_to_the_stretchs_length() {
        // 1,100 pages with a gap, so three blocks begin within 1,100 pages behind them.
        let grown = [touch(extent(2996, 600), 1.0), touch(extent(3660, 436), 1.0)];
        assert_eq!(chosen(&grown, 1e6), [extent(4096, 1536)]);
        let read = [touch(extent(2996, 1100), 0.0)];
        assert_eq!(chosen(&read, 0.0), []);
        let sparse = (0..20).map(|n| touch(extent(3000 + 54 * n, 20), 1.0)).collect::<Vec<_>>();
        assert_eq!(chosen(&sparse, 0.0), []);
        let short = [touch(extent(3696, 400), 1.0)];
        assert_eq!(chosen(&short, 0.0), []);
    }
}
