//! Idle VMs: each takes the steps down that its function's policy says, until a request takes it back (`wake.rs`).
//!
//! `tiering::idle` decides the times. Here are the steps: a VM is parked, gives local copies back, and is saved and
//! ended. A step that the VM cannot take is counted, and tried again after its next request. A step may take any time:
//! only a VM that no longer answers is ended.

use std::io;
use std::num::NonZeroU64;
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use utoipa::ToSchema;

use super::blocking::blocking;
use super::daemon::Daemon;
use super::idle_counts::{IdleTally, StepEnd};
use super::standby;
use super::store::gone_is_fine;
use super::suspended::{DiskSpace, Layer, SuspendedVm, space_of};
use super::vm::control::ControlError;
use super::vm::offloading::GivenBack;
use super::vm::steps::{Descent, SpillFile};
use super::vm::table::Suspends;
use super::vm::{FormerLife, RestoreOrigin, Vm, VmRecord, VmState, unix_ms};
use crate::config::bodies::{CreateBody, CreateExtension};
use crate::config::control::SnapshotTaken;
use crate::snapshot::{Location, PAGE_SIZE, SnapshotKind, used_profile_path};
use crate::sys::process_memory::ProcessMemory;
use crate::tiering::idle::{IdleAction, IdleRule, Step};

/// The shortest and the longest pause between two looks at all VMs.
const PAUSE: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_millis(500);
/// Pause between two looks at the host's memory.
const PRESSURE: Duration = Duration::from_secs(1);
/// Steps that are under way at once, but for slow ones.
const AT_ONCE: usize = 4;
/// Time after which a step is slow, and no longer keeps those of other VMs waiting: its VM or a disk may hang.
const SLOW_STEP: Duration = Duration::from_secs(10);
/// The most snapshots that a suspended VM builds on besides that of its restore: the next one is full.
const MOST_LAYERS: usize = 4;
/// The most bytes of a snapshot beside its pages and images: state, page map, manifest.
const BESIDE_PAGES: u64 = 1 << 20;

/// Idle VMs of a function, and what has become of them since the daemon began.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct IdleState {
    /// Pauses between an answer and the next request to the same VM: the 99th percentile, ms. None: fewer than 8 are
    /// known.
    reuse_p99_ms: Option<u64>,
    /// The idle time from which on a VM's memory is worth more than the VM, by the policy and the pauses until now, ms:
    /// `ladder` trims it then, `faasmem` begins to offload it, others end or suspend it.
    delay_ms: u64,
    /// The number of pauses that both are taken from.
    reuses: usize,
    /// Suspended VMs.
    asleep: usize,
    #[serde(flatten)]
    tally: IdleTally,
}

/// The state of a function's idle VMs; `None` if no policy applies to them.
pub(super) fn state_of(daemon: &Daemon, func_name: &str) -> Option<IdleState> {
    let rule = daemon.idle_rule(func_name)?;
    let reuse = daemon.idle.reuse(func_name);
    let asleep = daemon.vms.suspended.all().iter().filter(|vm| vm.record().func_name == func_name).count();
    Some(IdleState {
        reuse_p99_ms: reuse.p99.map(|p99| p99.as_millis() as u64),
        delay_ms: rule.delay(reuse).as_millis() as u64,
        reuses: daemon.idle.intervals(func_name),
        asleep,
        tally: daemon.idle.of(func_name),
    })
}

/// The steps that are under way.
struct Steps {
    tasks: JoinSet<()>,
    /// One for each step that is not slow.
    slots: Arc<Semaphore>,
}

