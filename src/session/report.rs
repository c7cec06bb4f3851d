//! The JSON report of one boot or restore: `--report` when it is over, `GET /tvmm/report` while it runs.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::console::Answer;
use super::facts::{Facts, Parts};
use super::outcome::{GuestEnd, Outcome};
use crate::memory::fault_batches::FaultBatch;
use crate::memory::spill::Spill;
use crate::memory::{accounting, usage};
use crate::session::Error;
use crate::snapshot::overwrite_private;
use crate::sys::clock;
use crate::sys::otlp;
use crate::sys::timeline::{Timeline, Wake, chrome_event};
use crate::tiering::profile::Profile;

/// A report being put together.
pub struct Report(Value);

/// Collects everything that needs the machine alive.
///
/// `against`: the profile of a run to compare the plan with.
pub fn collect(
    facts: &Facts,
    operation: &str,
    answer: Option<&Answer>,
    against: Option<&Profile>,
) -> Result<Report, Error> {
    let parts = facts.parts.as_ref();
    let memory = parts.map(|parts| usage::read(parts.ram)).transpose()?;
    let fault_ins = parts.map(|parts| accounting::count(parts.ram, parts.faults)).transpose()?.flatten();
    let fault_ins = fault_ins.map(|counts| {
        let mut json = json!(counts);
        json["by_read"] = json!(counts.by_read());
        json["by_write"] = json!(counts.by_write());
        json
    });
    let batch = |batch: &FaultBatch| {
        let mut json = json!(batch);
        json["start_us"] = json!(facts.timeline.since_start_us(batch.start_ns));
        json["length_us"] = json!((batch.end_ns - batch.start_ns) as f64 / 1000.0);
        json
    };
    let fault_batches = parts.map(|parts| parts.fault_batches.iter().map(batch).collect::<Vec<Value>>());
    let against = match (facts.restored, against) {
        (Some(restored), Some(profile)) => Some(restored.fit_of(profile)?),
        _ => None,
    };
    let restored = facts.restored.map(|restored| {
        json!({
            "snapshot": restored.snapshot,
            "policy": restored.policy,
            "policy_reason": restored.policy_reason,
            "plan": restored.plan,
            "source_cache": restored.source_cache,
            "costs": restored.costs,
            "fit_expected": restored.fit,
            "fit_against": against,
            "layers": restored.layers,
            "pools": restored.pools,
            "engine": restored.engine,
            "rewinds": restored.rewinds,
            "last_rewind": restored.last_rewind,
            "demotions": restored.demotions,
            "last_demotion": restored.last_demotion,
            "barriers": restored.barriers,
            "last_barrier": restored.last_barrier,
            "repurposed": restored.repurposed,
            "last_repurpose": restored.last_repurpose,
        })
    });
    Ok(Report(json!({
        "tvmm_version": env!("CARGO_PKG_VERSION"),
        "operation": operation,
        "restore": restored,
        "jail": crate::sys::jail::in_force(),
        "forks": facts.forks,
        "answer": answer.and_then(Answer::get).map(|(line, _)| line),
        "memory": memory,
        "fault_ins": fault_ins,
        "fault_batches": fault_batches,
        "promotion": parts.and_then(|parts| parts.ram.promotion()),
        "translations": parts.map(Parts::translations).transpose()?,
        "verification": parts.map(|parts| &parts.verification),
        "cold": parts.and_then(|parts| parts.cold.as_ref()),
        "spill": parts.and_then(|parts| parts.spill).map(Spill::counts),
        "exits": parts.map(|parts| parts.counters_json()),
        "msrs_refused": parts.map(|parts| parts.msrs_refused),
    })))
}

/// The report of a running machine so far.
pub fn live(facts: &Facts) -> Result<Value, Error> {
    let operation = if facts.restored.is_some() { "restore" } else { "boot" };
    let mut timeline = facts.timeline.clone();
    timeline.note_moments(facts.moments, None);
    Ok(collect(facts, operation, None, None)?.timed(facts, &timeline).0)
}

impl Report {
    /// Adds the reason of the end.
    pub fn ended(mut self, outcome: &Outcome) -> Self {
        self.0["ending"] = json!(match outcome {
            Outcome::Guest(GuestEnd::Reset) => "reset",
            Outcome::Guest(GuestEnd::PowerOff) => "power-off",
            Outcome::Guest(GuestEnd::TripleFault) => "triple-fault",
            Outcome::Failed(_) => "failed",
            Outcome::MemoryLost(_) => "memory-lost",
            Outcome::Signal(_) => "signal",
            Outcome::Quit => "quit",
            Outcome::Answered => "answered",
            Outcome::NoAnswer(_) => "no-answer",
            Outcome::TimedOut => "timed-out",
        });
        self
    }

    /// Adds the time slices, tear-down included.
    ///
    /// `facts`: taken after the tear-down, which waits for snapshots being read back.
    pub fn finish(self, facts: &Facts) -> Self {
        self.timed(facts, facts.timeline)
    }

