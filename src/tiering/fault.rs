//! The traits by which the fault service reads pages from tiers and reports faults to a recorder.

use std::io;

use crate::snapshot::{Gfn, PageSource};

/// A tier from which pages are fetched. The fault service calls it from one thread at a time.
pub trait PageReader: Send {
    /// Must fill `bytes` (whole pages) from `source` on. An error is final: the guest cannot have these pages.
    fn read(&mut self, source: PageSource, bytes: &mut [u8]) -> io::Result<()>;
}

/// The kind of a first touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The page was missing and was read.
    Read,
    /// The page was missing and was written.
    Write,
    /// The page had been read before and is now written for the first time.
    WriteProtect,
}

/// Called by the fault service for every first touch, in order.
pub trait FaultObserver: Send {
    /// Page `gfn` was touched; `at_ns` is CLOCK_MONOTONIC. The guest waits until this returns.
    fn fault(&mut self, gfn: Gfn, kind: FaultKind, at_ns: u64);
}
