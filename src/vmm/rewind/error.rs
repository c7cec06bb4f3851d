//! Reasons against a rewind.

use crate::vmm::own_memory::NotItsOwn;

/// The reason why a machine cannot be rewound. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRewindable {
    #[error(transparent)]
    NotItsOwn(#[from] NotItsOwn),
    #[error("Cannot rewind the VM while a snapshot of it is being sealed. Try again when that is done")]
    Sealing,
    #[error(
        "Cannot rewind the VM: this kernel cannot tell which pages the guest has written (PAGEMAP_SCAN, Linux 6.7). \
         Restore with --track-dirty-pages"
    )]
    Untracked,
    #[error(
        "Cannot rewind the VM: the guest can write drive {id}, and its image is not a copy of this VM's own. Take the \
         snapshot with copies of its drives (--copy-drives) and restore with --drive-dir, or make the drive read-only"
    )]
    Drive { id: String },
    #[error("Cannot rewind the VM: the guest can write the image of pmem device {id}. Make it read-only")]
    Pmem { id: String },
}
