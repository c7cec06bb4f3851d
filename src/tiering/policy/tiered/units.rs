//! The ways in which `tiered` can place a stretch of memory within one block, and their costs.

use super::super::estimate::tally;
use super::super::facts::PolicyFacts;
use super::super::model::{AnonBlock, FileBlock, GROUP_PAGES, Tally};
use super::super::place::{advance, pieces};
use super::super::touches::Touch;
use crate::snapshot::{
    Content, Extent, Fill, HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, PageSource, Placement, PlannedExtent, TierAccess,
};
use crate::tiering::costs::{Costs, SourceCache};

/// The backing of a stretch. Neighbours with the same backing need no mapping of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    Anonymous,
    /// A file mapping that wants huge folios.
    InPlace,
    /// A file mapping by small pages.
    CowFile,
}

pub const BACKINGS: [Backing; 3] = [Backing::Anonymous, Backing::InPlace, Backing::CowFile];

/// The price of a way: time, and pages of local memory that no profiled write needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    pub ns: f64,
    pub extra_pages: u64,
}

impl Price {
    /// Time, with each extra page at `page_ns`.
    pub fn at(self, page_ns: f64) -> f64 {
        self.ns + page_ns * self.extra_pages as f64
    }
}

/// A stretch within one block whose pages all have the same kind of source: a part of one resolved run, or a whole
/// block whose pages one file has.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    pub extent: Extent,
    /// The place of the first page in the file that has all pages; `None` if they are zero and no file has them.
    pub source: Option<PageSource>,
    /// Zero in the snapshot, so that it needs no source.
    pub zero: bool,
    /// Index of the first touch that may be in it.
    pub touch: usize,
}

/// The ways of a unit, in the order of [`BACKINGS`].
pub type Ways = [Option<Price>; 3];

impl Unit {
    /// The unit of a part of a resolved run.
    pub fn of(facts: &PolicyFacts, content: Content, run: Extent, part: Extent, touch: usize) -> Unit {
        match content {
            Content::Zero => Unit { extent: part, source: facts.hole(part.first), zero: true, touch },
            Content::Bytes(source) => {
                let source = advance(source, part.first.0 - run.first.0);
                Unit { extent: part, source: Some(source), zero: false, touch }
            }
        }
    }

    /// The access of its tier; `None` if it comes from no tier.
    fn access(&self, facts: &PolicyFacts) -> Option<TierAccess> {
        facts.access(self.source?.origin)
    }

    fn is_block(&self) -> bool {
        self.extent.pages == HUGE_PAGE_PAGES
    }

    fn is_aligned(&self) -> bool {
        self.source.is_some_and(|source| source.offset % HUGE_PAGE_SIZE == self.extent.gpa() % HUGE_PAGE_SIZE)
    }

    /// The price of each backing.
    pub fn ways(&self, facts: &PolicyFacts, touches: &[Touch]) -> Ways {
        let costs = facts.costs;
        let all = tally(self.extent, touches, &mut self.touch.clone());
        if self.source.is_none() {
            return [Some(self.zero_price(&all, costs)), None, None];
        }
        if self.access(facts) == Some(TierAccess::Fetch) {
            return [Some(self.anonymous(&all, facts).0), None, None];
        }
        let broken = self.broken(facts, touches);
        let mapped = |backing| self.mapped_price(&all, broken.as_ref(), backing, facts).0;
        let small =
            (costs.cache == SourceCache::Cold && self.access(facts).is_none()).then(|| mapped(Backing::CowFile));
        [Some(self.anonymous(&all, facts).0), Some(mapped(Backing::InPlace)), small]
    }

    /// The price of leaving zero pages to faults, or of reading everything ahead, and true for the latter.
    fn anonymous(&self, all: &Tally, facts: &PolicyFacts) -> (Price, bool) {
        let costs = facts.costs;
        let zero = self.zero_price(all, costs);
        // Zero pages in less than a block are not worth a read.
        if self.zero && !self.is_block() {
            return (zero, false);
        }
        let block = AnonBlock { copied: *all, calls: 1, whole: self.is_block(), ..AnonBlock::default() };
        let copy = Price { ns: block.cost(costs).total(), extra_pages: all.unwritten };
        if self.zero && zero.at(facts.page_ns) <= copy.at(facts.page_ns) { (zero, false) } else { (copy, true) }
    }

    fn zero_price(&self, all: &Tally, costs: &Costs) -> Price {
        let ns = AnonBlock { zero: *all, ..AnonBlock::default() }.cost(costs).total();
        Price { ns, extra_pages: 0 }
    }

    fn file(&self, open: Tally, broken: Tally, calls: u64, backing: Backing, promoted: bool) -> FileBlock {
        let wants_huge = backing == Backing::InPlace;
        FileBlock { open, broken, calls, wants_huge, aligned: self.is_aligned(), promoted, read_ahead: false }
    }

    /// The price of a mapped file, and true if copy-on-write is broken ahead for it.
    fn mapped_price(
        &self,
        all: &Tally,
        broken: Option<&Broken>,
        backing: Backing,
        facts: &PolicyFacts,
    ) -> (Price, bool) {
        let promoted = self.access(facts) == Some(TierAccess::MapShared);
        let open = self.file(*all, Tally::default(), 0, backing, promoted).cost(facts.costs).total();
        let open = Price { ns: open, extra_pages: 0 };
        let Some(Broken { runs, open: left, broken }) = broken else { return (open, false) };
        let block = self.file(*left, *broken, runs.len() as u64, backing, promoted);
        let price = Price { ns: block.cost(facts.costs).total(), extra_pages: broken.unwritten };
        if price.at(facts.page_ns) < open.ns { (price, true) } else { (open, false) }
    }

