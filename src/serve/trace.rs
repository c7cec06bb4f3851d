//! Traces: one per invocation, with a span for each step, from the request down to the slices of the restore
//! (`docs/architecture.md`, "Time slices").

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Notify;
use utoipa::ToSchema;

use super::error::ServeError;
use super::traceparent::Caller;
use crate::snapshot::{overwrite_private, random_hex};
use crate::sys::clock;
use crate::sys::otlp::Exporter;
use crate::sys::timeline::chrome_event;

/// Traces kept in memory; older ones are dropped.
pub(super) const MAX_TRACES: usize = 512;
/// Traces that may wait for the trace file's disk; more are dropped and counted.
const MAX_WAITING: usize = 4096;
/// Longest wait of a reader for a trace to be complete.
const COMPLETION: Duration = Duration::from_secs(3);

/// A step that took time.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Span {
    pub(super) name: String,
    /// Index of the span that contains it; none: the whole invocation.
    pub(super) parent: Option<usize>,
    /// µs since the trace began.
    pub(super) start_us: f64,
    /// µs
    pub(super) length_us: f64,
    #[schema(value_type = std::collections::BTreeMap<String, Object>)]
    pub(super) attributes: BTreeMap<String, Value>,
}

/// The steps of one invocation.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Trace {
    #[serde(rename = "traceId")]
    pub(super) trace_id: String,
    /// The id of the first span.
    #[serde(rename = "spanId")]
    pub(super) span_id: String,
    /// The caller's span that it is part of, by the header `traceparent`.
    #[serde(rename = "parentSpanId")]
    pub(super) parent_span_id: Option<String>,
    pub(super) func_name: String,
    #[serde(rename = "vmId")]
    pub(super) vm_id: Option<String>,
    /// The HTTP status of the answer.
    pub(super) status: u16,
    /// µs since 1970.
    pub(super) start_unix_us: u64,
    /// True if the VM's own spans are included.
    pub(super) complete: bool,
    /// The first is the whole invocation.
    pub(super) spans: Vec<Span>,
    /// True if it is sent to a collector.
    #[serde(skip)]
    pub(super) is_sampled: bool,
}

/// A trace without its spans.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct TraceSummary {
    #[serde(rename = "traceId")]
    trace_id: String,
    /// The id of the first span: unique even if a caller's trace has several invocations.
    #[serde(rename = "spanId")]
    span_id: String,
    func_name: String,
    #[serde(rename = "vmId")]
    vm_id: Option<String>,
    status: u16,
    start_unix_us: u64,
    length_us: f64,
}

/// A trace being made.
#[derive(Debug)]
pub(super) struct Recording {
    pub(super) trace: Trace,
    start_ns: u64,
}

impl Recording {
    /// `caller`: the caller's span, if the caller has begun the trace.
    pub(super) fn begin(func_name: &str, caller: Option<Caller>) -> Recording {
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let root = Span {
            name: "invocation".into(),
            parent: None,
            start_us: 0.0,
            length_us: 0.0,
            attributes: BTreeMap::new(),
        };
        let trace = Trace {
            is_sampled: caller.as_ref().is_none_or(|caller| caller.is_sampled),
            trace_id: caller.as_ref().map_or_else(|| random_hex(16), |caller| caller.trace_id.clone()),
            span_id: random_hex(8),
            parent_span_id: caller.map(|caller| caller.span_id),
            func_name: func_name.to_string(),
            vm_id: None,
            status: 200,
            start_unix_us: since_epoch.as_micros() as u64,
            complete: false,
            spans: vec![root],
        };
        Recording { trace, start_ns: clock::monotonic_ns() }
    }

    /// Adds a part of the span `parent`. Returns its index.
    pub(super) fn span(&mut self, name: &str, parent: usize, start_ns: u64, end_ns: u64) -> usize {
        let start_us = (start_ns as f64 - self.start_ns as f64) / 1000.0;
        let length_us = end_ns.saturating_sub(start_ns) as f64 / 1000.0;
        let name = name.to_string();
        let attributes = BTreeMap::new();
        self.trace.spans.push(Span { name, parent: Some(parent), start_us, length_us, attributes });
        self.trace.spans.len() - 1
    }

