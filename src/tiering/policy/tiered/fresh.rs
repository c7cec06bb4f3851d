//! Chooses the zero memory that comes in huge pages: one fault then brings 512 pages, and the unused ones of them cost
//! nothing but local memory.
//!
//! That pays where a profile expects that enough of a block will be written. It may pay where unused memory begins
//! behind written pages: if an input is larger than the recorded one, an allocator goes on there, and the recording
//! does not show it. Untouched memory costs nothing: huge pages, too, come with the first touch.

use super::super::estimate::tally;
use super::super::facts::PolicyFacts;
use super::super::model::AnonBlock;
use super::super::touches::Touch;
use crate::snapshot::{Extent, Gfn, HUGE_PAGE_PAGES, Placement, PlannedExtent};

/// The longest distance from the last written page to a zero extent for an allocator to go on there: a block.
const NEAR_PAGES: u64 = HUGE_PAGE_PAGES;

/// The blocks of `extents` that are zero memory and should come whole, as ascending runs.
pub fn blocks(facts: &PolicyFacts, touches: &[Touch], extents: &[PlannedExtent]) -> Vec<Extent> {
    let is_written = |touch: &&Touch| touch.written >= 0.5;
    // As many pages again as the recorded run wrote.
    let growth = touches.iter().filter(is_written).map(|touch| touch.extent.pages).sum::<u64>();
    let mut out: Vec<Extent> = Vec::new();
    let mut at = 0;
    let mut written_end = None;
    for zero in extents.iter().filter(|item| item.placement == Placement::Zero).map(|item| item.extent) {
        let first = zero.first.0.next_multiple_of(HUGE_PAGE_PAGES);
        let end = zero.end().0;
        for number in first / HUGE_PAGE_PAGES..end / HUGE_PAGE_PAGES {
            let block = Extent { first: Gfn(number * HUGE_PAGE_PAGES), pages: HUGE_PAGE_PAGES };
            while let Some(touch) = touches.get(at).filter(|touch| touch.extent.end() <= block.first) {
                written_end = if is_written(&touch) { Some(touch.extent.end().0) } else { written_end };
                at += 1;
            }
            let near = written_end.filter(|end| zero.first.0.saturating_sub(*end) <= NEAR_PAGES);
            let grows = near.is_some_and(|end| block.first.0 - end.max(zero.first.0) < growth.max(NEAR_PAGES));
            if !(grows || pays(facts, touches, block, at)) {
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

/// True if the expected pages of `block` cost more one by one.
fn pays(facts: &PolicyFacts, touches: &[Touch], block: Extent, at: usize) -> bool {
    if touches.get(at).is_none_or(|touch| touch.extent.first >= block.end()) {
        return false;
    }
    let zero = tally(block, touches, &mut at.clone());
    let cost = |huge| AnonBlock { zero, huge, ..AnonBlock::default() }.cost(facts.costs).total();
    let unwritten = (1.0 - zero.idle) * zero.unwritten as f64;
    cost(true) + facts.page_ns * unwritten < cost(false)
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
        let source = PageSource::layer(0, 0);
        let resolved = [
            ResolvedRun { extent: extent(0, 4096), content: Content::Bytes(source) },
            ResolvedRun { extent: extent(4096, 4096), content: Content::Zero },
        ];
        let costs = Costs::default();
        let facts = PolicyFacts { page_ns, ..PolicyFacts::bare(&layout, 1, &resolved, &costs) };
        let held = PlannedExtent::from(extent(0, 4096), Placement::CowFile, source);
        blocks(&facts, touches, &[held, PlannedExtent::zero(extent(4096, 4096))])
    }

    #[test]
    fn blocks_that_will_be_written_come_whole_and_at_a_price_only_the_full_ones() {
        let touches = [touch(extent(4096, 3), 1.0), touch(extent(5120, 400), 1.0), touch(extent(6144, 60), 1.0)];
        // The blocks behind them follow, because they are written.
        assert_eq!(chosen(&touches, 0.0), [extent(4608, 2560)]);
        assert_eq!(chosen(&touches, 1000.0), [extent(4608, 1536), extent(6656, 512)]);
        assert_eq!(chosen(&[], 0.0), []);
    }

    #[test]
    fn zero_memory_behind_written_pages_comes_whole_as_much_as_was_written() {
        // 1,100 pages in all: three blocks begin within as many pages behind them.
        let grown = [touch(extent(100, 664), 1.0), touch(extent(3650, 436), 1.0)];
        assert_eq!(chosen(&grown, 1e6), [extent(4096, 1536)]);
        // Half of it in zero memory already, from where it goes on.
        let begun = [touch(extent(3796, 300), 1.0), touch(extent(4096, 300), 1.0)];
        assert_eq!(chosen(&begun, 1e6), [extent(4096, 1024)]);
        let few = [touch(extent(4000, 8), 1.0)];
        assert_eq!(chosen(&few, 1e6), [extent(4096, 512)]);
        let read = [touch(extent(2996, 1100), 0.0)];
        assert_eq!(chosen(&read, 0.0), []);
        let far = [touch(extent(2000, 1500), 1.0)];
        assert_eq!(chosen(&far, 0.0), []);
    }
}
