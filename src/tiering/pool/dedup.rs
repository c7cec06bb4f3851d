//! Decides which pages of a snapshot are shared with the pool and which are stored, even if the pool has them already.
//!
//! A page that the pool has costs nothing to share, but every place where one mapping stops and another begins costs
//! every restore. So a run that is in the pool is shared only if its bytes are worth more than the splits it makes;
//! zero pages between stored ones are stored where a hole would cost more. The search finds the cheapest choice for all
//! stretches together (Viterbi: three states, the price of a stretch in its state, the price of going from one to the
//! next).

use crate::snapshot::{Extent, Gfn, MemoryLayout};
use crate::tiering::costs::Costs;

use super::format::BLOCK_PAGES;

/// The worth of a page of the pool: time that all restores of the snapshot together may take longer to save it.
const PAGE_RENT_NS: f64 = 100_000.0;

/// Prices of sharing and storing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prices {
    /// One more mapping, in all expected restores.
    pub split: f64,
    /// A page of the pool.
    pub page: f64,
    /// A touched page that is mapped alone, in all restores.
    pub touch: f64,
    /// A touched block that one huge page maps, in all restores.
    pub huge: f64,
}

impl Prices {
    pub fn new(costs: &Costs, restores: u64) -> Prices {
        let all = |ns: u64| ns as f64 * restores as f64;
        Prices {
            split: all(costs.vma_ns),
            page: PAGE_RENT_NS,
            touch: all(costs.file_read_fault_ns),
            huge: all(costs.huge_fault_ns),
        }
    }

    /// The shortest run that is shared at the price of two splits; shorter ones are stored again.
    pub fn least_run(&self) -> u64 {
        (2.0 * self.split / self.page).ceil() as u64
    }
}

/// The class that a profile gives a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    Read,
    Written,
    /// Not touched, or unknown.
    #[default]
    Cold,
}

/// A page of the snapshot that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    pub gfn: u64,
    /// Its place in the pool, if the pool has it.
    pub known: Option<u64>,
}

/// The choice for a stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Shared with the pages of the pool from this one on.
    Share(u64),
    Store,
    /// Zero, and not stored.
    Leave,
}

/// Pages that are treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub extent: Extent,
    pub choice: Choice,
}

/// A stretch within one block, before it is decided.
#[derive(Clone, Copy, Debug)]
struct Part {
    extent: Extent,
    /// `None`: zero. `Some(None)`: the pool does not have it.
    content: Option<Option<u64>>,
    /// To be stored, whatever it costs.
    forced: bool,
    /// First of a range of guest memory: no mapping crosses that.
    fresh: bool,
}

/// Decides for all of guest memory: every page once, ascending, zero stretches included. `pages` ascend; `class` is the
/// expected use of a page.
pub fn decide(layout: &MemoryLayout, pages: &[Page], class: &dyn Fn(u64) -> Class, prices: &Prices) -> Vec<Stretch> {
    let mut parts = Vec::new();
    let mut at = 0;
    for range in layout.extents() {
        for (index, block) in range.chunks(BLOCK_PAGES).enumerate() {
            let start = parts.len();
            let held = at;
            push_parts(&mut parts, block, pages, &mut at);
            parts[start].fresh = index == 0;
            if block.pages == BLOCK_PAGES && whole_pays(&parts[start..], &pages[held..at], class, prices) {
                let fresh = parts[start].fresh;
                parts.truncate(start);
                parts.push(Part { extent: block, content: Some(None), forced: true, fresh });
            }
        }
    }
    join(&cheapest(&parts, prices))
}

