//! The expected cost of a plan of any policy.

use serde::{Deserialize, Serialize};

use super::facts::PolicyFacts;
use super::model::{AnonBlock, Cost, FileBlock, LazyBlock, Tally};
use super::place::pieces;
use super::touches::Touch;
use crate::snapshot::{
    BackgroundAction, Extent, Fill, Folios, Gfn, HUGE_PAGE_PAGES, HUGE_PAGE_SIZE, InPlaceMapping, PageOrigin,
    PageSource, Placement, PlannedExtent, RestorePlan, View,
};
use crate::tiering::costs::Costs;

/// The expectation for one restore and one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Making the mappings.
    pub map_ns: f64,
    /// Filling memory before the guest runs.
    pub preload_ns: f64,
    /// Faults while the request is executed.
    pub fault_ns: f64,
    /// Mappings that the restore makes for guest memory. A userfaultfd splits some of them: that is in `map_ns` only.
    pub vmas: u64,
    /// Pages of local memory filled before the guest runs.
    pub pages_preloaded: u64,
    /// Those of them that the profile does not expect to be written.
    pub pages_preloaded_unwritten: u64,
}

impl Estimate {
    /// The sum.
    pub fn total_ns(&self) -> f64 {
        self.map_ns + self.preload_ns + self.fault_ns
    }
}

/// The userfaultfd that anonymous pages are registered with. Each change of it within a mapping splits the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    Userfaultfd,
    Nothing,
    /// Either will do.
    Any,
}

impl Behind {
    fn of(item: &PlannedExtent) -> Behind {
        match (item.placement, item.fill) {
            (Placement::Lazy, _) | (Placement::Preload, Fill::Install) => Behind::Userfaultfd,
            (Placement::Preload, Fill::Copy) => Behind::Any,
            (Placement::Zero | Placement::InPlace | Placement::CowFile | Placement::Preload, _) => Behind::Nothing,
        }
    }

    fn joined(self, next: Behind) -> Option<Behind> {
        match (self, next) {
            (Behind::Any, other) | (other, Behind::Any) => Some(other),
            (one, other) => (one == other).then_some(one),
        }
    }
}

/// The pages of one block in one mapping, being collected.
#[derive(Default)]
struct Block {
    number: u64,
    file: FileBlock,
    anon: AnonBlock,
    lazy: LazyBlock,
}

struct Walk<'a> {
    costs: &'a Costs,
    touches: &'a [Touch],
    at: usize,
    read_ahead: bool,
    fault_pages: u64,
    huge: &'a [Extent],
    /// The content of the mapping that is walked through, and its first page.
    view: View,
    start: Gfn,
    block: Block,
    cost: Cost,
    estimate: Estimate,
    /// The end of the last read of a file.
    read_to: Option<PageSource>,
}

/// The expected cost of `plan` with the expected touches `touches`.
pub fn estimate(plan: &RestorePlan, facts: &PolicyFacts, touches: &[Touch]) -> Estimate {
    let mut walk = Walk {
        costs: facts.costs,
        touches,
        at: 0,
        read_ahead: plan.background.iter().any(|step| step.action == BackgroundAction::ReadAhead),
        fault_pages: plan.fault_pages,
        huge: &plan.huge,
        view: View::Anonymous,
        start: Gfn(0),
        block: Block::default(),
        cost: Cost::default(),
        estimate: Estimate::default(),
        read_to: None,
    };
    let mut splits = 0;
    for mapping in plan.mappings(facts.layout, InPlaceMapping::Private) {
        walk.flush();
        walk.estimate.vmas += 1;
        walk.view = mapping.view;
        walk.start = mapping.extent.first;
        let mut behind = Behind::Any;
        for item in &plan.extents[mapping.items] {
            let next = Behind::of(item);
            let joined = behind.joined(next);
            if joined.is_none() {
                walk.flush();
                splits += 1;
            }
            behind = joined.unwrap_or(next);
            walk.add(item);
        }
    }
    walk.flush();
    let Walk { mut estimate, cost, .. } = walk;
    estimate.map_ns = (estimate.vmas + splits) as f64 * facts.costs.vma_ns as f64;
    (estimate.preload_ns, estimate.fault_ns) = (cost.before, cost.during);
    estimate
}

