//! All VMs: their limits, the choice of one that makes room, and the records of ended ones.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::Notify;

use super::process::ChildExit;
use super::{Vm, VmRecord, VmState};
use crate::serve::fault::Fault;
use crate::serve::standby_counts::{StandbyCounts, StandbyEvent};
use crate::serve::store;

/// ChildExit VMs that are kept for clients; older ones are dropped.
const MAX_OVER: usize = 256;

/// The VMs of this daemon.
#[derive(Debug)]
pub struct Table {
    live: Mutex<BTreeMap<String, Arc<Vm>>>,
    over: Mutex<VecDeque<VmRecord>>,
    /// The places and the memory of VMs that live or are being made.
    taken: Arc<Mutex<Capacity>>,
    max: Capacity,
    /// Requests for which VMs make room at present.
    waiting: AtomicUsize,
    standby: Arc<StandbyCounts>,
    /// Notified of changes that a restart should find.
    pub changed: Notify,
}

/// Places and memory that VMs take, or may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    pub vms: usize,
    /// Guest memory, MiB.
    pub memory_mib: u64,
}

/// The allowance for one VM.
#[derive(Debug)]
pub struct VmPermit {
    taken: Arc<Mutex<Capacity>>,
    memory_mib: u64,
}

impl Drop for VmPermit {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        taken.vms -= 1;
        taken.memory_mib -= self.memory_mib;
    }
}

/// A request that waits for room, until it has it or is given up.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn lock(taken: &Mutex<Capacity>) -> MutexGuard<'_, Capacity> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    /// `lost`: VMs that were living when an earlier daemon ended.
    pub fn new(max: Capacity, lost: Vec<VmRecord>, standby: Arc<StandbyCounts>) -> Table {
        let over = lost.into_iter().map(|record| match record.state {
            VmState::Lost | VmState::Ended => record,
            _ => VmRecord {
                state: VmState::Lost,
                reason: Some("The daemon ended while it ran, and it with the daemon.".into()),
                ..record
            },
        });
        Table {
            live: Mutex::default(),
            over: Mutex::new(over.collect()),
            taken: Arc::default(),
            max,
            waiting: AtomicUsize::new(0),
            standby,
            changed: Notify::new(),
        }
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Vm>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self) -> MutexGuard<'_, VecDeque<VmRecord>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the allowance for one more VM with this much guest memory. If the limits do not permit it, the VM left
    /// by an invocation that has been idle longest makes room, or else the one that has stood by longest.
    pub async fn reserve(&self, memory_mib: u64) -> Result<VmPermit, Fault> {
        let limit = self.max.memory_mib;
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
            if let Some(slot) = self.try_reserve(memory_mib) {
                return Ok(slot);
            }
            let Some(vm) = self.longest_idle() else {
                let Capacity { vms, memory_mib: taken } = self.taken();
                if vms >= self.max.vms {
                    return Err(Fault::busy(format!("{} VMs live, which is all there may be.", self.max.vms)));
                }
                return Err(Fault::busy(format!(
                    "The VM needs {memory_mib} MiB of memory, and {vms} VMs have {taken} of the {limit} MiB that all \
                     may have."
                )));
            };
            vm.process.stop().await;
            // The task that waits for the VM's end runs first: it gives back the VM's place.
            tokio::task::yield_now().await;
        }
    }

    /// Returns the allowance for one more VM if no other VM has to make room for it, and no request waits for room.
    pub fn reserve_free(&self, memory_mib: u64) -> Result<VmPermit, Fault> {
        let is_free = self.waiting.load(Ordering::Relaxed) == 0;
        let permit = if is_free { self.try_reserve(memory_mib) } else { None };
        permit.ok_or_else(|| Fault::busy("There is no room for a VM that stands by."))
    }

    /// Returns whether [`reserve_free`](Self::reserve_free) has an allowance.
    pub fn has_room(&self, memory_mib: u64) -> bool {
        self.reserve_free(memory_mib).is_ok()
    }

    fn try_reserve(&self, memory_mib: u64) -> Option<VmPermit> {
        let mut taken = lock(&self.taken);
        let wanted = Capacity { vms: taken.vms + 1, memory_mib: taken.memory_mib.saturating_add(memory_mib) };
        (wanted.vms <= self.max.vms && wanted.memory_mib <= self.max.memory_mib).then(|| {
            *taken = wanted;
            VmPermit { taken: self.taken.clone(), memory_mib }
        })
    }

    /// Takes the VM that was idle longest out of the table, so that no other request finds it.
    fn longest_idle(&self) -> Option<Arc<Vm>> {
        let mut live = self.live();
        let idle = live.values().filter(|vm| vm.from_invocation);
        let idle = idle.filter_map(|vm| Some((vm.idle_for()?, &vm.id))).max();
        let waiting = || live.values().filter_map(|vm| Some((vm.standing_by_for()?, &vm.id))).max();
        let id = idle.or_else(waiting)?.1.clone();
        let vm = live.remove(&id)?;
        if vm.retire() {
            self.standby.count(&vm.function.func_name, StandbyEvent::Evicted);
        }
        Some(vm)
    }

    /// Adds a VM, and removes it when it has ended.
    pub fn add(self: &Arc<Self>, vm: Vm, slot: VmPermit, vsock: Option<std::path::PathBuf>) -> Arc<Vm> {
        let vm = Arc::new(vm);
        self.live().insert(vm.id.clone(), vm.clone());
        self.changed.notify_one();
        let table = self.clone();
        let watched = vm.clone();
        tokio::spawn(async move {
            let ended = watched.process.end().await;
            table.is_over(&watched, &ended, vsock.as_deref());
            drop(slot);
        });
        vm
    }

    fn is_over(&self, vm: &Vm, ended: &ChildExit, vsock: Option<&Path>) {
        let record = VmRecord { state: VmState::Ended, reason: Some(ended.why()), ..vm.record() };
        self.live().remove(&vm.id);
        if vm.retire() {
            self.standby.count(&vm.function.func_name, StandbyEvent::Lost);
        }
        // There is room for another VM.
        self.standby.changed.notify_one();
        let mut over = self.over();
        over.push_back(record);
        let too_many = over.len().saturating_sub(MAX_OVER);
        over.drain(..too_many);
        drop(over);
        if let Some(error) = vsock.and_then(|path| store::gone_is_fine(std::fs::remove_file(path)).err()) {
            tracing::warn!(%error, vm = vm.id, "Cannot remove the socket of a VM that has ended");
        }
        self.changed.notify_one();
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
        living.or_else(|| self.over().iter().rev().find(|record| record.vm_id == id).cloned())
    }

    /// All records: living VMs, then ended ones, the last first.
    pub fn records(&self) -> Vec<VmRecord> {
        let mut records: Vec<VmRecord> = self.all().iter().map(|vm| vm.record()).collect();
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

    /// VMs that invocations have left behind and that no request has used for `limit`.
    pub fn idle_longer_than(&self, limit: Duration) -> Vec<Arc<Vm>> {
        let is_idle = |vm: &Arc<Vm>| vm.from_invocation && vm.idle_for().is_some_and(|idle| idle >= limit);
        self.all().into_iter().filter(is_idle).collect()
    }

    /// The places and the memory of VMs that live or are being made.
    pub fn taken(&self) -> Capacity {
        *lock(&self.taken)
    }
}
