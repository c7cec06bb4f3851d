//! A VM for a request: idle VMs are taken back from their step, and suspended ones are restored.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use rustix::process::Signal;
use serde_json::Value;
use tokio::time::error::Elapsed;

use super::blocking::blocking;
use super::daemon::{Daemon, START_TIMEOUT};
use super::fault::Fault;
use super::function::Function;
use super::suspended::{Reserved, SuspendedVm};
use super::trace::Recording;
use super::vm::{Purpose, RequestGuard, RestoreOrigin, RestoreSpec, StartSpec, Vm, VmRecord, unix_ms};
use crate::config::LoadFields;
use crate::config::restore::RestoreOptions;
use crate::snapshot::{Location, Policy, used_profile_path};
use crate::tiering::idle::Step;

/// Every so many suspensions a VM is woken without its profile: pages that it no longer uses leave the next one.
const RENEWAL: u64 = 8;

/// A VM that runs, for one request.
pub(super) struct Claimed {
    pub(super) using: RequestGuard,
    /// The step that it was taken back from.
    pub(super) found_at: Option<Step>,
}

/// Claims a VM that clients may use, by its id, and lets it run.
pub(super) async fn claim(daemon: &Arc<Daemon>, id: &str) -> Result<Claimed, Fault> {
    let daemon = daemon.clone();
    let id = id.to_owned();
    // A step up that has begun is finished, whether or not its request waits.
    let claimed = tokio::spawn(async move { claim_now(&daemon, &id).await });
    claimed.await.unwrap_or_else(|_| Err(Fault::internal("The request was given up.")))
}

async fn claim_now(daemon: &Arc<Daemon>, id: &str) -> Result<Claimed, Fault> {
    loop {
        if let Some(vm) = daemon.vms.get(id).filter(|vm| vm.is_suspending()) {
            vm.stepped().await;
        } else if daemon.vms.get(id).is_none() && daemon.vms.suspended.waking(id).is_some() {
            if let Some(claimed) = wake(daemon, id).await? {
                return Ok(claimed);
            }
        } else {
            return rouse(daemon, daemon.vm(id)?.claim()?).await;
        }
    }
}

/// Counts the spilled pages of a VM that came back to local memory, by its report after a request. `found_at`: the step
/// at which the request found it.
pub(super) fn count_recalls(daemon: &Daemon, vm: &Vm, report: &Value, found_at: Option<Step>) {
    let pages = vm.note_pages_back(report["spill"]["pages_back"].as_u64().unwrap_or_default());
    if pages > 0 {
        daemon.idle.recalled(&vm.function.func_name, pages, found_at == Some(Step::Spilled));
    }
}

/// Lets a claimed VM run. A VM that cannot be resumed is ended.
async fn rouse(daemon: &Daemon, using: RequestGuard) -> Result<Claimed, Fault> {
    let vm = using.vm().clone();
    let func_name = &vm.function.func_name;
    if let Some(interval) = using.reuse_interval() {
        daemon.idle.reused(func_name, interval);
    }
    match using.rouse().await {
        Ok(found_at) => {
            found_at.into_iter().for_each(|step| daemon.idle.woken(func_name, step));
            Ok(Claimed { using, found_at })
        }
        Err(error) => {
            vm.step().into_iter().for_each(|step| daemon.idle.wake_failed(func_name, step));
            let why = error.to_string();
            let why = why.trim_end_matches('.');
            vm.life.blame(format!("could not be resumed: {why}"));
            vm.life.signal(Signal::KILL);
            Err(Fault::bad_gateway(format!("Cannot resume VM `{}`: {why}. The VM was ended.", vm.id)))
        }
    }
}

/// Restores a suspended VM, when no other request does. `None`: it was not suspended any more.
async fn wake(daemon: &Arc<Daemon>, id: &str) -> Result<Option<Claimed>, Fault> {
    let Some(waking) = daemon.vms.suspended.waking(id) else { return Ok(None) };
    let _waking = waking.lock().await;
    wake_alone(daemon, id).await
}

/// Restores a suspended VM that was reserved.
async fn wake_reserved(daemon: &Arc<Daemon>, reserved: Reserved) -> Result<Option<Claimed>, Fault> {
    wake_alone(daemon, &reserved.id).await
}

