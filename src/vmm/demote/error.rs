//! Reasons against a demotion.

use std::path::PathBuf;

use crate::vmm::own_memory::NotItsOwn;

/// The reason why a machine cannot be demoted. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotDemotable {
    #[error(transparent)]
    NotItsOwn(#[from] NotItsOwn),
    #[error("Cannot begin: the VM is being demoted, or a barrier is being set. Try again when that is done")]
    UnderWay,
    #[error("Cannot spill the VM: pages are still being copied in the background. Try again when that is done")]
    Copying,
    #[error(
        "Cannot spill the VM to {}: some of its pages are in {}. Name that directory",
        asked.display(),
        used.display()
    )]
    OtherDirectory { asked: PathBuf, used: PathBuf },
}
