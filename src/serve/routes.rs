//! All paths, and the OpenAPI document made from them.

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, Method, StatusCode, Uri, header};
use axum::response::{Html, IntoResponse};
use serde_json::{Value, json};
use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, ParameterIn};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, Ref, RefOr, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::access::right::{Right, required};
use super::access::role::Role;
use super::daemon::Shared;
use super::fault::{Fault, Reply};
use super::working_set::{mincore, profile, reap};
use super::{forks, functions, invocations, metrics, networks, rewinds, snapshots, traces, vms};

#[derive(OpenApi)]
#[openapi(info(
    title = "tvmm serve",
    description = "Functions in microVMs, restored from snapshots by policy. Resources are FaaSnap's, with tvmm's \
                   added."
))]
struct ApiDoc;

/// Every documented path, with its handler.
fn documented() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(ApiDoc::openapi())
        .routes(routes!(functions::get_functions, functions::post_function))
        .routes(routes!(functions::get_function, functions::delete_function))
        .routes(routes!(vms::get_vms, vms::post_vm))
        .routes(routes!(vms::get_vm, vms::delete_vm))
        .routes(routes!(vms::get_report))
        .routes(routes!(rewinds::post_rewind))
        .routes(routes!(forks::post_fork))
        .routes(routes!(vms::post_vmm))
        .routes(routes!(vms::get_policies))
        .routes(routes!(snapshots::get_snapshots, snapshots::post_snapshot, snapshots::copy_snapshot))
        .routes(routes!(snapshots::get_snapshot, snapshots::patch_snapshot, snapshots::delete_snapshot))
        .routes(routes!(mincore::get_mincore, mincore::put_mincore, mincore::post_mincore, mincore::patch_mincore))
        .routes(routes!(reap::get_reap, reap::patch_reap, reap::delete_reap))
        .routes(routes!(profile::get_profile, profile::post_profile, profile::put_profile, profile::delete_profile))
        .routes(routes!(profile::get_plan))
        .routes(routes!(networks::get_networks))
        .routes(routes!(networks::get_network, networks::put_network, networks::delete_network))
        .routes(routes!(invocations::post_invocation))
        .routes(routes!(traces::get_traces))
        .routes(routes!(traces::get_trace))
        .routes(routes!(metrics::get_metrics))
        .routes(routes!(get_ui))
        .routes(routes!(get_ui_data))
        .routes(routes!(get_openapi))
        .routes(routes!(get_health))
}

/// The OpenAPI 3.1 document.
pub fn openapi() -> String {
    let (_, mut document) = documented().split_for_parts();
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in [
            (Method::GET, &mut item.get),
            (Method::PUT, &mut item.put),
            (Method::POST, &mut item.post),
            (Method::PATCH, &mut item.patch),
            (Method::DELETE, &mut item.delete),
        ] {
            let Some(operation) = operation else { continue };
            add_refusals(operation);
            add_right(operation, required(&method, path));
        }
    }
    let mut scheme = Http::new(HttpAuthScheme::Bearer);
    scheme.description = Some("A token of the file of --tokens; without that option, no token is needed".to_string());
    document.components.get_or_insert_default().add_security_scheme(SCHEME, SecurityScheme::Http(scheme));
    // The document's keys are all strings.
    let mut text = document.to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

/// The name of the security scheme in the document.
const SCHEME: &str = "token";

/// Adds the role that an operation needs, and the refusals of requests without it.
fn add_right(operation: &mut Operation, right: Right) {
    let needed = |role: Role| SecurityRequirement::new(SCHEME, [role.name()]);
    let security = match right {
        Right::Open => Vec::new(),
        // The empty requirement: clients on the same host need no token.
        Right::Metrics => vec![SecurityRequirement::default(), needed(Role::Invoke)],
        Right::Role(role) => vec![needed(role)],
    };
    operation.security = Some(security);
    if right != Right::Open {
        add_refusal(operation, "401", "The request has no token, or an unknown one");
        add_refusal(operation, "429", "The token has made as many requests as it may: try again later");
        add_refusal(operation, "503", "The audit log cannot be written");
    }
    if let Right::Role(Role::Operate | Role::Admin) = right {
        add_refusal(operation, "403", "The token has a smaller role");
    }
}

