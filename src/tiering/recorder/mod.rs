//! Recorders, the part without system calls: what they ask of the kernel, and how its answers become a profile.
//!
//! Each recorder says what it saw and leaves the rest unknown. `vmm::record` runs the function and asks the kernel.

mod faults;
mod layers;

use std::io;

pub use faults::FaultLog;
pub use layers::{LAYER_PAGES, Layering, from_layers};

use super::profile::{Profile, RecorderKind};
use crate::snapshot::{PageSet, SnapshotId};

/// The host's page cache of a snapshot's memory files.
///
/// Asked every few milliseconds while the guest runs, by a thread of its own.
pub trait ResidentPages: Send {
    /// Guest pages whose bytes are in the page cache now: those that were touched, those read ahead, and those that
    /// were there before.
    fn resident(&mut self) -> io::Result<PageSet>;
}

/// What a process has mapped of a guest's memory, which was all private mappings of files (or anonymous) at first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MappedPages {
    /// Pages of a file, or the zero page, as they are: somebody may have read them.
    pub shared: PageSet,
    /// Private copies: somebody wrote them.
    pub own: PageSet,
    /// True if the kernel mapped nothing but what was touched. If not, `shared` has neighbours of touched pages too
    /// (fault-around, huge folios).
    pub only_touched: bool,
}

/// A profile of private copies and mapped pages (`pagemap`).
pub fn from_mapped(snapshot: SnapshotId, function: &str, mapped: MappedPages) -> Profile {
    let mut profile = Profile::new(snapshot, RecorderKind::Pagemap, function);
    let shared = mapped.shared.difference(&mapped.own);
    profile.written = mapped.own;
    match mapped.only_touched {
        true => profile.read = shared,
        false => profile.unclassified = shared,
    }
    profile
}

/// A profile of KVM's dirty log: the written half.
pub fn from_dirty(snapshot: SnapshotId, function: &str, dirty: PageSet) -> Profile {
    Profile { written: dirty, ..Profile::new(snapshot, RecorderKind::DirtyLog, function) }
}
