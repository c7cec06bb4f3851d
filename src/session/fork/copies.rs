//! Pages that children have copies of before they run, so that their first writes cost no faults.

use std::path::Path;

use crate::session::Error;
use crate::snapshot::{Chain, Extent, Location, PAGE_SIZE, PageSet};
use crate::sys::page_cache::PageCache;
use crate::tiering::planner::Planner;

/// The copies that each child makes.
pub struct Copies {
    /// The pages that the parent has copies of.
    pub pages: PageSet,
    /// The most bytes of a child.
    pub most_bytes: u64,
}

impl Copies {
    /// Writes the plan by which the children restore `snapshot` to `path`. Returns the bytes that each of them copies.
    pub fn write_plan(&self, snapshot: &Location, path: &Path) -> Result<u64, Error> {
        let chain = Chain::open(snapshot)?;
        // Other pages are zero.
        let held = self.pages.intersection(chain.tip().page_map()?.held());
        let copied = first_pages(&held, self.most_bytes / PAGE_SIZE);
        let planner = Planner { chain: &chain, tiers: &[], cold: None, page_cache: &PageCache };
        planner.with_copies(&copied)?.save(path)?;
        Ok(copied.len() * PAGE_SIZE)
    }
}

/// The first pages of `pages`, `most` at most.
fn first_pages(pages: &PageSet, most: u64) -> PageSet {
    let mut left = most;
    let fitting = pages.runs().map_while(|run| {
        let taken = run.pages.min(left);
        left -= taken;
        (taken > 0).then_some(Extent { pages: taken, ..run })
    });
    fitting.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Gfn;

    #[test]
    fn the_first_pages_are_taken_as_far_as_they_fit() {
        let pages: PageSet = [Extent::new(Gfn(1), 2), Extent::new(Gfn(10), 4)].into_iter().collect();
        let taken = |most| first_pages(&pages, most).iter().map(|page| page.0).collect::<Vec<_>>();
        assert_eq!(taken(0), [0; 0]);
        assert_eq!(taken(4), [1, 2, 10, 11]);
        assert_eq!(taken(9), [1, 2, 10, 11, 12, 13]);
    }
}
