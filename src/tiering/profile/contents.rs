//! The contents of a profile, and the rules that every profile follows.

use super::order::Order;
use super::recorder_kind::RecorderKind;
use super::{order, sets};
use crate::snapshot::{Extent, Gfn, PageSet, Snapshot, SnapshotId};
use crate::tiering::Error;

/// The longest function, in bytes of UTF-8.
pub const MAX_FUNCTION_BYTES: usize = 4096;

/// Pages of the exact order between two times of [`Profile::times_ns`].
pub const PAGES_PER_TIME: u64 = 64;

/// The most runs one profile can stand for.
pub const MAX_RUNS: u32 = 1024;

/// The number of a merged profile's runs in which its pages were touched and written.
///
/// Each entry is `(n, pages seen in exactly n runs)` with `0 < n < runs`, ascending in `n`, the sets disjoint. A page
/// of the profile in none of `touched` was touched in all runs. A page in none of `written` was written in all runs if
/// it counts as written, in none if it does not.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frequency {
    pub touched: Vec<(u32, PageSet)>,
    pub written: Vec<(u32, PageSet)>,
}

/// The use that one run of a function, or several merged, made of the pages of a restored snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// The snapshot that was restored. The profile is of no use for any other.
    pub snapshot: SnapshotId,
    pub recorder: RecorderKind,
    /// The function that was run: `name key=value…`.
    pub function: String,
    /// Number of runs the profile stands for; at least 1.
    pub runs: u32,
    /// True if pages that were only read would be here. If false, `read` is empty because the recorder could not see
    /// reads.
    pub sees_reads: bool,
    /// Touched and never written.
    pub read: PageSet,
    /// Written, whether or not read before.
    pub written: PageSet,
    /// Touched, but the recorder cannot tell a read from a write.
    pub unclassified: PageSet,
    pub order: Order,
    /// The time of the touch of every 64th page of an exact order ([`PAGES_PER_TIME`]), in ns since the first. Empty if
    /// unknown.
    pub times_ns: Vec<u64>,
    /// Counts of a merged profile's runs by page. Empty if all runs agreed or there was one.
    pub frequency: Frequency,
}

impl Profile {
    /// A profile of one run in which nothing was touched, to be filled by its recorder.
    pub fn new(snapshot: SnapshotId, recorder: RecorderKind, function: &str) -> Profile {
        Profile {
            snapshot,
            recorder,
            function: function.to_string(),
            runs: 1,
            sees_reads: recorder.sees_reads(),
            read: PageSet::new(),
            written: PageSet::new(),
            unclassified: PageSet::new(),
            order: Order::Unknown,
            times_ns: Vec::new(),
            frequency: Frequency::default(),
        }
    }

    /// All pages that were touched.
    pub fn working_set(&self) -> PageSet {
        let mut set = self.read.union(&self.written);
        set.union_with(&self.unclassified);
        set
    }

    /// FaaSnap's loading set: touched pages that are not zero in the snapshot. [`nonzero`](super::nonzero) makes the
    /// argument.
    pub fn loading_set(&self, nonzero: &PageSet) -> PageSet {
        self.working_set().intersection(nonzero)
    }

    /// The working set, each page once, in the order in which to bring it in: as touched if that is known, layer by
    /// layer (ascending addresses within) if only that is, else by address.
    pub fn in_order(&self) -> Vec<Extent> {
        match &self.order {
            Order::Exact(extents) => extents.clone(),
            Order::Layers(layers) => layers.iter().flat_map(PageSet::runs).collect(),
            Order::Unknown => self.working_set().runs().collect(),
        }
    }

    /// True if `read` and `written` are complete: the recorder saw every page, and told reads from writes.
    pub fn knows_classes(&self) -> bool {
        self.sees_reads && self.unclassified.is_empty()
    }

    /// True if the order of first touches is known page by page.
    pub fn knows_order(&self) -> bool {
        matches!(self.order, Order::Exact(_))
    }

    /// The share of runs that touched `page` (0 to 1).
    pub fn touch_probability(&self, page: Gfn) -> f64 {
        let is_member = self.read.contains(page) || self.written.contains(page) || self.unclassified.contains(page);
        self.probability(&self.frequency.touched, page, is_member)
    }

    /// The share of runs that wrote `page` (0 to 1). Unclassified pages count as not written.
    pub fn write_probability(&self, page: Gfn) -> f64 {
        self.probability(&self.frequency.written, page, self.written.contains(page))
    }

    fn probability(&self, counts: &[(u32, PageSet)], page: Gfn, otherwise: bool) -> f64 {
        match counts.iter().find(|(_, pages)| pages.contains(page)) {
            Some((count, _)) => f64::from(*count) / f64::from(self.runs.max(1)),
            None => f64::from(u8::from(otherwise)),
        }
    }

    /// Refuses a profile that was recorded on another snapshot, or that has pages that the snapshot's guest does not
    /// have.
    pub fn check_for(&self, snapshot: &Snapshot) -> Result<(), Error> {
        if self.snapshot != snapshot.id() {
            return Err(Error::ProfileOfOther { made_for: self.snapshot, given: snapshot.id() });
        }
        let pages = self.working_set();
        let inside: u64 = snapshot.layout().extents().map(|range| pages.len_in(range)).sum();
        match pages.len() - inside {
            0 => Ok(()),
            outside => Err(Error::profile("The profile", format!("{outside} of its pages are outside guest memory"))),
        }
    }

    /// Refuses profiles that no recorder produces: overlapping classes, an order of other pages, impossible counts.
    pub(super) fn check(&self) -> Result<(), String> {
        let disjoint = self.read.is_disjoint(&self.written)
            && self.read.is_disjoint(&self.unclassified)
            && self.written.is_disjoint(&self.unclassified);
        if !disjoint {
            return Err("a page has two classes".to_string());
        }
        if self.runs == 0 || self.runs > MAX_RUNS {
            return Err(format!("it stands for {} runs, allowed are 1 to {MAX_RUNS}", self.runs));
        }
        if self.function.len() > MAX_FUNCTION_BYTES || self.function.chars().any(char::is_control) {
            return Err("its function is too long or has control characters".to_string());
        }
        let pages = self.working_set();
        let runs = pages.runs().count() as u64;
        if runs > sets::MAX_SET_RUNS {
            return Err(format!("its pages are in {runs} runs, at most {} are allowed", sets::MAX_SET_RUNS));
        }
        order::check(&self.order, &pages)?;
        let times = if self.knows_order() { pages.len().div_ceil(PAGES_PER_TIME) } else { 0 };
        if !self.times_ns.is_empty() && self.times_ns.len() as u64 != times {
            return Err(format!("it has {} times, its order needs {times}", self.times_ns.len()));
        }
        if self.times_ns.windows(2).any(|pair| pair[0] > pair[1]) {
            return Err("its times go backwards".to_string());
        }
        self.frequency.check(self.runs, &pages)
    }
}

impl Frequency {
    fn check(&self, runs: u32, pages: &PageSet) -> Result<(), String> {
        for counts in [&self.touched, &self.written] {
            let mut seen = PageSet::new();
            let mut last = 0;
            for (count, set) in counts {
                if *count <= last || *count >= runs {
                    return Err(format!("it counts {count} of {runs} runs"));
                }
                if !seen.is_disjoint(set) || set.is_empty() || !set.difference(pages).is_empty() {
                    return Err("its counts are of no page, of a page twice, or of pages it does not have".to_string());
                }
                seen.union_with(set);
                last = *count;
            }
        }
        Ok(())
    }
}
