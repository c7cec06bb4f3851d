//! Where the pages of a restored guest live: policies that make plans.
//!
//! A policy is a pure function from a snapshot (and, for some, a profile and budgets) to a [`RestorePlan`]. It knows
//! neither KVM nor system calls, so all of them are tested without a machine; the restore engine in `vmm` carries out
//! whatever plan comes.
//!
//! [`RestorePlan`]: crate::snapshot::RestorePlan

pub mod fault;
pub mod policy;
pub mod profile;
pub mod recorder;

use crate::snapshot::{self, SnapshotId};

/// What can go wrong while a plan is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("There is no policy {name:?}; there are: {known}")]
    UnknownPolicy { name: String, known: String },
    #[error("There is no recorder {name:?}; there are: {known}")]
    UnknownRecorder { name: String, known: String },
    #[error("Profiles cannot be merged by {name:?}, only by: {known}")]
    UnknownMerge { name: String, known: String },
    #[error("The profile was recorded on snapshot {made_for} and is of no use for snapshot {given}")]
    ProfileOfOther { made_for: SnapshotId, given: SnapshotId },
    #[error("{object} is not a valid profile: {problem}")]
    Profile { object: String, problem: String },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

impl Error {
    pub(crate) fn profile(object: &str, problem: impl Into<String>) -> Error {
        Error::Profile { object: object.to_string(), problem: problem.into() }
    }
}
