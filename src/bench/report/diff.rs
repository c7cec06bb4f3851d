//! `tvmm bench diff`: two files of results, number by number.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};

use super::super::study::Experiment;
use super::super::study::stats::{Summary, axes, geomean, summary};
use super::super::study::store::Results;
use crate::sys::errors::{BoxError, refuse};

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// Results: a directory of `tvmm bench run --out`, or its file
    #[arg(value_name = "BEFORE")]
    before: PathBuf,
    /// Other results
    #[arg(value_name = "AFTER")]
    after: PathBuf,
    /// Number to compare
    #[arg(long, default_value = "answer_ms", value_name = "NAME")]
    value: String,
}

pub fn run(args: &DiffArgs) -> Result<ExitCode, BoxError> {
    let before = Results::read(&args.before)?;
    let after = Results::read(&args.after)?;
    let rows = compare(&before, &after, &args.value);
    if rows.is_empty() {
        return refuse(format!("No {} was measured in both for the same case and flow", args.value));
    }
    if before.header.host != after.header.host {
        out!("The results are of different hosts.");
    }
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["experiment", "case", "flow", "before", "after", "after / before", ""]);
    for row in &rows {
        let verdict = row.verdict();
        let before = format!("{:.3}", row.before.median);
        let after = format!("{:.3}", row.after.median);
        let ratio = row.ratio().map_or("–".to_string(), |ratio| format!("{ratio:.3}"));
        table.add_row([row.experiment, &row.case, &row.flow, &before, &after, &ratio, verdict]);
    }
    for column in table.column_iter_mut().skip(3).take(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    out!("{}: medians\n{table}", args.value);
    let ratios: Vec<f64> = rows.iter().filter_map(Row::ratio).collect();
    if let Some(mean) = geomean(&ratios) {
        out!("geometric mean of {} ratios: {mean:.3}", ratios.len());
    }
    Ok(ExitCode::SUCCESS)
}

struct Row {
    experiment: &'static str,
    case: String,
    flow: String,
    before: Summary,
    after: Summary,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        (self.before.median > 0.0 && self.after.median > 0.0).then(|| self.after.median / self.before.median)
    }

    /// Returns more or less only if the rounds of the two do not overlap.
    fn verdict(&self) -> &'static str {
        if self.after.min > self.before.max {
            "more"
        } else if self.after.max < self.before.min {
            "less"
        } else {
            ""
        }
    }
}

fn compare(before: &Results, after: &Results, value: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    for experiment in Experiment::ALL.map(Experiment::name) {
        let (cases, flows) = axes(before, experiment);
        for case in &cases {
            for flow in &flows {
                let of = |results| summary(results, experiment, case, flow, value);
                if let (Some(before), Some(after)) = (of(before), of(after)) {
                    rows.push(Row { experiment, case: case.clone(), flow: flow.clone(), before, after });
                }
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_one_only_beyond_what_rounds_differ_by() {
        let row = |before: &[f64], after: &[f64]| Row {
            experiment: "E1",
            case: "c".into(),
            flow: "f".into(),
            before: Summary::of(before.to_vec()).unwrap(),
            after: Summary::of(after.to_vec()).unwrap(),
        };
        assert_eq!(row(&[1.0, 2.0, 3.0], &[3.0, 4.0, 5.0]).verdict(), "");
        assert_eq!(row(&[1.0, 2.0, 3.0], &[3.1, 4.0, 5.0]).verdict(), "more");
        assert_eq!(row(&[1.0, 2.0, 3.0], &[0.1, 0.2, 0.9]).verdict(), "less");
        assert_eq!(row(&[2.0], &[3.0]).ratio(), Some(1.5));
        assert_eq!(row(&[0.0], &[3.0]).ratio(), None);
    }
}
