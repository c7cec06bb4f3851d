//! Quantities as commands print them, and the time limit of commands that change a VM in place.

use std::time::Duration;

use crate::snapshot::PAGE_SIZE;

/// Longest wait for the answer: a source of memory may be slow, and the VM has a limit of its own.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// Milliseconds, to be printed.
pub fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

/// MiB, to be printed.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// MiB of pages, to be printed.
pub fn mib_of_pages(pages: u64) -> f64 {
    mib(pages * PAGE_SIZE)
}
