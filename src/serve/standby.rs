//! Standby VMs: for functions that ask for them, some VMs are restored ahead of invocations, and wait paused.
//!
//! A VM belongs to the set of its function while its restore is the one that an invocation by the function's own
//! settings would get. A change of the function, or a newer snapshot of it, ends the VMs of the old restore.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use rustix::process::Signal;
use tokio::time::Instant;

use super::blocking::blocking;
use super::daemon::{Daemon, START_TIMEOUT};
use super::fault::Fault;
use super::function::{After, Function, Standby};
use super::load::RestoreSettings;
use super::rewinds;
use super::standby_counts::StandbyEvent;
use super::trace::Recording;
use super::vm::{Purpose, RestoreSpec, StartSpec, Vm};
use crate::config::bodies::WantedState;
use crate::config::request::RewindRequest;
use crate::config::restore::RestoreOptions;
use crate::sys::available_memory::available_memory;
use crate::sys::process_memory::ProcessMemory;

/// Pause between two looks at all sets, unless an event asks for one.
const TICK: Duration = Duration::from_secs(1);
/// The reason of the end of a VM that stood by and would serve no invocation.
const UNWANTED: &str = "its function or snapshot was changed or removed";
/// Pause before a restore that has failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// The start of a VM that will stand by; `None` if the function has no snapshot.
fn start_of(daemon: &Daemon, function: &Function) -> Result<Option<StartSpec>, Fault> {
    let Some(snapshot) = daemon.latest_snapshot(&function.func_name) else { return Ok(None) };
    let policy = function.own_policy()?;
    let restore = daemon.restore_spec(&snapshot, policy, RestoreOptions::default(), RestoreSettings::default())?;
    let function = Function { func_name: function.func_name.clone(), ..snapshot.function };
    Ok(Some(StartSpec { function, network: None, restore: Some(restore), purpose: Purpose::Standby }))
}

/// The set that VMs of `restore` belong to: that of the function of this name.
fn set_of(daemon: &Daemon, func_name: &str, restore: Option<&RestoreSpec>) -> Option<(Standby, After)> {
    let function = daemon.function(func_name).ok()?;
    let standby = function.standby?;
    // A set whose restore cannot be made has no VMs.
    let own = start_of(daemon, &function).ok()??.restore;
    (restore.is_some() && own.as_ref() == restore).then_some((standby, function.after.unwrap_or_default()))
}

/// The VMs of a function that stand by.
fn ready(daemon: &Daemon, func_name: &str) -> Vec<Arc<Vm>> {
    let mut all = daemon.vms.all();
    all.retain(|vm| vm.stands_by() && vm.function.func_name == func_name);
    all
}

/// The number of VMs of a function that stand by.
pub(super) fn count(daemon: &Daemon, func_name: &str) -> usize {
    ready(daemon, func_name).len()
}

/// Takes a standby VM for an invocation that would otherwise start a VM by `spec`, and lets it run.
pub(super) async fn take(daemon: &Daemon, spec: &StartSpec, deadline: Instant) -> Option<Arc<Vm>> {
    let func_name = &spec.function.func_name;
    if spec.network.is_some() || set_of(daemon, func_name, spec.restore.as_ref()).is_none() {
        return None;
    }
    let suits = |vm: &Arc<Vm>| vm.restore == spec.restore && vm.retire();
    while let Some(vm) = ready(daemon, func_name).into_iter().find(suits) {
        match tokio::time::timeout_at(deadline, vm.set_state(WantedState::Resumed)).await {
            Ok(Ok(())) => {
                vm.serve();
                daemon.standby.events.count(func_name, StandbyEvent::Hit);
                return Some(vm);
            }
            Ok(Err(error)) => tracing::warn!(%error, vm = vm.id, "Cannot resume a standby VM"),
            Err(_) => tracing::warn!(vm = vm.id, "A standby VM does not resume in time"),
        }
        daemon.standby.events.count(func_name, StandbyEvent::Failed);
        vm.life.signal(Signal::KILL);
    }
    daemon.standby.events.count(func_name, StandbyEvent::Miss);
    None
}

