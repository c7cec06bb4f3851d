//! Traces of invocations in a collector's form.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::trace::{Span, Trace};
use crate::sys::otlp;

impl Trace {
    /// This trace for a collector. Attributes have OpenTelemetry's names if it defines them, else names with `tvmm.`.
    pub(super) fn exported(&self) -> otlp::Trace {
        let mut spans: Vec<otlp::Span> = self.spans.iter().map(exported).collect();
        let root = &self.spans.first().map(|root| &root.attributes);
        let message = root.and_then(|attributes| attributes.get("message")).and_then(Value::as_str);
        if let Some(root) = spans.first_mut() {
            root.attributes.extend([
                ("http.request.method".to_string(), json!("POST")),
                ("http.route".to_string(), json!("/invocations")),
                ("http.response.status_code".to_string(), json!(self.status)),
                ("tvmm.func_name".to_string(), json!(self.func_name)),
                ("tvmm.vm_id".to_string(), json!(self.vm_id)),
            ]);
        }
        // The ids come from random_hex, or were checked on arrival.
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
        otlp::Trace {
            trace_id: u128::from_str_radix(&self.trace_id, 16).unwrap_or(0),
            root_id: hex(&self.span_id),
            caller_id: self.parent_span_id.as_deref().map(hex),
            is_request: true,
            begun: UNIX_EPOCH + Duration::from_micros(self.start_unix_us),
            // A client's error is no failure of the service (semantic conventions for HTTP servers).
            error: (self.status >= 500).then(|| message.unwrap_or_default().to_string()),
            spans,
        }
    }
}

fn exported(span: &Span) -> otlp::Span {
    otlp::Span {
        name: span.name.clone(),
        parent: span.parent,
        start_ns: (span.start_us * 1000.0) as i64,
        length_ns: (span.length_us * 1000.0) as u64,
        attributes: span.attributes.iter().map(|(key, value)| (format!("tvmm.{key}"), value.clone())).collect(),
    }
}
