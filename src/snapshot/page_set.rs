//! A set of pages, held as a roaring bitmap of guest frame numbers.

use std::io;
use std::ops::RangeInclusive;

use roaring::RoaringBitmap;

use super::{Error, Extent, Gfn, Result};

/// A set of guest pages. Frame numbers of 2^32 and above cannot exist ([`super::MAX_GUEST_ADDRESS`]) and are ignored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PageSet {
    bits: RoaringBitmap,
}

/// The part of an extent that can exist, as the bitmap wants it.
fn range_of(extent: Extent) -> Option<RangeInclusive<u32>> {
    let first = u32::try_from(extent.first.0).ok()?;
    let last = extent.end().0.checked_sub(1)?.min(u64::from(u32::MAX)) as u32;
    (extent.pages > 0).then_some(first..=last)
}

fn extent_of(range: &RangeInclusive<u32>) -> Extent {
    let first = u64::from(*range.start());
    let last = u64::from(*range.end());
    Extent { first: Gfn(first), pages: last - first + 1 }
}

impl PageSet {
    /// The empty set.
    pub fn new() -> PageSet {
        PageSet::default()
    }

    /// Adds every page of a run.
    pub fn insert_run(&mut self, run: Extent) {
        if let Some(range) = range_of(run) {
            self.bits.insert_range(range);
        }
    }

    /// Adds the pages whose bits are set, the lowest bit of the first word being `first`'s.
    pub fn insert_bitmap(&mut self, first: Gfn, words: &[u64]) {
        for (index, &word) in words.iter().enumerate() {
            let mut bits = word;
            while bits != 0 {
                let start = bits.trailing_zeros();
                let pages = (bits >> start).trailing_ones();
                let gfn = Gfn(first.0 + index as u64 * 64 + u64::from(start));
                self.insert_run(Extent { first: gfn, pages: u64::from(pages) });
                bits &= !(u64::MAX.checked_shr(64 - pages).unwrap_or(u64::MAX) << start);
            }
        }
    }

    /// Removes every page of a run.
    pub fn remove_run(&mut self, run: Extent) {
        if let Some(range) = range_of(run) {
            self.bits.remove_range(range);
        }
    }

    /// Adds one page.
    pub fn insert(&mut self, gfn: Gfn) {
        self.insert_run(Extent { first: gfn, pages: 1 });
    }

    /// True if the page is in the set.
    pub fn contains(&self, gfn: Gfn) -> bool {
        u32::try_from(gfn.0).is_ok_and(|gfn| self.bits.contains(gfn))
    }

    /// True if every page of the run is in the set (an empty run is).
    pub fn contains_run(&self, run: Extent) -> bool {
        run.pages == 0 || (run.end().0 <= 1 << 32 && range_of(run).is_some_and(|range| self.bits.contains_range(range)))
    }

    /// The number of pages in the set.
    pub fn len(&self) -> u64 {
        self.bits.len()
    }

    /// The number of the run's pages that are in the set.
    pub fn len_in(&self, run: Extent) -> u64 {
        range_of(run).map_or(0, |range| self.bits.range_cardinality(range))
    }

    /// True if the set has no pages.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    /// The lowest page.
    pub fn first(&self) -> Option<Gfn> {
        self.bits.min().map(|gfn| Gfn(u64::from(gfn)))
    }

    /// The highest page.
    pub fn last(&self) -> Option<Gfn> {
        self.bits.max().map(|gfn| Gfn(u64::from(gfn)))
    }

    /// Every page, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.bits.iter().map(|gfn| Gfn(u64::from(gfn)))
    }

    /// The maximal runs of the set, ascending. Costs by run, not by page.
    pub fn runs(&self) -> impl Iterator<Item = Extent> + '_ {
        joined_runs(self.bits.iter(), u32::MAX)
    }

    /// The maximal runs of the pages that set and `extent` share, ascending.
    pub fn runs_in(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let (bits, last) = match range_of(extent) {
            Some(range) => (self.bits.range(range.clone()), *range.end()),
            None => (self.bits.range(0..0), 0),
        };
        joined_runs(bits, last)
    }

    /// Adds every page of `other`.
    pub fn union_with(&mut self, other: &PageSet) {
        self.bits |= &other.bits;
    }

    /// Keeps only the pages that `other` has too.
    pub fn intersect_with(&mut self, other: &PageSet) {
        self.bits &= &other.bits;
    }

    /// Removes every page of `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        self.bits -= &other.bits;
    }

    /// The pages in either set.
    #[must_use]
    pub fn union(&self, other: &PageSet) -> PageSet {
        PageSet { bits: &self.bits | &other.bits }
    }

    /// The pages in both sets.
    #[must_use]
    pub fn intersection(&self, other: &PageSet) -> PageSet {
        PageSet { bits: &self.bits & &other.bits }
    }

    /// The pages that `other` does not have.
    #[must_use]
    pub fn difference(&self, other: &PageSet) -> PageSet {
        PageSet { bits: &self.bits - &other.bits }
    }

    /// True if the sets share no page.
    pub fn is_disjoint(&self, other: &PageSet) -> bool {
        self.bits.is_disjoint(&other.bits)
    }

    /// The set in the portable roaring format, run-compressed where that is smaller.
    pub fn serialize(&self) -> Vec<u8> {
        let mut bits = self.bits.clone();
        bits.optimize();
        let mut out = Vec::with_capacity(bits.serialized_size());
        // Proven: writing to a Vec fails only when memory is out, which aborts.
        bits.serialize_into(&mut out).expect("writing to a Vec does not fail");
        out
    }

    /// Reads what [`PageSet::serialize`] wrote.
    ///
    /// # Errors
    /// [`Error::PageSet`] for bytes that no writer produces: not roaring, short, with trailing bytes, or with counts
    /// or offsets that contradict the content.
    pub fn deserialize(bytes: &[u8]) -> Result<PageSet> {
        let bad = |problem: String| Error::PageSet { problem };
        let mut rest = bytes;
        let bits = RoaringBitmap::deserialize_from(&mut rest).map_err(|source| bad(describe(&source)))?;
        if !rest.is_empty() {
            return Err(bad(format!("{} bytes follow its end", rest.len())));
        }
        // The format has redundant fields (offsets, counts of run containers) that the decoder skips. Writing the
        // set again and comparing checks all of them.
        let mut again = Vec::with_capacity(bytes.len());
        bits.serialize_into(&mut again).map_err(|source| bad(describe(&source)))?;
        if again != bytes {
            return Err(bad("its counts or offsets contradict its content".to_string()));
        }
        Ok(PageSet { bits })
    }
}

