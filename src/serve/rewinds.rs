//! `/vms/{id}/rewind`: takes a restored VM back to its snapshot, in place.

use axum::extract::{Path, State};

use super::body::Body;
use super::counters::RewindEnd;
use super::daemon::{Daemon, Shared};
use super::fault::{Fault, FaultBody, Reply};
use super::vm::Vm;
use super::wake;
use crate::config::control::Rewound;
use crate::config::request::RewindRequest;

/// Takes a VM back to the snapshot that it was restored from, between its requests. The VM runs on.
#[utoipa::path(post, path = "/vms/{id}/rewind", tag = "vms", params(("id" = String, Path)),
    request_body = Option<RewindRequest>,
    responses((status = 200, description = "The pages by the way they went back, and the time of each step",
        body = Rewound),
        (status = 404, body = FaultBody, description = "The VM does not exist"),
        (status = 409, body = FaultBody, description = "The VM has ended"),
        (status = 422, body = FaultBody,
        description = "The VM cannot be rewound (it was booted, or shares a drive that it can write), and runs on"),
        (status = 429, body = FaultBody, description = "Too many requests wait for the VM"),
        (status = 502, body = FaultBody, description = "The rewind failed, and the VM was ended")))]
pub(super) async fn post_rewind(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    body: Option<Body<Option<RewindRequest>>>,
) -> Result<Reply<Rewound>, Fault> {
    let request = body.and_then(|Body(request)| request).unwrap_or_default();
    // Once begun it is finished, whether or not the client waits.
    let task = tokio::spawn(async move {
        let claimed = wake::claim(&daemon, &id).await?;
        rewind(&daemon, claimed.using.vm(), request).await
    });
    task.await.unwrap_or_else(|_| Err(Fault::internal("The rewind was given up."))).map(Reply)
}

/// Rewinds a VM, and counts how that ended. A VM whose rewind failed is neither as it was nor its snapshot: it is
/// ended.
pub(super) async fn rewind(daemon: &Daemon, vm: &Vm, request: RewindRequest) -> Result<Rewound, Fault> {
    let error = match vm.rewind(request).await {
        Ok(rewound) => {
            daemon.counters.rewound(RewindEnd::Done);
            return Ok(rewound);
        }
        Err(error) => error,
    };
    if error.left_all_as_it_was() {
        daemon.counters.rewound(RewindEnd::Refused);
        return Err(error.fault(error.to_string()));
    }
    daemon.counters.rewound(RewindEnd::Failed);
    let why = error.to_string();
    let why = why.trim_end_matches('.');
    vm.life.stop_because(&format!("could not be rewound: {why}")).await;
    Err(Fault::bad_gateway(format!("Cannot rewind VM `{}`: {why}. The VM was ended.", vm.id)))
}
