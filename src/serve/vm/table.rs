//! All VMs: how many may live, which one makes room, what became of those that are over.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::process::Ended;
use super::{Vm, VmRecord, VmState};
use crate::serve::fault::Fault;
use crate::serve::store;

/// VMs that are over, of which the last ones are told.
const MAX_OVER: usize = 256;

/// The VMs of this daemon.
#[derive(Debug)]
pub(in crate::serve) struct Table {
    live: Mutex<BTreeMap<String, Arc<Vm>>>,
    over: Mutex<VecDeque<VmRecord>>,
    /// VMs that live or are being made.
    count: Arc<AtomicUsize>,
    max: usize,
    /// Something changed that a restart should find.
    pub(in crate::serve) changed: Notify,
}

/// The right to have one VM.
#[derive(Debug)]
pub(in crate::serve) struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Table {
    /// `lost`: VMs that lived when an earlier daemon ended.
    pub(in crate::serve) fn new(max: usize, lost: Vec<VmRecord>) -> Table {
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
            count: Arc::default(),
            max,
            changed: Notify::new(),
        }
    }

    fn live(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Vm>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn over(&self) -> std::sync::MutexGuard<'_, VecDeque<VmRecord>> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to one more VM. If there are as many as may be, the one that has been idle longest among those that
    /// invocations have left behind makes room.
    pub(in crate::serve) async fn reserve(&self) -> Result<Slot, Fault> {
        loop {
            if let Some(slot) = self.try_reserve() {
                return Ok(slot);
            }
            let Some(vm) = self.longest_idle() else {
                return Err(Fault::busy(format!("{} VMs live, which is all there may be.", self.max)));
            };
            vm.process.stop().await;
            // Whoever waits for its end runs before this goes on.
            tokio::task::yield_now().await;
        }
    }

    fn try_reserve(&self) -> Option<Slot> {
        let slot = Slot(self.count.clone());
        // Slot's drop takes it back.
        (self.count.fetch_add(1, Ordering::Relaxed) < self.max).then_some(slot)
    }

    /// Taken out of the table, so that nobody else finds it.
    fn longest_idle(&self) -> Option<Arc<Vm>> {
        let mut live = self.live();
        let idle = live.values().filter(|vm| vm.from_invocation);
        let id = idle.filter_map(|vm| Some((vm.idle_for()?, &vm.id))).max()?.1.clone();
        live.remove(&id)
    }

    /// Takes in a VM, and out again when it has ended.
    pub(in crate::serve) fn add(self: &Arc<Self>, vm: Vm, slot: Slot, vsock: Option<std::path::PathBuf>) -> Arc<Vm> {
        let vm = Arc::new(vm);
        self.live().insert(vm.id.clone(), vm.clone());
        self.changed.notify_one();
        let (table, watched) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            let ended = watched.process.end().await;
            table.is_over(&watched, &ended, vsock.as_deref());
            drop(slot);
        });
        vm
    }

    fn is_over(&self, vm: &Vm, ended: &Ended, vsock: Option<&Path>) {
        let record = VmRecord { state: VmState::Ended, reason: Some(ended.why()), ..vm.record() };
        self.live().remove(&vm.id);
        let mut over = self.over();
        over.push_back(record);
        let too_many = over.len().saturating_sub(MAX_OVER);
        over.drain(..too_many);
        drop(over);
        if let Some(error) = vsock.and_then(|path| store::gone_is_fine(std::fs::remove_file(path)).err()) {
            tracing::warn!(%error, vm = vm.id, "The socket of a VM that is over cannot be removed");
        }
        self.changed.notify_one();
    }

    /// A VM that lives.
    pub(in crate::serve) fn get(&self, id: &str) -> Option<Arc<Vm>> {
        self.live().get(id).cloned()
    }

    /// All VMs that live.
    pub(in crate::serve) fn all(&self) -> Vec<Arc<Vm>> {
        self.live().values().cloned().collect()
    }

    /// What there is to say of a VM, living or not.
    pub(in crate::serve) fn record(&self, id: &str) -> Option<VmRecord> {
        let living = self.get(id).map(|vm| vm.record());
        living.or_else(|| self.over().iter().rev().find(|record| record.vm_id == id).cloned())
    }

    /// All that can be told: those that live, then those that are over, the last first.
    pub(in crate::serve) fn records(&self) -> Vec<VmRecord> {
        let mut records: Vec<VmRecord> = self.all().iter().map(|vm| vm.record()).collect();
        records.extend(self.over().iter().rev().cloned());
        records
    }

    /// Forgets a VM that is over.
    pub(in crate::serve) fn forget(&self, id: &str) -> bool {
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

    /// VMs that invocations have left behind and nobody has used for `limit`.
    pub(in crate::serve) fn idle_longer_than(&self, limit: Duration) -> Vec<Arc<Vm>> {
        let is_idle = |vm: &Arc<Vm>| vm.from_invocation && vm.idle_for().is_some_and(|idle| idle >= limit);
        self.all().into_iter().filter(is_idle).collect()
    }

    pub(in crate::serve) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}