    /// Adds a part of the span `parent` that began at `start_ns` and ends now.
    pub(super) fn lap(&mut self, name: &str, parent: usize, start_ns: u64) -> usize {
        self.span(name, parent, start_ns, clock::monotonic_ns())
    }

    pub(super) fn note(&mut self, span: usize, key: &str, value: Value) {
        if let Some(span) = self.trace.spans.get_mut(span) {
            span.attributes.insert(key.to_string(), value);
        }
    }

    /// Ends the trace with the answer's status. Returns its length, µs.
    pub(super) fn answered(&mut self, status: u16) -> u64 {
        let length_us = clock::monotonic_ns().saturating_sub(self.start_ns) as f64 / 1000.0;
        self.trace.status = status;
        if let Some(root) = self.trace.spans.first_mut() {
            root.length_us = length_us;
        }
        length_us.round() as u64
    }

    /// A copy of the recording, to continue elsewhere.
    pub(super) fn taken(&self) -> Recording {
        Recording { trace: self.trace.clone(), start_ns: self.start_ns }
    }

    /// Adds the spans of the VM's report. `parent`: the span in which it was made; `execute`: that of the request.
    pub(super) fn add_report(&mut self, report: &Value, parent: usize, execute: usize) {
        let begin_ns = report["start_monotonic_ns"].as_u64().unwrap_or(0);
        let list = |key: &str| report[key].as_array().map(Vec::as_slice).unwrap_or_default();
        // Clipped to the trace: the time in which a shell was made ready costs no invocation.
        let earliest_ns = self.start_ns;
        let times = |part: &Value| {
            let start_ns = begin_ns + (part["start_us"].as_f64()? * 1000.0) as u64;
            let length_ns = (part["length_us"].as_f64()? * 1000.0) as u64;
            (start_ns >= earliest_ns).then_some((start_ns, start_ns + length_ns))
        };
        for slice in list("slices") {
            let (Some(name), Some((start_ns, end_ns))) = (slice["slice"].as_str(), times(slice)) else { continue };
            let is_output = matches!(name, "first_response" | "execute");
            self.span(name, if is_output { execute } else { parent }, start_ns, end_ns);
        }
        let asked_us = self.trace.spans.get(execute).map_or(0.0, |execute| execute.start_us);
        for batch in list("fault_batches") {
            let Some((start_ns, end_ns)) = times(batch) else { continue };
            // The restore itself touches pages, and the guest does before its request.
            let is_early = ((start_ns - earliest_ns) as f64) < asked_us * 1000.0;
            let span = self.span("faults", if is_early { parent } else { execute }, start_ns, end_ns);
            for key in ["faults", "pages"] {
                self.note(span, key, batch[key].clone());
            }
        }
        for key in ["fault_ins", "memory"] {
            if !report[key].is_null() {
                self.note(execute, key, report[key].clone());
            }
        }
        if !report["restore"].is_null() {
            self.note(parent, "policy", report["restore"]["policy"].clone());
            self.note(parent, "plan", report["restore"]["plan"].clone());
            self.note(parent, "engine", report["restore"]["engine"].clone());
        }
    }
}

impl Trace {
    fn summary(&self) -> TraceSummary {
        TraceSummary {
            trace_id: self.trace_id.clone(),
            span_id: self.span_id.clone(),
            func_name: self.func_name.clone(),
            vm_id: self.vm_id.clone(),
            status: self.status,
            start_unix_us: self.start_unix_us,
            length_us: self.spans.first().map_or(0.0, |root| root.length_us),
        }
    }

    /// Events of Chrome's trace format. Each trace is a separate thread.
    pub(super) fn chrome_events(&self) -> Vec<Value> {
        let thread = u32::from_str_radix(self.trace_id.get(..6).unwrap_or_default(), 16).unwrap_or(0);
        let event = |span: &Span| {
            let times = [self.start_unix_us as f64 + span.start_us, span.length_us];
            let mut event = chrome_event(&span.name, &self.func_name, std::process::id(), times);
            event["tid"] = json!(thread);
            event["args"] = json!(span.attributes);
            event
        };
        let mut events: Vec<Value> = self.spans.iter().map(event).collect();
        if let Some(root) = events.first_mut() {
            root["args"]["traceId"] = json!(self.trace_id);
            root["args"]["vmId"] = json!(self.vm_id);
            root["args"]["status"] = json!(self.status);
        }
        events
    }
}

