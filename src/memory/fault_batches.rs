//! Batches of faults: when the fault service was busy, for traces.

use serde::Serialize;

/// Batches kept. When there are more, the two neighbours that make the shortest batch become one.
const MAX_BATCHES: usize = 64;
/// Faults that follow each other within this time are one batch, ns: the guest touches page after page.
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

impl FaultBatch {
    fn append(&mut self, later: FaultBatch) {
        self.end_ns = later.end_ns;
        self.faults += later.faults;
        self.pages += later.pages;
    }
}

/// All batches so far, in order.
#[derive(Debug, Default)]
pub struct Batches(Vec<FaultBatch>);

impl Batches {
    pub fn note(&mut self, batch: FaultBatch) {
        match self.0.last_mut() {
            Some(last) if batch.start_ns.saturating_sub(last.end_ns) <= GAP_NS => last.append(batch),
            _ => self.0.push(batch),
        }
        if self.0.len() > MAX_BATCHES {
            let lengths = self.0.windows(2).map(|pair| pair[1].end_ns - pair[0].start_ns);
            let (first, _) = lengths.enumerate().min_by_key(|&(_, length)| length).unwrap_or_default();
            let second = self.0.remove(first + 1);
            self.0[first].append(second);
        }
    }

    pub fn kept(&self) -> &[FaultBatch] {
        &self.0
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
        assert_eq!(batches.kept().len(), MAX_BATCHES);
        // Evenly spread faults do not end up in one batch.
        assert!(batches.kept().iter().all(|batch| batch.faults < 10_000 / 8));
    }
}