/// Lets idle VMs take their steps, for ever.
pub(super) async fn descend_all(daemon: Arc<Daemon>) {
    let mut steps = Steps { tasks: JoinSet::new(), slots: Arc::new(Semaphore::new(AT_ONCE)) };
    let mut looked = tokio::time::Instant::now();
    loop {
        while steps.tasks.try_join_next().is_some() {}
        if looked.elapsed() >= PRESSURE {
            looked = tokio::time::Instant::now();
            if standby::shortage(&daemon).is_some() {
                hasten(&daemon, &mut steps);
            }
        }
        let mut pause = *PAUSE.end();
        let mut due = Vec::new();
        for vm in daemon.vms.all() {
            let Some((idle, rule)) = waiting(&daemon, &vm) else { continue };
            let reuse = daemon.idle.reuse(&vm.function.func_name);
            if let Some(action) = rule.due(idle, vm.descended(), reuse) {
                due.push((idle, vm, action));
            } else if let Some(next) = rule.next_time(idle, reuse) {
                pause = pause.min(next - idle);
            }
        }
        // If not all can begin, those begin that have waited longest.
        due.sort_by_key(|(idle, ..)| std::cmp::Reverse(*idle));
        due.into_iter().for_each(|(_, vm, action)| begin(&daemon, &mut steps, vm, action));
        tokio::time::sleep(pause.max(*PAUSE.start())).await;
    }
}

/// The idle time of a VM that waits for requests, and the rule that applies to it.
fn waiting(daemon: &Daemon, vm: &Vm) -> Option<(Duration, IdleRule)> {
    let idle = vm.idle_for().filter(|_| !vm.is_stepping())?;
    Some((idle, rule_of(daemon, vm)?))
}

/// The rule that applies to a VM while it waits for requests.
pub(super) fn rule_of(daemon: &Daemon, vm: &Vm) -> Option<IdleRule> {
    let func_name = &vm.function.func_name;
    let timeout = daemon.options.limits.idle_timeout;
    if vm.from_invocation {
        return Some(daemon.idle_rule(func_name).unwrap_or(IdleRule::End { after: timeout }));
    }
    // The daemon's default is for VMs that it has made by itself, and no VM of a client is ended.
    let own = daemon.function(func_name).ok()?.idle.filter(|idle| idle.suspends())?;
    Some(own.rule(timeout))
}

/// Lets a quarter of the idle VMs take their next step before its time: those first that have been idle longest,
/// measured by the pauses between requests that their functions are used to. Memory is short.
fn hasten(daemon: &Arc<Daemon>, steps: &mut Steps) {
    let mut idle = Vec::new();
    for vm in daemon.vms.all() {
        let Some((idle_for, rule)) = waiting(daemon, &vm) else { continue };
        let func_name = &vm.function.func_name;
        // Without a policy of its own, a VM waits for its time.
        let Some(action) = daemon.idle_rule(func_name).and_then(|_| rule.next(vm.descended())) else { continue };
        let usual = rule.delay(daemon.idle.reuse(func_name)).max(Duration::from_millis(1));
        idle.push((idle_for.as_secs_f64() / usual.as_secs_f64(), vm, action));
    }
    idle.sort_by(|(one, ..), (other, ..)| other.total_cmp(one));
    idle.truncate(idle.len().div_ceil(4));
    for (_, vm, action) in idle {
        begin(daemon, steps, vm, action);
    }
}

/// Begins an action; a step only if a slot is free.
fn begin(daemon: &Arc<Daemon>, steps: &mut Steps, vm: Arc<Vm>, action: IdleAction) {
    let daemon = daemon.clone();
    match action {
        IdleAction::End => {
            if vm.finish() {
                tracing::debug!(vm = vm.id, "An idle VM is ended");
                vm.life.blame("ended because it was idle");
                daemon.idle.ended(&vm.function.func_name);
                tokio::spawn(async move { standby::end(&daemon, &vm).await });
            }
        }
        IdleAction::Step(_) | IdleAction::Offload { .. } => {
            let Ok(slot) = steps.slots.clone().try_acquire_owned() else { return };
            steps.tasks.spawn(async move { descend_in(&daemon, &vm, action, slot).await });
        }
    }
}

/// The step to which an action leads.
fn step_of(action: IdleAction) -> Step {
    match action {
        IdleAction::Step(step) => step,
        IdleAction::Offload { .. } => Step::Spilled,
        // Nothing is left of it.
        IdleAction::End => Step::Suspended,
    }
}

/// Takes a step if the VM is still idle, and gives the slot back when the step ends, or is slow.
async fn descend_in(daemon: &Arc<Daemon>, vm: &Arc<Vm>, action: IdleAction, slot: OwnedSemaphorePermit) {
    let Some(descent) = vm.descend() else { return };
    let mut taken = pin!(descend(daemon, vm, descent, action));
    if tokio::time::timeout(SLOW_STEP, &mut taken).await.is_err() {
        drop(slot);
        let step = step_of(action);
        daemon.idle.slow(&vm.function.func_name, step);
        tracing::warn!(vm = vm.id, step = step.name(), "A step of an idle VM is slow, and no others wait for it");
        taken.await;
    }
}

