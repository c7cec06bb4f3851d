//! Counters of vCPU exits.

use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};

/// Exits of one kind: their number, and how many of them no device answered.
#[derive(Debug, Default)]
pub struct ExitCounter {
    all: AtomicU64,
    unclaimed: AtomicU64,
}

impl ExitCounter {
    pub fn count(&self, claimed: bool) {
        self.all.fetch_add(1, Ordering::Relaxed);
        if !claimed {
            self.unclaimed.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({ "count": self.all.load(Ordering::Relaxed), "unclaimed": self.unclaimed.load(Ordering::Relaxed) })
    }
}

/// Exits of all vCPUs by kind.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub io_in: ExitCounter,
    pub io_out: ExitCounter,
    /// Batches of port writes that KVM collected without an exit of their own.
    pub io_coalesced: ExitCounter,
    pub mmio_read: ExitCounter,
    pub mmio_write: ExitCounter,
}

impl ExitCounters {
    pub fn json(&self) -> Value {
        json!({
            "exit_io_in": self.io_in.json(),
            "exit_io_out": self.io_out.json(),
            "io_coalesced": self.io_coalesced.json(),
            "exit_mmio_read": self.mmio_read.json(),
            "exit_mmio_write": self.mmio_write.json(),
        })
    }
}
