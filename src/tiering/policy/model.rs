//! The cost model: what the pages of one block cost, before the guest runs and while it does. The formulae are in
//! `docs/policies.md`; the numbers come from [`Costs`].

use super::place::BLOCK_PAGES;
use super::touches::Touch;
use crate::snapshot::{Extent, Gfn};
use crate::tiering::costs::{Costs, SourceCache};

/// How likely a page is touched that no recorded run touched. Recorded working sets differ by a few percent from run to
/// run (REAP's Figure 5: 97 % of the pages are the same for most functions), spread over all that is left.
const SURPRISE: f64 = 1e-4;
/// Pages between two touched pages that the host's readahead crosses (128 KiB).
const READAHEAD_PAGES: u64 = 32;

/// Expected time in ns: until the guest runs, and after that.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub before: f64,
    pub during: f64,
}

impl Cost {
    pub fn total(self) -> f64 {
        self.before + self.during
    }

    pub fn add(&mut self, other: Cost) {
        self.before += other.before;
        self.during += other.during;
    }
}

/// What is expected of some pages.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    pub pages: u64,
    /// Pages expected to be read and not written.
    pub reads: f64,
    /// Pages expected to be written.
    pub writes: f64,
    /// Of both, those that are zero in the snapshot.
    pub zeros: f64,
    /// The probability that none is written.
    pub clean: f64,
    /// The probability that none is touched.
    pub idle: f64,
    /// Reads that do not follow the one before.
    pub seeks: f64,
    last: Gfn,
}

impl Default for Tally {
    fn default() -> Self {
        let last = Gfn(u64::MAX);
        Tally { pages: 0, reads: 0.0, writes: 0.0, zeros: 0.0, clean: 1.0, idle: 1.0, seeks: 0.0, last }
    }
}

fn power(base: f64, exponent: u64) -> f64 {
    base.powi(exponent.min(i32::MAX as u64) as i32)
}

impl Tally {
    /// Pages of which the profile says nothing.
    pub fn add_rest(&mut self, pages: u64) {
        let each = SURPRISE * pages as f64;
        self.pages += pages;
        self.reads += each / 2.0;
        self.writes += each / 2.0;
        self.clean *= power(1.0 - SURPRISE / 2.0, pages);
        self.idle *= power(1.0 - SURPRISE, pages);
        self.seeks += each;
    }

    /// Pages of which the profile says something.
    pub fn add(&mut self, part: Extent, touch: &Touch) {
        let pages = part.pages as f64;
        self.pages += part.pages;
        self.reads += pages * (touch.touched - touch.written);
        self.writes += pages * touch.written;
        self.zeros += if touch.zero { pages * touch.touched } else { 0.0 };
        self.clean *= power(1.0 - touch.written, part.pages);
        self.idle *= power(1.0 - touch.touched, part.pages);
        if part.first.0.wrapping_sub(self.last.0) > READAHEAD_PAGES {
            self.seeks += touch.touched;
        }
        self.last = part.end();
    }

    pub fn touched(&self) -> f64 {
        self.reads + self.writes
    }
}

/// The pages of one block that one private file mapping shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileBlock {
    /// Pages left as they are.
    pub open: Tally,
    /// Pages whose copy-on-write is broken ahead.
    pub broken: Tally,
    /// In so many calls.
    pub calls: u64,
    /// The mapping wants huge folios.
    pub wants_huge: bool,
    /// Guest and file addresses agree modulo 2 MiB.
    pub aligned: bool,
    /// Somebody reads the file ahead while the guest runs.
    pub read_ahead: bool,
}

/// The pages of one block in anonymous memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnonBlock {
    pub zero: Tally,
    pub copied: Tally,
    /// Reads that fill it.
    pub calls: u64,
    /// One read fills the whole block.
    pub whole: bool,
    /// The read goes on where the one before ended.
    pub sequential: bool,
}

/// The pages of one block behind a userfaultfd.
#[derive(Clone, Copy, Debug, Default)]
pub struct LazyBlock {
    pub lazy: Tally,
    pub installed: Tally,
    pub calls: u64,
    pub fault_pages: u64,
}

/// `ns` `times` times.
fn times(ns: u64, times: f64) -> f64 {
    ns as f64 * times
}

