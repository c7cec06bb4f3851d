//! The pages that a guest has used since its machine was restored, as the kernel's page map of this process tells.

use crate::snapshot::PageSet;

/// Pages that a guest has used.
#[derive(Clone, Debug, Default)]
pub struct UsedPages {
    /// Pages that are mapped, spilled or in swap: the guest has touched them, they were filled before it ran, or the
    /// kernel has mapped them beside a touched page of the same file.
    pub mapped: PageSet,
    /// Those of them that this process has a copy of.
    pub own: PageSet,
}

/// Pages of a file that a fault maps around the touched one: `fault_around_bytes` of the kernel, 64 KiB by default. It
/// maps all of a folio of 2 MiB.
const FAULT_AROUND: u64 = 16;
/// The pages that are copied ahead in the time of a fault: an estimate.
const PAGES_A_FAULT: u64 = 4;

impl UsedPages {
    /// Returns whether it is worth copying these pages before the guest runs, instead of a fault for each copy and for
    /// each 16 neighbours in a file. The kernel maps whole runs around a touched page, so that a guest may have used
    /// few pages of many that are mapped.
    pub fn are_worth_copying(&self) -> bool {
        let around: u64 = self.mapped.runs().map(|run| run.pages.div_ceil(FAULT_AROUND)).sum();
        self.mapped.len() <= PAGES_A_FAULT * (around + self.own.len())
    }

    /// Those that are not among `others`.
    pub fn without(&self, others: &PageSet) -> UsedPages {
        UsedPages { mapped: self.mapped.difference(others), own: self.own.difference(others) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Extent, Gfn};

    fn used(mapped: &[(u64, u64)], own: u64) -> UsedPages {
        let run = |&(first, pages): &(u64, u64)| Extent { first: Gfn(first), pages };
        UsedPages { mapped: mapped.iter().map(run).collect(), own: [run(&(0, own))].into_iter().collect() }
    }

    #[test]
    fn pages_that_few_faults_have_mapped_are_not_worth_copying() {
        // Single pages, copies, and what 16 neighbours cost.
        assert!(used(&[(0, 1), (9, 2), (100, 3)], 0).are_worth_copying());
        assert!(used(&[(0, 400)], 100).are_worth_copying());
        assert!(!used(&[(0, 16)], 0).are_worth_copying());
        assert!(!used(&[(0, 512), (1024, 512)], 100).are_worth_copying());
        assert!(used(&[], 0).are_worth_copying());
        let rest = used(&[(0, 512)], 100).without(&used(&[(100, 412)], 0).mapped);
        assert!(rest.are_worth_copying() && rest.mapped.len() == 100);
    }
}
