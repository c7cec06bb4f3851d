//! Traces as OpenTelemetry's spans.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanLinks};
use serde_json::Value;

use super::trace::{Span, Trace};

/// The spans of a trace, the first first.
pub fn of(trace: Trace) -> Vec<SpanData> {
    let ids = RandomIdGenerator::default();
    let drawn = (1..trace.spans.len()).map(|_| ids.new_span_id());
    let ids: Vec<SpanId> = std::iter::once(SpanId::from(trace.root_id)).chain(drawn).collect();
    let status = trace.error.map_or(Status::Unset, Status::error);
    let trace_id = TraceId::from(trace.trace_id);
    let scope = InstrumentationScope::builder("tvmm").with_version(env!("CARGO_PKG_VERSION")).build();
    let span = |(index, span): (usize, Span)| {
        let start_time = at(trace.begun, span.start_ns);
        let is_root = index == 0;
        let caller = trace.caller_id.filter(|_| index == 0);
        let parent = span.parent.and_then(|parent| ids.get(parent).copied()).or(caller.map(SpanId::from));
        SpanData {
            span_context: SpanContext::new(trace_id, ids[index], TraceFlags::SAMPLED, false, TraceState::default()),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: caller.is_some(),
            span_kind: if is_root && trace.is_request { SpanKind::Server } else { SpanKind::Internal },
            name: span.name.into(),
            start_time,
            end_time: start_time + Duration::from_nanos(span.length_ns),
            attributes: span.attributes.iter().flat_map(|(key, value)| attributes(key, value)).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: if is_root { status.clone() } else { Status::Unset },
            instrumentation_scope: scope.clone(),
        }
    };
    trace.spans.into_iter().enumerate().map(span).collect()
}

fn at(begun: SystemTime, offset_ns: i64) -> SystemTime {
    let offset = Duration::from_nanos(offset_ns.unsigned_abs());
    if offset_ns < 0 { begun - offset } else { begun + offset }
}

/// Objects as one attribute for each of their values; lists as text; null as nothing.
fn attributes(key: &str, value: &Value) -> Vec<KeyValue> {
    let key = key.to_string();
    match value {
        Value::Null => Vec::new(),
        Value::Bool(flag) => vec![KeyValue::new(key, *flag)],
        Value::Number(number) => vec![match number.as_i64() {
            Some(integer) => KeyValue::new(key, integer),
            None => KeyValue::new(key, number.as_f64().unwrap_or(f64::NAN)),
        }],
        Value::String(text) => vec![KeyValue::new(key, text.clone())],
        Value::Array(_) => vec![KeyValue::new(key, value.to_string())],
        Value::Object(map) => {
            map.iter().flat_map(|(name, value)| attributes(&format!("{key}.{name}"), value)).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn objects_become_dotted_attributes() {
        let value = json!({ "a": 1, "b": { "c": "x", "d": null, "e": [1, 2] }, "f": 0.5, "g": true });
        let mut found: Vec<String> =
            attributes("k", &value).iter().map(|pair| format!("{}={}", pair.key, pair.value.as_str())).collect();
        found.sort();
        assert_eq!(found, ["k.a=1", "k.b.c=x", "k.b.e=[1,2]", "k.f=0.5", "k.g=true"]);
    }

    #[test]
    fn spans_may_begin_before_the_trace() {
        let span = |parent, start_ns| Span { name: "s".into(), parent, start_ns, length_ns: 5, attributes: Vec::new() };
        let begun = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
        let trace = Trace {
            trace_id: 7,
            root_id: 3,
            caller_id: Some(4),
            is_request: true,
            begun,
            error: Some("no".into()),
            spans: vec![span(None, 0), span(Some(0), -10)],
        };
        let spans = of(trace);
        assert_eq!(spans[0].parent_span_id, SpanId::from(4));
        assert_eq!((spans[0].status.clone(), spans[1].status.clone()), (Status::error("no"), Status::Unset));
        assert_eq!(spans[1].parent_span_id, spans[0].span_context.span_id());
        assert_eq!(spans[1].start_time, begun - Duration::from_nanos(10));
        assert_eq!(spans[1].end_time, begun - Duration::from_nanos(5));
    }
}
