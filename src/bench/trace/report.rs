//! The report of a trace: tables, `summary.csv`, `summary.json` and `requests.csv`, charts, and one HTML page.

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::outcome::{Outcome, Replayed, Request, Summary, Way, rank};
use super::policy::Policy;
use crate::bench::markup::escape;
use crate::bench::report::chart::Series;
use crate::bench::report::curves::{At, Axis, Curves};
use crate::bench::report::html::{document, table};
use crate::bench::report::tables::{Cells, drawn, number_text};
use crate::bench::report::write;
use crate::sys::errors::BoxError;

/// Points of a curve of latencies.
const POINTS: usize = 200;

/// A fact about the run: its name, and its value.
pub(super) struct Fact {
    pub(super) name: &'static str,
    pub(super) value: String,
}

/// All that is to be shown.
pub(super) struct Report<'a> {
    pub(super) facts: Vec<Fact>,
    pub(super) notes: &'a [String],
    pub(super) outcomes: &'a [Outcome],
    /// Names of the trace's functions.
    pub(super) functions: &'a [String],
}

impl Report<'_> {
    /// Prints the tables, and writes all files to `dir`.
    pub(super) fn publish(&self, dir: &Path) -> Result<(), BoxError> {
        let latencies: Vec<Vec<f64>> = self.outcomes.iter().map(Outcome::latencies).collect();
        let summary = |(outcome, latencies): (&Outcome, &Vec<f64>)| outcome.summary(latencies);
        let summaries: Vec<Summary> = self.outcomes.iter().zip(&latencies).map(summary).collect();
        let tables = [numbers(&summaries), ways(&summaries), density(&summaries)];
        let compared = compared(&summaries);
        for cells in tables.iter().chain(&compared) {
            out!("{}\n", drawn(cells));
        }
        for (outcome, summary) in self.outcomes.iter().zip(&summaries).filter(|(_, summary)| summary.failed > 0) {
            let reasons: Vec<String> =
                outcome.reasons.iter().map(|(reason, count)| format!("{reason}: {count}")).collect();
            out!("{}: {} requests failed ({})", outcome.title(), summary.failed, reasons.join(", "));
        }
        for note in self.notes {
            out!("{note}");
        }
        write(&dir.join("summary.csv"), &csv(&summaries)?)?;
        if let Some(requests) = requests_csv(self.outcomes, self.functions)? {
            write(&dir.join("requests.csv"), &requests)?;
        }
        let facts: serde_json::Map<String, serde_json::Value> =
            self.facts.iter().map(|fact| (fact.name.to_string(), json!(fact.value))).collect();
        let reasons: Vec<_> = self.outcomes.iter().map(|outcome| &outcome.reasons).collect();
        let all = json!({ "facts": facts, "notes": self.notes, "policies": summaries, "reasons": reasons });
        write(&dir.join("summary.json"), &(serde_json::to_string_pretty(&all)? + "\n"))?;
        let charts = [("memory", self.memory()), ("latency", self.latency(&latencies))];
        let mut drawings = String::new();
        for (name, svg) in charts {
            let Some(svg) = svg else { continue };
            write(&dir.join(format!("{name}.svg")), &svg)?;
            drawings += &svg;
        }
        let page = dir.join("report.html");
        let tables: String = tables.iter().chain(&compared).map(table).collect();
        let facts = self
            .facts
            .iter()
            .map(|fact| format!("<tr><td>{}</td><td>{}</td></tr>\n", escape(fact.name), escape(&fact.value)));
        let facts: String = facts.collect();
        let notes: String = self.notes.iter().map(|note| format!("<p>{}</p>\n", escape(note))).collect();
        let body = format!("<table>{facts}</table>\n{notes}{tables}{drawings}");
        write(&page, &document("An arrival trace by policy", &body))?;
        out!("{}", page.display());
        Ok(())
    }

    fn series(&self) -> Vec<Series> {
        let one = |outcome: &Outcome| Series {
            name: outcome.title(),
            colour: outcome.policy.colour() + if outcome.is_simulated { Policy::ALL.len() } else { 0 },
        };
        self.outcomes.iter().map(one).collect()
    }

    fn memory(&self) -> Option<String> {
        let points = |outcome: &Outcome| {
            outcome.memory.iter().map(|sample| At { x: sample.at_s, y: sample.local_mib }).collect()
        };
        Curves {
            title: "Local memory of the service's processes over time",
            x_unit: "s of the trace",
            y_unit: "MiB",
            axis: Axis::Linear,
            series: &self.series(),
            curves: self.outcomes.iter().map(points).collect(),
        }
        .svg()
    }

    fn latency(&self, latencies: &[Vec<f64>]) -> Option<String> {
        let points = |latencies: &Vec<f64>| -> Vec<At> {
            if latencies.is_empty() {
                return Vec::new();
            }
            let share = |index: usize| index as f64 / POINTS as f64;
            (1..=POINTS).map(|index| At { x: rank(latencies, share(index)), y: share(index) * 100.0 }).collect()
        };
        Curves {
            title: "Requests answered within a time",
            x_unit: "ms from arrival to answer",
            y_unit: "%",
            axis: Axis::Logarithmic,
            series: &self.series(),
            curves: latencies.iter().map(points).collect(),
        }
        .svg()
    }
}