/// The fate of a VM that an invocation has started or taken, after the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It lives on, for other requests.
    Keep,
    /// It ends.
    End,
    /// It goes back to its snapshot, and stands by.
    Rewind,
}

/// Decides by the wish of the invocation, then by the function's `after`. From now on, no client finds a VM that will
/// end or be rewound; a VM that another request has found by then is kept instead of rewound, or ends after that one.
pub(super) fn next(daemon: &Daemon, vm: &Vm, keep: Option<bool>) -> Next {
    let next = wanted_next(daemon, vm, keep);
    if next == Next::End {
        vm.refuse_requests();
    }
    next
}

fn wanted_next(daemon: &Daemon, vm: &Vm, keep: Option<bool>) -> Next {
    if let Some(keep) = keep {
        return if keep { Next::Keep } else { Next::End };
    }
    let set = set_of(daemon, &vm.function.func_name, vm.restore.as_ref()).filter(|_| !vm.has_network());
    match set {
        None if daemon.idle_rule(&vm.function.func_name).is_some_and(|rule| rule.ends_at_once()) => Next::End,
        None => Next::Keep,
        Some((_, After::End)) => Next::End,
        Some((_, After::Keep)) => Next::Keep,
        Some((_, After::Rewind)) if vm.leave() => Next::Rewind,
        Some((_, After::Rewind)) => Next::Keep,
    }
}

/// Ends a VM that has finished. Its process is kept for another VM for a moment, unless memory is short.
pub(super) async fn end(daemon: &Daemon, vm: &Vm) {
    vm.answered().await;
    if vm.is_finishing() && shortage(daemon).is_none() {
        daemon.vms.retire(vm).await;
    } else {
        vm.life.stop_because("finished").await;
    }
}

/// Returns a VM to its function's set, or ends it if there is no place in it.
pub(super) async fn give_back(daemon: &Daemon, vm: &Arc<Vm>) {
    let func_name = &vm.function.func_name;
    let has_place = || {
        let set = set_of(daemon, func_name, vm.restore.as_ref());
        set.is_some_and(|(standby, _)| count(daemon, func_name) < standby.max)
    };
    if has_place() {
        match rewound(daemon, vm).await {
            // Another VM may have taken the place meanwhile.
            Ok(()) if has_place() && has_memory(daemon, vm).await => {
                vm.stand_by();
                daemon.standby.events.count(func_name, StandbyEvent::Rewind);
                return;
            }
            Ok(()) => {}
            Err(fault) => {
                daemon.standby.events.count(func_name, StandbyEvent::Failed);
                tracing::warn!(fault.message, vm = vm.id, "Cannot return a VM to those that stand by");
                vm.life.stop_because(&fault.message).await;
                return;
            }
        }
    }
    vm.finish();
    end(daemon, vm).await;
}

/// Returns whether a VM may join those of its function that stand by, as far as memory goes. VMs that may not are
/// counted.
async fn has_memory(daemon: &Daemon, vm: &Arc<Vm>) -> bool {
    let func_name = &vm.function.func_name;
    let limit = daemon.function(func_name).ok().and_then(|function| function.standby?.dram_mib);
    let mut set = ready(daemon, func_name);
    set.push(vm.clone());
    let fits = match limit {
        Some(mib) => own_kib(&set).await <= mib << 10,
        None => true,
    };
    let fits = fits && shortage(daemon).is_none();
    if !fits {
        daemon.standby.events.count(func_name, StandbyEvent::Evicted);
    }
    fits
}

/// Local memory of VMs, KiB. A VM that has ended has none.
async fn own_kib(vms: &[Arc<Vm>]) -> u64 {
    let pids: Vec<u32> = vms.iter().map(|vm| vm.life.pid()).collect();
    let kib = |pid| ProcessMemory::of(pid).map_or(0, |memory| memory.own_kib());
    // The kernel walks the page tables of each.
    blocking(move || pids.into_iter().map(kib).sum()).await.unwrap_or_default()
}