/// The reason why a step was not taken.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Vm(#[from] ControlError),
    #[error("{0}")]
    Refused(String),
    #[error("a request has come")]
    Used,
}

/// Takes a step, and counts its end. Returns whether the VM has taken it.
async fn descend(daemon: &Arc<Daemon>, vm: &Arc<Vm>, descent: Descent<'_>, action: IdleAction) -> bool {
    let step = step_of(action);
    let goes_on = descent.is_offloading();
    let begun = Instant::now();
    let func_name = &vm.function.func_name;
    let taken = async {
        descent.park().await?;
        let given = match action {
            IdleAction::Offload { percent } => offload(daemon, vm, &descent, percent).await?,
            IdleAction::Step(Step::Trimmed) => descent.trim().await?,
            IdleAction::Step(Step::Spilled) => descent.spill(spill_file(daemon, vm).await?).await?,
            IdleAction::Step(Step::Suspended) => {
                let bytes = suspend(daemon, vm, &descent).await?;
                daemon.idle.freed(func_name, step, bytes);
                GivenBack::default()
            }
            IdleAction::Step(Step::Parked) | IdleAction::End => GivenBack::default(),
        };
        Ok::<_, StepError>(given)
    };
    let (end, why) = match taken.await {
        Ok(given) => {
            daemon.idle.gave_back(func_name, step, given);
            daemon.idle.took(func_name, step, begun.elapsed());
            if given.is_file_full {
                tracing::warn!(vm = vm.id, "An idle VM keeps a part of its pages: no more fit into its spill file");
                daemon.idle.stepped(func_name, step, StepEnd::Partly);
            } else if !goes_on {
                daemon.idle.stepped(func_name, step, StepEnd::Done);
            }
            return true;
        }
        // It was used, deleted, or made room for another VM.
        Err(error) if matches!(error, StepError::Used) || vm.idle_for().is_none() => {
            daemon.idle.stepped(func_name, step, StepEnd::Cancelled);
            return false;
        }
        Err(error @ (StepError::Vm(ControlError::Refused { .. }) | StepError::Refused(_))) => {
            descent.was_refused(step);
            (StepEnd::Refused, error.to_string())
        }
        // Its process no longer answers: no request could take it back.
        Err(error) => {
            vm.life.blame(format!("could not be {}: {error}", step.name()));
            vm.life.signal(Signal::KILL);
            (StepEnd::Failed, error.to_string())
        }
    };
    tracing::warn!(vm = vm.id, step = step.name(), why, "An idle VM does not take its step");
    daemon.idle.stepped(func_name, step, end);
    false
}

/// Lets idle VMs whose state is worth keeping make room by a suspension.
#[derive(Debug)]
pub(super) struct RoomBySuspension(Weak<Daemon>);

impl RoomBySuspension {
    pub(super) fn of(daemon: &Arc<Daemon>) -> RoomBySuspension {
        RoomBySuspension(Arc::downgrade(daemon))
    }
}

impl Suspends for RoomBySuspension {
    fn keeps(&self, vm: &Vm) -> bool {
        let rule = self.0.upgrade().and_then(|daemon| daemon.idle_rule(&vm.function.func_name));
        rule.is_some_and(|rule| rule.suspends())
    }

    fn suspend(&self, vm: Arc<Vm>) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        let daemon = self.0.clone();
        Box::pin(async move {
            let Some(daemon) = daemon.upgrade() else { return false };
            // A suspension that has begun is finished, whether or not the request that needs the room waits.
            let taken = tokio::spawn(async move {
                while vm.idle_for().is_some() {
                    vm.stepped().await;
                    if let Some(descent) = vm.descend() {
                        return descend(&daemon, &vm, descent, IdleAction::Step(Step::Suspended)).await;
                    }
                }
                false
            });
            taken.await.unwrap_or(false)
        })
    }
}

