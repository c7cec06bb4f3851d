//! Spans for an OpenTelemetry collector (`--otlp`): what a trace is made of, where it goes, and how many did not get there.
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

/// What a build without OpenTelemetry says of collectors.
#[cfg(not(feature = "otel"))]
const NO_OTEL: &str = "this build of tvmm has no OpenTelemetry: build it with `cargo build --release --features otel`";
/// The path that OTLP/HTTP gives traces ("OTLP/HTTP Request", OpenTelemetry Protocol Specification).
const TRACES_PATH: &str = "/v1/traces";

/// Why traces cannot be sent there.
#[derive(Debug, thiserror::Error)]
#[error("Traces cannot be sent to {url}: {problem}")]
pub struct Unusable {
    pub url: String,
    pub problem: String,
}

/// Something that took time.
#[derive(Clone, Debug)]
pub struct Span {
    pub name: String,
    /// Index of the span it is part of; none: the whole.
    pub parent: Option<usize>,
    /// ns since the trace began; spans of another process may begin earlier.
    pub start_ns: i64,
    pub length_ns: u64,
    /// Objects become one attribute for each number or text in them, `a.b`.
    pub attributes: Vec<(String, Value)>,
}

/// What belongs together.
#[derive(Clone, Debug)]
pub struct Trace {
    pub trace_id: u128,
    /// The id of the first span; those of the others are drawn.
    pub root_id: u64,
    /// The span of the caller's that the first one is part of.
    pub caller_id: Option<u64>,
    /// True if the first span answers a request.
    pub is_request: bool,
    pub begun: SystemTime,
    /// What failed.
    pub error: Option<String>,
    pub spans: Vec<Span>,
}

/// What came of the traces so far.
#[derive(Debug, Default)]
pub struct Counts {
    sent: AtomicU64,
    lost: AtomicU64,
    why: Mutex<String>,
}

impl Counts {
    /// Traces that the collector has taken.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Traces that it has not: it does not answer, it refused them, or too many were waiting.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Why the last one was not; empty if there is none.
    pub fn why(&self) -> String {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The collector's address, checked: `http://HOST[:PORT]`, with the path of traces if none is given.
///
/// # Errors
/// What is wrong with it, or with this build.
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

/// A build without OpenTelemetry has none.
#[cfg(not(feature = "otel"))]
#[derive(Debug)]
pub enum Exporter {}

#[cfg(not(feature = "otel"))]
impl Exporter {
    /// # Errors
    /// Always: with what is missing.
    pub fn start(url: &str) -> Result<Exporter, Unusable> {
        let url = endpoint(url)?;
        Err(Unusable { url, problem: NO_OTEL.to_string() })
    }

    /// Sends nothing.
    pub fn send(&self, _: impl FnOnce() -> Trace + Send + 'static) {
        match *self {}
    }

    /// What came of the traces so far.
    pub fn counts(&self) -> &Counts {
        match *self {}
    }

    /// There is nothing to wait for.
    pub fn finish(&self, _: Duration) {
        match *self {}
    }
}
