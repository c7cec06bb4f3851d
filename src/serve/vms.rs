//! `/vms`: running and ended machines.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Extension, Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::access::caller::Caller;
use super::body::Body;
use super::daemon::{Daemon, START_TIMEOUT, Shared};
use super::fault::{Fault, FaultBody, Reply};
use super::function::{Function, known_policy};
use super::load::RestoreSettings;
use super::trace::Recording;
use super::vm::{Purpose, StartSpec, VmRecord};
use crate::config::NetworkOverrideBody;
use crate::config::restore::RestoreOptions;
use crate::snapshot::Policy;

/// A VM to be started.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VmBody {
    func_name: String,
    /// Restore this snapshot; none: boot, then make the function's `prepare` request.
    #[serde(rename = "ssId")]
    ss_id: Option<String>,
    namespace: Option<String>,
    /// The policy to restore by; none: the function's, else `tiered` if the snapshot has a profile, else
    /// `firecracker`.
    #[schema(value_type = Option<String>)]
    policy: Option<Policy>,
    /// The VM's restore options; missing ones have the daemon's values.
    tvmm: Option<RestoreOptions>,
    /// True (the default): the guest's clocks are moved to the present; false: they go on from the snapshot's time.
    clock_realtime: Option<bool>,
    /// True: KVM logs the pages that the guest writes, for diff snapshots; none: the function's setting.
    track_dirty_pages: Option<bool>,
    /// Other taps for network interfaces.
    #[serde(default)]
    network_overrides: Vec<NetworkOverrideBody>,
    /// Metadata of the clone: the same as `tvmm.metadata`.
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

impl VmBody {
    fn settings(&self) -> RestoreSettings {
        RestoreSettings {
            tvmm: self.tvmm.clone(),
            metadata: self.metadata.clone(),
            network_overrides: self.network_overrides.clone(),
            track_dirty_pages: self.track_dirty_pages,
            clock_realtime: self.clock_realtime,
        }
    }
}

/// All VMs: living ones, then suspended ones, then ended ones, the last first.
#[utoipa::path(get, path = "/vms", tag = "vms",
    responses((status = 200,
        description = "The VMs that live, then suspended ones, then those that have ended, the last first",
        body = Vec<VmRecord>)))]
pub(super) async fn get_vms(State(daemon): State<Shared>) -> Reply<Vec<VmRecord>> {
    Reply(daemon.vms.records())
}

/// Boots or restores a VM. It lives until it is deleted.
#[utoipa::path(post, path = "/vms", tag = "vms", request_body = VmBody,
    responses((status = 200, description = "The VM, which runs", body = VmRecord),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 403, body = FaultBody,
        description = "The request names a path or an address that clients of this service may not name"),
        (status = 404, body = FaultBody, description = "The function, the snapshot or the namespace does not exist"),
        (status = 409, body = FaultBody,
        description = "The snapshot lacks the profile the policy needs, or copies of its drives"),
        (status = 422, body = FaultBody, description = "The VM cannot be booted or restored"),
        (status = 429, body = FaultBody,
        description = "Too many VMs live, or they take too much memory: try again after `Retry-After` seconds"),
        (status = 502, body = FaultBody, description = "The VM ended, or could not be prepared"),
        (status = 507, body = FaultBody,
        description = "The VM needs more memory than all VMs may have, or the disk is full")))]
pub(super) async fn post_vm(
    State(daemon): State<Shared>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<VmBody>,
) -> Result<Reply<VmRecord>, Fault> {
    let running = caller.run(&daemon.access)?;
    let task = tokio::spawn(async move {
        let _running = running;
        start(&daemon, body).await
    });
    task.await.unwrap_or_else(|_| Err(Fault::internal("The start was given up."))).map(Reply)
}

async fn start(daemon: &Arc<Daemon>, body: VmBody) -> Result<VmRecord, Fault> {
    let function = daemon.function(&body.func_name)?;
    let network = body.namespace.as_deref().map(|namespace| daemon.network(namespace)).transpose()?;
    let of_function = function.policy.as_deref().map(known_policy).transpose()?;
    let policy = body.policy.or(of_function);
    let settings = body.settings();
    let spec = match &body.ss_id {
        None if body.policy.is_some() => return Err(Fault::bad("`policy` says how to restore: it needs `ssId`.")),
        None if settings.is_for_restores() => {
            let message = "`tvmm`, `metadata`, `clock_realtime`, `track_dirty_pages` and `network_overrides` say how \
                           to restore: they need `ssId`.";
            return Err(Fault::bad(message));
        }
        None => StartSpec { function, network, restore: None, purpose: Purpose::Client },
        Some(id) => {
            let snapshot = daemon.snapshot(id)?;
            let options = daemon.allowances.confined(settings.options()?).await?;
            let policy = if options.plan.is_some() { body.policy } else { policy };
            let restore = daemon.restore_spec(&snapshot, policy, options, settings)?;
            let function = Function { func_name: function.func_name, ..snapshot.function };
            StartSpec { function, network, restore: Some(restore), purpose: Purpose::Client }
        }
    };
    let mut recording = Recording::begin(&body.func_name, None);
    let _turn = daemon.gate.enter(START_TIMEOUT).await?;
    let started = tokio::time::timeout(START_TIMEOUT, daemon.start_vm(&spec, &mut recording)).await;
    let slow = |_| Fault::timed_out(format!("The VM was not ready within {} s.", START_TIMEOUT.as_secs()));
    let vm = started.map_err(slow)?.map(|(using, _)| using.vm().clone())?;
    Ok(vm.record())
}

