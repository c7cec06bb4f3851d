//! Serving pages when they are touched: what the fault service asks of tiers, and what it tells a recorder.

use std::io;

use crate::snapshot::{Gfn, PageSource};

/// A tier from which pages are fetched. Called by one thread at a time.
pub trait PageReader: Send {
    /// Fills `bytes` (whole pages) from `source` on. An error is final: the guest cannot have these pages.
    fn read(&mut self, source: PageSource, bytes: &mut [u8]) -> io::Result<()>;
}

/// What a first touch was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The page was missing and was read.
    Read,
    /// The page was missing and was written.
    Write,
    /// The page had been read before and is now written for the first time.
    WriteProtect,
}

/// Is told of every first touch, in order.
pub trait FaultObserver: Send {
    /// Page `gfn` was touched; `at_ns` is CLOCK_MONOTONIC. The guest waits meanwhile.
    fn fault(&mut self, gfn: Gfn, kind: FaultKind, at_ns: u64);
}
