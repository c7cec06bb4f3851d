//! tvmm: a microVM monitor with tiered snapshot restore built in.
//!
//! The rooms of the house, and the one direction in which they may import each other, are described in
//! `docs/architecture.md`: `snapshot` ← `devices`, `tiering` ← `vmm` ← `api` ← `serve` ← `cli`.

pub mod api;
pub mod cli;
pub mod devices;
pub mod serve;
pub mod snapshot;
pub mod tiering;
pub mod vmm;
mod worker;