impl FileBlock {
    pub fn cost(&self, costs: &Costs) -> Cost {
        let (open, broken) = (&self.open, &self.broken);
        let whole = self.aligned && open.pages + broken.pages == BLOCK_PAGES;
        let huge_io = whole && self.wants_huge;
        let huge = match costs.cache {
            SourceCache::Huge => whole && broken.pages == 0,
            SourceCache::Small => false,
            SourceCache::Cold => huge_io && broken.pages == 0,
        };
        let mut cost = Cost {
            before: times(costs.populate_write_call_ns, self.calls as f64)
                + times(costs.populate_write_page_ns, broken.pages as f64),
            during: times(costs.populated_touch_ns, broken.touched()),
        };
        cost.during += times(costs.hole_extra_ns, open.zeros);
        if huge {
            let split = costs.cow_split_fault_ns.saturating_sub(costs.cow_fault_ns);
            cost.during += times(costs.huge_fault_ns, 1.0 - open.idle)
                + times(costs.cow_fault_ns, open.writes)
                + (1.0 - open.clean) * (split as f64 + times(costs.file_read_fault_ns, open.reads));
        } else {
            cost.during += times(costs.file_read_fault_ns, open.reads) + times(costs.cow_fault_ns, open.writes);
        }
        if costs.cache == SourceCache::Cold {
            self.add_device(costs, huge_io, &mut cost);
        }
        cost
    }

    fn add_device(&self, costs: &Costs, huge_io: bool, cost: &mut Cost) {
        let (open, broken) = (&self.open, &self.broken);
        let page = |pages: f64| times(costs.device_sequential_page_ns, pages);
        let seek = |seeks: f64| times(costs.device_seek_ns, seeks);
        if huge_io {
            let block = page(BLOCK_PAGES as f64) + seek(1.0);
            if broken.pages > 0 {
                cost.before += block
            } else {
                cost.during += (1.0 - open.idle) * block
            }
            return;
        }
        cost.before += page(broken.pages as f64) + seek(self.calls as f64);
        let touched = page(open.touched() - open.zeros.min(open.touched()));
        if self.read_ahead {
            // Somebody reads all of it in order; a guest that touches pages in another order waits for that.
            cost.during += page(open.pages as f64);
            return;
        }
        // A fault reads a window around it; what lies in the window of another is there already, so that in the end no
        // more is read than there is.
        let around = seek(1.0) + page(costs.readahead_pages as f64);
        let all = page(open.pages as f64) + seek(1.0);
        cost.during += (touched + open.seeks * around).min((1.0 - open.idle) * all.max(around));
    }
}

impl AnonBlock {
    pub fn cost(&self, costs: &Costs) -> Cost {
        let copied = &self.copied;
        let mut cost = Cost {
            before: times(costs.call_ns, self.calls as f64),
            during: times(costs.anon_read_fault_ns, self.zero.reads)
                + times(costs.anon_write_fault_ns, self.zero.writes),
        };
        if self.whole {
            cost.before += times(costs.read_huge_page_ns, copied.pages as f64);
            cost.during += times(costs.huge_fault_ns, 1.0 - copied.idle);
        } else {
            cost.before += times(costs.read_small_page_ns, copied.pages as f64);
            cost.during += times(costs.populated_touch_ns, copied.touched());
        }
        if costs.cache == SourceCache::Cold {
            let seeks = if self.sequential { 0.0 } else { self.calls as f64 };
            cost.before += times(costs.device_sequential_page_ns, copied.pages as f64);
            cost.before += times(costs.device_seek_ns, seeks);
        }
        cost
    }
}

impl LazyBlock {
    pub fn cost(&self, costs: &Costs) -> Cost {
        let (lazy, installed) = (&self.lazy, &self.installed);
        let around = self.fault_pages.max(1);
        let faults = if around == 1 {
            lazy.touched()
        } else {
            (lazy.touched() / around as f64 + lazy.seeks).min(lazy.touched())
        };
        let fault = costs.uffd_fault_ns + (around - 1).saturating_mul(costs.uffd_copy_ns);
        let mut cost = Cost {
            // Past the page cache, whatever is in it.
            before: times(costs.uffd_copy_ns + costs.device_sequential_page_ns, installed.pages as f64)
                + times(costs.uffd_call_ns, self.calls as f64),
            during: times(costs.populated_touch_ns, installed.touched()) + times(fault, faults),
        };
        if costs.cache == SourceCache::Cold {
            cost.during += times(costs.device_seek_ns + around.saturating_mul(costs.device_sequential_page_ns), faults);
        }
        cost
    }
}
