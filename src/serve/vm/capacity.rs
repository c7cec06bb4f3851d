//! The places and the guest memory of VMs: those taken, and the allowance of each VM.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places and memory that VMs take, or may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    pub vms: usize,
    /// Guest memory, MiB.
    pub memory_mib: u64,
}

/// All places and memory of VMs.
#[derive(Debug)]
pub struct Room {
    /// Those of VMs that live or are being made, and of kept processes.
    taken: Arc<Mutex<Capacity>>,
    pub max: Capacity,
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

fn lock(taken: &Mutex<Capacity>) -> MutexGuard<'_, Capacity> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Room {
    pub fn new(max: Capacity) -> Room {
        Room { taken: Arc::default(), max }
    }

    /// Returns the allowance for one more VM, if the limits permit it.
    pub fn take(&self, memory_mib: u64) -> Option<VmPermit> {
        let mut taken = lock(&self.taken);
        let wanted = Capacity { vms: taken.vms + 1, memory_mib: taken.memory_mib.saturating_add(memory_mib) };
        (wanted.vms <= self.max.vms && wanted.memory_mib <= self.max.memory_mib).then(|| {
            *taken = wanted;
            VmPermit { taken: self.taken.clone(), memory_mib }
        })
    }

    /// The places and the memory that are taken.
    pub fn taken(&self) -> Capacity {
        *lock(&self.taken)
    }
}
