//! Spans for an OpenTelemetry collector (`--otlp`): the parts of a trace, sending, and the count of lost traces.
//!
//! Builds without the feature `otel` know the nouns and refuse the address.

#[cfg(feature = "otel")]
mod export;
#[cfg(feature = "otel")]
mod spans;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
#[cfg(not(feature = "otel"))]
use std::time::Duration;
use std::time::SystemTime;

use serde_json::Value;

#[cfg(feature = "otel")]
pub use export::Exporter;

/// The refusal of a build without OpenTelemetry.
#[cfg(not(feature = "otel"))]
const NO_OTEL: &str = "this build of tvmm has no OpenTelemetry: build it with `cargo build --release --features otel`";
/// The path that OTLP/HTTP gives traces ("OTLP/HTTP Request", OpenTelemetry Protocol Specification).
const TRACES_PATH: &str = "/v1/traces";

/// The reason why traces cannot be sent to an address.
#[derive(Debug, thiserror::Error)]
#[error("Traces cannot be sent to {url}: {problem}")]
pub struct Unusable {
    pub url: String,
    pub problem: String,
}

/// An action that took time.
#[derive(Clone, Debug)]
pub struct Span {
    pub name: String,
    /// Index of the span it is part of; `None` for the whole trace.
    pub parent: Option<usize>,
    /// ns since the trace began; spans of another process may begin earlier.
    pub start_ns: i64,
    pub length_ns: u64,
    /// Objects become one attribute for each number or text in them, `a.b`.
    pub attributes: Vec<(String, Value)>,
}

/// The spans of one operation.
#[derive(Clone, Debug)]
pub struct Trace {
    pub trace_id: u128,
    /// The id of the first span; those of the others are random.
    pub root_id: u64,
    /// The caller's span that the first one is part of.
    pub caller_id: Option<u64>,
    /// True if the first span answers a request.
    pub is_request: bool,
    pub begun: SystemTime,
    /// The error, if the operation failed.
    pub error: Option<String>,
    pub spans: Vec<Span>,
}

/// Counts of the traces so far.
#[derive(Debug, Default)]
pub struct Counts {
    sent: AtomicU64,
    lost: AtomicU64,
    why: Mutex<String>,
}

impl Counts {
    /// Traces that the collector took.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Traces that the collector did not take: it does not answer, it refused them, or too many were waiting.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The reason of the last loss; empty if there was none.
    pub fn why(&self) -> String {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The collector's address, checked: `http://HOST[:PORT]`, with the path of traces if none is given.
///
/// # Errors
/// The fault of the address, or of this build.
pub fn endpoint(url: &str) -> Result<String, Unusable> {
    let wrong = |problem: &str| Unusable { url: url.to_string(), problem: problem.to_string() };
    #[cfg(not(feature = "otel"))]
    if url.starts_with("http") {
        return Err(wrong(NO_OTEL));
    }
    let Some(rest) = url.strip_prefix("http://") else {
        return Err(wrong(
            "the address must be like http://HOST:4318 (for TLS, run a collector on this host and have it forward)",
        ));
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    if !rest.bytes().all(|byte| byte.is_ascii_graphic())
        || authority.is_empty()
        || authority.starts_with(':')
        || port.is_some_and(|port| port.parse::<u16>().is_err())
    {
        return Err(wrong("it is not like http://HOST:PORT or http://HOST:PORT/v1/traces"));
    }
    let path = if path.trim_matches('/').is_empty() { TRACES_PATH } else { path };
    Ok(format!("http://{authority}{path}"))
}

/// A build without OpenTelemetry has no exporter.
#[cfg(not(feature = "otel"))]
#[derive(Debug)]
pub enum Exporter {}

#[cfg(not(feature = "otel"))]
impl Exporter {
    /// Always fails in this build.
    ///
    /// # Errors
    /// [`Unusable`], with the missing feature.
    pub fn start(url: &str) -> Result<Exporter, Unusable> {
        let url = endpoint(url)?;
        Err(Unusable { url, problem: NO_OTEL.to_string() })
    }

    /// Sends nothing.
    pub fn send(&self, _: impl FnOnce() -> Trace + Send + 'static) {
        match *self {}
    }

    /// The results of sending so far.
    pub fn counts(&self) -> &Counts {
        match *self {}
    }

    /// There is nothing to wait for.
    pub fn finish(&self, _: Duration) {
        match *self {}
    }
}
