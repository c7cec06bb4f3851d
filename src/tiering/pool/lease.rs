//! Leases: who uses which entry, so that nobody frees what a VM maps.
//!
//! A lease is a slot of the pool and the lock of the slot's first byte. On one host the lock says whether its holder
//! lives: the kernel drops it with the process. Other hosts see only the slot and its heart beat.
//!
//! Whoever takes a lease writes it first and looks at the directory then; who frees pages retires their entry first and
//! looks at the leases then. So one of the two always sees the other.
//!
//! Clocks of hosts differ. So a lease is not abandoned because its last beat looks old: whoever wants to free what it
//! protects watches it for longer than a heart takes to beat, and [wipes](abandon) it before anything is freed. A holder that
//! finds its slot wiped has [lost](Error::LeaseLost) it, and must not go on.

use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::error::Error;
use super::format::{LEASE_LEN, LEASE_SLOTS, LEASES};
use super::medium::Medium;
use crate::snapshot::{Digest, SnapshotId};

/// A lease of another host is suspected when its last beat is so many seconds away, unless told otherwise.
pub const EXPIRY_S: u64 = 600;
/// How often a heart beats.
pub const BEAT: Duration = Duration::from_secs(10);
/// How long a suspected lease is watched. Tests beat faster.
const WATCH: Duration = if cfg!(test) { Duration::from_secs(3) } else { Duration::from_secs(25) };
/// How long it takes at most until one host's write is seen by another that was about to write there.
pub(super) const SETTLE: Duration = Duration::from_millis(200);

/// Who asks: this boot of this host, and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Differs between hosts, between boots of one, and between device nodes of one device (a container has its own):
    /// within it, locks tell who lives.
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
        // 0 is nobody.
        Ok(Holder { host: host.max(1), pid: std::process::id() })
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

/// All leases whose holder lives, as far as locks and clocks tell, with their slots. `expiry_s`: leases of other hosts whose
/// last beat is further away are not among them.
pub fn live(medium: &dyn Medium, expiry_s: u64) -> Result<Vec<(u64, Lease)>, Error> {
    Ok(sort(medium, expiry_s)?.0)
}

/// Those that live, and those of other hosts that have not been heard of for `expiry_s`.
type Sorted = (Vec<(u64, Lease)>, Vec<(u64, Lease)>);

fn sort(medium: &dyn Medium, expiry_s: u64) -> Result<Sorted, Error> {
    let me = Holder::of(medium)?;
    let (mut live, mut suspected) = (Vec::new(), Vec::new());
    for (slot, lease) in read_all(medium)? {
        let locked = medium.is_locked(offset(slot)).map_err(Error::io("look at the leases of", medium.path()))?;
        if locked || lease.holder == me {
            live.push((slot, lease));
        } else if lease.holder.host != me.host && medium.facts().shared_between_hosts {
            let is_recent = now().abs_diff(lease.beat) <= expiry_s;
            if is_recent { live.push((slot, lease)) } else { suspected.push((slot, lease)) }
        }
    }
    Ok((live, suspected))
}

