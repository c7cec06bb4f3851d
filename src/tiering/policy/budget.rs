//! The limits of a plan.

use crate::snapshot::PAGE_SIZE;

/// The most memory of each kind that a plan may use. `None`: unlimited. Only `tiered` makes choices that a budget can
/// change; the other policies do what their papers do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Pages of local memory: those preloaded, and those that the request will write.
    pub dram_pages: Option<u64>,
    /// Pages mapped in place from a pool.
    pub cxl_pages: Option<u64>,
    /// The worth of a page of local memory that the request does not write, as extra ns that a request may take to save
    /// it. 0 optimises time only.
    pub dram_page_ns: u64,
}

impl Budget {
    /// A budget in MiB, with a price in µs per MiB. More MiB than can be counted in pages are no limit.
    pub fn of_mib(dram: Option<u64>, cxl: Option<u64>, dram_price_us: u64) -> Budget {
        let pages = |mib: Option<u64>| mib.map(|mib| mib.saturating_mul((1 << 20) / PAGE_SIZE));
        Budget { dram_pages: pages(dram), cxl_pages: pages(cxl), dram_page_ns: page_price_ns(dram_price_us) }
    }
}

/// Converts a price per MiB to a price per page.
fn page_price_ns(us_per_mib: u64) -> u64 {
    us_per_mib.saturating_mul(1000) / ((1 << 20) / PAGE_SIZE)
}
