//! Merges profiles of several runs of a function into one, and measures how much they agree.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::contents::{Frequency, MAX_FUNCTION_BYTES, MAX_RUNS, Profile};
use super::order::{MAX_LAYERS, Order};
use super::recorder_kind::RecorderKind;
use crate::snapshot::{Extent, Gfn, PageSet};
use crate::tiering::Error;

/// The rule for the pages of a merged profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeKind {
    /// Those of any profile.
    Union,
    /// Those of every profile.
    Intersection,
    /// Those of more than half of the runs.
    Majority,
}

impl MergeKind {
    pub const ALL: [MergeKind; 3] = [MergeKind::Union, MergeKind::Intersection, MergeKind::Majority];

    pub fn name(self) -> &'static str {
        match self {
            MergeKind::Union => "union",
            MergeKind::Intersection => "intersection",
            MergeKind::Majority => "majority",
        }
    }

    /// True if the rule keeps a page seen in `count` of `runs` runs.
    fn keeps(self, count: u32, runs: u32) -> bool {
        match self {
            MergeKind::Union => count > 0,
            MergeKind::Intersection => count == runs,
            MergeKind::Majority => u64::from(count) * 2 > u64::from(runs),
        }
    }
}

impl fmt::Display for MergeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MergeKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        MergeKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known = MergeKind::ALL.map(MergeKind::name).join(", ");
            Error::UnknownMerge { name: name.to_string(), known }
        })
    }
}

/// The agreement of two profiles: the size of the intersection over the size of the union (Jaccard), 1 for two empty
/// sets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairAgreement {
    /// Indices of the two profiles.
    pub a: usize,
    pub b: usize,
    /// Of their working sets.
    pub touched: f64,
    /// Of the pages they wrote.
    pub written: f64,
}

/// The agreement of profiles, pair by pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Agreement {
    /// Every pair once. None for a single profile.
    pub pairs: Vec<PairAgreement>,
}

impl Agreement {
    /// Means over the pairs, of the working sets and of the written sets; 1 if there is no pair.
    pub fn mean(&self) -> (f64, f64) {
        match self.pairs.len() {
            0 => (1.0, 1.0),
            pairs => {
                let sum = |part: fn(&PairAgreement) -> f64| self.pairs.iter().map(part).sum::<f64>() / pairs as f64;
                (sum(|pair| pair.touched), sum(|pair| pair.written))
            }
        }
    }

    /// The least over the pairs, of the working sets and of the written sets.
    pub fn least(&self) -> (f64, f64) {
        let least = |part: fn(&PairAgreement) -> f64| self.pairs.iter().map(part).fold(1.0, f64::min);
        (least(|pair| pair.touched), least(|pair| pair.written))
    }
}

fn jaccard(a: &PageSet, b: &PageSet) -> f64 {
    let both = a.intersection(b).len();
    let either = a.len() + b.len() - both;
    if either == 0 { 1.0 } else { both as f64 / either as f64 }
}

