//! Placement of a restored guest's pages: profiles, policies, plans, and the contents of pools.
//!
//! Owns: recorders and profiles, policies and the cost model, plan files, the formats of pools (`pool/`) and of cold
//! pools (`cold/`), and the traits that back ends implement (`tier::Tier`, `pool::Medium`, `cold::Place`).
//! Must not know: KVM, guest memory, devices, HTTP. A policy is a pure function from a snapshot, a profile, costs and
//! budgets to a [`RestorePlan`](crate::snapshot::RestorePlan), so all of them are tested without a machine.
//! Start reading: `planner.rs` (chooses a restore's plan), `policy/mod.rs`, then `policy/reap.rs` (the smallest with a
//! profile) and `costs.rs`.

pub mod cold;
pub mod costs;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod error;
pub mod fault;
pub mod fit;
pub mod idle;
pub mod plan_cache;
pub mod plan_file;
pub mod plan_json;
pub mod planner;
pub mod policy;
pub mod pool;
pub mod profile;
pub mod recorder;
pub mod tier;
pub mod window;

pub use error::Error;
