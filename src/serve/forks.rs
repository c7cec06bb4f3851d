//! `/vms/{id}/fork`: makes VMs that go on from one instant of a VM.

use std::collections::BTreeMap;
use std::path::Path as FilePath;
use std::sync::Arc;

use axum::extract::{Extension, Path, State};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use utoipa::ToSchema;

use super::access::caller::Caller;
use super::blocking::blocking;
use super::body::Body;
use super::counters::Counters;
use super::daemon::{Daemon, START_TIMEOUT, Shared};
use super::fault::{Fault, FaultBody, Reply};
use super::network::Network;
use super::snapshots;
use super::trace::Recording;
use super::vm::{Purpose, RestoreOrigin, RestoreSpec, StartSpec, Vm, VmRecord};
use super::wake;
use crate::config::LoadFields;
use crate::config::fork::MAX_CHILDREN;
use crate::config::restore::RestoreOptions;
use crate::snapshot::{ForkPoint, Policy, SnapshotKind, Verify};

/// The VMs to make.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ForkBody {
    /// The number of VMs, 1 to 256.
    count: u32,
    /// The network interface of each VM: as many as VMs, if the forked VM has one, else none.
    #[serde(default)]
    namespaces: Vec<String>,
    /// True: at once and while the VM runs, also in the middle of a request, which the new VMs then answer to no
    /// client. Default: between requests, with the VM paused.
    #[serde(default)]
    live: bool,
    /// Metadata that the VMs read besides those of the forked VM, or instead of them.
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

/// A fork.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ForkRecord {
    /// Time for which the forked VM stood still to be captured, µs.
    capture_us: u64,
    /// The VMs that were made.
    vms: Vec<VmRecord>,
}

/// Makes VMs that go on from the same instant of a VM, between its requests or live. All of them are VMs of their own:
/// they live until they are deleted, and share memory that none of them has written.
#[utoipa::path(post, path = "/vms/{id}/fork", tag = "vms", params(("id" = String, Path)), request_body = ForkBody,
    responses((status = 200, description = "The VMs, which run", body = ForkRecord),
        (status = 404, body = FaultBody, description = "The VM or a namespace does not exist"),
        (status = 409, body = FaultBody, description = "The VM has ended"),
        (status = 422, body = FaultBody,
        description = "The VM cannot be forked, or a new VM cannot be restored"),
        (status = 429, body = FaultBody,
        description = "Too many VMs live, or they take too much memory, or too many requests wait for the VM"),
        (status = 502, body = FaultBody, description = "The VM, or one of the new ones, has ended"),
        (status = 507, body = FaultBody, description = "The disk is full")))]
pub(super) async fn post_fork(
    State(daemon): State<Shared>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Body(body): Body<ForkBody>,
) -> Result<Reply<ForkRecord>, Fault> {
    let running = caller.run(&daemon.access)?;
    // Once begun it is finished, whether or not the client waits.
    let task = tokio::spawn(async move {
        let _running = running;
        fork(&daemon, &id, body).await
    });
    task.await.unwrap_or_else(|_| Err(Fault::internal("The fork was given up."))).map(Reply)
}

async fn fork(daemon: &Arc<Daemon>, id: &str, body: ForkBody) -> Result<ForkRecord, Fault> {
    if !(1..=MAX_CHILDREN).contains(&body.count) {
        return Err(Fault::bad(format!("`count` is {}, but must be from 1 to {MAX_CHILDREN}.", body.count)));
    }
    let claimed = wake::claim(daemon, id).await?;
    let vm = claimed.using.vm();
    check_room(daemon, vm, body.count)?;
    let networks = networks(daemon, vm, &body)?;
    let dir = daemon.store.run_dir();
    let place = dir.clone();
    let point = blocking(move || ForkPoint::create(&place)).await?.map_err(|error| Fault::of(&error))?;
    let capture = async {
        let to = point.snapshot();
        if body.live {
            return snapshots::capture_live(vm, SnapshotKind::Full, &to).await;
        }
        let _quiet = vm.quiet().await;
        snapshots::capture(vm, SnapshotKind::Full, &to).await
    };
    let restored = match capture.await {
        Ok(taken) => {
            let load = load(vm, &point.snapshot(), body.metadata);
            start_all(daemon, vm, load, networks).await.map(|vms| ForkRecord { capture_us: taken.capture_us, vms })
        }
        Err(fault) => Err(fault),
    };
    match restored {
        Ok(record) => {
            Counters::count(&daemon.counters.vms_forked);
            drop(point.keep());
            Ok(record)
        }
        Err(fault) => {
            blocking(move || drop(point)).await?;
            Err(Fault { message: format!("Cannot fork VM `{id}`: {}", fault.message), ..fault })
        }
    }
}

