//! One VM from its start to its end.
//!
//! Owns: the main loop, the effect of each command in each state, the console, planning a restore and opening its
//! sources, recording profiles, reports and metrics.
//! Must not know: HTTP, command lines. Commands come through `config::control`.
//! Start reading: `main_loop.rs` (the events of a VM's process), `controller.rs` (the states in which a command is
//! allowed), `planning.rs` (choosing a restore's plan), `sources.rs` (opening a restore's sources of memory).

pub mod console;
pub mod controller;
mod demotion;
mod error;
pub mod facts;
pub mod fork;
pub mod jail;
mod live;
pub(crate) mod log;
pub mod main_loop;
pub(crate) mod metrics;
mod opened_request;
pub mod outcome;
pub(crate) mod plan_dir;
pub(crate) mod planning;
pub mod port_request;
pub(crate) mod read_backs;
pub mod record;
pub mod report;
mod repurpose;
pub mod sources;
mod used_profile;
pub mod watch;

pub use error::Error;
