//! The expectation of a profile for each page, as numbers: the probabilities of a touch and of a write.

use super::place::pieces;
use crate::snapshot::{Content, Extent, PageSet, ResolvedRun};
use crate::tiering::profile::Profile;

/// The odds of a write, if the recorder cannot tell reads from writes.
const UNCLASSIFIED_WRITTEN: f64 = 0.5;

/// Pages with the same expectation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Touch {
    pub extent: Extent,
    /// The probability that a request touches one of them.
    pub touched: f64,
    /// The probability that it writes it; not more than `touched`.
    pub written: f64,
    /// True if the pages are zero in the snapshot.
    pub zero: bool,
}

impl AsRef<Extent> for Touch {
    fn as_ref(&self) -> &Extent {
        &self.extent
    }
}

/// A run with the share that a set gives its pages.
#[derive(Clone, Copy)]
struct Odds(Extent, f64);

impl AsRef<Extent> for Odds {
    fn as_ref(&self) -> &Extent {
        &self.0
    }
}

/// All touched pages, ascending, cut where the expectation changes.
pub fn expected(profile: &Profile, resolved: &[ResolvedRun]) -> Vec<Touch> {
    let classes = [(&profile.read, 0.0), (&profile.written, 1.0), (&profile.unclassified, UNCLASSIFIED_WRITTEN)];
    let mut touches: Vec<Touch> = Vec::new();
    for (pages, written) in classes {
        touches.extend(pages.runs().map(|extent| Touch { extent, touched: 1.0, written, zero: false }));
    }
    // Three ascending runs: the stable sort merges them.
    touches.sort_by_key(|touch| touch.extent.first);
    let frequency = &profile.frequency;
    relabel(&mut touches, &shares(&frequency.written, profile.runs), |touch, share| touch.written = share);
    relabel(&mut touches, &shares(&frequency.touched, profile.runs), |touch, share| touch.touched = share);
    let zero = resolved.iter().filter(|run| run.content == Content::Zero);
    let zero: Vec<Odds> = zero.map(|run| Odds(run.extent, 1.0)).collect();
    relabel(&mut touches, &zero, |touch, _| touch.zero = true);
    touches.iter_mut().for_each(|touch| touch.written = touch.written.min(touch.touched));
    touches
}

/// Counts of runs as shares of all, by address.
fn shares(counts: &[(u32, PageSet)], runs: u32) -> Vec<Odds> {
    let share = |count: u32| f64::from(count) / f64::from(runs.max(1));
    let mut all: Vec<Odds> =
        counts.iter().flat_map(|(count, pages)| pages.runs().map(|run| Odds(run, share(*count)))).collect();
    all.sort_unstable_by_key(|odds| odds.0.first);
    all
}

fn relabel(touches: &mut Vec<Touch>, labels: &[Odds], set: impl Fn(&mut Touch, f64)) {
    if labels.is_empty() {
        return;
    }
    let mut out = Vec::with_capacity(touches.len() + labels.len());
    let mut at = 0;
    for touch in &*touches {
        pieces(touch.extent, labels, &mut at, |part, label| {
            let mut piece = Touch { extent: part, ..*touch };
            if let Some(label) = label {
                set(&mut piece, labels[label].1);
            }
            out.push(piece);
        });
    }
    *touches = out;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Gfn, SnapshotId};
    use crate::tiering::profile::RecorderKind;

    fn extent(first: u64, pages: u64) -> Extent {
        Extent { first: Gfn(first), pages }
    }

    #[test]
    fn merged_runs_become_odds_and_zero_pages_are_told() {
        let mut profile = Profile::new(SnapshotId::default(), RecorderKind::Merged, "f");
        profile.runs = 4;
        profile.read.insert_run(extent(0, 4));
        profile.written.insert_run(extent(4, 4));
        profile.unclassified.insert_run(extent(20, 1));
        profile.frequency.touched = vec![(2, [extent(3, 2)].into_iter().collect())];
        profile.frequency.written =
            vec![(1, [extent(4, 1)].into_iter().collect()), (3, [extent(6, 1)].into_iter().collect())];
        let zero = [ResolvedRun { extent: extent(7, 10), content: Content::Zero }];
        let all: Vec<_> = expected(&profile, &zero)
            .iter()
            .map(|t| (t.extent.first.0, t.extent.pages, t.touched, t.written, t.zero))
            .collect();
        let expected = [
            (0, 3, 1.0, 0.0, false),
            (3, 1, 0.5, 0.0, false),
            (4, 1, 0.5, 0.25, false),
            (5, 1, 1.0, 1.0, false),
            (6, 1, 1.0, 0.75, false),
            (7, 1, 1.0, 1.0, true),
            (20, 1, 1.0, 0.5, false),
        ];
        assert_eq!(all, expected);
    }
}
