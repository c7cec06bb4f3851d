//! When the fault service was busy: faults in batches, for traces.

use serde::Serialize;

/// Batches that are kept. When there are more, those that are nearest to each other become one.
const MAX_BATCHES: usize = 64;
/// Faults that follow each other within this time are one batch, ns: a guest that touches page after page.
const GAP_NS: u64 = 200_000;

/// Faults that came one after the other. Times are ns of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FaultBatch {
    #[serde(skip)]
    pub start_ns: u64,
    #[serde(skip)]
    pub end_ns: u64,
    /// Faults answered.
    pub faults: u64,
    /// Pages installed in answer, neighbours included.
    pub pages: u64,
}

/// All batches so far, in order.
#[derive(Debug)]
pub struct Batches {
    gap_ns: u64,
    kept: Vec<FaultBatch>,
}

impl Default for Batches {
    fn default() -> Self {
        Batches { gap_ns: GAP_NS, kept: Vec::new() }
    }
}

impl Batches {
    pub fn note(&mut self, batch: FaultBatch) {
        self.append(batch);
        while self.kept.len() > MAX_BATCHES {
            self.gap_ns *= 2;
            for batch in std::mem::take(&mut self.kept) {
                self.append(batch);
            }
        }
    }

    fn append(&mut self, batch: FaultBatch) {
        match self.kept.last_mut() {
            Some(last) if batch.start_ns.saturating_sub(last.end_ns) <= self.gap_ns => {
                last.end_ns = batch.end_ns;
                last.faults += batch.faults;
                last.pages += batch.pages;
            }
            _ => self.kept.push(batch),
        }
    }

    pub fn kept(&self) -> &[FaultBatch] {
        &self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start_ns: u64) -> FaultBatch {
        FaultBatch { start_ns, end_ns: start_ns + 40_000, faults: 1, pages: 16 }
    }

    #[test]
    fn faults_that_follow_each_other_are_one_batch() {
        let mut batches = Batches::default();
        for start in [0, 100_000, 200_000, 9_000_000] {
            batches.note(at(start));
        }
        let first = FaultBatch { start_ns: 0, end_ns: 240_000, faults: 3, pages: 48 };
        assert_eq!(batches.kept(), [first, at(9_000_000)]);
    }

    #[test]
    fn there_are_never_too_many_and_none_is_lost() {
        let mut batches = Batches::default();
        for index in 0..10_000 {
            batches.note(at(index * 1_000_000));
            assert!(batches.kept().len() <= MAX_BATCHES);
        }
        assert_eq!(batches.kept().iter().map(|batch| batch.faults).sum::<u64>(), 10_000);
        assert!(batches.kept().is_sorted_by(|a, b| a.end_ns < b.start_ns));
        assert!(batches.kept().len() > 8);
    }
}
