//! The charts of each experiment: bars over functions, or lines over an axis.

use super::chart::{Bar, Bars, Lines, Series};
use crate::bench::study::stats::{axes, summary};
use crate::bench::study::store::Results;
use crate::bench::study::{Experiment, Flow};

/// One experiment, drawn.
pub(super) struct ExperimentCharts {
    pub(super) experiment: Experiment,
    pub(super) charts: Vec<ChartFile>,
}

/// A chart in a file.
pub(super) struct ChartFile {
    /// The name of the file, without its extension.
    pub(super) name: String,
    pub(super) svg: String,
}

/// The charts of an experiment.
pub(super) fn charts(results: &Results, experiment: Experiment) -> Vec<ChartFile> {
    let name = |what: &str| format!("{}-{what}", experiment.name().to_lowercase());
    let drawn = match experiment {
        Experiment::E1 | Experiment::E4 => vec![
            (name("answer"), bars(results, experiment, "answer_ms", "ms to the answer")),
            (name("local-dram"), bars(results, experiment, "local_dram_kib", "KiB of local memory")),
        ],
        Experiment::E5 => vec![
            (name("by-read"), bars(results, experiment, "by_read_pages", "pages brought in by reads")),
            (name("by-write"), bars(results, experiment, "by_write_pages", "pages brought in by writes")),
        ],
        Experiment::E2 => lines(results, experiment, "answer_ms", Units { x: "request", y: "ms to the answer" }),
        Experiment::E7 => {
            lines(results, experiment, "answer_ms", Units { x: "local memory for reads", y: "ms to the answer" })
        }
        Experiment::E3 => {
            let mut charts = lines(results, experiment, "answer_ms", Units { x: "restores at once", y: "ms, median" });
            charts.extend(lines(results, experiment, "answer_p95_ms", Units { x: "restores at once", y: "ms, p95" }));
            charts
        }
        Experiment::Burst => {
            let mut charts = lines(results, experiment, "answer_ms", Units { x: "VMs asked at once", y: "ms, p50" });
            charts.extend(lines(results, experiment, "answer_p95_ms", Units { x: "VMs asked at once", y: "ms, p95" }));
            charts
        }
        Experiment::E6 => {
            lines(results, experiment, "local_mib_per_vm", Units { x: "VMs alive", y: "local MiB per VM" })
        }
    };
    drawn.into_iter().filter_map(|(name, svg)| Some(ChartFile { name, svg: svg? })).collect()
}

fn series(flows: &[String]) -> Vec<Series> {
    let of =
        |(index, name): (usize, &String)| Series { name: name.clone(), colour: Flow::place(name).unwrap_or(index) };
    flows.iter().enumerate().map(of).collect()
}

fn bars(results: &Results, experiment: Experiment, value: &str, unit: &str) -> Option<String> {
    let (cases, flows) = axes(results, experiment.name());
    let bar = |case: &String, flow: &String| {
        let summary = summary(results, experiment.name(), case, flow, value)?;
        Some(Bar { value: summary.median, low: summary.min, high: summary.max })
    };
    let bars = cases.iter().map(|case| flows.iter().map(|flow| bar(case, flow)).collect()).collect();
    Bars { title: experiment.title(), unit, groups: &cases, series: &series(&flows), bars }.svg()
}

/// The words beside the axes of a chart with lines.
#[derive(Clone, Copy)]
struct Units<'a> {
    x: &'a str,
    y: &'a str,
}

/// A chart per function: its cases begin with its name.
fn lines(results: &Results, experiment: Experiment, value: &str, units: Units) -> Vec<(String, Option<String>)> {
    let (cases, flows) = axes(results, experiment.name());
    let function = |case: &String| case.split(' ').next().unwrap_or_default().to_string();
    let mut functions: Vec<String> = cases.iter().map(function).collect();
    functions.dedup();
    let chart = |name: String| {
        let points: Vec<&String> = cases.iter().filter(|case| function(case) == name).collect();
        let median = |case: &str, flow: &str| Some(summary(results, experiment.name(), case, flow, value)?.median);
        let values = flows.iter().map(|flow| points.iter().map(|case| median(case, flow)).collect()).collect();
        let labels: Vec<String> = points.iter().map(|case| case[name.len()..].trim().to_string()).collect();
        let title = format!("{}: {name}", experiment.title());
        let series = series(&flows);
        let svg =
            Lines { title: &title, x_unit: units.x, y_unit: units.y, points: &labels, series: &series, values }.svg();
        (format!("{}-{name}-{value}", experiment.name().to_lowercase()), svg)
    };
    functions.into_iter().map(chart).collect()
}