/// Merges profiles of one snapshot.
///
/// Pages are kept by the number of runs that touched them. A kept page is `written` if the same rule holds for the runs
/// that wrote it; else `read` if any run could tell reads from writes; else unclassified. [`Profile::frequency`] counts
/// the runs that touched and wrote each page.
///
/// The order is exact if that of all profiles is: pages by their mean rank over the profiles that have them, in pieces
/// that are contiguous in all of them. If all profiles have layers at least, the order is by the first layer in which
/// any run saw a page. Otherwise it is unknown. Times are not kept.
///
/// # Errors
/// None given, more than [`MAX_RUNS`] runs in all, or profiles of different snapshots.
pub fn merge(profiles: &[Profile], kind: MergeKind) -> Result<(Profile, Agreement), Error> {
    let refuse = |problem: String| Err(Error::profile("The merged profile", problem));
    let Some(first) = profiles.first() else { return refuse("no profile is given".to_string()) };
    if let Some(other) = profiles.iter().find(|profile| profile.snapshot != first.snapshot) {
        return Err(Error::ProfileOfOther { made_for: other.snapshot, given: first.snapshot });
    }
    let runs = profiles.iter().fold(0_u32, |sum, profile| sum.saturating_add(profile.runs));
    if runs > MAX_RUNS {
        return refuse(format!("it would stand for {runs} runs, at most {MAX_RUNS} are allowed"));
    }
    for profile in profiles {
        profile.check().map_err(|problem| Error::profile("A profile", problem))?;
    }
    let working: Vec<PageSet> = profiles.iter().map(Profile::working_set).collect();
    let agreement = agreement(profiles, &working);
    if let [only] = profiles {
        return Ok((only.clone(), agreement));
    }
    let touched = count(profiles.iter().zip(&working).map(|(p, set)| (p.runs, set, p.frequency.touched.as_slice())));
    let written = count(profiles.iter().map(|p| (p.runs, &p.written, p.frequency.written.as_slice())));
    let keep = |counts: &[(u32, PageSet)]| {
        let kept = counts.iter().filter(|(count, _)| kind.keeps(*count, runs));
        kept.fold(PageSet::new(), |all, (_, pages)| all.union(pages))
    };
    let pages = keep(&touched);
    let mut merged = Profile::new(first.snapshot, RecorderKind::Merged, &common_function(profiles));
    merged.runs = runs;
    merged.sees_reads = profiles.iter().all(|profile| profile.sees_reads);
    merged.written = keep(&written).intersection(&pages);
    let rest = pages.difference(&merged.written);
    let told = profiles.iter().fold(PageSet::new(), |all, p| all.union(&p.read).union(&p.written));
    merged.unclassified = rest.difference(&told);
    merged.read = rest.intersection(&told);
    merged.order = merged_order(profiles, &pages);
    merged.frequency =
        Frequency { touched: some_runs(&touched, runs, &pages), written: some_runs(&written, runs, &pages) };
    Ok((merged, agreement))
}

fn agreement(profiles: &[Profile], working: &[PageSet]) -> Agreement {
    let pairs = (0..profiles.len()).flat_map(|a| (a + 1..profiles.len()).map(move |b| (a, b)));
    let pair = |(a, b): (usize, usize)| PairAgreement {
        a,
        b,
        touched: jaccard(&working[a], &working[b]),
        written: jaccard(&profiles[a].written, &profiles[b].written),
    };
    Agreement { pairs: pairs.map(pair).collect() }
}

fn common_function(profiles: &[Profile]) -> String {
    let mut names: Vec<&str> = profiles.iter().map(|profile| profile.function.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let all = names.join(" | ");
    if all.len() <= MAX_FUNCTION_BYTES { all } else { format!("{} functions", names.len()) }
}

/// The pages of several runs by the number of runs that have them: ascending, disjoint, without zero.
///
/// Each profile is `(its runs, its pages, pages seen in fewer of its runs)`; a page of the last that is not one of its
/// pages (written by a minority) counts too.
fn count<'a>(profiles: impl Iterator<Item = (u32, &'a PageSet, &'a [(u32, PageSet)])>) -> Vec<(u32, PageSet)> {
    let mut counts: BTreeMap<u32, PageSet> = BTreeMap::new();
    for (runs, pages, fewer) in profiles {
        let some = fewer.iter().fold(PageSet::new(), |all, (_, pages)| all.union(pages));
        let in_all = (runs, pages.difference(&some));
        let steps: Vec<(u32, &PageSet)> =
            fewer.iter().map(|(count, pages)| (*count, pages)).chain([(in_all.0, &in_all.1)]).collect();
        let mut next: BTreeMap<u32, PageSet> = BTreeMap::new();
        let mut add = |count: u32, pages: PageSet| {
            if !pages.is_empty() {
                next.entry(count).or_default().union_with(&pages);
            }
        };
        let mut seen = PageSet::new();
        for (step, pages) in steps {
            let mut new = pages.clone();
            for (before, old) in &counts {
                add(before + step, old.intersection(pages));
                new.subtract(old);
            }
            add(step, new);
            seen.union_with(pages);
        }
        for (before, old) in &counts {
            add(*before, old.difference(&seen));
        }
        counts = next;
    }
    counts.into_iter().collect()
}

