//! Picks measured times, the same ones for the same seed.

use crate::bench::trace::random::Random;
use crate::bench::trace::samples::{Samples, Work};

/// Tells the sequences of a simulation from those that make arrivals of the same seed.
const OWN: u64 = 0x7469_6d65_7300_0000;

/// Picks times.
#[derive(Debug)]
pub(super) struct Draws {
    seed: u64,
    /// The shares of work that is no request.
    others: Random,
}

impl Draws {
    pub(super) fn new(seed: u64) -> Draws {
        let seed = seed ^ OWN;
        Draws { seed, others: Random::new(seed, u64::MAX) }
    }

    /// The share of measured times that are shorter than that of a request; `number`: its number in the trace. It is
    /// the same by each policy.
    pub(super) fn of_request(&self, number: u64) -> f64 {
        Random::new(self.seed, number).unit()
    }

    /// The share for the next work that is no request.
    pub(super) fn share(&mut self) -> f64 {
        self.others.unit()
    }

    /// A time of the next work that is no request.
    pub(super) fn next(&mut self, times: &Samples) -> Work {
        times.at(self.share())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_from_the_seed_and_the_number() {
        let draws = Draws::new(7);
        let shares = |draws: &Draws| -> Vec<f64> { (0..10_000).map(|number| draws.of_request(number)).collect() };
        let all = shares(&draws);
        assert_eq!(all, shares(&Draws::new(7)));
        assert_ne!(all, shares(&Draws::new(8)));
        let below = all.iter().filter(|share| **share < 0.95).count();
        assert!((9_400..9_600).contains(&below), "{below}");
        let times = Samples::of((1..=4).map(|ms| Work { ms: ms.into(), cpu_ms: 0.0 }).collect()).unwrap();
        let mut others = Draws::new(7);
        let mut counts = [0; 4];
        (0..4_000).for_each(|_| counts[others.next(&times).ms as usize - 1] += 1);
        assert!(counts.iter().all(|count| (900..1_100).contains(count)), "{counts:?}");
    }
}
