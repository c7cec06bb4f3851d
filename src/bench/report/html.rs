//! The page: tables and charts in one file, without scripts or network access.

use super::super::study::stats::failures;
use super::super::study::store::Results;
use super::charts::ExperimentCharts;
use super::tables::{Cells, tables};
use crate::bench::markup::escape;

pub(super) fn page(results: &Results, drawn: &[ExperimentCharts]) -> String {
    let header = &results.header;
    let fact = |(name, value): (&String, &String)| row(&[name, value]);
    let facts: String = header.host.iter().chain(&header.settings).map(fact).collect();
    let sections: String = drawn.iter().map(|drawn| section(results, drawn)).collect();
    let body = format!(
        "<p>tvmm {}. Each number is the median of its rounds, with the least and the most; flows are interleaved; \
         bars and lines stand on logarithmic axes. Every answer of the guests was compared with the others'.</p>\n\
         <table>{facts}</table>\n{sections}{}",
        escape(&header.tvmm_version),
        failed(results),
    );
    document("Restores, measured", &body)
}

/// A page with a title and a body in HTML.
pub fn document(title: &str, body: &str) -> String {
    let title = escape(title);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>tvmm bench: {title}</title>\n<style>\n\
         body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; background: \
         #fff }}\ntable {{ border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums }}\n\
         th, td {{ border-bottom: 1px solid #ddd; padding: .2em .6em; text-align: right; white-space: nowrap }}\n\
         th:first-child, td:first-child {{ text-align: left }} .wide {{ overflow-x: auto }} svg {{ max-width: 100%; \
         height: auto }}\n</style></head><body>\n<h1>{title}</h1>\n{body}</body></html>\n"
    )
}

fn section(results: &Results, drawn: &ExperimentCharts) -> String {
    let experiment = drawn.experiment;
    let charts: String = drawn.charts.iter().map(|chart| chart.svg.as_str()).collect();
    let tables: String = tables(results, experiment).iter().map(table).collect();
    let title = escape(experiment.title());
    format!("<h2>{}: {title}</h2>\n{charts}{tables}", experiment.name())
}

/// A table in HTML.
pub fn table(cells: &Cells) -> String {
    let header: String = cells.header.iter().map(|cell| format!("<th>{}</th>", escape(cell))).collect();
    let rows: String = cells.rows.iter().map(|cells| row(&cells.iter().collect::<Vec<_>>())).collect();
    let title = escape(&cells.title);
    format!("<p>{title}</p>\n<div class=\"wide\"><table><tr>{header}</tr>\n{rows}</table></div>\n")
}

fn row(cells: &[&String]) -> String {
    let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
    format!("<tr>{cells}</tr>\n")
}

/// The failed measurements.
fn failed(results: &Results) -> String {
    let failures = failures(results);
    if failures.is_empty() {
        return String::new();
    }
    let rows: String = failures
        .iter()
        .map(|failure| {
            let count = failure.count.to_string();
            row(&[&failure.experiment, &failure.case, &failure.flow, &count, &failure.reason])
        })
        .collect();
    format!("<h2>Failed</h2>\n<table>{rows}</table>\n")
}
