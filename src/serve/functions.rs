//! `/functions`: the functions, and the machine of each.

use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::blocking::blocking;
use super::body::Body;
use super::daemon::{Daemon, Shared};
use super::fault::{Fault, FaultBody, Reply};
use super::function::Function;
use super::idle::{self, IdleState};
use super::repurpose_counts::RepurposeTally;
use super::standby;
use super::standby_counts::StandbyTally;
use super::store::Kind;

/// A function, its VMs that stand by or are idle, and its use of finished VMs' processes.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FunctionState {
    #[serde(flatten)]
    function: Function,
    /// Of a function with `standby`.
    #[serde(skip_serializing_if = "Option::is_none")]
    standby_state: Option<StandbyState>,
    /// Idle VMs, of a function whose VMs have a policy for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_state: Option<IdleState>,
    /// Processes of finished VMs that were there when the function needed a VM.
    repurposes: RepurposeTally,
}

/// The VMs of a function that stand by, and what has become of them since the daemon began.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StandbyState {
    /// VMs that stand by now.
    ready: usize,
    /// Local memory of these VMs, KiB.
    memory_kib: u64,
    /// The reason for which no VM is added, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_back: Option<String>,
    #[serde(flatten)]
    tally: StandbyTally,
}

/// All functions.
#[utoipa::path(get, path = "/functions", tag = "functions",
    responses((status = 200, description = "All functions", body = Vec<Function>)))]
pub(super) async fn get_functions(State(daemon): State<Shared>) -> Reply<Vec<Function>> {
    Reply(daemon.functions().values().cloned().collect())
}

/// Adds or replaces a function. Existing VMs and snapshots stay as they are.
#[utoipa::path(post, path = "/functions", tag = "functions", request_body = Function,
    responses((status = 200, description = "The function as it is stored", body = Function),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 403, body = FaultBody,
        description = "The function names a file that clients of this service may not name"),
        (status = 507, body = FaultBody, description = "The disk is full")))]
pub(super) async fn post_function(
    State(daemon): State<Shared>,
    Body(function): Body<Function>,
) -> Result<Reply<Function>, Fault> {
    function.check()?;
    daemon.allowances.confined_function(function.clone()).await?;
    let kept = blocking({
        let daemon = daemon.clone();
        let function = function.clone();
        move || {
            daemon.store.save(Kind::Functions, &function.func_name, &function)?;
            daemon.functions().insert(function.func_name.clone(), function);
            Ok::<(), crate::snapshot::Error>(())
        }
    });
    kept.await?.map_err(|error| Fault::of(&error))?;
    daemon.standby.changed.notify_one();
    Ok(Reply(function))
}

/// One function.
#[utoipa::path(get, path = "/functions/{name}", tag = "functions", params(("name" = String, Path)),
    responses((status = 200, description = "The function", body = FunctionState),
        (status = 404, body = FaultBody, description = "The function does not exist")))]
pub(super) async fn get_function(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
) -> Result<Reply<FunctionState>, Fault> {
    let function = daemon.function(&name)?;
    Ok(Reply(state_of(&daemon, function).await))
}

/// A function with its state.
pub(super) async fn state_of(daemon: &Daemon, function: Function) -> FunctionState {
    let name = &function.func_name;
    let repurposes = daemon.repurposes.of(name);
    let idle_state = idle::state_of(daemon, name);
    if function.standby.is_none() {
        return FunctionState { function, standby_state: None, idle_state, repurposes };
    }
    let memory_kib = standby::memory_kib(daemon, name).await;
    let standby_state = StandbyState {
        ready: standby::count(daemon, name),
        memory_kib,
        held_back: standby::shortage(daemon),
        tally: daemon.standby.events.of(name),
    };
    FunctionState { function, standby_state: Some(standby_state), idle_state, repurposes }
}

/// Removes a function. Its standby VMs end; other VMs and its snapshots stay.
#[utoipa::path(delete, path = "/functions/{name}", tag = "functions", params(("name" = String, Path)),
    responses((status = 200, description = "The removed function", body = Function),
        (status = 404, body = FaultBody, description = "The function does not exist")))]
pub(super) async fn delete_function(
    State(daemon): State<Shared>,
    Path(name): Path<String>,
) -> Result<Reply<Function>, Fault> {
    let function = daemon.function(&name)?;
    daemon.store.remove(Kind::Functions, &name).map_err(|error| Fault::of(&error))?;
    daemon.functions().remove(&name);
    standby::end_unwanted(&daemon).await;
    daemon.standby.events.forget(&name);
    daemon.repurposes.forget(&name);
    daemon.idle.forget(&name);
    Ok(Reply(function))
}
