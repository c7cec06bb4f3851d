//! The cost model: the cost of the pages of one block, before the guest runs and while it does. The formulae are in
//! `docs/policies.md`; the numbers come from [`Costs`].

use super::touches::Touch;
use crate::snapshot::{Extent, Gfn, HUGE_PAGE_PAGES};
use crate::tiering::costs::{Costs, SourceCache};

/// The probability that a request touches a page that no recorded run touched. Recorded working sets differ by a few
/// percent from run to run (REAP's Figure 5: 97 % of the pages are the same for most functions), spread over all that
/// is left.
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

/// The expectation for some pages.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    pub pages: u64,
    /// Pages expected to be read and not written.
    pub reads: f64,
    /// Pages expected to be written.
    pub writes: f64,
    /// Pages of both kinds that are zero in the snapshot.
    pub zeros: f64,
    /// Pages that no recorded run wrote.
    pub unwritten: u64,
    /// The probability that none is written.
    pub clean: f64,
    /// The probability that none is touched.
    pub idle: f64,
    /// Reads that do not follow the read before.
    pub seeks: f64,
    /// Groups with all of their pages here, of which one is touched.
    groups: f64,
    /// Pages expected to be touched in such groups.
    grouped: f64,
    group: Group,
    last: Gfn,
}

/// Pages that KVM maps along with a touched one, if all of them can be: an aligned group.
pub const GROUP_PAGES: u64 = 8;

/// The group whose pages are being added.
#[derive(Clone, Copy, Debug)]
struct Group {
    number: u64,
    pages: u64,
    touched: f64,
    idle: f64,
}

/// The guest's first touches of a whole group, if the pages are small ones in the host's page tables.
pub fn group_ns(costs: &Costs) -> u64 {
    costs.populated_touch_ns.saturating_mul(GROUP_PAGES)
}

impl Default for Tally {
    fn default() -> Self {
        let last = Gfn(u64::MAX);
        Tally {
            pages: 0,
            reads: 0.0,
            writes: 0.0,
            zeros: 0.0,
            unwritten: 0,
            clean: 1.0,
            idle: 1.0,
            seeks: 0.0,
            groups: 0.0,
            grouped: 0.0,
            group: Group { number: u64::MAX, pages: 0, touched: 0.0, idle: 1.0 },
            last,
        }
    }
}

fn power(base: f64, exponent: u64) -> f64 {
    match exponent {
        0 => 1.0,
        1 => base,
        // Most pages are touched in every run, or are unknown.
        _ if base <= 0.0 => 0.0,
        // Nearly exact, and covers most of the others.
        _ if (1.0 - base) * (exponent as f64) < 1e-3 => 1.0 - (1.0 - base) * exponent as f64,
        _ => base.powi(exponent.min(i32::MAX as u64) as i32),
    }
}

impl Tally {
    /// Adds pages that the profile does not have.
    pub fn add_rest(&mut self, part: Extent) {
        let pages = part.pages;
        let each = SURPRISE * pages as f64;
        self.add_groups(part, SURPRISE);
        self.unwritten += pages;
        self.pages += pages;
        self.reads += each / 2.0;
        self.writes += each / 2.0;
        self.clean *= power(1.0 - SURPRISE / 2.0, pages);
        self.idle *= power(1.0 - SURPRISE, pages);
        self.seeks += each;
    }