/// Reserves space for the spill file of a VM, as far as there is any.
async fn spill_file<'a>(daemon: &'a Daemon, vm: &Vm) -> Result<SpillFile<'a>, StepError> {
    let local = memory_of(vm.life.pid()).await?.anonymous_kib << 10;
    let most = daemon.options.limits.spill_disk_mib << 20;
    // Pages that do not compress, each in a block of its own.
    let wanted = (local + local / 8).next_multiple_of(1 << 20);
    let Some(bytes) = daemon.vms.reserve_spill(vm, wanted, most) else {
        let taken = daemon.vms.spill_bytes();
        return refuse(&format!("{taken} of the {most} bytes that all spill files may have are taken (--spill-disk)"));
    };
    Ok(SpillFile { dir: daemon.spill_dir(), mib: NonZeroU64::new(bytes >> 20).unwrap_or(NonZeroU64::MIN) })
}

/// Offloads a parked VM up to this part of the local memory that it had.
async fn offload(daemon: &Daemon, vm: &Vm, descent: &Descent<'_>, percent: u8) -> Result<GivenBack, StepError> {
    let local_pages =
        if descent.is_offloading() { 0 } else { (memory_of(vm.life.pid()).await?.anonymous_kib << 10) / PAGE_SIZE };
    let Some(most_pages) = descent.pages_due(percent, local_pages) else { return Ok(GivenBack::default()) };
    Ok(descent.offload(percent, most_pages, spill_file(daemon, vm).await?).await?)
}

/// Saves a parked VM, and ends its process. Returns the memory that the process had, bytes.
async fn suspend(daemon: &Arc<Daemon>, vm: &Arc<Vm>, descent: &Descent<'_>) -> Result<u64, StepError> {
    let tracks = match &vm.restore {
        Some(restore) => restore.load.track_dirty_pages,
        None => vm.function.track_dirty_pages,
    };
    if tracks {
        return refuse("a VM with `track_dirty_pages` is not suspended: its diffs build on its snapshots");
    }
    let suspended = &daemon.vms.suspended;
    let memory = memory_of(vm.life.pid()).await?;
    let former = suspended.layers_of(&vm.id);
    let (form, space) = reserve(daemon, vm, descent, &former, memory).await?;
    let Form { number, .. } = form;
    let saved = match save(daemon, vm, form).await {
        Ok(bytes) => settle_space(daemon, vm, space, bytes).await,
        Err(error) => Err(error),
    };
    let space = match saved {
        Ok(space) => space,
        Err(error) => {
            remove_layer(daemon, vm, number).await;
            return Err(error);
        }
    };
    let mut layers = if form.is_diff { former } else { Vec::new() };
    layers.push(Layer { number, bytes: space.bytes() });
    let idle = vm.since_used();
    if !descent.commit_suspension() {
        remove_layer(daemon, vm, number).await;
        return Err(StepError::Used);
    }
    let asleep = asleep(vm, layers, idle);
    // From here on the snapshot is the VM, also if its process ends by itself.
    suspended.leave(asleep.clone());
    drop(space);
    let kept = blocking({
        let daemon = daemon.clone();
        move || {
            let kept = daemon.vms.suspended.save(&asleep);
            if kept.is_err() {
                // The record may be there all the same. The directory may be removed by now.
                daemon.vms.suspended.unsave(&asleep.record().vm_id)?;
            }
            kept.map_err(io::Error::other)
        }
    });
    let kept = kept.await.map_err(|fault| fault.message).and_then(|kept| kept.map_err(|error| error.to_string()));
    if let Err(why) = kept {
        if suspended.stay(&vm.id) {
            descent.cancel_suspension();
            remove_layer(daemon, vm, number).await;
        }
        return refuse(&why);
    }
    let layer = Location::Dir(suspended.layer_dir(&vm.id, number));
    if !used_profile_path(&layer).exists() {
        daemon.idle.unprofiled(&vm.function.func_name, Step::Suspended);
    }
    descent.end_process().await;
    daemon.vms.changed.notify_one();
    Ok(memory.own_kib() << 10)
}

fn refuse<T>(why: &str) -> Result<T, StepError> {
    Err(StepError::Refused(why.to_owned()))
}