/// Adds a refusal, unless the operation describes this status itself.
fn add_refusal(operation: &mut Operation, status: &str, description: &str) {
    let fault = Content::new(Some(Ref::from_schema_name("FaultBody")));
    let response = ResponseBuilder::new().description(description).content("application/json", fault).build();
    operation.responses.responses.entry(status.to_string()).or_insert_with(|| response.into());
}

/// The refusals that any body and any query can get (`body.rs`).
fn add_refusals(operation: &mut Operation) {
    let has_body = operation.request_body.is_some();
    let has_query = operation
        .parameters
        .iter()
        .flatten()
        .any(|one| matches!(one, RefOr::T(one) if one.parameter_in == ParameterIn::Query));
    for (status, description) in [
        ("400", "The request is invalid"),
        ("408", "The body was not received in time"),
        ("413", "The body is too large"),
        ("415", "The body does not say that it is JSON"),
    ] {
        let is_possible = has_body || (has_query && status == "400");
        if is_possible {
            add_refusal(operation, status, description);
        }
    }
}

/// The whole service.
pub(super) fn router(daemon: Shared) -> Router {
    let (router, _) = documented().split_for_parts();
    router.fallback(unknown).method_not_allowed_fallback(not_allowed).with_state(daemon)
}

async fn unknown(uri: Uri) -> Fault {
    Fault::new(StatusCode::NOT_FOUND, format!("There is no path `{}`: see /openapi.json.", uri.path()))
}

async fn not_allowed(method: Method, uri: Uri) -> Fault {
    let message = format!("`{}` does not take {method}: see /openapi.json.", uri.path());
    Fault::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "service",
    responses((status = 200, description = "The document (OpenAPI 3.1)", body = Object)))]
async fn get_openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi())
}

/// Tells that the service runs. It needs no token.
#[utoipa::path(get, path = "/health", tag = "service",
    responses((status = 200, description = "The service runs", body = Object)))]
async fn get_health() -> Reply<Value> {
    Reply(json!({ "status": "ok" }))
}

/// Headers of the page: it loads nothing from elsewhere, asks only this service, and is shown in no other page.
const PAGE_HEADERS: [(HeaderName, &str); 3] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
];

/// A page that shows functions, VMs with the place of their memory, and recent traces. It has no data of its own, and
/// asks for a token if the service needs one.
#[utoipa::path(get, path = "/ui", tag = "service",
    responses((status = 200, description = "The page", body = String, content_type = "text/html")))]
async fn get_ui() -> impl IntoResponse {
    (PAGE_HEADERS, Html(include_str!("ui.html")))
}

/// VMs whose memory the page shows.
const VMS_SHOWN: usize = 32;
/// Traces and ended VMs that it shows.
const RECENT: usize = 20;

/// The data of the page.
#[utoipa::path(get, path = "/ui/data", tag = "service",
    responses((status = 200, description = "The data of the page", body = Object)))]
async fn get_ui_data(State(daemon): State<Shared>) -> Reply<Value> {
    let (running, queued) = daemon.gate.load();
    let living = daemon.vms.all();
    let mut records: Vec<Value> = Vec::new();
    for record in daemon.vms.records().into_iter().take(living.len() + RECENT) {
        records.push(json!(record));
    }
    // One after the other: each VM answers at once or not at all.
    for (vm, record) in living.iter().zip(&mut records).take(VMS_SHOWN) {
        if let Ok(report) = vm.report().await {
            record["memory"] = report["memory"].clone();
            record["planned_pages"] = report["restore"]["engine"]["planned"].clone();
            record["fault_ins"] = report["fault_ins"].clone();
        }
    }
    let mut functions = Vec::new();
    let known: Vec<_> = daemon.functions().values().cloned().collect();
    for function in known {
        functions.push(functions::state_of(&daemon, function).await);
    }
    let limits = &daemon.options.limits;
    let taken = daemon.vms.taken();
    Reply(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "load": {
            "running": running, "max_running": limits.max_running, "queued": queued, "max_queue": limits.max_queue,
            "vms": taken.vms, "max_vms": limits.max_vms,
            "memory_mib": taken.memory_mib, "max_memory_mib": limits.memory_mib,
            "shells": daemon.shells.len(), "spares": daemon.vms.spares(),
            "suspended_bytes": daemon.vms.suspended.bytes(), "suspend_disk_mib": limits.suspend_disk_mib,
        },
        "functions": functions,
        "snapshots": daemon.snapshots().values().cloned().collect::<Vec<_>>(),
        "vms": records,
        "traces": daemon.traces.summaries(RECENT),
    }))
}