/// All leases whose holder lives, after those that have not been heard of for `expiry_s` have been watched and, if they are
/// silent, wiped. `beat` is called every now and then meanwhile.
pub fn abandon(
    medium: &dyn Medium,
    expiry_s: u64,
    beat: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Vec<(u64, Lease)>, Error> {
    let (mut live, mut suspected) = sort(medium, expiry_s)?;
    let start = Instant::now();
    while !suspected.is_empty() && start.elapsed() < WATCH {
        std::thread::sleep(SETTLE);
        beat()?;
        wake(medium, &mut suspected, &mut live, |lease| Some(*lease))?;
    }
    for (slot, _) in &suspected {
        write(medium, *slot, None)?;
    }
    if !suspected.is_empty() {
        // Its heart may have been about to beat.
        std::thread::sleep(SETTLE);
        wake(medium, &mut suspected, &mut live, |_| None)?;
    }
    Ok(live)
}

/// Moves those of `suspected` that do not say what they are expected to any more to `live`.
fn wake(
    medium: &dyn Medium,
    suspected: &mut Vec<(u64, Lease)>,
    live: &mut Vec<(u64, Lease)>,
    expected: impl Fn(&Lease) -> Option<Lease>,
) -> Result<(), Error> {
    let slots: Vec<(u64, Lease)> = std::mem::take(suspected);
    for (slot, lease) in slots {
        match read(medium, slot)? {
            found if found == expected(&lease) => suspected.push((slot, lease)),
            Some(found) => live.push((slot, found)),
            // It was given back.
            None => {}
        }
    }
    Ok(())
}

fn read_all(medium: &dyn Medium) -> Result<Vec<(u64, Lease)>, Error> {
    let mut bytes = vec![0; (LEASE_SLOTS * LEASE_LEN) as usize];
    medium.read(LEASES, &mut bytes).map_err(Error::io("read the leases of", medium.path()))?;
    let slots = (0..).zip(bytes.chunks_exact(LEASE_LEN as usize));
    Ok(slots.filter_map(|(slot, bytes)| Some((slot, Lease::decode(bytes)?))).collect())
}

fn read(medium: &dyn Medium, slot: u64) -> Result<Option<Lease>, Error> {
    let mut bytes = [0; LEASE_LEN as usize];
    medium.read(offset(slot), &mut bytes).map_err(Error::io("read a lease of", medium.path()))?;
    Ok(Lease::decode(&bytes))
}

fn write(medium: &dyn Medium, slot: u64, lease: Option<&Lease>) -> Result<(), Error> {
    let failed = || Error::io("write a lease of", medium.path());
    let bytes = lease.map_or([0; LEASE_LEN as usize], Lease::encode);
    medium.write(offset(slot), &bytes).map_err(failed())?;
    // Only other hosts need that: a lease does not outlive its process.
    match medium.facts().shared_between_hosts {
        true => medium.flush(offset(slot), LEASE_LEN).map_err(failed()),
        false => Ok(()),
    }
}

/// A lease of this process. Given back on drop.
#[derive(Debug)]
pub struct Held {
    medium: Arc<dyn Medium>,
    slot: u64,
    lease: Mutex<Lease>,
}

impl Held {
    /// Takes a lease. The medium's handle holds it.
    ///
    /// # Errors
    /// [`Error::NoLease`], [`Error::Io`].
    pub fn take(medium: &Arc<dyn Medium>, snapshot: SnapshotId, entry: Digest) -> Result<Held, Error> {
        let path = medium.path();
        let failed = || Error::io("take a lease of", path);
        let holder = Holder::of(medium.as_ref())?;
        let lease = Lease { holder, beat: now(), snapshot, entry: short(entry), planned: [0; 4] };
        // Hosts, and processes of a host, start to look at different places.
        let start = holder.host.wrapping_add(u64::from(holder.pid)) % LEASE_SLOTS;
        for slot in (0..LEASE_SLOTS).map(|step| (start + step) % LEASE_SLOTS) {
            if !medium.try_lock(offset(slot)).map_err(failed())? {
                continue;
            }
            // Only who collects garbage may decide that another host is gone.
            let is_others = read(medium.as_ref(), slot)?
                .is_some_and(|found| found.holder.host != holder.host && medium.facts().shared_between_hosts);
            if !is_others {
                write(medium.as_ref(), slot, Some(&lease))?;
                // On a medium of several hosts another one may have come at the same moment.
                if read(medium.as_ref(), slot)? == Some(lease) {
                    return Ok(Held { medium: medium.clone(), slot, lease: Mutex::new(lease) });
                }
            }
            medium.unlock(offset(slot)).map_err(failed())?;
        }
        Err(Error::NoLease { path: path.to_path_buf(), slots: LEASE_SLOTS })
    }

    /// Says that the holder lives.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], [`Error::Io`].
    pub fn beat(&self) -> Result<(), Error> {
        self.update(|_| {})
    }

    /// Changes what the lease says.
    ///
    /// # Errors
    /// As for [`beat`](Self::beat).
    pub fn update(&self, change: impl FnOnce(&mut Lease)) -> Result<(), Error> {
        let mut lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        if read(self.medium.as_ref(), self.slot)? != Some(*lease) {
            return Err(Error::LeaseLost { path: self.medium.path().to_path_buf() });
        }
        change(&mut lease);
        lease.beat = now();
        write(self.medium.as_ref(), self.slot, Some(&lease))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let lease = self.lease.lock().unwrap_or_else(PoisonError::into_inner);
        // If that fails, the lock ends with the handle, which says the same. Another's lease is left alone.
        if read(self.medium.as_ref(), self.slot).is_ok_and(|found| found == Some(*lease)) {
            let _ = write(self.medium.as_ref(), self.slot, None);
        }
        let _ = self.medium.unlock(offset(self.slot));
    }
}
