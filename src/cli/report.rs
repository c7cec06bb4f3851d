//! The JSON report of one boot or restore (`--report`).

use std::path::Path;

use serde_json::{Value, json};

use super::BoxError;
use crate::tiering::profile::Profile;
use crate::vmm::Ending;
use crate::vmm::console::Answer;
use crate::vmm::controller::{Controller, Parts};
use crate::vmm::session::Outcome;
use crate::vmm::{accounting, usage};

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
) -> Result<Report, BoxError> {
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
    pub fn finish(mut self, controller: &Controller) -> Self {
        let (timeline, moments) = (&controller.timeline, controller.moments());
        let since = |ns: Option<u64>| ns.map(|ns| timeline.since_start_us(ns));
        self.0["start_source"] = json!(timeline.start_source());
        self.0["slices"] = json!(timeline.measured());
        self.0["first_exit_us"] = json!(since(moments.first_exit_ns()));
        self.0["first_output_us"] = json!(since(moments.first_output_ns()));
        self
    }

    /// Writes the report to `path`.
    pub fn write(&self, path: &Path) -> Result<(), BoxError> {
        let failed = |error: std::io::Error| format!("Cannot write the report {}: {error}", path.display());
        let text = format!("{:#}\n", self.0);
        Ok(std::fs::write(path, text).map_err(failed)?)
    }
}
