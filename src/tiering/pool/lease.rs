//! Leases: who uses which entry, so that nobody frees what a VM maps.
//!
//! A lease is a slot of the pool and the lock of the slot's first byte. On one host the lock says whether its holder
//! lives: the kernel drops it with the process. Other hosts see only the slot and how long ago its heart beat.
//!
//! Whoever takes a lease writes it first and looks at the directory then; who frees pages retires their entry first and
//! looks at the leases then. So one of the two always sees the other.

use std::time::{SystemTime, UNIX_EPOCH};

use super::error::Error;
use super::format::{LEASE_LEN, LEASE_SLOTS, LEASES};
use super::medium::Medium;
use crate::snapshot::{Digest, SnapshotId};

/// A lease of another host counts as abandoned when its heart has not beaten for so long, unless told otherwise.
pub const EXPIRY_S: u64 = 600;
/// How often a heart beats.
pub const BEAT_S: u64 = 30;

/// Who asks: this boot of this host, and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Differs between hosts, and between boots of one.
    pub host: u64,
    pub pid: u32,
}

impl Holder {
    pub fn this_process() -> Holder {
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digest = *blake3::hash(&boot).as_bytes();
        let host = digest.iter().take(8).fold(0, |host, byte| host << 8 | u64::from(*byte));
        // 0 is nobody.
        Holder { host: host.max(1), pid: std::process::id() }
    }
}

/// What a lease says, pages by placement included: what its VM was planned to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    pub holder: Holder,
    /// Seconds since 1970.
    pub beat: u64,
    pub snapshot: SnapshotId,
    /// The start of the entry's digest.
    pub entry: [u8; 16],
    /// Pages planned in place, in local memory, zero, and lazy.
    pub planned: [u32; 4],
}

/// The start of an entry's digest.
pub fn short(entry: Digest) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&entry.0[..16]);
    out
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Lease {
    fn encode(&self) -> [u8; LEASE_LEN as usize] {
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

    /// `None`: nobody's, or torn.
    fn decode(slot: &[u8]) -> Option<Lease> {
        let word = |at: usize| u32::from_le_bytes(slot[at..at + 4].try_into().unwrap_or_default());
        let long = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap_or_default());
        if crc32c::crc32c(&slot[4..]) != word(0) || long(8) == 0 {
            return None;
        }
        Some(Lease {
            holder: Holder { pid: word(4), host: long(8) },
            beat: long(16),
            snapshot: SnapshotId(slot[24..56].try_into().unwrap_or_default()),
            entry: slot[56..72].try_into().unwrap_or_default(),
            planned: [word(72), word(76), word(80), word(84)],
        })
    }
}

fn offset(slot: u64) -> u64 {
    LEASES + slot * LEASE_LEN
}

/// All leases that somebody living holds, with their slots. `expiry_s`: after so many seconds without a heartbeat,
/// leases of other hosts are abandoned.
pub fn live(medium: &dyn Medium, expiry_s: u64) -> Result<Vec<(u64, Lease)>, Error> {
    let me = Holder::this_process();
    let all = read_all(medium)?;
    let mut live = Vec::new();
    for (slot, lease) in all {
        if lives(medium, slot, &lease, me, expiry_s)? {
            live.push((slot, lease));
        }
    }
    Ok(live)
}

fn lives(medium: &dyn Medium, slot: u64, lease: &Lease, me: Holder, expiry_s: u64) -> Result<bool, Error> {
    if lease.holder.host == me.host {
        let locked = medium.is_locked(offset(slot)).map_err(Error::io("look at the leases of", medium.path()))?;
        return Ok(locked || lease.holder == me);
    }
    Ok(medium.facts().shared_between_hosts && now().saturating_sub(lease.beat) <= expiry_s)
}

fn read_all(medium: &dyn Medium) -> Result<Vec<(u64, Lease)>, Error> {
    let mut bytes = vec![0; (LEASE_SLOTS * LEASE_LEN) as usize];
    medium.read(LEASES, &mut bytes).map_err(Error::io("read the leases of", medium.path()))?;
    let slots = (0..).zip(bytes.chunks_exact(LEASE_LEN as usize));
    Ok(slots.filter_map(|(slot, bytes)| Some((slot, Lease::decode(bytes)?))).collect())
}

/// Takes a lease; returns its slot. The medium's handle holds it.
///
/// # Errors
/// [`Error::NoLease`], [`Error::Io`].
pub fn take(medium: &dyn Medium, snapshot: SnapshotId, entry: Digest) -> Result<u64, Error> {
    let path = medium.path();
    let holder = Holder::this_process();
    let lease = Lease { holder, beat: now(), snapshot, entry: short(entry), planned: [0; 4] };
    // Hosts, and processes of a host, start to look at different places.
    let start = holder.host.wrapping_add(u64::from(holder.pid)) % LEASE_SLOTS;
    for slot in (0..LEASE_SLOTS).map(|step| (start + step) % LEASE_SLOTS) {
        let failed = || Error::io("take a lease of", path);
        if !medium.try_lock(offset(slot)).map_err(failed())? {
            continue;
        }
        let mut bytes = [0; LEASE_LEN as usize];
        medium.read(offset(slot), &mut bytes).map_err(failed())?;
        let others = Lease::decode(&bytes).filter(|found| found.holder.host != holder.host);
        let is_taken = others
            .is_some_and(|found| medium.facts().shared_between_hosts && now().saturating_sub(found.beat) <= EXPIRY_S);
        if !is_taken {
            write(medium, slot, &lease)?;
            medium.read(offset(slot), &mut bytes).map_err(failed())?;
            // On a medium of several hosts another one may have come at the same moment.
            if Lease::decode(&bytes) == Some(lease) {
                return Ok(slot);
            }
        }
        medium.unlock(offset(slot)).map_err(failed())?;
    }
    Err(Error::NoLease { path: path.to_path_buf(), slots: LEASE_SLOTS })
}

fn write(medium: &dyn Medium, slot: u64, lease: &Lease) -> Result<(), Error> {
    let failed = || Error::io("write a lease of", medium.path());
    medium.write(offset(slot), &lease.encode()).map_err(failed())?;
    // Only other hosts need that: a lease does not outlive its process.
    match medium.facts().shared_between_hosts {
        true => medium.flush(offset(slot), LEASE_LEN).map_err(failed()),
        false => Ok(()),
    }
}

/// Changes what the lease in `slot`, which is the caller's, says.
pub fn update(medium: &dyn Medium, slot: u64, change: impl FnOnce(&mut Lease)) -> Result<(), Error> {
    let mut bytes = [0; LEASE_LEN as usize];
    medium.read(offset(slot), &mut bytes).map_err(Error::io("read a lease of", medium.path()))?;
    let Some(mut lease) = Lease::decode(&bytes) else {
        return Err(Error::damaged(medium.path(), "a lease was overwritten by somebody else"));
    };
    change(&mut lease);
    lease.beat = now();
    write(medium, slot, &lease)
}

/// Gives a lease back.
pub fn give_back(medium: &dyn Medium, slot: u64) -> Result<(), Error> {
    let failed = || Error::io("give back a lease of", medium.path());
    medium.write(offset(slot), &[0; LEASE_LEN as usize]).map_err(failed())?;
    medium.unlock(offset(slot)).map_err(failed())
}
