//! Reasons against a rewind.

/// The reason why a machine cannot be rewound. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRewindable {
    #[error("Cannot rewind a VM that was booted: there is no snapshot to go back to. Take one and restore it")]
    Booted,
    #[error(
        "Cannot rewind a VM whose memory a page-fault handler serves: only the handler knows the snapshot's bytes. \
         Restore from the snapshot's files or a pool"
    )]
    Handler,
    #[error("Cannot rewind a VM while a profile of it is recorded")]
    Observed,
    #[error("Cannot rewind the VM while a snapshot of it is being sealed. Try again when that is done")]
    Sealing,
    #[error(
        "Cannot rewind the VM: this kernel cannot tell which pages the guest has written (PAGEMAP_SCAN, Linux 6.7). \
         Restore with --track-dirty-pages"
    )]
    Untracked,
    #[error("Cannot rewind the VM: its memory is no longer served")]
    Unserved,
    #[error(
        "Cannot rewind the VM: the guest can write drive {id}, and its image is not a copy of this VM's own. Take the \
         snapshot with copies of its drives (--copy-drives) and restore with --drive-dir, or make the drive read-only"
    )]
    Drive { id: String },
    #[error("Cannot rewind the VM: the guest can write the image of pmem device {id}. Make it read-only")]
    Pmem { id: String },
}