    /// Adds pages that the profile has.
    pub fn add(&mut self, part: Extent, touch: &Touch) {
        let pages = part.pages as f64;
        self.pages += part.pages;
        self.add_groups(part, touch.touched);
        self.unwritten += if touch.written > 0.0 { 0 } else { part.pages };
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

    /// Counts pages, each touched with probability `touched`, into their groups.
    fn add_groups(&mut self, part: Extent, touched: f64) {
        let first = part.first.0;
        let end = part.end().0;
        let number = first / GROUP_PAGES;
        let last = end / GROUP_PAGES;
        if number == last {
            return self.add_to_group(number, part.pages, touched);
        }
        let whole = first.div_ceil(GROUP_PAGES);
        let tail = end % GROUP_PAGES;
        if number < whole {
            self.add_to_group(number, whole * GROUP_PAGES - first, touched);
        }
        let groups = (last - whole) as f64;
        self.grouped += groups * GROUP_PAGES as f64 * touched;
        self.groups += groups * (1.0 - power(1.0 - touched, GROUP_PAGES));
        if tail > 0 {
            self.add_to_group(last, tail, touched);
        }
    }

    fn add_to_group(&mut self, number: u64, pages: u64, touched: f64) {
        if number != self.group.number {
            self.group = Group { number, pages: 0, touched: 0.0, idle: 1.0 };
        }
        let group = &mut self.group;
        group.pages += pages;
        group.touched += pages as f64 * touched;
        group.idle *= power(1.0 - touched, pages);
        if group.pages == GROUP_PAGES {
            self.grouped += group.touched;
            self.groups += 1.0 - group.idle;
        }
    }

    pub fn touched(&self) -> f64 {
        self.reads + self.writes
    }

    /// The guest's first touches, if the pages are small ones in the host's page tables, writable.
    fn populated_touches(&self, costs: &Costs) -> f64 {
        times(group_ns(costs), self.groups) + times(costs.populated_alone_ns, (self.touched() - self.grouped).max(0.0))
    }
}

/// The pages of one block that one private file mapping covers.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileBlock {
    /// Pages left as they are.
    pub open: Tally,
    /// Pages whose copy-on-write is broken ahead.
    pub broken: Tally,
    /// Number of calls that break it.
    pub calls: u64,
    /// The mapping wants huge folios.
    pub wants_huge: bool,
    /// Guest and file addresses agree modulo 2 MiB.
    pub aligned: bool,
    /// The kernel does not copy written pages: the monitor promotes them.
    pub promoted: bool,
    /// A second thread reads the file ahead while the guest runs.
    pub read_ahead: bool,
}

/// The pages of one block in anonymous memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnonBlock {
    pub zero: Tally,
    /// The first touch of a zero page brings the whole block.
    pub huge: bool,
    pub copied: Tally,
    /// Reads that fill it and do not continue the read before: a continuing read is one with it.
    pub calls: u64,
    /// One read fills the whole block.
    pub whole: bool,
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
        let open = &self.open;
        let broken = &self.broken;
        let whole = self.aligned && open.pages + broken.pages == HUGE_PAGE_PAGES;
        let huge_io = whole && self.wants_huge;
        let huge = match costs.cache {
            SourceCache::Huge => whole && broken.pages == 0,
            SourceCache::Small => false,
            SourceCache::Cold => huge_io && broken.pages == 0,
        };
        // A promotion is an exit from the guest and an entry, as is a fault that a userfaultfd answers.
        let cow_ns = if self.promoted { costs.uffd_fault_ns } else { costs.cow_fault_ns };
        let mut cost = Cost {
            before: times(costs.populate_write_call_ns, self.calls as f64)
                + times(costs.populate_write_page_ns, broken.pages as f64),
            during: broken.populated_touches(costs),
        };
        cost.during += times(costs.hole_extra_ns, open.zeros);
        if huge {
            let split = costs.cow_split_fault_ns.saturating_sub(costs.cow_fault_ns);
            cost.during += times(costs.huge_fault_ns, 1.0 - open.idle)
                + times(cow_ns, open.writes)
                + (1.0 - open.clean) * (split as f64 + times(costs.file_read_fault_ns, open.reads));
        } else {
            cost.during += times(costs.file_read_fault_ns, open.reads) + times(cow_ns, open.writes);
        }
        if costs.cache == SourceCache::Cold {
            self.add_device(costs, huge_io, &mut cost);
        }
        cost
    }

    fn add_device(&self, costs: &Costs, huge_io: bool, cost: &mut Cost) {
        let open = &self.open;
        let broken = &self.broken;
        let page = |pages: f64| times(costs.device_sequential_page_ns, pages);
        let seek = |seeks: f64| times(costs.device_seek_ns, seeks);
        if huge_io {
            let block = page(HUGE_PAGE_PAGES as f64) + seek(1.0);
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
            // The second thread reads all of it in order; a guest that touches pages in another order waits for it.
            cost.during += page(open.pages as f64);
            return;
        }
        // A fault reads a window around it. Windows overlap, so that in the end no more is read than there is.
        let around = seek(1.0) + page(costs.readahead_pages as f64);
        let all = page(open.pages as f64) + seek(1.0);
        cost.during += (touched + open.seeks * around).min((1.0 - open.idle) * all.max(around));
    }
}

