//! The cheapest way through all of memory: block by block, on one of three backings, where a change of the backing
//! costs a mapping.

use super::super::facts::PolicyFacts;
use super::super::touches::Touch;
use super::units::{BACKINGS, Backing, Unit, Ways};
use crate::snapshot::{Extent, HUGE_PAGE_PAGES, PageOrigin, PlannedExtent, ResolvedRun};

/// The price so far of ending on each backing.
type Front = [f64; 3];

/// The way in which a block was entered and crossed to end on a backing.
#[derive(Clone, Copy, Debug, Default)]
struct Step {
    /// As one unit, or unit by unit.
    whole: bool,
    /// The backing before.
    from: usize,
}

struct Block {
    /// Its first unit, and how many there are.
    units: std::ops::Range<usize>,
    /// The whole block as one unit, if one file can show it.
    whole: Option<(Unit, Ways)>,
    /// It does not continue the block before (another range).
    fresh: bool,
}

/// Memory cut into blocks and units, each unit with the price of its ways.
pub struct Field<'a> {
    facts: &'a PolicyFacts<'a>,
    touches: &'a [Touch],
    units: Vec<(Unit, Ways)>,
    blocks: Vec<Block>,
}

impl<'a> Field<'a> {
    pub fn new(facts: &'a PolicyFacts<'a>, touches: &'a [Touch]) -> Field<'a> {
        let mut field = Field { facts, touches, units: Vec::new(), blocks: Vec::new() };
        let mut at = 0;
        let mut last: Option<Extent> = None;
        for run in facts.resolved {
            let fresh_run = last.is_none_or(|last| {
                last.end() != run.extent.first
                    || facts.layout.range_of(last.first) != facts.layout.range_of(run.extent.first)
            });
            for (index, part) in run.extent.chunks(HUGE_PAGE_PAGES).enumerate() {
                let fresh = fresh_run && index == 0;
                field.push(run, part, fresh, &mut at);
            }
            last = Some(run.extent);
        }
        field.add_wholes();
        field
    }

    fn push(&mut self, run: &ResolvedRun, part: Extent, fresh: bool, at: &mut usize) {
        while self.touches.get(*at).is_some_and(|touch| touch.extent.end() <= part.first) {
            *at += 1;
        }
        let unit = Unit::of(self.facts, run.content, run.extent, part, *at);
        let ways = unit.ways(self.facts, self.touches);
        let next = self.units.len();
        self.units.push((unit, ways));
        let number = part.first.0 / HUGE_PAGE_PAGES;
        let same = self
            .blocks
            .last()
            .is_some_and(|block| !fresh && self.units[block.units.start].0.extent.first.0 / HUGE_PAGE_PAGES == number);
        match self.blocks.last_mut() {
            Some(block) if same => block.units.end = next + 1,
            _ => self.blocks.push(Block { units: next..next + 1, whole: None, fresh }),
        }
    }

    /// A block of several units can also be taken as one if the tip's file shows all of it: its own pages, and holes.
    fn add_wholes(&mut self) {
        if !self.facts.tiers.is_empty() {
            return;
        }
        let tip = PageOrigin::Layer(self.facts.layers - 1);
        for block in &mut self.blocks {
            let units = &self.units[block.units.clone()];
            let pages: u64 = units.iter().map(|(unit, _)| unit.extent.pages).sum();
            let shown =
                units.iter().all(|(unit, _)| unit.zero || unit.source.is_some_and(|source| source.origin == tip));
            let (Some((first, _)), true) = (units.first(), units.len() > 1 && shown && pages == HUGE_PAGE_PAGES) else {
                continue;
            };
            let extent = Extent { first: first.extent.first, pages };
            let source = self.facts.hole(extent.first);
            let unit = Unit { extent, source, zero: false, touch: first.touch };
            block.whole = Some((unit, unit.ways(self.facts, self.touches)));
        }
    }

    /// The cost of a change of the backing between two units.
    fn change(&self, from: usize, to: usize, last: &Unit, next: &Unit) -> f64 {
        let same_file = || match (last.source, next.source) {
            (Some(a), Some(b)) => a.origin == b.origin,
            _ => false,
        };
        let stays = from == to && (BACKINGS[to] == Backing::Anonymous || same_file());
        if stays { 0.0 } else { self.facts.costs.vma_ns as f64 }
    }

    /// The cheapest plan, with each page of local memory that no profiled write needs at the `page_ns` of the facts.
    pub fn cheapest(&self) -> Vec<PlannedExtent> {
        let mut front: Front = [0.0; 3];
        let mut last: Option<&Unit> = None;
        let mut steps: Vec<[Step; 3]> = Vec::with_capacity(self.blocks.len());
        let mut hops: Vec<[u8; 3]> = vec![[0; 3]; self.units.len()];
        for block in &self.blocks {
            let before = (front, last.filter(|_| !block.fresh));
            let mut step = [Step::default(); 3];
            let (mut inside, mut previous) = before;
            for index in block.units.clone() {
                let (unit, ways) = &self.units[index];
                let (next, from) = self.advance(&inside, previous, unit, ways);
                hops[index] = from.map(|from| from as u8);
                (inside, previous) = (next, Some(unit));
            }
            front = inside;
            if let Some((unit, ways)) = &block.whole {
                let (whole, from) = self.advance(&before.0, before.1, unit, ways);
                for to in 0..BACKINGS.len() {
                    if whole[to] <= front[to] {
                        front[to] = whole[to];
                        step[to] = Step { whole: true, from: from[to] };
                    }
                }
            }
            steps.push(step);
            last = previous;
        }
        self.emit(&front, &steps, &hops)
    }

    /// One unit further: the new front, and for each backing the one it was reached from.
    fn advance(&self, front: &Front, last: Option<&Unit>, unit: &Unit, ways: &Ways) -> (Front, [usize; 3]) {
        let mut next = [f64::INFINITY; 3];
        let mut from = [0; 3];
        for to in 0..BACKINGS.len() {
            let Some(price) = ways[to] else { continue };
            for (before, so_far) in front.iter().enumerate() {
                let change = match last {
                    Some(last) => self.change(before, to, last, unit),
                    None => self.facts.costs.vma_ns as f64,
                };
                let total = so_far + change + price.at(self.facts.page_ns);
                if total < next[to] {
                    (next[to], from[to]) = (total, before);
                }
            }
        }
        (next, from)
    }

    /// Follows the steps back from the cheapest end.
    fn emit(&self, front: &Front, steps: &[[Step; 3]], hops: &[[u8; 3]]) -> Vec<PlannedExtent> {
        let mut at = (0..BACKINGS.len()).min_by(|a, b| front[*a].total_cmp(&front[*b])).unwrap_or(0);
        let mut chosen: Vec<(Unit, Backing)> = Vec::new();
        for (block, step) in self.blocks.iter().zip(steps).rev() {
            match (&block.whole, step[at]) {
                (Some((unit, _)), Step { whole: true, from }) => {
                    chosen.push((*unit, BACKINGS[at]));
                    at = from;
                }
                _ => {
                    for index in block.units.clone().rev() {
                        chosen.push((self.units[index].0, BACKINGS[at]));
                        at = usize::from(hops[index][at]);
                    }
                }
            }
        }
        let mut out = Vec::new();
        for (unit, backing) in chosen.iter().rev() {
            unit.emit(self.facts, self.touches, *backing, &mut out);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Content;

    #[test]
    fn zero_memory_without_a_profile_is_one_extent() {
        let layout = crate::snapshot::MemoryLayout::from_gpa_ranges(&[(0, 64 << 20)]).unwrap();
        let resolved = [ResolvedRun { extent: Extent::new(crate::snapshot::Gfn(0), 16384), content: Content::Zero }];
        let costs = crate::tiering::costs::Costs::default();
        let facts = PolicyFacts::bare(&layout, 1, &resolved, &costs);
        let mut plan = facts.empty_plan("tiered");
        plan.extents = Field::new(&facts, &[]).cheapest();
        plan.coalesce(&layout);
        assert_eq!(plan.extents.len(), 1, "{:?}", plan.extents);
    }
}
