//! The expected cost of a plan of any policy.

use serde::{Deserialize, Serialize};

use super::Ground;
use super::model::{AnonBlock, Cost, FileBlock, LazyBlock, Tally};
use super::place::{BLOCK_PAGES, pieces};
use super::touches::Touch;
use crate::snapshot::{
    BackgroundAction, Extent, Fill, Gfn, MemoryLayout, PAGE_SIZE, PageSource, Placement, PlannedExtent, RestorePlan,
    TierAccess,
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
    /// Mappings that guest memory is made of.
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

/// The content of a mapping. Neighbours with the same content, continued, are one mapping.
#[derive(Clone, Copy, Debug, PartialEq)]
enum View {
    /// `served`: behind a userfaultfd, or not; `None` where either will do.
    Anonymous { served: Option<bool> },
    /// `huge` is `None` where either will do.
    File { layer: usize, base: i128, huge: Option<bool> },
}

impl View {
    fn of(item: &PlannedExtent) -> View {
        let file = |source: Option<PageSource>, huge| match source {
            Some(PageSource { layer, offset }) => {
                View::File { layer, base: i128::from(offset) - i128::from(item.extent.gpa()), huge }
            }
            None => View::Anonymous { served: Some(false) },
        };
        match (item.placement, item.fill) {
            (Placement::CowFile, _) => file(item.source, Some(false)),
            (Placement::InPlace, _) => file(item.source, Some(true)),
            (Placement::Preload, Fill::BreakCow) => file(item.source, None),
            (Placement::Preload, Fill::Install) | (Placement::Lazy, _) => View::Anonymous { served: Some(true) },
            (Placement::Preload, Fill::Copy) => View::Anonymous { served: None },
            (Placement::Zero, _) => View::Anonymous { served: Some(false) },
        }
    }

    fn joined(self, next: View) -> Option<View> {
        match (self, next) {
            (View::File { layer, base, huge }, View::File { layer: l, base: b, huge: h }) => {
                let same = layer == l && base == b && (huge.is_none() || h.is_none() || huge == h);
                same.then_some(View::File { layer, base, huge: huge.or(h) })
            }
            (View::Anonymous { served }, View::Anonymous { served: s }) => {
                let same = served.is_none() || s.is_none() || served == s;
                same.then_some(View::Anonymous { served: served.or(s) })
            }
            _ => None,
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
    layers: usize,
    read_ahead: bool,
    fault_pages: u64,
    huge: &'a [Extent],
    ground: &'a Ground<'a>,
    view: View,
    block: Block,
    cost: Cost,
    estimate: Estimate,
    /// The end of the last read of a file.
    read_to: Option<PageSource>,
}

/// The expected cost of `plan` with the expected touches `touches`.
pub fn estimate(plan: &RestorePlan, ground: &Ground, touches: &[Touch]) -> Estimate {
    let mut walk = Walk {
        costs: ground.costs,
        touches,
        at: 0,
        layers: ground.layers,
        ground,
        read_ahead: plan.background.iter().any(|step| step.action == BackgroundAction::ReadAhead),
        fault_pages: plan.fault_pages,
        huge: &plan.huge,
        view: View::Anonymous { served: None },
        block: Block::default(),
        cost: Cost::default(),
        estimate: Estimate::default(),
        read_to: None,
    };
    let mut last: Option<Extent> = None;
    for item in &plan.extents {
        let view = View::of(item);
        let joined =
            walk.view.joined(view).filter(|_| last.is_some_and(|last| adjoin(ground.layout, last, item.extent)));
        if joined.is_none() {
            walk.flush();
            walk.estimate.vmas += 1;
        }
        walk.view = joined.unwrap_or(view);
        walk.add(item);
        last = Some(item.extent);
    }
    walk.flush();
    let Walk { mut estimate, cost, .. } = walk;
    estimate.map_ns = estimate.vmas as f64 * ground.costs.vma_ns as f64;
    (estimate.preload_ns, estimate.fault_ns) = (cost.before, cost.during);
    estimate
}

fn adjoin(layout: &MemoryLayout, last: Extent, next: Extent) -> bool {
    last.end() == next.first && layout.contains(Extent { first: Gfn(next.first.0 - 1), pages: 2 })
}

impl Walk<'_> {
    fn flush(&mut self) {
        let block = std::mem::take(&mut self.block);
        match self.view {
            View::Anonymous { .. } => {
                self.cost.add(block.anon.cost(self.costs));
                self.cost.add(block.lazy.cost(self.costs));
            }
            View::File { layer, base, huge } => {
                let file = FileBlock {
                    wants_huge: huge == Some(true),
                    aligned: base.rem_euclid(i128::from(BLOCK_PAGES * PAGE_SIZE)) == 0,
                    read_ahead: self.read_ahead && layer >= self.layers,
                    promoted: self.ground.access(layer) == Some(TierAccess::MapShared),
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
        for (index, part) in item.extent.chunks(BLOCK_PAGES).enumerate() {
            let number = part.first.0 / BLOCK_PAGES;
            if number != self.block.number {
                self.flush();
                self.block.number = number;
            }
            let (tally, calls) = match (item.placement, item.fill) {
                (Placement::Preload, Fill::BreakCow) => (&mut self.block.file.broken, Some(&mut self.block.file.calls)),
                (Placement::Preload, Fill::Copy) => {
                    self.block.anon.whole = part.pages == BLOCK_PAGES;
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