/// Refuses more VMs than may ever live beside the forked one: no other VM has to make room for them in vain.
fn check_room(daemon: &Daemon, vm: &Vm, count: u32) -> Result<(), Fault> {
    let limits = &daemon.options.limits;
    let size = vm.function.mem_size;
    let all = 1 + u64::from(count);
    if all > limits.max_vms as u64 || all.saturating_mul(size) > limits.memory_mib {
        return Err(Fault::busy(format!(
            "Cannot fork VM `{}`: it and {count} others are {all} VMs of {size} MiB, and all VMs together may be {} \
             with {} MiB. Raise --max-vms and --memory.",
            vm.id, limits.max_vms, limits.memory_mib
        )));
    }
    Ok(())
}

/// The network of each new VM.
fn networks(daemon: &Daemon, vm: &Vm, body: &ForkBody) -> Result<Vec<Option<Network>>, Fault> {
    let wanted = if vm.has_network() { body.count as usize } else { 0 };
    if body.namespaces.len() != wanted {
        return Err(Fault::bad(format!(
            "`namespaces` has {} names, but VM `{}` needs {wanted}: one for each new VM if it has a network.",
            body.namespaces.len(),
            vm.id
        )));
    }
    if wanted == 0 {
        return Ok((0..body.count).map(|_| None).collect());
    }
    body.namespaces.iter().map(|namespace| daemon.network(namespace).map(Some)).collect()
}

/// The restore of a fork point, without what differs between the new VMs.
fn load(vm: &Vm, snapshot: &FilePath, metadata: BTreeMap<String, String>) -> LoadFields {
    let tvmm = RestoreOptions {
        policy: Some(Policy::Firecracker),
        // The bytes were written a moment ago, and are still in the page cache.
        verify: Some(Verify::Off),
        metadata,
        ..RestoreOptions::default()
    };
    LoadFields {
        snapshot_path: snapshot.to_owned(),
        resume_vm: true,
        track_dirty_pages: vm.function.track_dirty_pages,
        clock_realtime: true,
        tvmm,
        ..LoadFields::default()
    }
}

/// Starts a VM for each of `networks`. If one fails, all are ended.
async fn start_all(
    daemon: &Arc<Daemon>,
    vm: &Vm,
    load: LoadFields,
    networks: Vec<Option<Network>>,
) -> Result<Vec<VmRecord>, Fault> {
    let mut starting = JoinSet::new();
    for network in networks {
        let origin = RestoreOrigin::Fork(vm.id.clone());
        let has_drive_copies = vm.function.writes_image();
        let restore = Some(RestoreSpec { origin, load: load.clone(), has_drive_copies });
        let spec = StartSpec { function: vm.function.clone(), network, restore, purpose: Purpose::Client };
        let daemon = daemon.clone();
        starting.spawn(async move {
            let mut recording = Recording::begin(&spec.function.func_name, None);
            let started = tokio::time::timeout(START_TIMEOUT, daemon.start_vm(&spec, &mut recording)).await;
            let slow = |_| Fault::timed_out(format!("A new VM was not ready within {} s.", START_TIMEOUT.as_secs()));
            started.map_err(slow)?.map(|(using, _)| using.vm().clone())
        });
    }
    let mut started: Vec<Arc<Vm>> = Vec::new();
    let mut failed = None;
    while let Some(end) = starting.join_next().await {
        match end.unwrap_or_else(|_| Err(Fault::internal("A start was given up."))) {
            Ok(vm) => started.push(vm),
            Err(fault) => failed = failed.or(Some(fault)),
        }
    }
    if let Some(fault) = failed {
        for vm in started {
            vm.life.stop_because("another VM of its fork could not be made").await;
        }
        return Err(fault);
    }
    let records = started.iter().map(|vm| vm.record()).collect();
    started.into_iter().for_each(|vm| sweep_after(daemon, vm));
    Ok(records)
}

/// Removes fork points that no VM uses any more after the end of `vm`.
fn sweep_after(daemon: &Arc<Daemon>, vm: Arc<Vm>) {
    let dir = daemon.store.run_dir();
    tokio::spawn(async move {
        vm.life.end().await;
        drop(vm);
        let _ = blocking(move || ForkPoint::sweep(&dir)).await;
    });
}
