//! The kinds of recorders.

use std::fmt;
use std::str::FromStr;

use crate::tiering::Error;

/// The recorder of a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecorderKind {
    /// userfaultfd: every first touch and every first write, in order.
    Uffd,
    /// Residency of the memory file in the host's page cache, in layers (FaaSnap).
    Mincore,
    /// The kernel's page map of this process: copied pages are pages the guest wrote.
    Pagemap,
    /// KVM's dirty log: pages written, nothing about reads.
    DirtyLog,
    /// Made of several profiles by [`merge`](super::merge).
    Merged,
}

impl RecorderKind {
    pub const ALL: [RecorderKind; 5] = [
        RecorderKind::Uffd,
        RecorderKind::Mincore,
        RecorderKind::Pagemap,
        RecorderKind::DirtyLog,
        RecorderKind::Merged,
    ];

    pub fn name(self) -> &'static str {
        match self {
            RecorderKind::Uffd => "uffd",
            RecorderKind::Mincore => "mincore",
            RecorderKind::Pagemap => "pagemap",
            RecorderKind::DirtyLog => "dirty-log",
            RecorderKind::Merged => "merged",
        }
    }

    /// True if the recorder sees pages that are only read.
    pub fn sees_reads(self) -> bool {
        self != RecorderKind::DirtyLog
    }
}

impl fmt::Display for RecorderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RecorderKind {
    type Err = Error;

    /// Parses the name of a recorder that can be started; `merged` is none.
    fn from_str(name: &str) -> Result<Self, Error> {
        let mut recorders = RecorderKind::ALL.into_iter().filter(|kind| *kind != RecorderKind::Merged);
        let known = || RecorderKind::ALL.map(RecorderKind::name)[..4].join(", ");
        recorders
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::UnknownRecorder { name: name.to_string(), known: known() })
    }
}