/// Local memory of the VMs of a function that stand by, KiB.
pub(super) async fn memory_kib(daemon: &Daemon, func_name: &str) -> u64 {
    own_kib(&ready(daemon, func_name)).await
}

/// The reason for which no VM may be added to the sets, and some have to go: the host has too little memory left.
pub(super) fn shortage(daemon: &Daemon) -> Option<String> {
    let left = available_memory().ok()? >> 20;
    let reserve = daemon.options.limits.memory_reserve_mib;
    (left < reserve).then(|| format!("{left} MiB of memory are left, fewer than --memory-reserve ({reserve} MiB)"))
}

/// Ends a quarter of the VMs that stand by, those first that have waited longest, if memory is short.
async fn yield_memory(daemon: &Daemon) {
    let Some(why) = shortage(daemon) else { return };
    let mut waiting: Vec<_> = daemon.vms.all().into_iter().filter(|vm| vm.stands_by()).collect();
    waiting.sort_by_key(|vm| std::cmp::Reverse(vm.standing_by_for()));
    waiting.truncate(waiting.len().div_ceil(4));
    if !waiting.is_empty() {
        tracing::warn!(vms = waiting.len(), why, "VMs that stand by are ended");
    }
    for vm in waiting.into_iter().filter(|vm| vm.retire()) {
        daemon.standby.events.count(&vm.function.func_name, StandbyEvent::Evicted);
        vm.life.stop_because("the host has little memory left (--memory-reserve)").await;
    }
}

/// Ends the VMs of a function that stand by beyond its memory, those first that have waited longest.
async fn keep_within_memory(daemon: &Daemon, function: &Function) {
    let Some(mib) = function.standby.and_then(|standby| standby.dram_mib) else { return };
    let mut set = ready(daemon, &function.func_name);
    set.sort_by_key(|vm| vm.standing_by_for());
    while own_kib(&set).await > mib << 10 {
        let Some(vm) = set.pop() else { return };
        if vm.retire() {
            daemon.standby.events.count(&function.func_name, StandbyEvent::Evicted);
            vm.life.stop_because("VMs that stand by had more memory than `standby.dram_mib`").await;
        }
    }
}

/// Returns whether one more VM of a function fits into its memory: it will need what the others need on average.
async fn may_grow(daemon: &Daemon, func_name: &str, limit_mib: Option<u64>) -> bool {
    let Some(mib) = limit_mib else { return true };
    let set = ready(daemon, func_name);
    let have = own_kib(&set).await;
    have + have / (set.len() as u64).max(1) <= mib << 10
}

/// Pauses a VM first: nothing of the former run goes on, and nothing of the next one begins.
async fn rewound(daemon: &Daemon, vm: &Vm) -> Result<(), Fault> {
    vm.set_state(WantedState::Paused).await.map_err(|error| Fault::bad_gateway(error.to_string()))?;
    rewinds::rewind(daemon, vm, RewindRequest::default()).await.map(drop)
}

/// Restores VMs that are missing, and ends those that are no longer wanted, for ever.
pub(super) async fn keep_ready(daemon: Arc<Daemon>) {
    let mut failed = BTreeMap::new();
    loop {
        end_unwanted(&daemon).await;
        yield_memory(&daemon).await;
        let mut functions: Vec<Function> = daemon.functions().values().cloned().collect();
        functions.retain(|function| function.standby.is_some());
        for function in &functions {
            keep_within_memory(&daemon, function).await;
            refill(&daemon, function, &mut failed).await;
        }
        failed.retain(|_, until| *until > Instant::now());
        let _ = tokio::time::timeout(TICK, daemon.standby.changed.notified()).await;
    }
}