    fn timed(mut self, facts: &Facts, timeline: &Timeline) -> Self {
        self.0["read_backs"] = facts.read_backs.clone();
        let moments = facts.moments;
        let since = |ns: Option<u64>| ns.map(|ns| timeline.since_start_us(ns));
        self.0["start_source"] = json!(timeline.start_source());
        self.0["start_monotonic_ns"] = json!(timeline.start_ns());
        self.0["slices"] = json!(timeline.measured());
        self.0["first_exit_us"] = json!(since(moments.first_exit_ns()));
        self.0["first_output_us"] = json!(since(moments.first_output_ns()));
        self.0["woken"] = json!(moments.wake().map(|wake| woken(timeline, &wake)));
        self
    }

    /// Writes the report to `path`.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        write_text(path, &format!("{:#}\n", self.0))
    }

    /// The time slices and fault batches for a collector, as parts of one span; fault batches are parts of the request.
    pub fn spans(&self, trace_id: u128, root_id: u64) -> otlp::Trace {
        let list = |key: &str| self.0[key].as_array().map(Vec::as_slice).unwrap_or_default();
        let operation = self.0["operation"].as_str().unwrap_or_default();
        let span = |name: &str, parent, of: &Value, attributes| {
            let ns = |key: &str| (of[key].as_f64().unwrap_or(0.0) * 1000.0) as u64;
            let start_ns = ns("start_us") as i64;
            let length_ns = ns("length_us");
            otlp::Span { name: name.to_string(), parent, start_ns, length_ns, attributes }
        };
        let keys = ["restore.policy", "restore.plan", "restore.engine", "fault_ins", "memory", "ending"];
        let whole = keys.map(|key| {
            let value = key.split('.').fold(&self.0, |value, part| &value[part]);
            (format!("tvmm.{}", key.trim_start_matches("restore.")), value.clone())
        });
        let mut spans = vec![span(operation, None, &Value::Null, whole.to_vec())];
        for slice in list("slices") {
            spans.push(span(slice["slice"].as_str().unwrap_or_default(), Some(0), slice, Vec::new()));
        }
        let request = spans.iter().position(|span| span.name == "execute").unwrap_or(0);
        for batch in list("fault_batches") {
            let counts = ["faults", "pages"].map(|key| (format!("tvmm.{key}"), batch[key].clone()));
            let mut batch = span("faults", Some(0), batch, counts.to_vec());
            // Faults before the request belong to the restore, which touches pages itself.
            batch.parent = Some(if batch.start_ns < spans[request].start_ns { 0 } else { request });
            spans.push(batch);
        }
        spans[0].length_ns = spans.iter().map(|span| span.start_ns as u64 + span.length_ns).max().unwrap_or(0);
        let age_ns = clock::monotonic_ns().saturating_sub(self.0["start_monotonic_ns"].as_u64().unwrap_or(0));
        let begun = SystemTime::now() - Duration::from_nanos(age_ns);
        otlp::Trace { trace_id, root_id, caller_id: None, is_request: false, begun, error: None, spans }
    }

    /// Writes the slices, and the batches of page faults, to `path` in Chrome's trace format.
    pub fn write_trace(&self, path: &Path) -> Result<(), Error> {
        let list = |key: &str| self.0[key].as_array().map(Vec::as_slice).unwrap_or_default();
        let start_us = self.0["start_monotonic_ns"].as_f64().unwrap_or(0.0) / 1000.0;
        let pid = std::process::id();
        let operation = self.0["operation"].as_str().unwrap_or_default();
        let event = |span: &Value| {
            let number = |key: &str| span[key].as_f64().unwrap_or(0.0);
            let name = span["slice"].as_str().unwrap_or("faults");
            chrome_event(name, operation, pid, [start_us + number("start_us"), number("length_us")])
        };
        let events: Vec<Value> = list("slices").iter().chain(list("fault_batches")).map(event).collect();
        let other = json!({ "restore": self.0["restore"], "fault_ins": self.0["fault_ins"] });
        write_text(path, &format!("{:#}\n", json!({ "traceEvents": events, "otherData": other })))
    }
}

/// The request for which a guest has waited. Its first instruction lies between `entered_us` and `first_exit_us`, which
/// count from the request.
fn woken(timeline: &Timeline, wake: &Wake) -> Value {
    let since_asked = |ns: Option<u64>| ns.map(|ns| ns.saturating_sub(wake.asked_ns) as f64 / 1000.0);
    json!({
        "by": wake.by,
        "asked_us": timeline.since_start_us(wake.asked_ns),
        "entered_us": since_asked(wake.entered_ns),
        "first_exit_us": since_asked(wake.acted_ns),
    })
}

/// Writes a file. A new one is readable by its owner only: addresses and times of page faults tell what the guest did.
fn write_text(path: &Path, text: &str) -> Result<(), Error> {
    let written = overwrite_private(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| Error::File { doing: "write", path: path.to_owned(), source })
}
