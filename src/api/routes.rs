//! The paths of the API: the bodies and commands of each, and the form of the answers.

use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{FromRequest, Path, Request as HttpRequest, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, any, get, patch, put};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::sync::oneshot;

use super::devices::{self, ParseAt};
use super::fault::{Fault, json_response};
use super::requests::{self, Parse, Parsed};
use crate::config::control::{ControlSender, Reply, Request};
use crate::config::patch::BalloonQuestion;
use crate::config::refusal::Refused;
use crate::config::request::Command;
use crate::config::unbuilt_section_error;

/// The largest body (Firecracker's default).
pub(super) const MAX_BODY_BYTES: usize = 51_200;
/// Time for a client to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Firecracker's paths for devices that tvmm does not have, each with its section of the config.
const UNBUILT_PATHS: &[(&str, &str)] =
    &[("/hotplug/memory", "memory-hotplug"), ("/mmds", "mmds-config"), ("/mmds/config", "mmds-config")];

/// The whole API.
pub(super) fn router(control: ControlSender) -> Router {
    let mut router = Router::new()
        .route("/", reads(|| Command::InstanceInfo))
        .route("/version", reads(|| Command::Version))
        .route("/vm/config", reads(|| Command::GetVmConfig))
        .route(
            "/machine-config",
            reads(|| Command::GetMachineConfig)
                .merge(puts(requests::put_machine_config))
                .merge(patches(requests::patch_machine_config)),
        )
        .route("/boot-source", puts(requests::put_boot_source))
        .route("/cpu-config", puts(requests::put_cpu_config))
        .route("/logger", puts(requests::put_logger))
        .route("/metrics", puts(requests::put_metrics))
        .route("/actions", puts(requests::put_actions))
        .route("/drives/{id}", puts_at(devices::put_drive).merge(patches_at(devices::patch_drive)))
        .route("/network-interfaces/{id}", puts_at(devices::put_network).merge(patches_at(devices::patch_network)))
        .route("/pmem/{id}", puts_at(devices::put_pmem).merge(patches_at(devices::patch_pmem)))
        .route("/vsock", puts(devices::put_vsock))
        .route("/entropy", puts(devices::put_entropy))
        .route(
            "/balloon",
            reads(|| Command::AskBalloon(BalloonQuestion::Config))
                .merge(puts(devices::put_balloon))
                .merge(patches(devices::patch_balloon)),
        )
        .route(
            "/balloon/statistics",
            reads(|| Command::AskBalloon(BalloonQuestion::Statistics))
                .merge(patches(devices::patch_balloon_statistics)),
        )
        .route("/balloon/hinting/status", reads(|| Command::AskBalloon(BalloonQuestion::Hinting)))
        .route("/balloon/hinting/start", asks(devices::start_hinting))
        .route("/balloon/hinting/stop", asks(devices::stop_hinting))
        .route("/vm", patches(requests::patch_vm))
        .route("/snapshot/create", puts(requests::put_snapshot_create))
        .route("/snapshot/load", puts(requests::put_snapshot_load))
        .route("/tvmm/report", reads(|| Command::Report))
        .route("/tvmm/rewind", puts(requests::put_rewind))
        .route("/tvmm/demote", puts(requests::put_demote))
        .route("/tvmm/barrier", puts(requests::put_barrier))
        .route("/tvmm/fork", puts(requests::put_fork))
        .route("/tvmm/vacate", puts(requests::put_vacate))
        .route("/tvmm/repurpose", puts(requests::put_repurpose))
        .route("/serial", any(async || Fault::bad_request("Setting up serial output is not supported yet.")));
    for (path, section) in UNBUILT_PATHS {
        if let Some(error) = unbuilt_section_error(section) {
            let fault = Fault::from(error);
            router = router.route(path, any(async move || fault));
        }
    }
    router.fallback(unknown).method_not_allowed_fallback(unknown).with_state(control)
}

/// Firecracker's sentence: clients match it.
async fn unknown(method: Method, uri: Uri) -> Fault {
    let path = uri.path().trim_start_matches('/');
    Fault::bad_request(format!("Invalid request method and/or path: {method} {path}."))
}

fn reads(command: fn() -> Command) -> MethodRouter<ControlSender> {
    let handler = async move |State(control): State<ControlSender>, method: Method, uri: Uri, body: Body| {
        // `get` answers HEAD too, which Firecracker does not know.
        if method != Method::GET {
            return unknown(method, uri).await.into_response();
        }
        if !body.0.is_empty() {
            return Fault::bad_request("GET request cannot have a body.").into_response();
        }
        answer(&control, Ok(command().into())).await
    };
    get(handler)
}

fn puts(parse: Parse) -> MethodRouter<ControlSender> {
    put(async move |State(control): State<ControlSender>, body: Body| {
        answer(&control, body.parsed_by(parse, "PUT")).await
    })
}