/// The counts of `pages` that not all runs have.
fn some_runs(counts: &[(u32, PageSet)], runs: u32, pages: &PageSet) -> Vec<(u32, PageSet)> {
    let some = counts.iter().filter(|(count, _)| *count < runs);
    let within = some.map(|(count, set)| (*count, set.intersection(pages)));
    within.filter(|(_, set)| !set.is_empty()).collect()
}

fn merged_order(profiles: &[Profile], pages: &PageSet) -> Order {
    let exact: Vec<&[Extent]> = profiles
        .iter()
        .filter_map(|profile| match &profile.order {
            Order::Exact(extents) => Some(extents.as_slice()),
            _ => None,
        })
        .collect();
    if exact.len() == profiles.len() {
        return Order::Exact(by_mean_rank(&exact, pages));
    }
    if profiles.iter().any(|profile| profile.order == Order::Unknown) {
        return Order::Unknown;
    }
    let layered: Vec<Vec<PageSet>> = profiles.iter().map(layers_of).collect();
    let depth = layered.iter().map(Vec::len).max().unwrap_or(0);
    let mut layers = Vec::new();
    let mut seen = PageSet::new();
    for index in 0..depth {
        let at = layered.iter().filter_map(|layers| layers.get(index));
        let layer = at.fold(PageSet::new(), |all, layer| all.union(layer)).intersection(pages).difference(&seen);
        seen.union_with(&layer);
        if !layer.is_empty() {
            layers.push(layer);
        }
    }
    Order::Layers(layers)
}

/// Pages of a layer that an exact order is cut into, where it meets layers.
const LAYER_PAGES: u64 = 1024;

fn layers_of(profile: &Profile) -> Vec<PageSet> {
    match &profile.order {
        Order::Layers(layers) => layers.clone(),
        Order::Unknown => Vec::new(),
        Order::Exact(extents) => {
            let mut layers = vec![PageSet::new()];
            for part in extents.iter().flat_map(|extent| extent.chunks(LAYER_PAGES)) {
                let is_last = layers.len() == MAX_LAYERS;
                match layers.last_mut() {
                    Some(layer) if layer.len() < LAYER_PAGES || is_last => layer.insert_run(part),
                    _ => layers.push([part].into_iter().collect()),
                }
            }
            layers
        }
    }
}

/// A run of pages and the rank of the first in each order that has it.
struct Piece {
    extent: Extent,
    rank_sum: f64,
    orders: u32,
}

/// Costs by run: guest memory is cut wherever a run of any order begins or ends, so that within a piece every order
/// goes up page by page, and the pieces are sorted.
fn by_mean_rank(orders: &[&[Extent]], pages: &PageSet) -> Vec<Extent> {
    let mut cuts: Vec<u64> =
        orders.iter().flat_map(|order| order.iter().flat_map(|e| [e.first.0, e.end().0])).collect();
    cuts.extend(pages.runs().flat_map(|run| [run.first.0, run.end().0]));
    cuts.sort_unstable();
    cuts.dedup();
    let kept = cuts.windows(2).map(|pair| Extent { first: Gfn(pair[0]), pages: pair[1] - pair[0] });
    let mut pieces: Vec<Piece> = kept
        .filter(|extent| pages.contains(extent.first))
        .map(|extent| Piece { extent, rank_sum: 0.0, orders: 0 })
        .collect();
    for order in orders {
        let mut rank = 0_u64;
        for extent in *order {
            let from = pieces.partition_point(|piece| piece.extent.first < extent.first);
            for piece in pieces[from..].iter_mut().take_while(|piece| piece.extent.first < extent.end()) {
                piece.rank_sum += (rank + (piece.extent.first.0 - extent.first.0)) as f64;
                piece.orders += 1;
            }
            rank += extent.pages;
        }
    }
    let mean = |piece: &Piece| piece.rank_sum / f64::from(piece.orders.max(1));
    pieces.sort_by(|a, b| mean(a).total_cmp(&mean(b)).then(a.extent.first.cmp(&b.extent.first)));
    let mut out: Vec<Extent> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match out.last_mut() {
            Some(last) if last.end() == piece.extent.first => last.pages += piece.extent.pages,
            _ => out.push(piece.extent),
        }
    }
    out
}