/// The last traces, and the file for all of them.
#[derive(Debug)]
pub(super) struct Traces {
    kept: Mutex<VecDeque<Arc<Trace>>>,
    completed: Notify,
    file: Option<SyncSender<String>>,
    /// Traces that are missing in the file.
    pub(super) lost: Arc<AtomicU64>,
    /// To the collector.
    pub(super) exporter: Option<Exporter>,
}

impl Traces {
    /// `path`: a new file in Chrome's trace format. `collector`: the address of an OpenTelemetry collector.
    pub(super) fn new(path: Option<&Path>, collector: Option<&str>) -> Result<Traces, ServeError> {
        let lost = Arc::new(AtomicU64::new(0));
        let file = path.map(|path| start_file(path, lost.clone())).transpose()?;
        let exporter = collector.map(Exporter::start).transpose()?;
        Ok(Traces { kept: Mutex::default(), completed: Notify::new(), file, lost, exporter })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Trace>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a trace for readers. Its VM's spans may come later, by [`Traces::complete`].
    pub(super) fn keep(&self, trace: Trace) {
        let mut kept = self.kept();
        kept.push_back(Arc::new(trace));
        let too_many = kept.len().saturating_sub(MAX_TRACES);
        kept.drain(..too_many);
    }

    /// Replaces a kept trace by its complete form.
    pub(super) fn complete(&self, mut trace: Trace) {
        trace.complete = true;
        if let Some(file) = &self.file {
            let lines: String = trace.chrome_events().iter().map(|event| format!("{event},\n")).collect();
            if file.try_send(lines).is_err() {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        let trace = Arc::new(trace);
        if let Some(exporter) = self.exporter.as_ref().filter(|_| trace.is_sampled) {
            let trace = trace.clone();
            exporter.send(move || trace.exported());
        }
        let mut kept = self.kept();
        // A caller's trace may have many invocations.
        if let Some(place) = kept.iter_mut().rev().find(|kept| kept.span_id == trace.span_id) {
            *place = trace;
        }
        drop(kept);
        self.completed.notify_waiters();
    }

    /// Finds a trace by the id of its first span, or by its own: then the newest, if a caller's trace has several
    /// invocations.
    fn find(&self, id: &str) -> Option<Arc<Trace>> {
        self.kept().iter().rev().find(|trace| trace.span_id == id || trace.trace_id == id).cloned()
    }

    /// Waits for a trace to be complete, within a limit.
    pub(super) async fn wait_for(&self, id: &str) -> Option<Arc<Trace>> {
        let complete = async {
            loop {
                let mut completed = std::pin::pin!(self.completed.notified());
                completed.as_mut().enable();
                match self.find(id) {
                    Some(trace) if !trace.complete => completed.await,
                    found => return found,
                }
            }
        };
        tokio::time::timeout(COMPLETION, complete).await.unwrap_or_else(|_| self.find(id))
    }

    /// The last traces, the newest first.
    pub(super) fn summaries(&self, count: usize) -> Vec<TraceSummary> {
        self.kept().iter().rev().take(count).map(|trace| trace.summary()).collect()
    }
}

/// Writes lines to the trace file on its own thread: no invocation waits for its disk.
fn start_file(path: &Path, lost: Arc<AtomicU64>) -> Result<SyncSender<String>, ServeError> {
    let failed = |source| ServeError::TraceFile { path: path.to_owned(), source };
    let mut file = overwrite_private(path).map_err(failed)?;
    // The format's array may lack its end, so the file of a killed process can be read.
    file.write_all(b"[\n").map_err(failed)?;
    let (sender, lines) = sync_channel::<String>(MAX_WAITING);
    let path = path.to_owned();
    let write = move || {
        for text in lines {
            if let Err(error) = file.write_all(text.as_bytes()) {
                tracing::warn!(%error, path = %path.display(), "Cannot write a trace");
                lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    std::thread::Builder::new().name("traces".into()).spawn(write).map_err(failed)?;
    Ok(sender)
}