/// Restores one VM after the other until the function's set has as many as it keeps ready (VMs that will come back are
/// counted), while there is room and no invocation waits for its turn. `failed`: functions whose restores are not tried
/// again before a time.
async fn refill(daemon: &Daemon, function: &Function, failed: &mut BTreeMap<String, Instant>) {
    let name = &function.func_name;
    let wanted = || daemon.function(name).ok().and_then(|function| function.standby).map_or(0, |standby| standby.min);
    // With `rewind`, VMs in use will come back.
    let comes_back = function.after == Some(After::Rewind);
    let is_coming = |vm: &&Arc<Vm>| comes_back && vm.is_in_use() && vm.function.func_name == *name;
    let coming = || daemon.vms.all().iter().filter(|vm| vm.restore.is_some()).filter(is_coming).count();
    let missing = || wanted().saturating_sub(count(daemon, name) + coming());
    while missing() > 0 && !failed.contains_key(name) {
        let limit_mib = function.standby.and_then(|standby| standby.dram_mib);
        if shortage(daemon).is_some() || !may_grow(daemon, name, limit_mib).await {
            return;
        }
        let Some(_turn) = daemon.gate.free_turn() else { return };
        let started = match start_of(daemon, function) {
            Ok(None) => return,
            // A VM that has finished is about to leave its process, or its place.
            Ok(Some(spec)) if daemon.vms.count_finishing(spec.need().shape) >= missing() => return,
            Ok(Some(spec)) if !daemon.vms.has_room(&spec.need()) => return,
            Ok(Some(spec)) => start(daemon, &spec).await,
            Err(fault) => Err(fault),
        };
        match started {
            Ok(vm) if set_of(daemon, name, vm.restore.as_ref()).is_some() => {
                if !has_memory(daemon, &vm).await {
                    tracing::warn!(function = name, "A VM to stand by needs more memory than there is for it");
                    failed.insert(name.clone(), Instant::now() + RETRY);
                    vm.life.stop_because("there was too little memory for it").await;
                    return;
                }
                vm.stand_by();
                daemon.standby.events.count(name, StandbyEvent::Refill);
            }
            // The function or its snapshot was changed or removed meanwhile.
            Ok(vm) => {
                vm.life.stop_because(UNWANTED).await;
                return;
            }
            // An invocation has taken the room meanwhile.
            Err(fault) if fault.status == StatusCode::TOO_MANY_REQUESTS => return,
            Err(fault) => {
                daemon.standby.events.count(name, StandbyEvent::Failed);
                tracing::warn!(fault.message, function = name, "Cannot restore a VM to stand by");
                failed.insert(name.clone(), Instant::now() + RETRY);
            }
        }
    }
}

async fn start(daemon: &Daemon, spec: &StartSpec) -> Result<Arc<Vm>, Fault> {
    let mut recording = Recording::begin(&spec.function.func_name, None);
    let started = tokio::time::timeout(START_TIMEOUT, daemon.start_vm(spec, &mut recording)).await;
    let slow = |_| Fault::timed_out(format!("The VM was not ready within {} s.", START_TIMEOUT.as_secs()));
    started.map_err(slow)?.map(|(using, _)| using.vm().clone())
}

/// Ends the standby VMs of removed functions and snapshots, of former settings, and beyond the most of a set.
pub(super) async fn end_unwanted(daemon: &Daemon) {
    let mut ending = tokio::task::JoinSet::new();
    let mut kept: BTreeMap<String, usize> = BTreeMap::new();
    for vm in daemon.vms.all() {
        if !vm.stands_by() {
            continue;
        }
        let name = &vm.function.func_name;
        let most = set_of(daemon, name, vm.restore.as_ref()).map_or(0, |(standby, _)| standby.max);
        let kept = kept.entry(name.clone()).or_default();
        if *kept < most {
            *kept += 1;
        } else if vm.retire() {
            ending.spawn(async move { vm.life.stop_because(UNWANTED).await });
        }
    }
    ending.join_all().await;
}