/// Restores a suspended VM, which no other request wakes meanwhile.
async fn wake_alone(daemon: &Arc<Daemon>, id: &str) -> Result<Option<Claimed>, Fault> {
    let Some(suspended) = daemon.vms.suspended.take(id) else { return Ok(None) };
    let func_name = suspended.record().func_name.clone();
    match restored(daemon, &suspended).await {
        Ok(using) => {
            daemon.idle.woken(&func_name, Step::Suspended);
            let idle_ms = unix_ms().saturating_sub(suspended.used_unix_ms);
            daemon.idle.reused(&func_name, Duration::from_millis(idle_ms));
            Ok(Some(Claimed { using, found_at: Some(Step::Suspended) }))
        }
        Err(fault) => {
            daemon.idle.wake_failed(&func_name, Step::Suspended);
            let kept = blocking({
                let daemon = daemon.clone();
                move || daemon.vms.suspended.put_back(suspended)
            });
            let kept = kept.await?;
            if let Err(error) = kept {
                tracing::warn!(%error, vm = id, "A suspended VM will not be found by a restart of the service");
            }
            if fault.retry_after_s.is_none() {
                daemon.vms.suspended.note_failure(id);
            }
            Err(Fault { message: format!("Cannot wake VM `{id}`: {}", fault.message), ..fault })
        }
    }
}

/// Restores a suspended VM by the profile of the pages that it had used, if it has one.
async fn restored(daemon: &Arc<Daemon>, suspended: &SuspendedVm) -> Result<RequestGuard, Fault> {
    if let Some(profile) = profile_of(daemon, suspended) {
        let func_name = &suspended.record().func_name;
        match restored_by(daemon, suspended, Some(profile)).await {
            Ok(using) => {
                daemon.idle.prefetched(func_name, Step::Suspended);
                return Ok(using);
            }
            // The profile or its plan may be the reason.
            Err(fault) if fault.status == StatusCode::UNPROCESSABLE_ENTITY => {
                let vm = &suspended.record().vm_id;
                tracing::warn!(fault.message, vm, "A suspended VM cannot be woken by its profile, and is without it");
            }
            Err(fault) => return Err(fault),
        }
    }
    restored_by(daemon, suspended, None).await
}

async fn restored_by(
    daemon: &Arc<Daemon>,
    suspended: &SuspendedVm,
    profile: Option<PathBuf>,
) -> Result<RequestGuard, Fault> {
    let spec = spec(daemon, suspended, profile)?;
    let mut recording = Recording::begin(&suspended.record().func_name, None);
    let started = tokio::time::timeout(START_TIMEOUT, daemon.start_vm(&spec, &mut recording)).await;
    let slow = |_: Elapsed| Fault::timed_out(format!("it was not ready within {} s.", START_TIMEOUT.as_secs()));
    started.map_err(slow)?.map(|(using, _)| using)
}

/// The snapshot that a suspended VM is woken from.
fn snapshot_of(daemon: &Daemon, suspended: &SuspendedVm) -> PathBuf {
    let number = suspended.layers.last().map_or(0, |layer| layer.number);
    daemon.vms.suspended.layer_dir(&suspended.record().vm_id, number)
}

/// The profile that a suspended VM is woken by; `None` if it has none, or its use is to be recorded anew.
fn profile_of(daemon: &Daemon, suspended: &SuspendedVm) -> Option<PathBuf> {
    let is_renewed = suspended.record().suspensions.is_multiple_of(RENEWAL);
    let path = used_profile_path(&Location::Dir(snapshot_of(daemon, suspended)));
    Some(path).filter(|path| !is_renewed && path.exists())
}

fn spec(daemon: &Daemon, suspended: &SuspendedVm, profile: Option<PathBuf>) -> Result<StartSpec, Fault> {
    let SuspendedVm { life, function, .. } = suspended;
    let VmRecord { namespace, from_invocation, .. } = &life.record;
    let network = namespace.as_deref().map(|namespace| daemon.network(namespace)).transpose()?;
    let first = life.restore.as_ref().map(|restore| &restore.load);
    let policy = if profile.is_some() { Policy::Tiered } else { Policy::Firecracker };
    let load = LoadFields {
        snapshot_path: snapshot_of(daemon, suspended),
        resume_vm: true,
        clock_realtime: first.is_none_or(|load| load.clock_realtime),
        network_overrides: first.map(|load| load.network_overrides.clone()).unwrap_or_default(),
        tvmm: RestoreOptions { policy: Some(policy), profile, ..RestoreOptions::default() },
        ..LoadFields::default()
    };
    let origin = RestoreOrigin::Suspension(Box::new(life.clone()));
    let restore = RestoreSpec { origin, load, has_drive_copies: function.writes_image() };
    let purpose = if *from_invocation { Purpose::Invocation } else { Purpose::Client };
    Ok(StartSpec { function: function.clone(), network, restore: Some(restore), purpose })
}

