//! The record of a lease: its holder and content, and their bytes in a slot.

use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

use super::error::Error;
use super::format::LEASE_LEN;
use super::medium::Medium;
use crate::snapshot::{Digest, SnapshotId};

/// The identity of a lease holder or writer: this boot of this host, and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Differs between hosts, between boots of one, and between device nodes of one device (a container has its own):
    /// within one value, locks tell which holders live.
    pub host: u64,
    pub pid: u32,
}

impl Holder {
    /// This process, as a user of `medium`.
    pub fn of(medium: &dyn Medium) -> Result<Holder, Error> {
        let failed = || Error::io("say which host this is (/proc/sys/kernel/random/boot_id) to", medium.path());
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").map_err(failed())?;
        let file = medium.file().metadata().map_err(failed())?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&boot).update(&file.dev().to_le_bytes()).update(&file.ino().to_le_bytes());
        let host = hasher.finalize().as_bytes().iter().take(8).fold(0, |host, byte| host << 8 | u64::from(*byte));
        // 0 stands for no holder.
        Ok(Holder { host: host.max(1), pid: std::process::id() })
    }
}

/// The content of a lease, with the pages by placement that its VM's plan has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub holder: Holder,
    /// Seconds since 1970.
    pub beat: u64,
    pub snapshot: SnapshotId,
    /// The start of the entry's digest: 16 bytes of it, or 4 and zeros for a lease that is locks.
    pub entry: [u8; 16],
    /// Pages planned in place, in local memory, zero, and lazy.
    pub planned: [u32; 4],
}

/// The start of an entry's digest.
pub(super) fn short(entry: Digest) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&entry.0[..16]);
    out
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The bytes of a slot.
pub(super) type Bytes = [u8; LEASE_LEN as usize];

/// The content of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Free,
    /// Being written, or its writer died while writing: the owner is unknown.
    Torn(Bytes),
    Of(Lease),
}

impl Lease {
    /// True if it may be a lease of the entry with this digest.
    pub fn is_of(&self, entry: Digest) -> bool {
        let entry = short(entry);
        self.entry == entry || self.entry[4..] == [0; 12] && self.entry[..4] == entry[..4]
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = [0; LEASE_LEN as usize];
        out[4..8].copy_from_slice(&self.holder.pid.to_le_bytes());
        out[8..16].copy_from_slice(&self.holder.host.to_le_bytes());
        out[16..24].copy_from_slice(&self.beat.to_le_bytes());
        out[24..56].copy_from_slice(&self.snapshot.0);
        out[56..72].copy_from_slice(&self.entry);
        for (at, pages) in (72..).step_by(4).zip(self.planned) {
            out[at..at + 4].copy_from_slice(&pages.to_le_bytes());
        }
        let sum = crc32c::crc32c(&out[4..]);
        out[..4].copy_from_slice(&sum.to_le_bytes());
        out
    }

    pub(super) fn decode(slot: &Bytes) -> Slot {
        let word = |at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().unwrap_or_default());
        let long = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap_or_default());
        if slot.iter().all(|byte| *byte == 0) {
            return Slot::Free;
        }
        if crc32c::crc32c(&slot[4..]) != word(0) || long(8) == 0 {
            return Slot::Torn(*slot);
        }
        Slot::Of(Lease {
            holder: Holder { pid: word(4), host: long(8) },
            beat: long(16),
            snapshot: SnapshotId(slot[24..56].try_into().unwrap_or_default()),
            entry: slot[56..72].try_into().unwrap_or_default(),
            planned: [word(72), word(76), word(80), word(84)],
        })
    }
}
