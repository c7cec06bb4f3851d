//! The report of a study: tables on the screen, charts in files, and one HTML page.

pub mod chart;
mod diff;
mod html;
mod tables;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::BoxError;
use super::study::stats::{axes, summary};
use super::study::store::Results;
use super::study::{Experiment, Flow};
use chart::{Bar, Bars, Lines, Series};

pub use diff::{DiffArgs, run as run_diff};

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The directory of `tvmm bench run --out`, or its file of results
    #[arg(value_name = "DIR")]
    results: PathBuf,
    /// Directory for charts and the page; default: the directory of the results
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: &ReportArgs) -> Result<ExitCode, BoxError> {
    let results = Results::read(&args.results)?;
    let beside = if args.results.is_dir() { Some(args.results.as_path()) } else { args.results.parent() };
    publish(&results, args.out.as_deref().or(beside).unwrap_or(Path::new(".")))?;
    Ok(ExitCode::SUCCESS)
}

/// One experiment, drawn.
struct Drawn {
    experiment: Experiment,
    charts: Vec<(String, String)>,
}

/// Prints tables, and writes charts and the page to `dir`.
pub fn publish(results: &Results, dir: &Path) -> Result<(), BoxError> {
    let mut drawn = Vec::new();
    for experiment in Experiment::ALL {
        let (cases, _) = axes(results, experiment.name());
        if cases.is_empty() {
            continue;
        }
        out!("{}: {}\n{}\n", experiment.name(), experiment.title(), tables::text(results, experiment));
        drawn.push(Drawn { experiment, charts: charts(results, experiment) });
    }
    std::fs::create_dir_all(dir).map_err(|error| format!("Cannot make {}: {error}", dir.display()))?;
    for (name, svg) in drawn.iter().flat_map(|drawn| &drawn.charts) {
        write(&dir.join(format!("{name}.svg")), svg)?;
    }
    let page = dir.join("report.html");
    write(&page, &html::page(results, &drawn))?;
    out!("{}", page.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), BoxError> {
    Ok(std::fs::write(path, text).map_err(|error| format!("Cannot write {}: {error}", path.display()))?)
}

/// The charts of an experiment, each with the name of its file.
fn charts(results: &Results, experiment: Experiment) -> Vec<(String, String)> {
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
        Experiment::E2 => lines(results, experiment, "answer_ms", ("request", "ms to the answer")),
        Experiment::E7 => lines(results, experiment, "answer_ms", ("local memory for reads", "ms to the answer")),
        Experiment::E3 => {
            let mut charts = lines(results, experiment, "answer_ms", ("restores at once", "ms, median"));
            charts.extend(lines(results, experiment, "answer_p95_ms", ("restores at once", "ms, p95")));
            charts
        }
        Experiment::E6 => lines(results, experiment, "local_mib_per_vm", ("VMs alive", "local MiB per VM")),
    };
    drawn.into_iter().filter_map(|(name, svg)| Some((name, svg?))).collect()
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

/// A chart per function: its cases begin with its name.
fn lines(
    results: &Results,
    experiment: Experiment,
    value: &str,
    (x_unit, y_unit): (&str, &str),
) -> Vec<(String, Option<String>)> {
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
        let svg = Lines { title: &title, x_unit, y_unit, points: &labels, series: &series, values }.svg();
        (format!("{}-{name}-{value}", experiment.name().to_lowercase()), svg)
    };
    functions.into_iter().map(chart).collect()
}
