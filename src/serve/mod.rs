//! `tvmm serve`: functions, VMs, snapshots and invocations over HTTP, in FaaSnap's resources.
//!
//! Owns: the daemon's store, its VMs (each a `tvmm` process of its own), snapshots, drives, networks, traces, metrics,
//! and the allowances of clients. It is single-threaded but for the threads that spawn processes, wait for disks and
//! write traces.
//! Must not know: KVM, guest memory, how a restore is carried out.
//! Start reading: `routes.rs`, `invocations.rs` (a request from start to end), `vm/process.rs` (a VM as a child
//! process). A file with a plural name handles the requests under that path; the noun has a file of its own
//! (`function.rs`, `functions.rs`), which the daemon and the VMs use.

mod access;
mod allowances;
mod blocking;
mod body;
mod counters;
mod daemon;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod drives;
mod error;
mod fault;
mod forks;
mod function;
mod functions;
mod gate;
mod guard;
mod idle;
mod idle_counts;
mod invocations;
mod load;
mod metrics;
mod network;
mod networks;
mod options;
mod otlp;
mod repurpose_counts;
mod rewinds;
mod routes;
mod server;
mod service;
mod snapshot_record;
mod snapshots;
mod standby;
mod standby_counts;
mod store;
mod suspended;
mod tallies;
mod trace;
mod traceparent;
mod traces;
mod vm;
mod vms;
mod wake;
mod windows;
mod working_set;

pub use self::access::role::Role;
pub use self::access::token::{Secret, Token};
pub use self::access::token_file::{TokenFileError, read as read_tokens};
pub use self::error::ServeError;
pub use self::options::{AccessOptions, Limits, MetricsAccess, Options, Reuse};
pub use self::routes::openapi;
pub use self::service::run;
