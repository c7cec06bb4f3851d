//! tvmm: a microVM monitor with tiered snapshot restore built in.
//!
//! Each module here is a room: `docs/architecture.md` says what it owns and which others it may import, from the ground
//! floor (`snapshot`, `sys`) up to `cli`. The first ten lines of a room's `mod.rs` say where to start reading.

#[macro_use]
pub mod sys;

pub mod api;
pub mod backends;
pub mod bench;
pub mod cli;
pub mod config;
pub mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod memory;
pub mod serve;
pub mod session;
pub mod snapshot;
pub mod tiering;
pub mod vmm;

/// Unit tests and integration tests count what they skip in one way.
#[cfg(test)]
#[path = "../tests/integration/support/skip.rs"]
mod skip;
