//! Packs exact orders of pages.
//!
//! An exact order is a permutation of the working set. Pages are written by their rank in the set (the lowest page has
//! rank 0), which takes `log2(pages)` bits however far apart they are: less than two bytes a page up to 32,768 pages,
//! even if the order is random. Runs take their first rank and their length, strides two bits.

use super::bits::{BitReader, BitWriter};
use crate::snapshot::{Extent, Gfn, PageSet};

/// Ranks of the pages of a set. Costs by run, not by page.
#[derive(Debug)]
pub struct Ranks {
    /// Runs of the set, each with the rank of its first page.
    runs: Vec<(Extent, u64)>,
    pages: u64,
}

impl Ranks {
    pub fn of(set: &PageSet) -> Ranks {
        let mut pages = 0;
        let ranked = |run: Extent| {
            let rank = pages;
            pages += run.pages;
            (run, rank)
        };
        let runs = set.runs().map(ranked).collect();
        Ranks { runs, pages }
    }

    /// The number of pages in the set.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bits that a rank takes.
    fn width(&self) -> u32 {
        u64::BITS - self.pages.saturating_sub(1).leading_zeros()
    }

    /// The rank of a page of the set.
    pub fn rank(&self, gfn: Gfn) -> Option<u64> {
        let at = self.runs.partition_point(|(run, _)| run.end() <= gfn);
        let (run, rank) = self.runs.get(at).filter(|(run, _)| run.contains(gfn))?;
        Some(rank + (gfn.0 - run.first.0))
    }

    /// The pages of `count` ranks from `first` on, as runs.
    pub fn extents(&self, first: u64, count: u64) -> impl Iterator<Item = Extent> + '_ {
        let end = first.saturating_add(count).min(self.pages);
        let start = self.runs.partition_point(|(run, rank)| rank + run.pages <= first);
        self.runs[start..].iter().take_while(move |(_, rank)| *rank < end).map(move |(run, rank)| {
            let skip = first.saturating_sub(*rank);
            let pages = run.pages.min(end - rank) - skip;
            Extent { first: Gfn(run.first.0 + skip), pages }
        })
    }
}

/// Runs of ranks in the order in which they were touched, with a guess of the next: as long as the last, and as far
/// from it as that was from the one before.
#[derive(Default)]
struct Stride {
    last: Option<(u64, u64)>,
    step: Option<i64>,
}

impl Stride {
    fn expected(&self) -> Option<(u64, u64)> {
        let ((first, count), step) = (self.last?, self.step?);
        Some((first.checked_add_signed(step)?, count))
    }

    fn push(&mut self, first: u64, count: u64) {
        // Ranks are below 2^32.
        self.step = self.last.map(|(last, _)| first as i64 - last as i64);
        self.last = Some((first, count));
    }
}

/// Packs an exact order of the pages that `ranks` ranks.
///
/// Each run of ranks is `1` and its first rank if it is one page; `01` if it is the expected one; else `00`, its first
/// rank, and its length less one in gamma code.
pub fn encode(extents: &[Extent], ranks: &Ranks) -> Vec<u8> {
    let mut runs: Vec<(u64, u64)> = Vec::with_capacity(extents.len());
    for extent in extents {
        // A checked order has no other pages.
        let Some(rank) = ranks.rank(extent.first) else { continue };
        match runs.last_mut() {
            Some((first, count)) if *first + *count == rank => *count += extent.pages,
            _ => runs.push((rank, extent.pages)),
        }
    }
    let mut bits = BitWriter::default();
    let mut stride = Stride::default();
    for (first, count) in runs {
        if stride.expected() == Some((first, count)) {
            bits.bits(0b10, 2);
        } else if count == 1 {
            bits.bits(1, 1);
            bits.bits(first, ranks.width());
        } else {
            bits.bits(0, 2);
            bits.bits(first, ranks.width());
            bits.gamma(count - 1);
        }
        stride.push(first, count);
    }
    bits.finish()
}

fn take_run(bits: &mut BitReader<'_>, width: u32, stride: &Stride) -> Option<(u64, u64)> {
    if bits.bits(1)? == 1 {
        return Some((bits.bits(width)?, 1));
    }
    if bits.bits(1)? == 1 {
        return stride.expected();
    }
    Some((bits.bits(width)?, bits.gamma()?.checked_add(1)?))
}

/// Unpacks an exact order; fails unless it has every page once.
pub fn decode(bytes: &[u8], ranks: &Ranks) -> Result<Vec<Extent>, String> {
    let mut bits = BitReader::new(bytes);
    let mut stride = Stride::default();
    let mut seen = PageSet::new();
    let mut done = 0_u64;
    let mut extents: Vec<Extent> = Vec::new();
    while done < ranks.pages() {
        let run = take_run(&mut bits, ranks.width(), &stride);
        let (first, count) = run.ok_or_else(|| "its order ends early".to_string())?;
        let end = first.checked_add(count).filter(|end| *end <= ranks.pages());
        if end.is_none() || seen.len_in(Extent { first: Gfn(first), pages: count }) != 0 {
            return Err("its order has a page twice or one it does not have".to_string());
        }
        seen.insert_run(Extent { first: Gfn(first), pages: count });
        stride.push(first, count);
        done += count;
        for extent in ranks.extents(first, count) {
            match extents.last_mut() {
                Some(last) if last.end() == extent.first => last.pages += extent.pages,
                _ => extents.push(extent),
            }
        }
    }
    if bits.is_finished() { Ok(extents) } else { Err("something follows its order".to_string()) }
}