fn patches(parse: Parse) -> MethodRouter<ControlSender> {
    patch(async move |State(control): State<ControlSender>, body: Body| {
        answer(&control, body.parsed_by(parse, "PATCH")).await
    })
}

/// A PATCH whose body may be left out.
fn asks(parse: Parse) -> MethodRouter<ControlSender> {
    patch(async move |State(control): State<ControlSender>, body: Body| answer(&control, parse(&body.0)).await)
}

fn puts_at(parse: ParseAt) -> MethodRouter<ControlSender> {
    put(async move |State(control): State<ControlSender>, Path(id): Path<String>, body: Body| {
        answer(&control, body.parsed_by(|body| parse(&id, body), "PUT")).await
    })
}

fn patches_at(parse: ParseAt) -> MethodRouter<ControlSender> {
    patch(async move |State(control): State<ControlSender>, Path(id): Path<String>, body: Body| {
        answer(&control, body.parsed_by(|body| parse(&id, body), "PATCH")).await
    })
}

/// The body of a request, received whole within the limits of size and time.
struct Body(Bytes);

impl Body {
    fn parsed_by(&self, parse: impl FnOnce(&[u8]) -> Result<Parsed, Fault>, method: &str) -> Result<Parsed, Fault> {
        if self.0.is_empty() {
            return Err(Fault::bad_request(format!("Empty {method} request.")));
        }
        parse(&self.0)
    }
}

impl<S: Sync> FromRequest<S> for Body {
    type Rejection = Fault;

    async fn from_request(request: HttpRequest, _: &S) -> Result<Self, Fault> {
        let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
        match tokio::time::timeout(BODY_TIMEOUT, body).await {
            Ok(Ok(body)) => Ok(Self(body.to_bytes())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Fault::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("Request body is larger than {MAX_BODY_BYTES} bytes."),
            )),
            Ok(Err(error)) => Err(Fault::bad_request(format!("Cannot read the request body: {error}."))),
            Err(_) => Err(Fault::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("Request body was not received within {} s.", BODY_TIMEOUT.as_secs()),
            )),
        }
    }
}

/// Asks the machine and turns its reply into an answer.
async fn answer(control: &ControlSender, parsed: Result<Parsed, Fault>) -> Response {
    let Parsed { command, is_deprecated } = match parsed {
        Ok(parsed) => parsed,
        Err(fault) => return fault.into_response(),
    };
    tracing::debug!(?command, "API request was received.");
    // Firecracker's clients expect no body; only a request for a snapshot directory is answered with its contents.
    let tells_snapshot = matches!(&command, Command::CreateSnapshot(create) if create.location.memory.is_none());
    let mut response = match ask(control, command).await {
        Ok(Reply::Snapshot(_)) if !tells_snapshot => StatusCode::NO_CONTENT.into_response(),
        Ok(reply) => told(&reply),
        Err(fault) => fault.into_response(),
    };
    if is_deprecated {
        response.headers_mut().insert("deprecation", HeaderValue::from_static("true"));
    }
    response
}

/// Sends a command to the machine and waits for its reply, however long the machine takes.
async fn ask(control: &ControlSender, command: Command) -> Result<Reply, Fault> {
    let (respond, reply) = oneshot::channel();
    // The client may have disconnected by the time the machine answers; then the answer is dropped.
    let respond = Box::new(move |reply| drop(respond.send(reply)));
    control.send(Request::new(command, respond))?;
    let gone = |_| Err(Refused::internal("The VMM ended before it answered."));
    Ok(reply.await.unwrap_or_else(gone)?)
}

fn told(reply: &Reply) -> Response {
    match reply {
        Reply::Empty => StatusCode::NO_CONTENT.into_response(),
        Reply::InstanceInfo(info) => json_response(StatusCode::OK, info),
        // Clients look for Firecracker's key; a key of tvmm's says whose version it is.
        Reply::Version(version) => {
            let body = serde_json::json!({ "firecracker_version": version, "tvmm_version": version });
            json_response(StatusCode::OK, &body)
        }
        Reply::MachineConfig(machine) => json_response(StatusCode::OK, machine),
        Reply::VmConfig(config) => json_response(StatusCode::OK, config),
        Reply::Balloon(said) | Reply::Report(said) => json_response(StatusCode::OK, said),
        Reply::Snapshot(snapshot) => json_response(StatusCode::OK, snapshot),
        Reply::Demoted(demoted) => json_response(StatusCode::OK, demoted),
        Reply::Barrier(barrier) => json_response(StatusCode::OK, barrier),
        Reply::Rewound(rewound) => json_response(StatusCode::OK, rewound),
        Reply::Forked(forked) => json_response(StatusCode::OK, forked),
        Reply::Repurposed(repurposed) => json_response(StatusCode::OK, repurposed),
    }
}
