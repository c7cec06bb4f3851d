//! The JSON report of one boot or restore: `--report` when it is over, `GET /tvmm/report` while it runs.

use std::path::Path;

use serde_json::{Value, json};

use super::Ending;
use super::console::Answer;
use super::controller::{Controller, Parts};
use super::error::Error;
use super::session::Outcome;
use super::timeline::Timeline;
use super::{accounting, usage};
use crate::tiering::profile::Profile;

/// A report being put together.
pub struct Report(Value);

/// Everything that needs the machine alive.
///
/// `against`: the profile of a run to hold the plan against.
pub fn collect(
    controller: &Controller,
    operation: &str,
    answer: Option<&Answer>,
    against: Option<&Profile>,
) -> Result<Report, Error> {
    let parts = controller.machine_parts();
    let memory = parts.as_ref().map(|parts| usage::read(parts.ram)).transpose()?;
    let fault_ins = parts.as_ref().map(|parts| accounting::count(parts.ram, parts.faults)).transpose()?.flatten();
    let fault_ins = fault_ins.map(|counts| {
        let mut json = json!(counts);
        json["by_read"] = json!(counts.by_read());
        json["by_write"] = json!(counts.by_write());
        json
    });
    let against = against.map(|profile| controller.fit(profile)).transpose()?.flatten();
    let restored = controller.restored().map(|restored| {
        json!({
            "snapshot": restored.snapshot,
            "policy": restored.policy,
            "plan": restored.plan,
            "source_cache": restored.source_cache,
            "costs": restored.costs,
            "fit_expected": restored.fit,
            "fit_against": against,
            "layers": restored.layers,
            "pools": restored.pools,
            "engine": restored.engine,
        })
    });
    Ok(Report(json!({
        "tvmm_version": env!("CARGO_PKG_VERSION"),
        "operation": operation,
        "restore": restored,
        "answer": answer.and_then(Answer::get).map(|(line, _)| line),
        "memory": memory,
        "fault_ins": fault_ins,
        "promotion": parts.as_ref().and_then(|parts| parts.ram.promotion()),
        "translations": parts.as_ref().map(Parts::translations).transpose()?,
        "cold": parts.as_ref().and_then(|parts| parts.cold.as_ref()),
        "exits": parts.as_ref().map(|parts| parts.counters_json()),
        "msrs_refused": parts.as_ref().map(|parts| parts.msrs_refused),
    })))
}

/// The report of a machine that lives, as far as it has come.
pub fn live(controller: &Controller) -> Result<Value, Error> {
    let operation = if controller.restored().is_some() { "restore" } else { "boot" };
    let mut timeline = controller.timeline.clone();
    timeline.note_moments(controller.moments(), None);
    Ok(collect(controller, operation, None, None)?.timed(controller, &timeline).0)
}

impl Report {
    /// Adds why it is over.
    pub fn ended(mut self, outcome: &Outcome) -> Self {
        self.0["ending"] = json!(match outcome {
            Outcome::Guest(Ending::Reset) => "reset",
            Outcome::Guest(Ending::PowerOff) => "power-off",
            Outcome::Guest(Ending::TripleFault) => "triple-fault",
            Outcome::Guest(Ending::Failed(_)) => "failed",
            Outcome::Signal(_) => "signal",
            Outcome::Quit => "quit",
            Outcome::Answered => "answered",
            Outcome::NoAnswer(_) => "no-answer",
            Outcome::TimedOut => "timed-out",
        });
        self
    }

    /// Adds the time slices, tear-down included.
    pub fn finish(self, controller: &Controller) -> Self {
        self.timed(controller, &controller.timeline)
    }

    fn timed(mut self, controller: &Controller, timeline: &Timeline) -> Self {
        let moments = controller.moments();
        let since = |ns: Option<u64>| ns.map(|ns| timeline.since_start_us(ns));
        self.0["start_source"] = json!(timeline.start_source());
        self.0["start_monotonic_ns"] = json!(timeline.start_ns());
        self.0["slices"] = json!(timeline.measured());
        self.0["first_exit_us"] = json!(since(moments.first_exit_ns()));
        self.0["first_output_us"] = json!(since(moments.first_output_ns()));
        self
    }

    /// Writes the report to `path`.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        write_text(path, &format!("{:#}\n", self.0))
    }

    /// Writes the slices to `path` in Chrome's trace format.
    pub fn write_trace(&self, path: &Path) -> Result<(), Error> {
        let slices = self.0["slices"].as_array().map(Vec::as_slice).unwrap_or_default();
        let start_us = self.0["start_monotonic_ns"].as_f64().unwrap_or(0.0) / 1000.0;
        let pid = std::process::id();
        let operation = self.0["operation"].as_str().unwrap_or_default();
        let event = |slice: &Value| {
            let number = |key: &str| slice[key].as_f64().unwrap_or(0.0);
            chrome_event(
                slice["slice"].as_str().unwrap_or_default(),
                operation,
                pid,
                [start_us + number("start_us"), number("length_us")],
            )
        };
        let events: Vec<Value> = slices.iter().map(event).collect();
        let other = json!({ "restore": self.0["restore"], "fault_ins": self.0["fault_ins"] });
        write_text(path, &format!("{:#}\n", json!({ "traceEvents": events, "otherData": other })))
    }
}

/// A complete event of Chrome's trace format ("Trace Event Format", ph = X). `times_us`: begin and length.
pub fn chrome_event(name: &str, category: &str, pid: u32, times_us: [f64; 2]) -> Value {
    json!({ "name": name, "cat": category, "ph": "X", "pid": pid, "tid": 1, "ts": times_us[0], "dur": times_us[1] })
}

fn write_text(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text).map_err(|source| Error::File { doing: "write", path: path.to_owned(), source })
}
