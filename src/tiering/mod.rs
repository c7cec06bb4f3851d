//! Where the pages of a restored guest live: policies that make plans.
//!
//! A policy is a pure function from a snapshot (and, for some, a profile and budgets) to a [`RestorePlan`]. It knows
//! neither KVM nor system calls, so all of them are tested without a machine; the restore engine in `vmm` carries out
//! whatever plan comes.
//!
//! [`RestorePlan`]: crate::snapshot::RestorePlan

pub mod fault;
pub mod policy;

use crate::snapshot;

/// What can go wrong while a plan is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("There is no policy {name:?}; there are: {known}")]
    UnknownPolicy { name: String, known: String },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}
