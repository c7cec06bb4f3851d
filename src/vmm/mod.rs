//! The KVM machine.
//!
//! Owns: vCPUs and their run loop, boot, the construction of devices from config, memory slots, capture, restore, the
//! saved state, and the check that a host can run a snapshot.
//! Must not know: HTTP, policies, or the places of pools. It is handed a plan and its sources.
//! Start reading: `machine.rs` (the states of a machine and the one way it is built), `vcpu.rs` (the run loop),
//! `restore/mod.rs` (a restore from top to bottom), `capture.rs` (the steps while the guest stands still).

pub(crate) mod arch;
mod boot;
mod buses;
pub(crate) mod capture;
pub(crate) mod console_ring;
pub(crate) mod demote;
pub(crate) mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
pub(crate) mod error;
pub(crate) mod exit_counters;
pub(crate) mod host;
mod interrupts;
pub(crate) mod kvm_error;
pub(crate) mod lineage;
pub mod machine;
mod origin;
mod own_memory;
mod pmem;
pub(crate) mod repurpose;
pub(crate) mod restore;
pub(crate) mod rewind;
mod saved_state;
pub(crate) mod state;
pub(crate) mod vcpu;

pub use crate::memory::ending::Ending;
pub use crate::memory::engine::EngineReport;
pub use crate::memory::fault_service::FaultCounts;
pub use error::Error;
