//! Changes of a restored machine's memory: they need a snapshot to hold it against, and page faults that this process
//! answers by itself.

use std::fmt;

/// A change of a machine's memory after its restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryChange {
    Rewind,
    Repurpose,
    Demote,
    Track,
}

impl fmt::Display for MemoryChange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            MemoryChange::Rewind => "rewind",
            MemoryChange::Repurpose => "repurpose",
            MemoryChange::Demote => "demote",
            MemoryChange::Track => "set a barrier for",
        })
    }
}

/// The reason why a machine's memory cannot be changed. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotItsOwn {
    #[error("Cannot {0} a VM that was booted: no snapshot has its memory. Take one and restore it")]
    Booted(MemoryChange),
    #[error(
        "Cannot {0} a VM whose memory a page-fault handler serves: only the handler knows the snapshot's bytes. \
         Restore from the snapshot's files or a pool"
    )]
    Handler(MemoryChange),
    #[error("Cannot {0} a VM while a profile of it is recorded")]
    Observed(MemoryChange),
    #[error("Cannot {0} the VM: its memory is no longer served")]
    Unserved(MemoryChange),
}