    /// The unit with copy-on-write broken ahead where that pays; `None` if it pays nowhere.
    fn broken(&self, facts: &PolicyFacts, touches: &[Touch]) -> Option<Broken> {
        if self.access(facts).is_some_and(|access| access != TierAccess::MapPrivate) {
            return None;
        }
        let first = touches.get(self.touch).filter(|touch| touch.extent.first < self.extent.end());
        let runs = if first.is_some() { self.breaks(facts, touches) } else { Vec::new() };
        if runs.is_empty() {
            return None;
        }
        let mut open = Tally::default();
        let mut broken = Tally::default();
        let mut run = 0;
        pieces(self.extent, touches, &mut self.touch.clone(), |piece, touch| {
            pieces(piece, &runs, &mut run, |part, inside| {
                let tally = if inside.is_some() { &mut broken } else { &mut open };
                match touch {
                    Some(touch) => tally.add(part, &touches[touch]),
                    None => tally.add_rest(part),
                }
            });
        });
        Some(Broken { runs, open, broken })
    }

    /// The runs whose copy-on-write is broken ahead, if any is broken in the block: pages whose expected write costs
    /// more than the break, joined over short gaps where another call costs more.
    fn breaks(&self, facts: &PolicyFacts, touches: &[Touch]) -> Vec<Part> {
        let costs = facts.costs;
        let mut runs: Vec<Part> = Vec::new();
        let mut pending = Tally::default();
        pieces(self.extent, touches, &mut self.touch.clone(), |piece, touch| {
            let gain = touch.map_or(f64::MIN, |touch| gain(piece, &touches[touch], costs));
            let joins = runs.last().is_some_and(|last| last.0.end() == piece.first);
            if gain > 0.0 && (joins || gain > costs.populate_write_call_ns as f64) {
                match runs.last_mut() {
                    Some(last) if joins => last.0.pages += piece.pages,
                    Some(last) if gap_pays(last.0, piece, &pending, facts) => {
                        last.0.pages = piece.end().0 - last.0.first.0;
                    }
                    _ => runs.push(Part(piece)),
                }
                pending = Tally::default();
            } else {
                match touch {
                    Some(touch) => pending.add(piece, &touches[touch]),
                    None => pending.add_rest(piece),
                }
            }
        });
        runs
    }

    /// The extents that carry out the unit on `backing`.
    pub fn emit(&self, facts: &PolicyFacts, touches: &[Touch], backing: Backing, out: &mut Vec<PlannedExtent>) {
        let all = tally(self.extent, touches, &mut self.touch.clone());
        let Some(source) = self.source else {
            out.push(PlannedExtent::zero(self.extent));
            return;
        };
        let placement = match backing {
            Backing::Anonymous => {
                let copies = self.anonymous(&all, facts).1;
                let copy = || PlannedExtent::preload(self.extent, source, Fill::Copy);
                out.push(if copies { copy() } else { PlannedExtent::zero(self.extent) });
                return;
            }
            Backing::InPlace => Placement::InPlace,
            Backing::CowFile => Placement::CowFile,
        };
        let broken = self.broken(facts, touches);
        let pays = self.mapped_price(&all, broken.as_ref(), backing, facts).1;
        let breaks = broken.filter(|_| pays).map(|broken| broken.runs).unwrap_or_default();
        pieces(self.extent, &breaks, &mut 0, |part, broken| {
            let source = advance(source, part.first.0 - self.extent.first.0);
            out.push(match broken {
                Some(_) => PlannedExtent::preload(part, source, Fill::BreakCow),
                None => PlannedExtent::from(part, placement, source),
            });
        });
    }
}

/// A unit with copy-on-write broken in some runs.
struct Broken {
    runs: Vec<Part>,
    /// The pages left as they are.
    open: Tally,
    broken: Tally,
}

/// The time saved by breaking copy-on-write of some pages ahead, without the cost of the call.
fn gain(piece: Extent, touch: &Touch, costs: &Costs) -> f64 {
    if touch.written <= 0.0 {
        return f64::MIN;
    }
    let later =
        touch.written * costs.cow_fault_ns as f64 + (touch.touched - touch.written) * costs.file_read_fault_ns as f64;
    let ahead = costs.populate_write_page_ns as f64 + touch.touched * touch_ns(piece.pages, costs);
    piece.pages as f64 * (later - ahead)
}

/// The cost of the first touch of one of `pages` pages whose copy-on-write was broken.
fn touch_ns(pages: u64, costs: &Costs) -> f64 {
    let ns = if pages < GROUP_PAGES { costs.populated_alone_ns } else { costs.populated_touch_ns };
    ns as f64
}

/// True if two runs cost less as one, with the pages between them.
fn gap_pays(last: Extent, next: Extent, gap: &Tally, facts: &PolicyFacts) -> bool {
    let costs = facts.costs;
    let pages = (next.first.0 - last.end().0) as f64;
    let later = gap.reads * costs.file_read_fault_ns as f64 + gap.writes * costs.cow_fault_ns as f64;
    let ahead = pages * (costs.populate_write_page_ns as f64 + facts.page_ns)
        + gap.touched() * touch_ns(next.end().0 - last.first.0, costs);
    ahead < later + costs.populate_write_call_ns as f64
}

/// A run as a label.
#[derive(Clone, Copy, Debug)]
pub struct Part(pub Extent);

impl AsRef<Extent> for Part {
    fn as_ref(&self) -> &Extent {
        &self.0
    }
}