fn row(name: String, cells: impl IntoIterator<Item = String>) -> Vec<String> {
    std::iter::once(name).chain(cells).collect()
}

fn header(names: &[&str]) -> Vec<String> {
    row(String::new(), names.iter().map(|name| name.to_string()))
}

fn numbers(summaries: &[Summary]) -> Cells {
    let of = |summary: &Summary| {
        let known = |number: Option<f64>| number.map_or("–".to_string(), number_text);
        let numbers = [summary.p50_ms, summary.p95_ms, summary.p99_ms, summary.mean_local_mib, summary.peak_local_mib];
        row(
            summary.title.clone(),
            numbers.map(number_text).into_iter().chain([known(summary.mean_all_mib), known(summary.other_cpus)]),
        )
    };
    Cells {
        title: "Time to the answer, and memory of the service's processes over the time of the trace".to_string(),
        header: header(&[
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "local MiB, mean",
            "local MiB, most",
            "with files, mean",
            "CPUs of others before",
        ]),
        rows: summaries.iter().map(of).collect(),
    }
}

fn ways(summaries: &[Summary]) -> Cells {
    let of = |summary: &Summary| {
        let share = |count: usize| format!("{:.1} %", count as f64 * 100.0 / summary.requests.max(1) as f64);
        let Summary { warm, trimmed, spilled, woken, standby, rewound, restored, .. } = *summary;
        let shares = [warm, trimmed, spilled, woken, standby, rewound, restored].map(share);
        let counts = [summary.repurposed.to_string(), summary.failed.to_string(), summary.late.to_string()];
        row(summary.title.clone(), [summary.requests.to_string()].into_iter().chain(shares).chain(counts))
    };
    let names = [
        "requests",
        "warm",
        "trimmed",
        "spilled",
        "woken",
        "standby",
        "rewound",
        "restored",
        "repurposed",
        "failed",
        "late",
    ];
    let title = "The VMs of the requests. Repurposed: restores in the process of a finished VM. Late: sent more than \
                 20 ms after their arrival";
    Cells { title: title.to_string(), header: header(&names), rows: summaries.iter().map(of).collect() }
}

