//! Errors of building, running, capturing and restoring a machine.

use std::io;
use std::path::PathBuf;

use super::boot::BootError;
use super::demote::NotDemotable;
use super::kvm_error::KvmError;
use super::repurpose::NotRepurposable;
use super::restore::StateError;
use super::rewind::NotRewindable;
use crate::{devices, memory, snapshot};

/// The one error of the vmm room. Each variant names the action and its object; causes are chained.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("A device failed")]
    Device(#[from] devices::Error),
    #[error("Cannot {doing}")]
    Os { doing: &'static str, source: io::Error },
    #[error("Cannot {doing} {path}")]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error("Cannot take a diff snapshot: {0}")]
    Diff(String),
    #[error("Another snapshot of this VM is still being sealed")]
    SnapshotInProgress,
    #[error(transparent)]
    Rewind(#[from] NotRewindable),
    #[error("Cannot rewind the VM: its drives cannot be copied from the snapshot again, and it stays as it is")]
    RewindDrives(#[source] snapshot::Error),
    #[error(transparent)]
    Repurpose(#[from] NotRepurposable),
    #[error(transparent)]
    Demote(#[from] NotDemotable),
    #[error("The machine is not as its snapshot: {}", first_of(.0))]
    NotAsSaved(Vec<String>),
    #[error(transparent)]
    Memory(#[from] memory::Error),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    State(#[from] StateError),
}

impl Error {
    pub(crate) fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |source| KvmError::Call { doing, source }.into()
    }

    pub(crate) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Os { doing, source }
    }
}

/// The first few of `differences`, and the number of the others.
fn first_of(differences: &[String]) -> String {
    const SHOWN: usize = 8;
    let shown = differences.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
    match differences.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!("{shown}; and {more} more"),
        _ => shown,
    }
}
