//! The report of a study: tables on the screen, charts in files, and one HTML page.

pub mod chart;
mod charts;
pub mod curves;
mod diff;
pub mod html;
pub mod tables;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::study::Experiment;
use super::study::stats::axes;
use super::study::store::Results;
use crate::sys::errors::BoxError;
use charts::{ChartFile, ExperimentCharts, charts};

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

/// Prints tables, and writes charts and the page to `dir`.
pub fn publish(results: &Results, dir: &Path) -> Result<(), BoxError> {
    let mut drawn = Vec::new();
    for experiment in Experiment::ALL {
        let (cases, _) = axes(results, experiment.name());
        if cases.is_empty() {
            continue;
        }
        out!("{}: {}\n{}\n", experiment.name(), experiment.title(), tables::text(results, experiment));
        drawn.push(ExperimentCharts { experiment, charts: charts(results, experiment) });
    }
    std::fs::create_dir_all(dir).map_err(|error| format!("Cannot make {}: {error}", dir.display()))?;
    for ChartFile { name, svg } in drawn.iter().flat_map(|drawn| &drawn.charts) {
        write(&dir.join(format!("{name}.svg")), svg)?;
    }
    let page = dir.join("report.html");
    write(&page, &html::page(results, &drawn))?;
    out!("{}", page.display());
    Ok(())
}

/// Writes a file of a report.
pub fn write(path: &Path, text: &str) -> Result<(), BoxError> {
    Ok(std::fs::write(path, text).map_err(|error| format!("Cannot write {}: {error}", path.display()))?)
}