fn density(summaries: &[Summary]) -> Cells {
    let of = |summary: &Summary| {
        let known = |number: Option<f64>| number.map_or("–".to_string(), number_text);
        let vms = [
            number_text(summary.mean_vms),
            summary.most_vms.to_string(),
            summary.most_suspended.to_string(),
            number_text(summary.vms_per_gib),
        ];
        let Summary { dropped_mib, spilled_mib, recalled_mib, regretted_mib, .. } = *summary;
        let memory = [dropped_mib, spilled_mib, recalled_mib, regretted_mib].map(known);
        let counts = [summary.refused_steps.to_string()];
        row(summary.title.clone(), vms.into_iter().chain(memory).chain(counts))
    };
    let names = [
        "VMs, mean",
        "VMs, most",
        "suspended, most",
        "VMs per GiB",
        "dropped MiB",
        "spilled MiB",
        "recalled MiB",
        "regretted MiB",
        "steps refused",
    ];
    let title = "VMs with a process, and memory that waiting VMs gave back: dropped copies equal the snapshot, spilled \
                 pages went to a file. Regretted: recalled by the very next request";
    Cells { title: title.to_string(), header: header(&names), rows: summaries.iter().map(of).collect() }
}

/// The simulator's error, for each policy that was replayed and simulated.
fn compared(summaries: &[Summary]) -> Option<Cells> {
    let mut rows = Vec::new();
    for real in summaries.iter().filter(|summary| !summary.simulated) {
        let is_same = |other: &&Summary| other.simulated && other.policy == real.policy;
        let Some(simulated) = summaries.iter().find(is_same) else { continue };
        let error = |real: f64, simulated: f64| {
            if real > 0.0 { format!("{:+.0} %", (simulated / real - 1.0) * 100.0) } else { "–".to_string() }
        };
        let pairs = [
            (real.mean_local_mib, simulated.mean_local_mib),
            (real.p50_ms, simulated.p50_ms),
            (real.p95_ms, simulated.p95_ms),
            (real.p99_ms, simulated.p99_ms),
            (real.restored as f64, simulated.restored as f64),
        ];
        rows.push(row(real.policy.clone(), pairs.map(|(real, simulated)| error(real, simulated))));
    }
    let title = "The simulator's error: simulated against replayed".to_string();
    let header = header(&["local memory", "p50", "p95", "p99", "restores"]);
    (!rows.is_empty()).then_some(Cells { title, header, rows })
}

/// The summaries as comma-separated values: the names of the JSON object in the first line.
/// A replayed request, as a line of `requests.csv`.
#[derive(Serialize)]
struct RequestLine<'a> {
    policy: String,
    /// Time of the trace.
    arrival_s: f64,
    function: &'a str,
    /// `None`: it has failed.
    way: Option<Way>,
    /// Requests that the VM had answered before.
    vm_answered: Option<u32>,
    latency_ms: f64,
    late_ms: f64,
}

/// All replayed requests, in the order of their answers; `None`: there are none.
fn requests_csv(outcomes: &[Outcome], functions: &[String]) -> Result<Option<String>, BoxError> {
    let of = |outcome: &Outcome| {
        let policy = outcome.title();
        let line = move |(request, replayed): (&Request, &Replayed)| RequestLine {
            policy: policy.clone(),
            arrival_s: replayed.arrival.at_us as f64 / 1e6,
            function: functions.get(replayed.arrival.function as usize).map_or("", String::as_str),
            way: request.way,
            vm_answered: replayed.vm_answered,
            latency_ms: request.latency_ms,
            late_ms: request.late_ms,
        };
        outcome.requests.iter().zip(&outcome.replayed).map(line).collect::<Vec<_>>()
    };
    let lines: Vec<RequestLine<'_>> = outcomes.iter().flat_map(of).collect();
    if lines.is_empty() { Ok(None) } else { csv(&lines).map(Some) }
}

/// Rows with the names of their fields above them.
fn csv<T: Serialize>(rows: &[T]) -> Result<String, BoxError> {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let value = serde_json::to_value(row)?;
        let fields: Vec<(&String, &serde_json::Value)> = value.as_object().into_iter().flatten().collect();
        if index == 0 {
            let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
            text += &(names.join(",") + "\n");
        }
        let cell = |value: &serde_json::Value| match value {
            serde_json::Value::Null => String::new(),
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let cells: Vec<String> = fields.iter().map(|(_, value)| cell(value)).collect();
        text += &(cells.join(",") + "\n");
    }
    Ok(text)
}
