//! `/traces`: the last traces, and one with its spans.

use axum::extract::{Path, State};
use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::body::query;
use super::daemon::Shared;
use super::fault::{Fault, FaultBody, Reply};
use super::trace::{MAX_TRACES, Trace, TraceSummary};

/// The last traces, the newest first.
#[utoipa::path(get, path = "/traces", tag = "traces",
    responses((status = 200, description = "The last traces, the newest first", body = Vec<TraceSummary>)))]
pub(super) async fn get_traces(State(daemon): State<Shared>) -> Reply<Vec<TraceSummary>> {
    Reply(daemon.traces.summaries(MAX_TRACES))
}

/// One trace with its spans: by its `spanId`, or by its `traceId`, which invocations of one caller may share (the
/// newest then).
#[utoipa::path(get, path = "/traces/{id}", tag = "traces",
    params(("id" = String, Path), ("format" = Option<String>, Query, description = "`chrome`: Chrome's trace format")),
    responses((status = 200, description = "The trace with its spans", body = Trace),
        (status = 400, body = FaultBody, description = "The format is unknown"),
        (status = 404, body = FaultBody, description = "The trace does not exist, or is no longer kept")))]
pub(super) async fn get_trace(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Response, Fault> {
    let query = query(&uri, &["format"])?;
    let trace = daemon.traces.wait_for(&id).await.ok_or_else(|| Fault::not_found("trace", &id))?;
    match query.get("format").map(String::as_str) {
        None | Some("json") => Ok(Reply(&*trace).into_response()),
        Some("chrome") => Ok(Reply(json!({ "traceEvents": trace.chrome_events() })).into_response()),
        Some(other) => Err(Fault::bad(format!("Unknown format `{other}`; known: json, chrome."))),
    }
}
