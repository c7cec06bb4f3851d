//! The results of sending traces.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Counts of the traces so far.
#[derive(Debug, Default)]
pub struct Counts {
    pub(super) sent: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) why: Mutex<String>,
}

impl Counts {
    /// Traces that the collector took.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Traces that the collector did not take: it does not answer, it refused them, or too many were waiting.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The reason of the last loss; empty if there was none.
    pub fn why(&self) -> String {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