/// Cuts a block into stretches that are zero, unknown, or known in a row.
fn push_parts(parts: &mut Vec<Part>, block: Extent, pages: &[Page], at: &mut usize) {
    let mut next = block.first.0;
    let start = parts.len();
    let mut push = |first: u64, count: u64, content| {
        let extent = Extent { first: Gfn(first), pages: count };
        parts.push(Part { extent, content, forced: false, fresh: false });
    };
    while let Some(page) = pages.get(*at).filter(|page| page.gfn < block.end().0) {
        if next < page.gfn {
            push(next, page.gfn - next, None);
        }
        let follows = |step: u64, other: &Page| {
            let same = match (page.known, other.known) {
                (None, None) => true,
                (Some(a), Some(b)) => a + step == b,
                _ => false,
            };
            same && other.gfn == page.gfn + step && other.gfn < block.end().0
        };
        let run = (0..).zip(&pages[*at..]).take_while(|(step, other)| follows(*step, other)).count();
        push(page.gfn, run as u64, Some(page.known));
        *at += run;
        next = page.gfn + run as u64;
    }
    if next < block.end().0 {
        push(next, block.end().0 - next, None);
    }
    debug_assert!(parts.len() > start);
}

/// True if it pays to store a block whole, zero pages included, so that one huge page maps it.
fn whole_pays(parts: &[Part], held: &[Page], class: &dyn Fn(u64) -> Class, prices: &Prices) -> bool {
    if let [Part { extent, content, .. }] = parts {
        // One stretch already: zero, new, or shared where a huge page maps it too.
        let aligned = |at: &u64| at % BLOCK_PAGES == extent.first.0 % BLOCK_PAGES;
        if content.is_none_or(|known| known.as_ref().is_none_or(aligned)) {
            return false;
        }
    }
    if held.iter().any(|page| class(page.gfn) == Class::Written) {
        return false;
    }
    let touched = held.iter().filter(|page| class(page.gfn) == Class::Read).count() as f64;
    let more = BLOCK_PAGES as f64 - held.iter().filter(|page| page.known.is_none()).count() as f64;
    let splits = parts.windows(2).filter(|pair| !follows(&pair[0], &pair[1])).count() as f64;
    touched * prices.touch - prices.huge + splits * prices.split > more * prices.page
}

/// True if two stretches are contiguous in the pool, or both zero, or both new.
fn follows(a: &Part, b: &Part) -> bool {
    match (a.content, b.content) {
        (None, None) | (Some(None), Some(None)) => true,
        (Some(Some(x)), Some(Some(y))) => x + a.extent.pages == y,
        _ => false,
    }
}

const SHARE: usize = 0;
const STORE: usize = 1;
const LEAVE: usize = 2;

fn cheapest(parts: &[Part], prices: &Prices) -> Vec<Stretch> {
    let mut front = [0.0; 3];
    let mut steps: Vec<[usize; 3]> = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let pages = part.extent.pages as f64;
        let own = [
            if matches!(part.content, Some(Some(_))) && !part.forced { 0.0 } else { f64::INFINITY },
            pages * prices.page,
            if part.content.is_none() { 0.0 } else { f64::INFINITY },
        ];
        let mut next = [f64::INFINITY; 3];
        let mut from = [0; 3];
        for to in 0..3 {
            for (before, so_far) in front.iter().enumerate() {
                let stays = match index.checked_sub(1).map(|last| &parts[last]).filter(|_| !part.fresh) {
                    Some(last) => before == to && (to != SHARE || follows(last, part)),
                    None => false,
                };
                let total = so_far + own[to] + if stays { 0.0 } else { prices.split };
                if total < next[to] {
                    (next[to], from[to]) = (total, before);
                }
            }
        }
        (front, _) = (next, steps.push(from));
    }
    let mut state = (0..3).min_by(|a, b| front[*a].total_cmp(&front[*b])).unwrap_or(STORE);
    let mut out = Vec::with_capacity(parts.len());
    for (part, from) in parts.iter().zip(&steps).rev() {
        let choice = match (state, part.content) {
            (SHARE, Some(Some(at))) => Choice::Share(at),
            (LEAVE, None) => Choice::Leave,
            _ => Choice::Store,
        };
        out.push(Stretch { extent: part.extent, choice });
        state = from[state];
    }
    out.reverse();
    out
}