async fn memory_of(pid: u32) -> Result<ProcessMemory, StepError> {
    let read = blocking(move || ProcessMemory::of(pid)).await;
    let read = read.map_err(|fault| fault.message).and_then(|read| read.map_err(|error| error.to_string()));
    read.map_err(|why| StepError::Refused(format!("cannot read the memory of its process: {why}")))
}

/// The snapshot by which a VM is suspended.
#[derive(Clone, Copy)]
struct Form {
    is_diff: bool,
    number: u64,
    /// It has a profile of the pages that the VM has used, and what is made of it for the wake.
    has_profile: bool,
}

/// Takes a snapshot of a paused VM, which is read back from the disk. Returns its space there, bytes.
async fn save(daemon: &Arc<Daemon>, vm: &Vm, form: Form) -> Result<u64, StepError> {
    let Form { is_diff, number, has_profile } = form;
    let dir = daemon.vms.suspended.dir_of(&vm.id);
    let layer = daemon.vms.suspended.layer_dir(&vm.id, number);
    on_disk(move || private_dir(&dir)).await?;
    let body = CreateBody {
        snapshot_path: layer.clone(),
        mem_file_path: None,
        snapshot_type: if is_diff { SnapshotKind::Diff } else { SnapshotKind::Full },
        tvmm: CreateExtension {
            copy_drives: vm.function.writes_image(),
            verify: true,
            profile: has_profile,
            ..CreateExtension::default()
        },
    };
    vm.send::<SnapshotTaken>("PUT", "/snapshot/create", &body).await?;
    on_disk(move || space_of(&layer)).await
}

fn private_dir(dir: &std::path::Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> Result<T, StepError> {
    let done = blocking(work).await.map_err(|fault| fault.message);
    done.and_then(|done| done.map_err(|error| error.to_string())).map_err(StepError::Refused)
}

async fn remove_layer(daemon: &Daemon, vm: &Vm, number: u64) {
    let dir = daemon.vms.suspended.dir_of(&vm.id);
    let layer = daemon.vms.suspended.layer_dir(&vm.id, number);
    let remove = move || {
        gone_is_fine(std::fs::remove_dir_all(layer))?;
        // This fails, and need not succeed, if the VM has other snapshots.
        let _ = std::fs::remove_dir(dir);
        Ok(())
    };
    if let Err(error) = on_disk(remove).await {
        tracing::warn!(%error, vm = vm.id, "Cannot remove a snapshot that was given up");
    }
}

/// Decides on the snapshot by which a VM is suspended, whose former ones are `former`, and reserves space for it.
async fn reserve<'a>(
    daemon: &'a Daemon,
    vm: &Vm,
    descent: &Descent<'_>,
    former: &[Layer],
    memory: ProcessMemory,
) -> Result<(Form, DiskSpace<'a>), StepError> {
    let finds_pages = daemon.finds_used_pages;
    // A fork point ends with its VMs: nothing builds on it.
    let is_from_snapshot = vm.restore.as_ref().is_some_and(|restore| !matches!(restore.origin, RestoreOrigin::Fork(_)));
    let is_diff = finds_pages && is_from_snapshot && former.len() < MOST_LAYERS;
    let used = ((memory.anonymous_kib + memory.shared_kib) << 10) + spilled_bytes(vm).await?;
    let mut space = if is_diff {
        room_for_diff(daemon, vm, descent).await?
    } else {
        // A full snapshot has about this size: pages of the snapshots below that the VM has never touched come to it.
        make_room(daemon, vm, used).await?
    };
    // The wake takes longer without a profile, but no other VM has to end for that.
    let most = daemon.options.limits.suspend_disk_mib << 20;
    let for_profile =
        if finds_pages && vm.restore.is_some() { daemon.vms.suspended.reserve_space(used, most) } else { None };
    let has_profile = for_profile.is_some();
    for_profile.into_iter().for_each(|more| space.join(more));
    let number = 1 + former.last().map_or(0, |layer| layer.number);
    Ok((Form { is_diff, number, has_profile }, space))
}