/// The cost of copying a page. Uncached pages are read past the cache: the device writes to memory that the CPU has
/// made ready meanwhile.
pub fn copied_page_ns(costs: &Costs, whole_block: bool) -> u64 {
    let page = if whole_block { costs.read_huge_page_ns } else { costs.read_small_page_ns };
    match costs.cache {
        SourceCache::Cold => page.max(costs.device_sequential_page_ns),
        _ => page,
    }
}

impl AnonBlock {
    pub fn cost(&self, costs: &Costs) -> Cost {
        let copied = &self.copied;
        let mut cost = Cost { before: times(costs.call_ns, self.calls as f64), during: self.zero_ns(costs) };
        cost.before += times(copied_page_ns(costs, self.whole), copied.pages as f64);
        cost.during +=
            if self.whole { times(costs.huge_fault_ns, 1.0 - copied.idle) } else { copied.populated_touches(costs) };
        if costs.cache == SourceCache::Cold {
            cost.before += times(costs.device_seek_ns, self.calls as f64);
        }
        cost
    }
}

impl AnonBlock {
    fn zero_ns(&self, costs: &Costs) -> f64 {
        let zero = &self.zero;
        if self.huge {
            // Writing zeros takes no longer than copying.
            let whole = costs.huge_fault_ns + costs.read_huge_page_ns.saturating_mul(HUGE_PAGE_PAGES);
            return times(whole, 1.0 - zero.idle);
        }
        times(costs.anon_read_fault_ns, zero.reads) + times(costs.anon_write_fault_ns, zero.writes)
    }
}

impl LazyBlock {
    pub fn cost(&self, costs: &Costs) -> Cost {
        let lazy = &self.lazy;
        let installed = &self.installed;
        let around = self.fault_pages.max(1);
        let faults = if around == 1 {
            lazy.touched()
        } else {
            (lazy.touched() / around as f64 + lazy.seeks).min(lazy.touched())
        };
        let fault = costs.uffd_fault_ns + (around - 1).saturating_mul(costs.uffd_copy_ns);
        let mut cost = Cost {
            // Read past the page cache, even if the file is cached.
            before: times(costs.uffd_copy_ns + costs.device_sequential_page_ns, installed.pages as f64)
                + times(costs.uffd_call_ns, self.calls as f64),
            during: installed.populated_touches(costs) + times(fault, faults),
        };
        if costs.cache == SourceCache::Cold {
            cost.during += times(costs.device_seek_ns + around.saturating_mul(costs.device_sequential_page_ns), faults);
        }
        cost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_is_whole_costs_one_fault_and_others_one_for_each_touched_page() {
        let costs = Costs::default();
        let extent = |first, pages| Extent { first: Gfn(first), pages };
        let touch = |first, pages, touched| Touch { extent: extent(first, pages), touched, written: 0.0, zero: false };
        let cost = |touches: &[Touch]| {
            let mut tally = Tally::default();
            touches.iter().for_each(|touch| tally.add(touch.extent, touch));
            tally.populated_touches(&costs).round() as u64
        };
        let group = group_ns(&costs);
        let alone = costs.populated_alone_ns;
        assert_eq!(cost(&[touch(16, 8, 1.0)]), group);
        assert_eq!(cost(&[touch(16, 3, 1.0), touch(19, 5, 1.0)]), group);
        assert_eq!(cost(&[touch(16, 7, 1.0)]), 7 * alone);
        assert_eq!(cost(&[touch(15, 34, 1.0)]), 4 * group + 2 * alone);
        // One of its pages is enough, and in half of the cases there is one.
        assert_eq!(cost(&[touch(16, 1, 0.5), touch(17, 7, 0.0)]), group / 2);
        assert_eq!(cost(&[touch(7, 1, 1.0), touch(9, 1, 0.5)]), alone + alone / 2);
    }
}