/// One VM, living or ended.
#[utoipa::path(get, path = "/vms/{id}", tag = "vms", params(("id" = String, Path)),
    responses((status = 200, description = "The VM", body = VmRecord),
        (status = 404, body = FaultBody, description = "The VM does not exist")))]
pub(super) async fn get_vm(State(daemon): State<Shared>, Path(id): Path<String>) -> Result<Reply<VmRecord>, Fault> {
    daemon.vms.record(&id).map(Reply).ok_or_else(|| Fault::not_found("VM", &id))
}

/// Ends a living or suspended VM; removes an ended one from the list.
#[utoipa::path(delete, path = "/vms/{id}", tag = "vms", params(("id" = String, Path)),
    responses((status = 200, description = "The VM, which has ended", body = VmRecord),
        (status = 404, body = FaultBody, description = "The VM does not exist")))]
pub(super) async fn delete_vm(State(daemon): State<Shared>, Path(id): Path<String>) -> Result<Reply<VmRecord>, Fault> {
    let record = daemon.vms.record(&id).ok_or_else(|| Fault::not_found("VM", &id))?;
    if let Some(vm) = daemon.vms.get(&id).filter(|vm| vm.is_suspending()) {
        vm.stepped().await;
    }
    // No request wakes it while it is removed.
    let waking = daemon.vms.suspended.waking(&id);
    let _waking = match &waking {
        Some(waking) => Some(waking.lock().await),
        None => None,
    };
    match daemon.vms.get(&id) {
        Some(vm) => {
            vm.refuse_requests();
            vm.life.stop_because("deleted").await;
            Ok(Reply(vm.record()))
        }
        None if daemon.vms.end_suspended(&id, "deleted while it was suspended") => {
            daemon.vms.record(&id).map(Reply).ok_or_else(|| Fault::not_found("VM", &id))
        }
        None => {
            daemon.vms.forget(&id);
            Ok(Reply(record))
        }
    }
}

/// The report of a VM: the place of its memory, and its time slices.
#[utoipa::path(get, path = "/vms/{id}/report", tag = "vms", params(("id" = String, Path)),
    responses((status = 200, description = "The report, as `tvmm restore --report` writes it", body = Object),
        (status = 404, body = FaultBody, description = "The VM does not exist"),
        (status = 502, body = FaultBody, description = "The VM does not answer")))]
pub(super) async fn get_report(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<serde_json::Value>, Fault> {
    let vm = daemon.living_vm(&id)?;
    vm.report()
        .await
        .map(Reply)
        .map_err(|error| Fault::bad_gateway(format!("Cannot get the report of VM `{id}`: {error}.")))
}

/// FaaSnap's way to start a VMM ahead of its VM.
#[utoipa::path(post, path = "/vmms", tag = "vms",
    responses((status = 400, body = FaultBody,
        description = "The answer to every request: the daemon keeps VMMs ready by itself")))]
pub(super) async fn post_vmm() -> Fault {
    let message = "VMMs are not started by hand: the daemon keeps some ready (`tvmm serve --shells N`).";
    Fault::new(StatusCode::BAD_REQUEST, message)
}

/// A restore policy.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PolicyRecord {
    name: String,
    /// True if it works from the profile of a recorded run.
    needs_profile: bool,
}

/// The restore policies, and which of them need a profile.
#[utoipa::path(get, path = "/policies", tag = "snapshots",
    responses((status = 200, description = "All policies", body = Vec<PolicyRecord>)))]
pub(super) async fn get_policies() -> Reply<Vec<PolicyRecord>> {
    let policy =
        |policy: Policy| PolicyRecord { name: policy.name().to_string(), needs_profile: policy.needs_profile() };
    Reply(Policy::ALL.into_iter().map(policy).collect())
}