fn join(stretches: &[Stretch]) -> Vec<Stretch> {
    let mut out: Vec<Stretch> = Vec::new();
    for stretch in stretches {
        if let Some(last) = out.last_mut()
            && last.extent.end() == stretch.extent.first
            && match (last.choice, stretch.choice) {
                (Choice::Share(a), Choice::Share(b)) => a + last.extent.pages == b,
                (a, b) => a == b,
            }
        {
            last.extent.pages += stretch.extent.pages;
            continue;
        }
        out.push(*stretch);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::PAGE_SIZE;

    const PRICES: Prices = Prices { split: 10.0, page: 1.0, touch: 4.0, huge: 5.0 };

    fn layout(pages: u64) -> MemoryLayout {
        MemoryLayout::from_gpa_ranges(&[(0, pages * PAGE_SIZE)]).unwrap()
    }

    fn page(gfn: u64, known: Option<u64>) -> Page {
        Page { gfn, known }
    }

    fn shown(stretches: &[Stretch]) -> Vec<(u64, u64, Choice)> {
        stretches.iter().map(|s| (s.extent.first.0, s.extent.pages, s.choice)).collect()
    }

    #[test]
    fn a_short_duplicate_between_new_pages_is_stored_again_and_a_long_one_is_shared() {
        let pages = |dup: u64| -> Vec<Page> {
            (0..100).map(|gfn| page(gfn, (40..40 + dup).contains(&gfn).then_some(gfn + 1000))).collect()
        };
        let short = decide(&layout(100), &pages(19), &|_| Class::Cold, &PRICES);
        assert_eq!(shown(&short), [(0, 100, Choice::Store)]);
        let long = decide(&layout(100), &pages(21), &|_| Class::Cold, &PRICES);
        assert_eq!(shown(&long), [(0, 40, Choice::Store), (40, 21, Choice::Share(1040)), (61, 39, Choice::Store)]);
    }

    #[test]
    fn short_holes_are_filled_and_long_ones_left() {
        let pages = |hole: u64| -> Vec<Page> {
            (0..100).filter(|gfn| !(40..40 + hole).contains(gfn)).map(|gfn| page(gfn, None)).collect()
        };
        let class = |_| Class::Cold;
        assert_eq!(shown(&decide(&layout(100), &pages(19), &class, &PRICES)), [(0, 100, Choice::Store)]);
        assert_eq!(decide(&layout(100), &pages(21), &class, &PRICES).len(), 3);
    }

    #[test]
    fn a_block_that_is_read_is_stored_whole_and_one_that_is_written_is_not() {
        // Every second page is in the pool, far apart.
        let pages: Vec<Page> =
            (0..512).map(|gfn| page(gfn, (gfn % 256 < 200).then_some(gfn + 4096 + gfn / 256 * 7))).collect();
        let decided = |class: Class| decide(&layout(512), &pages, &|_| class, &PRICES);
        assert_eq!(shown(&decided(Class::Read)), [(0, 512, Choice::Store)]);
        assert_eq!(decided(Class::Written).len(), 4);
        assert_eq!(decided(Class::Cold).len(), 4);
    }

    proptest! {
        #[test]
        fn every_page_is_decided_once_and_validly(
            pages in prop::collection::vec((0_u8..4, 0_u64..4), 1200),
            classes in prop::collection::vec(0_u8..3, 3),
        ) {
            let mut list = Vec::new();
            for (gfn, (kind, jump)) in pages.iter().enumerate() {
                let gfn = gfn as u64;
                match kind {
                    0 => {}
                    1 => list.push(page(gfn, None)),
                    _ => list.push(page(gfn, Some(gfn + 5000 + jump / 3 * 100))),
                }
            }
            let class = |gfn: u64| match classes[(gfn / 512) as usize] {
                0 => Class::Read,
                1 => Class::Written,
                _ => Class::Cold,
            };
            let decided = decide(&layout(1200), &list, &class, &PRICES);
            let mut next = 0;
            for stretch in &decided {
                prop_assert_eq!(stretch.extent.first.0, next);
                next = stretch.extent.end().0;
                for gfn in stretch.extent.first.0..next {
                    let found = list.iter().find(|page| page.gfn == gfn);
                    match stretch.choice {
                        Choice::Share(at) => {
                            let at = at + (gfn - stretch.extent.first.0);
                            prop_assert_eq!(found.and_then(|page| page.known), Some(at));
                        }
                        Choice::Leave => prop_assert!(found.is_none()),
                        Choice::Store => {}
                    }
                }
            }
            prop_assert_eq!(next, 1200);
        }
    }
}
