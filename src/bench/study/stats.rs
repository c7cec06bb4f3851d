//! Medians and related statistics.

use std::collections::BTreeMap;

use super::flow::Flow;
use super::store::{Key, Results, Sample};

/// Statistics of some numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub count: usize,
    pub min: f64,
    pub median: f64,
    pub p95: f64,
    pub max: f64,
}

impl Summary {
    /// `None` without numbers.
    pub fn of(mut numbers: Vec<f64>) -> Option<Summary> {
        numbers.sort_by(f64::total_cmp);
        // Nearest rank.
        let rank = |share: f64| numbers.get(((numbers.len() as f64 * share).ceil() as usize).max(1) - 1).copied();
        Some(Summary {
            count: numbers.len(),
            min: *numbers.first()?,
            median: rank(0.5)?,
            p95: rank(0.95)?,
            max: *numbers.last()?,
        })
    }
}

/// The statistics of number `name` of a flow in a case of an experiment.
pub fn summary(results: &Results, experiment: &str, case: &str, flow: &str, name: &str) -> Option<Summary> {
    let is_it = |sample: &&Sample| {
        (sample.key.experiment.as_str(), sample.key.case.as_str(), sample.key.flow.as_str()) == (experiment, case, flow)
    };
    let numbers = results.samples.iter().filter(is_it).filter_map(|sample| sample.values.get(name).copied());
    Summary::of(numbers.collect())
}

/// The geometric mean; `None` without numbers.
pub fn geomean(numbers: &[f64]) -> Option<f64> {
    let logs: f64 = numbers.iter().map(|number| number.ln()).sum();
    (!numbers.is_empty()).then(|| (logs / numbers.len() as f64).exp())
}

/// The cases of an experiment, in the order in which they were first measured, and its flows, in their usual order.
pub fn axes(results: &Results, experiment: &str) -> (Vec<String>, Vec<String>) {
    let mut cases = Vec::new();
    let mut flows = Vec::new();
    for sample in results.samples.iter().filter(|sample| sample.key.experiment == experiment) {
        if !cases.contains(&sample.key.case) {
            cases.push(sample.key.case.clone());
        }
        if !flows.contains(&sample.key.flow) {
            flows.push(sample.key.flow.clone());
        }
    }
    flows.sort_by_key(|flow| Flow::place(flow).unwrap_or(usize::MAX));
    (cases, flows)
}

/// The failed measurements of a flow in a case of an experiment.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub experiment: String,
    pub case: String,
    pub flow: String,
    pub count: usize,
    /// The reason of the first.
    pub reason: String,
}

/// The failures by experiment, case and flow.
pub fn failures(results: &Results) -> Vec<Failure> {
    let mut failures: BTreeMap<_, Failure> = BTreeMap::new();
    for sample in &results.samples {
        if let Some(reason) = &sample.failed {
            let Key { experiment, case, flow, .. } = sample.key.clone();
            let key = (experiment.clone(), case.clone(), flow.clone());
            let none = || Failure { experiment, case, flow, count: 0, reason: reason.clone() };
            failures.entry(key).or_insert_with(none).count += 1;
        }
    }
    failures.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_numbers_that_were_measured() {
        let summary = Summary::of((1..=20).rev().map(f64::from).collect()).unwrap();
        assert_eq!((summary.min, summary.median, summary.p95, summary.max), (1.0, 10.0, 19.0, 20.0));
        let one = Summary::of(vec![3.0]).unwrap();
        assert_eq!((one.count, one.median, one.p95), (1, 3.0, 3.0));
        assert_eq!(Summary::of(Vec::new()), None);
        assert!((geomean(&[1.0, 100.0]).unwrap() - 10.0).abs() < 1e-9);
        assert_eq!(geomean(&[]), None);
    }
}