/// An idle VM that may serve an invocation which would start a VM by some parameters.
enum Candidate {
    /// It lives, and was claimed for the invocation.
    Living(RequestGuard),
    /// It is suspended, and only the invocation wakes it.
    Suspended(Reserved),
    /// Its process ends because it is suspended.
    Suspending(Arc<Vm>),
}

/// Takes an idle VM for an invocation that would otherwise start a VM by `spec`: one at the first step before others,
/// and of those the one that was used last. `None`: there is none, or the function's VMs are not reused, or the
/// suspended one that was chosen could not be woken. That one stays.
pub(super) async fn take(daemon: &Arc<Daemon>, spec: &StartSpec) -> Option<Claimed> {
    daemon.idle_rule(&spec.function.func_name)?;
    let mut failed = Vec::new();
    loop {
        let (id, claimed) = match best(daemon, spec, &failed)? {
            Candidate::Suspending(vm) => {
                vm.stepped().await;
                continue;
            }
            Candidate::Living(using) => {
                let id = using.vm().id.clone();
                let daemon = daemon.clone();
                // A step up that has begun is finished, whether or not its request waits.
                (id, tokio::spawn(async move { rouse(&daemon, using).await.map(Some) }).await)
            }
            Candidate::Suspended(reserved) => {
                let id = reserved.id.clone();
                let daemon = daemon.clone();
                (id, tokio::spawn(async move { wake_reserved(&daemon, reserved).await }).await)
            }
        };
        match claimed.unwrap_or_else(|_| Err(Fault::internal("The request was given up."))) {
            Ok(Some(claimed)) => return Some(claimed),
            // It was ended meanwhile.
            Ok(None) => {}
            Err(fault) => {
                tracing::warn!(fault.message, vm = id, "Cannot use an idle VM for an invocation");
                // The cause may be the host's: another suspended VM is not tried.
                if daemon.vms.suspended.get(&id).is_some() {
                    return None;
                }
                failed.push(id);
            }
        }
    }
}

/// Claims or reserves the best VM, but none of those that have `failed`.
fn best(daemon: &Daemon, spec: &StartSpec, failed: &[String]) -> Option<Candidate> {
    let namespace = spec.network.as_ref().map(|network| network.namespace.as_str());
    let is_one = |vm: &&Arc<Vm>| {
        vm.from_invocation
            && is_same(&vm.function, &spec.function)
            && vm.first_restore() == spec.restore.as_ref()
            && vm.namespace() == namespace
            && !failed.contains(&vm.id)
    };
    let living = daemon.vms.all();
    let idle = living.iter().filter(is_one).filter_map(|vm| Some((vm.is_stepping(), vm.step(), vm.idle_for()?, vm)));
    let mut idle: Vec<_> = idle.collect();
    idle.sort_by_key(|(is_stepping, step, idle, _)| (*is_stepping, *step, *idle));
    // Another request may have claimed it meanwhile: then it is the next one's turn.
    if let Some(using) = idle.into_iter().find_map(|(.., vm)| vm.claim_idle()) {
        return Some(Candidate::Living(using));
    }
    let is_asleep = |vm: &SuspendedVm| {
        let VmRecord { from_invocation, namespace: of_vm, .. } = vm.record();
        *from_invocation
            && is_same(&vm.function, &spec.function)
            && vm.life.restore.as_deref() == spec.restore.as_ref()
            && of_vm.as_deref() == namespace
    };
    if let Some(reserved) = daemon.vms.suspended.reserve(is_asleep) {
        return Some(Candidate::Suspended(reserved));
    }
    let mut suspending = living.iter().filter(is_one).filter(|vm| vm.is_suspending());
    suspending.next().map(|vm| Candidate::Suspending(vm.clone()))
}

/// Returns whether two functions have the same machine and call.
fn is_same(one: &Function, other: &Function) -> bool {
    let machine = |function: &Function| Function { standby: None, after: None, idle: None, ..function.clone() };
    machine(one) == machine(other)
}
