//! All VMs: their limits, the choice of one that makes room, and the records of ended ones.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::Notify;

use super::capacity::{Capacity, Room};
use super::process::STOP_GRACE;
use super::shape::{Need, Shape};
use super::shells::{Past, Shell};
use super::spares::{Place, Spare, Spares};
use super::{RequestGuard, Vm, VmRecord, VmState};
use crate::config::request::VacateRequest;
use crate::serve::fault::Fault;
use crate::serve::options::Reuse;
use crate::serve::repurpose_counts::{RepurposeCounts, RepurposeEnd};
use crate::serve::standby_counts::{StandbyCounts, StandbyEvent};
use crate::serve::store;
use crate::serve::suspended::Suspended;

/// Records of ended VMs that are kept for clients; older ones are dropped.
const MAX_OVER: usize = 256;
/// Time for which the process of a finished VM waits for another VM.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// The VMs of this daemon.
#[derive(Debug)]
pub struct Table {
    live: Mutex<BTreeMap<String, Arc<Vm>>>,
    over: Mutex<VecDeque<VmRecord>>,
    room: Room,
    /// Processes of VMs that have finished.
    spares: Spares,
    reuse: Reuse,
    repurposes: Arc<RepurposeCounts>,
    /// Requests for which VMs make room at present.
    waiting: AtomicUsize,
    standby: Arc<StandbyCounts>,
    pub suspended: Suspended,
    suspends: OnceLock<Box<dyn Suspends>>,
    /// Notified of changes that a restart should find.
    pub changed: Notify,
}

/// Counts of events that the table sees.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub standby: Arc<StandbyCounts>,
    pub repurposes: Arc<RepurposeCounts>,
}

/// Suspends idle VMs, so that they make room for others and keep their state.
pub trait Suspends: Debug + Send + Sync {
    /// Returns whether the VM's policy keeps its state.
    fn keeps(&self, vm: &Vm) -> bool;

    /// Suspends an idle VM, after the step that it may be taking. False: a request uses it, or it cannot be suspended.
    fn suspend(&self, vm: Arc<Vm>) -> Pin<Box<dyn Future<Output = bool> + Send>>;
}

