//! Chooses the places of stored pages in the pool: long runs, in the guest's order. Runs with whole blocks are
//! congruent to guest addresses modulo 2 MiB. Pages that are read together lie together, apart from written and cold
//! ones.

use super::catalogue::Run;
use super::dedup::Class;
use super::format::BLOCK_PAGES;
use super::space::Space;
use crate::snapshot::{Extent, Gfn};

/// The least blocks of one class in a row that get a place of their own: each place is one more mapping.
const LEAST_BLOCKS: u64 = 4;

/// Finds room for `stored` (ascending, disjoint). `class` gives the class of the 2 MiB block with a number. Returns
/// `None` if there is not enough room; `space` may be changed then.
pub fn place(stored: &[Extent], class: &dyn Fn(u64) -> Class, space: &mut Space) -> Option<Vec<Run>> {
    if stored.iter().map(|extent| extent.pages).sum::<u64>() > space.free() {
        return None;
    }
    let mut pieces: Vec<(Class, Extent)> = stored.iter().flat_map(|extent| by_class(*extent, class)).collect();
    pieces.sort_by_key(|(class, extent)| (*class, extent.first));
    let mut runs = Vec::new();
    for (_, extent) in pieces {
        put(extent, space, &mut runs)?;
    }
    runs.sort_unstable_by_key(|run| run.gfn);
    Some(runs)
}

/// Cuts a run at block boundaries where the class changes for long enough.
fn by_class(extent: Extent, class: &dyn Fn(u64) -> Class) -> Vec<(Class, Extent)> {
    let mut groups: Vec<(Class, Extent)> = Vec::new();
    for part in extent.chunks(BLOCK_PAGES) {
        let own = class(part.first.0 / BLOCK_PAGES);
        match groups.last_mut() {
            Some((last, group)) if *last == own => group.pages += part.pages,
            _ => groups.push((own, part)),
        }
    }
    let mut out: Vec<(Class, Extent)> = Vec::new();
    for (own, group) in groups {
        match out.last_mut() {
            // Too short for a place of its own, or after one that is.
            Some((last, before))
                if group.pages < LEAST_BLOCKS * BLOCK_PAGES || before.pages < LEAST_BLOCKS * BLOCK_PAGES =>
            {
                before.pages += group.pages;
                *last = (*last).min(own);
            }
            _ => out.push((own, group)),
        }
    }
    out
}

/// Places one extent: in one run, or in parts if there is no room for one run.
fn put(extent: Extent, space: &mut Space, runs: &mut Vec<Run>) -> Option<()> {
    let first = extent.first.0;
    let has_block = first.next_multiple_of(BLOCK_PAGES) + BLOCK_PAGES <= first + extent.pages;
    let modulus = if has_block { BLOCK_PAGES } else { 1 };
    let mut found = space.allocate(extent.pages, first % modulus, modulus);
    if found.is_none() && extent.pages <= BLOCK_PAGES {
        found = space.allocate(extent.pages, 0, 1);
    }
    if let Some(at) = found {
        runs.push(Run { gfn: first, pages: extent.pages, at });
        return Some(());
    }
    if extent.pages == 1 {
        return None;
    }
    // At a block's boundary, if there is one.
    let half = first + extent.pages / 2;
    let aligned = half / BLOCK_PAGES * BLOCK_PAGES;
    let cut = if aligned > first { aligned } else { half };
    put(Extent { first: Gfn(first), pages: cut - first }, space, runs)?;
    put(Extent { first: Gfn(cut), pages: first + extent.pages - cut }, space, runs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    #[test]
    fn blocks_of_a_class_lie_together_and_congruent() {
        let class = |block: u64| if (8..16).contains(&block) { Class::Read } else { Class::Cold };
        let stored = [extent(100, 20 * BLOCK_PAGES)];
        let runs = place(&stored, &class, &mut Space::new(0, 64 * BLOCK_PAGES)).unwrap();
        assert_eq!(runs.len(), 3);
        assert_eq!(runs[1], Run { gfn: 8 * BLOCK_PAGES, pages: 8 * BLOCK_PAGES, at: 0 });
        assert!(runs.iter().all(|run| run.gfn % BLOCK_PAGES == run.at % BLOCK_PAGES));
    }

    #[test]
    fn too_little_room_is_none_and_just_enough_in_shreds_is_found() {
        let shreds = || {
            let mut space = Space::new(0, 4096);
            (0..1024).for_each(|index| space.take(index * 4, 1));
            space
        };
        assert!(place(&[extent(0, 3073)], &|_| Class::Cold, &mut shreds()).is_none());
        let runs = place(&[extent(0, 3072)], &|_| Class::Cold, &mut shreds()).unwrap();
        assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), 3072);
    }

    proptest! {
        #[test]
        fn every_stored_page_has_a_place_of_its_own(
            cuts in prop::collection::btree_set(0_u64..6000, 2..20),
            taken in prop::collection::vec((0_u64..12_000, 1_u64..900), 0..8),
            classes in prop::collection::vec(0_u8..3, 12),
        ) {
            let cuts: Vec<u64> = cuts.into_iter().collect();
            let stored: Vec<Extent> =
                cuts.chunks_exact(2).map(|pair| extent(pair[0], pair[1] - pair[0])).collect();
            let mut space = Space::new(0, 12_000);
            taken.iter().for_each(|(at, len)| space.take(*at, *len));
            let free = space.clone();
            let class = |block: u64| match classes[block as usize] {
                0 => Class::Read,
                1 => Class::Written,
                _ => Class::Cold,
            };
            let pages: u64 = stored.iter().map(|extent| extent.pages).sum();
            let Some(runs) = place(&stored, &class, &mut space) else {
                prop_assert!(pages > free.free());
                return Ok(());
            };
            let mut guest: Vec<u64> = runs.iter().flat_map(|run| run.gfn..run.gfn + run.pages).collect();
            guest.sort_unstable();
            let wanted: Vec<u64> = stored.iter().flat_map(|e| e.first.0..e.end().0).collect();
            prop_assert_eq!(guest, wanted);
            let mut again = free;
            for run in &runs {
                let before = again.free();
                again.take(run.at, run.pages);
                prop_assert_eq!(before - again.free(), run.pages, "taken twice");
            }
            prop_assert_eq!(again, space);
        }
    }
}