fn describe(source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => "it ends too early".to_string(),
        _ => source.to_string(),
    }
}

/// Joins neighbours: runs may come in pieces, because a bitmap container ends every 65,536 pages. Nothing after `last`.
fn joined_runs(mut bits: roaring::bitmap::Iter<'_>, last: u32) -> impl Iterator<Item = Extent> + '_ {
    let mut next = move || {
        let range = bits.next_range()?;
        (*range.start() <= last).then(|| *range.start()..=(*range.end()).min(last))
    };
    let mut pending = next();
    std::iter::from_fn(move || {
        let mut run = extent_of(&pending.take()?);
        pending = next();
        while let Some(more) = pending.as_ref().filter(|more| u64::from(*more.start()) == run.end().0) {
            run.pages += extent_of(more).pages;
            pending = next();
        }
        Some(run)
    })
}

impl FromIterator<Gfn> for PageSet {
    fn from_iter<I: IntoIterator<Item = Gfn>>(gfns: I) -> PageSet {
        PageSet { bits: gfns.into_iter().filter_map(|gfn| u32::try_from(gfn.0).ok()).collect() }
    }
}

impl FromIterator<Extent> for PageSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(runs: I) -> PageSet {
        let mut set = PageSet::new();
        runs.into_iter().for_each(|run| set.insert_run(run));
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Finds the runs the slow way.
    fn runs_by_page(set: &PageSet) -> Vec<Extent> {
        let mut runs: Vec<Extent> = Vec::new();
        for gfn in set.iter() {
            match runs.last_mut() {
                Some(run) if run.end() == gfn => run.pages += 1,
                _ => runs.push(Extent::new(gfn, 1)),
            }
        }
        runs
    }

    fn any_set() -> impl Strategy<Value = PageSet> {
        let run =
            (0_u64..200_000, prop_oneof![1_u64..20, 60_000_u64..70_000]).prop_map(|(f, n)| Extent::new(Gfn(f), n));
        (prop::collection::vec(run, 0..40), prop::collection::vec(0_u64..200_000, 0..200)).prop_map(|(runs, gfns)| {
            let mut set: PageSet = runs.into_iter().collect();
            for gfn in gfns {
                if gfn % 2 == 0 { set.insert(Gfn(gfn)) } else { set.remove_run(Extent::new(Gfn(gfn), 1)) }
            }
            set
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn runs_are_maximal_and_complete(set in any_set()) {
            prop_assert_eq!(set.runs().collect::<Vec<_>>(), runs_by_page(&set));
        }

        #[test]
        fn runs_in_is_the_intersection(set in any_set(), first in 0_u64..200_000, pages in 0_u64..100_000) {
            let window = Extent::new(Gfn(first), pages);
            let expected = set.intersection(&PageSet::from_iter([window]));
            prop_assert_eq!(set.runs_in(window).collect::<Vec<_>>(), runs_by_page(&expected));
            prop_assert_eq!(set.len_in(window), expected.len());
            prop_assert_eq!(set.contains_run(window), expected.len() == pages);
        }

        #[test]
        fn serialized_form_round_trips(set in any_set()) {
            prop_assert_eq!(&PageSet::deserialize(&set.serialize()).unwrap(), &set);
        }

        #[test]
        fn flipped_bits_never_panic(set in any_set(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let mut bytes = set.serialize();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            if let Ok(other) = PageSet::deserialize(&bytes) {
                let _ = (other.runs().count(), other.len());
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), cookie in any::<bool>()) {
            let mut bytes = bytes;
            if cookie && bytes.len() >= 4 {
                bytes[..2].copy_from_slice(&12347_u16.to_le_bytes());
                bytes[2] %= 3;
                bytes[3] = 0;
            }
            if let Ok(set) = PageSet::deserialize(&bytes) {
                let _ = set.runs().count();
            }
        }
    }

    #[test]
    fn trailing_byte_is_an_error() {
        let mut bytes = PageSet::from_iter([Gfn(1)]).serialize();
        bytes.push(0);
        assert!(matches!(PageSet::deserialize(&bytes), Err(Error::PageSet { .. })));
    }

    #[test]
    fn frames_that_cannot_exist_are_ignored() {
        let mut set = PageSet::new();
        set.insert_run(Extent::new(Gfn(u64::from(u32::MAX)), u64::MAX));
        set.insert_run(Extent::new(Gfn(1 << 32), 5));
        assert_eq!(set.runs().collect::<Vec<_>>(), [Extent::new(Gfn(u64::from(u32::MAX)), 1)]);
        assert!(!set.contains_run(Extent::new(Gfn(u64::from(u32::MAX)), 2)));
    }
}