/// Reserves space for a diff of a paused VM. The diff has the pages that the VM has a copy of and that differ from its
/// snapshot, so that it is no larger than the local memory of the VM's process. If there is no space for so many,
/// copies that equal the snapshot are given back first: no other VM is to end for them.
async fn room_for_diff<'a>(daemon: &'a Daemon, vm: &Vm, descent: &Descent<'_>) -> Result<DiskSpace<'a>, StepError> {
    let images: u64 = vm.record().drives.iter().map(|drive| drive.len).sum();
    let copies = || async {
        Ok::<_, StepError>((memory_of(vm.life.pid()).await?.anonymous_kib << 10) + spilled_bytes(vm).await?)
    };
    let most = most_space(daemon, BESIDE_PAGES + images)?;
    let bytes = copies().await? + images + BESIDE_PAGES;
    if daemon.vms.suspended.has_space(bytes, most) {
        return make_room(daemon, vm, bytes).await;
    }
    let given = descent.trim().await?;
    daemon.idle.gave_back(&vm.function.func_name, Step::Trimmed, given);
    make_room(daemon, vm, copies().await? + images + BESIDE_PAGES).await
}

/// The pages of a VM that are in its spill file, bytes.
async fn spilled_bytes(vm: &Vm) -> Result<u64, StepError> {
    if vm.spill_bytes() == 0 {
        return Ok(0);
    }
    let report = vm.report().await?;
    Ok(PAGE_SIZE * report["spill"]["pages_away"].as_u64().unwrap_or_default())
}

/// Keeps so many of the bytes that were reserved for a snapshot of a VM that is there now, or reserves more.
async fn settle_space<'a>(
    daemon: &'a Daemon,
    vm: &Vm,
    mut space: DiskSpace<'a>,
    bytes: u64,
) -> Result<DiskSpace<'a>, StepError> {
    if space.shrink(bytes) {
        return Ok(space);
    }
    drop(space);
    make_room(daemon, vm, bytes).await
}

/// Ends suspended VMs that invocations have left, those first that were used longest ago, until there is room for so
/// many bytes, and reserves them for `vm`. Waits for suspensions under way that have reserved more than they will need,
/// unless a request comes.
async fn make_room<'a>(daemon: &'a Daemon, vm: &Vm, bytes: u64) -> Result<DiskSpace<'a>, StepError> {
    let most = most_space(daemon, bytes)?;
    let suspended = &daemon.vms.suspended;
    loop {
        for vm in suspended.all() {
            if suspended.has_space(bytes, most) {
                break;
            }
            let record = vm.record();
            if record.from_invocation
                && daemon.vms.end_suspended(&record.vm_id, "its disk space was needed for others (--suspend-disk)")
            {
                daemon.idle.evicted(&record.func_name);
            }
        }
        if !suspended.has_space(bytes, most) {
            let taken = suspended.settled_bytes();
            return refuse(&format!(
                "it needs {bytes} bytes of the disk, and {taken} of {most} are taken (--suspend-disk)"
            ));
        }
        if let Some(space) = suspended.reserve_space(bytes, most) {
            return Ok(space);
        }
        if vm.idle_for().is_none() {
            return Err(StepError::Used);
        }
        // The notice of space may have come before this wait.
        let _ = tokio::time::timeout(*PAUSE.end(), suspended.unreserved.notified()).await;
    }
}

/// The space that all suspended VMs may have, if one that needs so many bytes can be among them.
fn most_space(daemon: &Daemon, bytes: u64) -> Result<u64, StepError> {
    let most = daemon.options.limits.suspend_disk_mib << 20;
    if most == 0 {
        return refuse("suspended VMs may have no disk space (--suspend-disk 0)");
    }
    if bytes > most {
        return refuse(&format!("it needs {bytes} bytes of the disk, and all may have {most} (--suspend-disk)"));
    }
    Ok(most)
}

fn asleep(vm: &Vm, layers: Vec<Layer>, idle: Duration) -> SuspendedVm {
    let record = vm.record();
    let record = VmRecord {
        state: VmState::Suspended,
        pid: 0,
        drives: Vec::new(),
        suspensions: record.suspensions + 1,
        suspended_bytes: layers.iter().map(|layer| layer.bytes).sum(),
        ..record
    };
    SuspendedVm {
        life: FormerLife { record, restore: vm.first_restore().cloned().map(Box::new) },
        function: vm.function.clone(),
        layers,
        used_unix_ms: unix_ms().saturating_sub(idle.as_millis() as u64),
    }
}