/// A request that waits for room, until it has it or is given up.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Table {
    /// `former`: the VMs of an earlier daemon. Those that are not suspended were living when it ended, or had ended.
    pub fn new(room: Room, reuse: Reuse, former: Vec<VmRecord>, suspended: Suspended, counts: Counts) -> Table {
        let lost = former.into_iter().filter(|record| suspended.get(&record.vm_id).is_none());
        let over: VecDeque<VmRecord> = lost
            .map(|record| match record.state {
                VmState::Lost | VmState::Ended => record,
                _ => {
                    tracing::warn!(vm = record.vm_id, "A VM was lost with the daemon that had started it");
                    VmRecord {
                        state: VmState::Lost,
                        reason: Some("The daemon ended while it ran, and it with the daemon.".into()),
                        ..record
                    }
                }
            })
            .collect();
        Table {
            live: Mutex::default(),
            over: Mutex::new(over),
            suspended,
            suspends: OnceLock::new(),
            room,
            spares: Spares::default(),
            reuse,
            repurposes: counts.repurposes,
            waiting: AtomicUsize::new(0),
            standby: counts.standby,
            changed: Notify::new(),
        }
    }

    /// Called once, before there are VMs.
    pub fn set_suspends(&self, suspends: impl Suspends + 'static) {
        drop(self.suspends.set(Box::new(suspends)));
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Vm>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self) -> MutexGuard<'_, VecDeque<VmRecord>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the place for one more VM. A kept process is used first. If the limits do not permit another one, kept
    /// processes make room, then the VM left by an invocation that has been idle longest, or else the one that has
    /// stood by longest. A VM whose policy keeps its state is suspended, if it can be; others end. If the process of
    /// the one that makes room may serve the VM, it comes with the place.
    pub async fn reserve(&self, need: &Need<'_>) -> Result<Place, Fault> {
        let limit = self.room.max.memory_mib;
        let memory_mib = need.memory_mib;
        if memory_mib > limit {
            let message = format!(
                "The VM needs {memory_mib} MiB of memory, and all VMs together may have {limit} MiB: give the function \
                 a smaller `mem_size`, or the service a larger --memory."
            );
            return Err(Fault::new(StatusCode::INSUFFICIENT_STORAGE, message));
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        loop {
            if let Some(place) = self.take_spare(need) {
                return Ok(place);
            }
            if let Some(permit) = self.room.take(memory_mib) {
                return Ok(Place { permit, used: None });
            }
            if let Some(spare) = self.spares.take_first() {
                self.count_unfit(need);
                spare.end().await;
            } else if let Some(vm) = self.finishing().filter(|_| self.is_enough_finishing()) {
                vm.life.end().await;
            } else if let Some(vm) = self.longest_idle() {
                let is_suspended = match self.suspends.get() {
                    Some(suspends) if suspends.keeps(&vm) => suspends.suspend(vm.clone()).await,
                    _ => false,
                };
                if !is_suspended
                    && self.let_finish(&vm)
                    && let Some(place) = self.make_room(vm, need).await
                {
                    return Ok(place);
                }
            } else if let Some(vm) = self.finishing() {
                vm.life.end().await;
            } else {
                return Err(self.no_room(memory_mib));
            }
            // The task that waits for the VM's end runs first: it gives back the VM's place.
            tokio::task::yield_now().await;
        }
    }

    fn no_room(&self, memory_mib: u64) -> Fault {
        let Capacity { vms: most, memory_mib: limit } = self.room.max;
        let Capacity { vms, memory_mib: taken } = self.room.taken();
        if vms >= most {
            return Fault::busy(format!("{most} VMs live, which is all there may be."));
        }
        Fault::busy(format!(
            "The VM needs {memory_mib} MiB of memory, and {vms} VMs have {taken} of the {limit} MiB that all may have."
        ))
    }

    /// Returns the place for one more VM if no other VM has to make room for it, and no request waits for room. A kept
    /// process is used first.
    pub fn reserve_free(&self, need: &Need<'_>) -> Result<Place, Fault> {
        let place = if self.is_waited_for() {
            None
        } else {
            let free = || self.room.take(need.memory_mib).map(|permit| Place { permit, used: None });
            self.take_spare(need).or_else(free)
        };
        place.ok_or_else(|| Fault::busy("There is no room for a VM that stands by."))
    }

    /// Returns whether [`reserve_free`](Self::reserve_free) has a place.
    pub fn has_room(&self, need: &Need<'_>) -> bool {
        let has_spare = || need.shape.is_some_and(|shape| self.spares.has(shape));
        !self.is_waited_for() && (has_spare() || self.room.take(need.memory_mib).is_some())
    }

    fn is_waited_for(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Returns the place and the process of a VM that has finished, if one is kept that may become the VM.
    fn take_spare(&self, need: &Need<'_>) -> Option<Place> {
        self.spares.take(need.shape?)
    }

    /// The number of kept processes.
    pub fn spares(&self) -> usize {
        self.spares.len()
    }

    /// Ends all kept processes.
    pub fn clear_spares(&self) {
        self.spares.clear();
    }

    /// A VM that has finished, and whose process ends or will be kept.
    fn finishing(&self) -> Option<Arc<Vm>> {
        self.live().values().find(|vm| vm.is_finishing()).cloned()
    }

    /// The number of VMs that have finished, and whose processes may be kept for a VM of this shape.
    pub fn count_finishing(&self, shape: Option<Shape>) -> usize {
        let is_one = |vm: &&Arc<Vm>| vm.shape == shape && vm.is_finishing();
        if shape.is_some() && self.reuse == Reuse::Allowed { self.live().values().filter(is_one).count() } else { 0 }
    }

    /// Returns whether as many VMs have finished as requests wait, so that no other VM has to make room.
    fn is_enough_finishing(&self) -> bool {
        let finishing = self.live().values().filter(|vm| vm.is_finishing()).count();
        finishing >= self.waiting.load(Ordering::Relaxed)
    }

    /// Takes the process of a VM that has finished for another one, if it may serve it, and ends it otherwise. The VM's
    /// life ends also if the request that needs the place is given up meanwhile.
    async fn make_room(&self, vm: Arc<Vm>, need: &Need<'_>) -> Option<Place> {
        let is_shared = self.reuse == Reuse::Allowed && need.shape.is_some();
        let is_fit = is_shared && vm.shape == need.shape;
        if is_shared && !is_fit {
            self.count_unfit(need);
        }
        let made = tokio::spawn(async move {
            let given = if is_fit { vm.life.give(STOP_GRACE).await } else { None };
            if given.is_none() {
                vm.life.stop_because("made room for another VM").await;
            }
            given
        });
        let (shell, permit) = made.await.ok().flatten()?;
        Some(Place { permit, used: Some(Shell { past: Past::Vm, ..shell }) })
    }

    fn count_unfit(&self, need: &Need<'_>) {
        if need.shape.is_some() {
            self.repurposes.count(need.func_name, RepurposeEnd::Unfit);
        }
    }

    /// Ends a VM that has finished, or keeps its process for another one.
    pub async fn retire(self: &Arc<Self>, vm: &Vm) {
        if !self.keep_process(vm).await {
            vm.life.stop_because("finished").await;
        }
    }

    /// Takes the process of a finished VM away from it. Returns whether it could: then nothing is left to end.
    async fn keep_process(self: &Arc<Self>, vm: &Vm) -> bool {
        let Some(shape) = vm.shape.filter(|_| self.reuse == Reuse::Allowed) else { return false };
        if self.spares.is_full() || vm.life.ended().is_some() {
            return false;
        }
        // Nothing of the finished run goes on, and its memory goes back to the host before the next VM needs the
        // process.
        let vacated = vm.send::<()>("PUT", "/tvmm/vacate", &VacateRequest {});
        if !matches!(tokio::time::timeout(STOP_GRACE, vacated).await, Ok(Ok(()))) {
            return false;
        }
        let Some((shell, permit)) = vm.life.give(STOP_GRACE).await else { return false };
        let number = match self.spares.keep(Spare { shell: Shell { past: Past::Vm, ..shell }, permit, shape }) {
            Ok(number) => number,
            Err(spare) => {
                spare.end().await;
                return true;
            }
        };
        let table = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(KEPT_FOR).await;
            if let Some(spare) = table.spares.take_kept(number) {
                spare.end().await;
                table.standby.changed.notify_one();
            }
        });
        true
    }

    /// The VM that was idle longest, one that takes no step before others; else the one that has stood by longest.
    fn longest_idle(&self) -> Option<Arc<Vm>> {
        let live = self.live();
        let idle = live.values().filter(|vm| vm.from_invocation);
        let idle = idle.filter_map(|vm| Some((!vm.is_stepping(), vm.idle_for()?, &vm.id))).max();
        let waiting = || live.values().filter_map(|vm| Some((vm.standing_by_for()?, &vm.id))).max();
        let id = idle.map(|(.., id)| id).or_else(|| waiting().map(|(_, id)| id))?;
        live.get(id).cloned()
    }

    /// Lets a VM finish that is idle or stands by, so that no request finds it; false if a request has found it.
    fn let_finish(&self, vm: &Vm) -> bool {
        let stood_by = vm.stands_by();
        let is_finished = vm.finish();
        if is_finished && stood_by {
            self.standby.events.count(&vm.function.func_name, StandbyEvent::Evicted);
        }
        is_finished
    }

    /// Adds a new VM, and removes it when it has ended. Returns it in use by the request for which it was made.
    pub fn add(self: &Arc<Self>, vm: Vm) -> RequestGuard {
        let vm = Arc::new(vm);
        self.live().insert(vm.id.clone(), vm.clone());
        self.changed.notify_one();
        let table = self.clone();
        let watched = vm.clone();
        tokio::spawn(async move {
            watched.life.end().await;
            table.is_over(&watched);
        });
        RequestGuard(vm)
    }

    fn is_over(&self, vm: &Vm) {
        let record = VmRecord { state: VmState::Ended, ..vm.record() };
        self.live().remove(&vm.id);
        let is_suspended = self.suspended.has_left(&vm.id);
        if vm.retire() {
            self.standby.events.count(&vm.function.func_name, StandbyEvent::Lost);
        }
        vm.life.close();
        // There is room for another VM, or a process for it.
        self.standby.changed.notify_one();
        if !is_suspended {
            self.add_over(record);
        }
        if let Some(error) = vm.vsock.as_ref().and_then(|path| store::gone_is_fine(std::fs::remove_file(path)).err()) {
            tracing::warn!(%error, vm = vm.id, "Cannot remove the socket of a VM that has ended");
        }
        vm.settle();
        self.changed.notify_one();
    }

    fn add_over(&self, record: VmRecord) {
        let mut over = self.over();
        over.push_back(record);
        let too_many = over.len().saturating_sub(MAX_OVER);
        over.drain(..too_many);
    }

    /// Ends a suspended VM, for this reason. Returns false if it is not suspended, or is being woken.
    pub fn end_suspended(&self, id: &str, reason: &str) -> bool {
        let Some(record) = self.suspended.remove_asleep(id) else { return false };
        self.add_over(VmRecord { state: VmState::Ended, reason: Some(reason.to_owned()), ..record });
        self.changed.notify_one();
        true
    }

    /// The number of VMs in each state but the last ones, and of those that are being made or whose processes are kept.
    pub fn count_by_state(&self) -> BTreeMap<&'static str, usize> {
        let shown = ["running", "busy", "standby", "parked", "trimmed", "spilled", "suspended", "starting", "finished"];
        let mut counts: BTreeMap<&'static str, usize> = shown.into_iter().map(|state| (state, 0)).collect();
        let living = self.all();
        let with_process = living.iter().filter_map(|vm| vm.record().state.name()).collect::<Vec<_>>();
        for state in &with_process {
            *counts.entry(state).or_default() += 1;
        }
        counts.insert("suspended", counts["suspended"] + self.suspended.all().len());
        counts.insert("finished", self.spares());
        let others = living.len() + self.spares();
        counts.insert("starting", self.room.taken().vms.saturating_sub(others));
        counts
    }

    /// Space of all spill files, bytes.
    pub fn spill_bytes(&self) -> u64 {
        self.live().values().map(|vm| vm.spill_bytes()).sum()
    }

    /// Reserves space for a spill file that may grow by `more` bytes, of the `most` that all may have. Returns the most
    /// bytes that it may have; `None` if there is no MiB left by which it could grow.
    pub fn reserve_spill(&self, vm: &Vm, more: u64, most: u64) -> Option<u64> {
        let live = self.live();
        let others: u64 = live.values().filter(|other| other.id != vm.id).map(|other| other.spill_bytes()).sum();
        let has = vm.spill_bytes();
        let may_have = (has + more).min(most.saturating_sub(others));
        if may_have < has + (1 << 20) {
            return None;
        }
        vm.note_spill(may_have);
        Some(may_have)
    }

    /// A living VM.
    pub fn get(&self, id: &str) -> Option<Arc<Vm>> {
        self.live().get(id).cloned()
    }

    /// All living VMs.
    pub fn all(&self) -> Vec<Arc<Vm>> {
        self.live().values().cloned().collect()
    }

    /// The record of a VM that lives or is over.
    pub fn record(&self, id: &str) -> Option<VmRecord> {
        let living = self.get(id).map(|vm| vm.record());
        let suspended = || self.suspended.record(id);
        let over = || self.over().iter().rev().find(|record| record.vm_id == id).cloned();
        living.or_else(suspended).or_else(over)
    }

    /// All records: living VMs, suspended ones, then ended ones, the last first.
    pub fn records(&self) -> Vec<VmRecord> {
        let mut records: Vec<VmRecord> = self.all().iter().map(|vm| vm.record()).collect();
        let waking = self.suspended.woken_records();
        let is_listed = |woken: &VmRecord| records.iter().any(|record| record.vm_id == woken.vm_id);
        let waking: Vec<VmRecord> = waking.into_iter().filter(|woken| !is_listed(woken)).collect();
        records.extend(waking);
        records.extend(self.suspended.all().into_iter().map(|vm| vm.life.record));
        records.extend(self.over().iter().rev().cloned());
        records
    }

    /// Removes an ended VM's record.
    pub fn forget(&self, id: &str) -> bool {
        let mut over = self.over();
        let before = over.len();
        over.retain(|record| record.vm_id != id);
        let found = over.len() < before;
        drop(over);
        if found {
            self.changed.notify_one();
        }
        found
    }

    /// The places and the memory of VMs that live or are being made, and of kept processes.
    pub fn taken(&self) -> Capacity {
        self.room.taken()
    }
}
