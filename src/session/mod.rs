//! One VM from its start to its end.
//!
//! Owns: the main loop, what each command does in each state, the console, planning and opening what a restore needs, recording
//! profiles, reports and metrics.
//! Must not know: HTTP, command lines. Commands come through `config::control`.
//! Start reading: `main_loop.rs` (what wakes a VM's process), `controller.rs` (which command is allowed when), `planning.rs`
//! (which plan a restore gets), `sources.rs` (what it takes memory from).

pub mod console;
pub mod controller;
mod error;
pub(crate) mod log;
pub mod main_loop;
pub(crate) mod metrics;
pub(crate) mod plan_dir;
pub(crate) mod planning;
pub mod port_request;
pub(crate) mod read_backs;
pub mod record;
pub mod report;
pub mod sources;

pub use error::Error;
