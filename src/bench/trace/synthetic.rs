//! Arrivals by the published shape: few functions have most requests, and the times between requests have heavy tails.

use std::fmt;
use std::str::FromStr;

use super::arrivals::{Collector, Part, Trace};
use super::random::Random;
use crate::sys::errors::BoxError;

const DAY_S: f64 = 86_400.0;

/// The exponent of the times between two requests (a Lomax distribution): their mean is finite, their variance is not.
const TAIL: f64 = 1.8;

/// A class of functions, by requests a day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// 512 and more.
    High,
    /// 64 to 511.
    Middle,
    /// Fewer than 64.
    Low,
}

impl Class {
    fn name(self) -> &'static str {
        match self {
            Class::High => "high",
            Class::Middle => "middle",
            Class::Low => "low",
        }
    }

    /// The fewest and the most requests a day. The rates of functions are spread evenly over their logarithms.
    fn per_day(self) -> (f64, f64) {
        match self {
            Class::High => (512.0, 16_384.0),
            Class::Middle => (64.0, 512.0),
            Class::Low => (4.0, 64.0),
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

impl FromStr for Class {
    type Err = String;

    fn from_str(name: &str) -> Result<Class, String> {
        let all = [Class::High, Class::Middle, Class::Low];
        all.into_iter().find(|class| class.name() == name).ok_or_else(|| "known classes: high, middle, low".to_string())
    }
}

/// The arrivals of `count` functions of each class, for `length_us`.
///
/// # Errors
/// No request arrives in this time, or too many do.
pub(super) fn generate(classes: &[Class], count: usize, length_us: u64, seed: u64) -> Result<Trace, BoxError> {
    let mut collector = Collector::new(Part { until_us: Some(length_us), functions: None });
    let mut stream = 0;
    for class in classes {
        for index in 0..count {
            let mut random = Random::new(seed, stream);
            stream += 1;
            let (fewest, most) = class.per_day();
            let per_day = fewest * (most / fewest).powf(random.unit());
            let function = collector.function(&format!("{class}-{index}"));
            // The first gap has begun before the trace.
            let mut at_s = gap(&mut random, per_day) * random.unit();
            while at_s * 1e6 < length_us as f64 {
                collector.add((at_s * 1e6) as u64, function)?;
                at_s += gap(&mut random, per_day);
            }
        }
    }
    collector.note(format!("arrivals made with seed {seed}: gaps by a Lomax distribution with exponent {TAIL}"));
    collector.finish()
}

/// The time to the next request, s.
fn gap(random: &mut Random, per_day: f64) -> f64 {
    let mean = DAY_S / per_day;
    let scale = mean * (TAIL - 1.0);
    scale * ((1.0 - random.unit()).powf(-1.0 / TAIL) - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_US: u64 = 86_400_000_000;

    #[test]
    fn same_seed_makes_the_same_arrivals_and_another_one_others() {
        let classes = [Class::High, Class::Middle, Class::Low];
        let one = generate(&classes, 4, DAY_US, 1).unwrap();
        assert_eq!(one, generate(&classes, 4, DAY_US, 1).unwrap());
        assert_ne!(one.arrivals, generate(&classes, 4, DAY_US, 2).unwrap().arrivals);
        assert!(one.arrivals.is_sorted_by_key(|arrival| arrival.at_us));
        // The sequence itself is part of what results are compared by.
        let mut random = Random::new(1, 0);
        let first: Vec<u64> = (0..3).map(|_| (random.unit() * 1e9) as u64).collect();
        assert_eq!(first, [368_189_515, 943_564_230, 45_256_997]);
    }

    #[test]
    fn classes_have_their_rates_and_heavy_tails() {
        for (class, fewest, most) in [(Class::High, 512, 16_384), (Class::Middle, 64, 512), (Class::Low, 4, 64)] {
            let trace = generate(&[class], 200, DAY_US, 7).unwrap();
            let mean = trace.arrivals.len() / 200;
            assert!(fewest <= mean && mean <= most, "{class}: {mean} a day");
        }
        let mut random = Random::new(3, 0);
        let mut gaps: Vec<f64> = (0..100_000).map(|_| gap(&mut random, 864.0)).collect();
        gaps.sort_by(f64::total_cmp);
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        assert!((50.0..200.0).contains(&mean), "{mean}");
        // An exponential distribution would have 4.6 times the mean.
        assert!(gaps[99_000] > 5.5 * mean && gaps[50_000] < 0.5 * mean, "{} {}", gaps[99_000], gaps[50_000]);
    }
}
