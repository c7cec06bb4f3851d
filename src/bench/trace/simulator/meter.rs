//! Local memory, or the number of VMs, over time.

use crate::bench::trace::outcome::Sample;

/// Samples of a simulation, evenly spaced.
const SAMPLES: usize = 600;

/// Integrates an amount, such as memory, over the time of a trace.
#[derive(Debug)]
pub(super) struct Integral {
    end_us: f64,
    speed: f64,
    now_us: f64,
    amount: f64,
    most: f64,
    /// Amount · µs, by sample.
    sums: Vec<f64>,
}

impl Integral {
    /// `end_us`: the end of the trace on the real clock. `amount`: that at the start.
    pub(super) fn new(end_us: f64, speed: f64, amount: f64) -> Integral {
        Integral { end_us, speed, now_us: 0.0, amount, most: amount, sums: vec![0.0; SAMPLES] }
    }

    /// Adds to the amount, or takes from it.
    pub(super) fn add(&mut self, more: f64) {
        self.set(self.amount + more);
    }

    pub(super) fn set(&mut self, amount: f64) {
        self.amount = amount;
        self.most = self.most.max(amount);
    }

    /// The present time.
    pub(super) fn now_us(&self) -> f64 {
        self.now_us
    }

    /// The largest amount so far.
    pub(super) fn most(&self) -> f64 {
        self.most
    }

    /// The mean over the time of the trace, when that is over.
    pub(super) fn mean(&self) -> f64 {
        self.sums.iter().sum::<f64>() / self.end_us
    }

    /// Lets time pass up to `to_us`. Time behind the end of the trace does not count.
    pub(super) fn advance(&mut self, to_us: f64) {
        let step = self.end_us / SAMPLES as f64;
        let to_us = to_us.min(self.end_us);
        while self.now_us < to_us {
            let mut index = (self.now_us / step) as usize;
            if step * (index + 1) as f64 <= self.now_us {
                // The division was rounded down.
                index += 1;
            }
            let index = index.min(SAMPLES - 1);
            let end = if index == SAMPLES - 1 { to_us } else { to_us.min(step * (index + 1) as f64) };
            self.sums[index] += (end - self.now_us) * self.amount;
            self.now_us = end;
        }
    }

    /// The amounts as samples of local memory, when the trace is over.
    pub(super) fn samples(&self) -> Vec<Sample> {
        let step = self.end_us / SAMPLES as f64;
        let sample = |(index, sum): (usize, &f64)| Sample {
            at_s: step * index as f64 * self.speed / 1e6,
            local_mib: sum / step,
            all_mib: None,
            vms: None,
        };
        self.sums.iter().enumerate().map(sample).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_for_its_time() {
        let mut integral = Integral::new(1000.0, 2.0, 1.0);
        integral.advance(250.0);
        integral.add(4.0);
        integral.advance(750.0);
        integral.add(-4.0);
        integral.advance(5000.0);
        let samples = integral.samples();
        assert!((integral.mean() - 3.0).abs() < 1e-6, "{}", integral.mean());
        assert_eq!(integral.most(), 5.0);
        assert_eq!(samples.len(), SAMPLES);
        assert!(samples.iter().all(|sample| sample.local_mib < 5.0 + 1e-6), "no sample has two steps");
        assert!((samples[300].local_mib - 5.0).abs() < 1e-6 && (samples[599].local_mib - 1.0).abs() < 1e-6);
        assert!((samples[300].at_s - 0.001).abs() < 1e-9, "{}", samples[300].at_s);
    }
}