impl Walk<'_> {
    fn flush(&mut self) {
        let block = std::mem::take(&mut self.block);
        match self.view {
            View::Anonymous => {
                self.cost.add(block.anon.cost(self.costs));
                self.cost.add(block.lazy.cost(self.costs));
            }
            View::File { source, folios, shared } => {
                let file = FileBlock {
                    wants_huge: folios == Folios::Huge,
                    aligned: source.offset % HUGE_PAGE_SIZE == self.start.gpa() % HUGE_PAGE_SIZE,
                    read_ahead: self.read_ahead && matches!(source.origin, PageOrigin::Image(_)),
                    promoted: shared,
                    ..block.file
                };
                self.cost.add(file.cost(self.costs));
            }
        }
    }

    fn is_huge(&self, part: Extent) -> bool {
        self.huge.iter().any(|blocks| blocks.intersection(&part).is_some())
    }

    fn add(&mut self, item: &PlannedExtent) {
        let is_preload = item.placement == Placement::Preload;
        if is_preload {
            self.estimate.pages_preloaded += item.extent.pages;
        }
        let sequential = is_preload && item.source.is_some() && self.read_to == item.source;
        if let (true, Some(source)) = (is_preload, item.source) {
            self.read_to = Some(super::place::advance(source, item.extent.pages));
        }
        for (index, part) in item.extent.chunks(HUGE_PAGE_PAGES).enumerate() {
            let number = part.first.0 / HUGE_PAGE_PAGES;
            if number != self.block.number {
                self.flush();
                self.block.number = number;
            }
            let (tally, calls) = match (item.placement, item.fill) {
                (Placement::Preload, Fill::BreakCow) => (&mut self.block.file.broken, Some(&mut self.block.file.calls)),
                (Placement::Preload, Fill::Copy) => {
                    self.block.anon.whole = part.pages == HUGE_PAGE_PAGES;
                    (&mut self.block.anon.copied, (!sequential).then_some(&mut self.block.anon.calls))
                }
                (Placement::Preload, Fill::Install) => {
                    (&mut self.block.lazy.installed, Some(&mut self.block.lazy.calls))
                }
                (Placement::Zero, _) => {
                    self.block.anon.huge = self.is_huge(part);
                    (&mut self.block.anon.zero, None)
                }
                (Placement::Lazy, _) => {
                    self.block.lazy.fault_pages = self.fault_pages;
                    (&mut self.block.lazy.lazy, None)
                }
                (Placement::InPlace | Placement::CowFile, _) => (&mut self.block.file.open, None),
            };
            if let Some(calls) = calls.filter(|_| index == 0) {
                *calls += 1;
            }
            let mut unwritten = 0;
            let touches = self.touches;
            pieces(part, touches, &mut self.at, |piece, touch| match touch {
                Some(touch) => {
                    tally.add(piece, &touches[touch]);
                    unwritten += if touches[touch].written > 0.0 { 0 } else { piece.pages };
                }
                None => {
                    tally.add_rest(piece);
                    unwritten += piece.pages;
                }
            });
            self.estimate.pages_preloaded_unwritten += if is_preload { unwritten } else { 0 };
        }
    }
}

/// The expected touches of the pages of `extent`. Advances `at`.
pub fn tally(extent: Extent, touches: &[Touch], at: &mut usize) -> Tally {
    let mut tally = Tally::default();
    pieces(extent, touches, at, |piece, touch| match touch {
        Some(touch) => tally.add(piece, &touches[touch]),
        None => tally.add_rest(piece),
    });
    tally
}
