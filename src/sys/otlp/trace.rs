//! A trace to be sent, and its spans.

use std::time::SystemTime;

use serde_json::Value;

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
