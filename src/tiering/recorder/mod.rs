//! The part of recorders without system calls: traits for the kernel's answers, and profiles made of them.
//!
//! Each recorder reports what it saw and leaves the rest unknown. `session::record` runs the function and asks the
//! kernel.

mod faults;
mod layers;

use std::io;

pub use faults::FaultLog;
pub use layers::{LAYER_PAGES, Layering, from_layers};

use super::profile::{Profile, RecorderKind};
use crate::snapshot::{PageSet, SnapshotId};

/// The host's page cache of a snapshot's memory files.
///
/// A thread of its own asks every few milliseconds while the guest runs.
pub trait ResidentPages: Send {
    /// Returns the guest pages whose bytes are in the page cache now: touched pages, pages read ahead, and pages that
    /// were there before.
    fn resident(&mut self) -> io::Result<PageSet>;
}

/// The pages that a process has mapped of a guest's memory, which was all private mappings of files (or anonymous) at
/// first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MappedPages {
    /// Pages of a file, or the zero page, as they are: the guest may have read them.
    pub shared: PageSet,
    /// Private copies: the guest wrote them.
    pub own: PageSet,
    /// True if the kernel mapped only touched pages. If not, `shared` has neighbours of touched pages too
    /// (fault-around, huge folios).
    pub only_touched: bool,
}

/// A profile of private copies and mapped pages (`pagemap`).
pub fn from_mapped(snapshot: SnapshotId, function: &str, mapped: MappedPages) -> Profile {
    let mut profile = Profile::new(snapshot, RecorderKind::Pagemap, function);
    let shared = mapped.shared.difference(&mapped.own);
    profile.written = mapped.own;
    if mapped.only_touched {
        profile.read = shared;
    } else {
        profile.unclassified = shared;
    }
    profile
}

/// A profile of KVM's dirty log: the written pages only.
pub fn from_dirty(snapshot: SnapshotId, function: &str, dirty: PageSet) -> Profile {
    Profile { written: dirty, ..Profile::new(snapshot, RecorderKind::DirtyLog, function) }
}
