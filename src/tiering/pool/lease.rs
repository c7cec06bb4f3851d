//! Leases: a lease says which VM uses which entry, so that the entry's pages are not freed.
//!
//! On a medium that other hosts share, a lease is a slot of the pool and the lock of the slot's first byte. (On a
//! medium of this host a lease is a set of [locks](super::readers), and nothing is written. VMs of earlier versions
//! have slots there too.) On one host the lock tells that the holder lives: the kernel drops it with the process. Other
//! hosts see only the slot and its heartbeat.
//!
//! A holder first writes its lease and then reads the directory; `collect` first retires an entry and then reads the
//! leases. So one of the two always sees the other.
//!
//! Clocks of hosts differ, so an old heartbeat alone does not end a lease. Before pages are freed, `collect` watches
//! the lease for longer than a heartbeat takes, and [wipes](abandon) it. A holder that finds its slot wiped has
//! [lost](Error::LeaseLost) the lease, and must not go on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::error::Error;
use super::format::{LEASE_LEN, LEASE_SLOTS, LEASES};
use super::lease_record::{Holder, Lease, Slot, now, short};
use super::medium::Medium;
use super::readers;
use crate::snapshot::{Digest, SnapshotId};
use crate::sys::bounded_wait::Wait;

/// Age in seconds at which another host's last heartbeat makes its lease suspect, unless told otherwise.
pub const EXPIRY_S: u64 = 600;
/// Time between two heartbeats.
pub const BEAT: Duration = Duration::from_secs(10);
/// Time for which a suspected lease is watched. Tests beat faster.
const WATCH: Duration = if cfg!(test) { Duration::from_secs(3) } else { Duration::from_secs(25) };
/// Upper bound of the time until one host's write is seen by another host that was about to write to the same place.
pub(super) const SETTLE: Duration = Duration::from_millis(200);
/// Reads of a torn record, whose owner may be writing it, and the pause between them.
pub(super) const READS: usize = 5;
pub(super) const PAUSE: Duration = Duration::from_millis(5);

/// Time since this host's start, its sleep included.
pub(super) fn uptime() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// True if a write just made may have hit another holder's record. The caller read at `read` that the record was its
/// own, and wrote it since. It stood still in between, and its last heartbeat `said` is so old that other hosts may
/// have watched it for `watch`.
pub(super) fn stood_still(read: Duration, said: Duration, watch: Duration) -> bool {
    let now = uptime();
    now.saturating_sub(read) > SETTLE && now.saturating_sub(said) + SETTLE > watch
}

fn offset(slot: u64) -> u64 {
    LEASES + slot * LEASE_LEN
}

/// All leases whose holder lives, as far as locks and clocks tell, with their slots. Leases of other hosts whose last
/// heartbeat is more than `expiry_s` away are not among them.
pub fn live(medium: &dyn Medium, expiry_s: u64) -> Result<Vec<(u64, Lease)>, Error> {
    Ok(sort(medium, expiry_s)?.0)
}

/// Live leases, and suspects: leases of other hosts that have been silent for `expiry_s`, and torn slots.
type Sorted = (Vec<(u64, Lease)>, Vec<(u64, Slot)>);

fn sort(medium: &dyn Medium, expiry_s: u64) -> Result<Sorted, Error> {
    let me = Holder::of(medium)?;
    let shared = medium.facts().shared_between_hosts;
    let mut live = Vec::new();
    let mut suspected = Vec::new();
    for (slot, found) in read_all(medium)? {
        let locked = medium.is_locked(offset(slot)).map_err(Error::io("look at the leases of", medium.path()))?;
        match found {
            Slot::Free => {}
            Slot::Torn(_) if locked => return Err(unknown(medium, slot)),
            // Without its lock a lease of this host has no owner.
            Slot::Torn(_) if shared => suspected.push((slot, found)),
            Slot::Torn(_) => {}
            Slot::Of(lease) if locked || lease.holder == me => live.push((slot, lease)),
            Slot::Of(lease) if lease.holder.host != me.host && shared => {
                let is_recent = now().abs_diff(lease.beat) < expiry_s;
                if is_recent { live.push((slot, lease)) } else { suspected.push((slot, found)) }
            }
            Slot::Of(_) => {}
        }
    }
    let readers = readers::all(medium, me.host).map_err(Error::io("look at the readers of", medium.path()))?;
    live.extend((LEASE_SLOTS..).zip(readers));
    Ok((live, suspected))
}

fn unknown(medium: &dyn Medium, slot: u64) -> Error {
    Error::damaged(medium.path(), format!("lease {slot} is in use, and does not say by whom; try again"))
}

/// Returns all leases whose holder lives. First watches the suspects (silent for `expiry_s`, or torn), and wipes those
/// that stay silent. Calls `beat` from time to time meanwhile.
///
/// # Errors
/// [`Error::Damaged`] if a lease is in use and never whole, [`Error::StoodStill`], [`Error::Io`].
pub fn abandon(
    medium: &dyn Medium,
    expiry_s: u64,
    beat: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<Vec<(u64, Lease)>, Error> {
    let (mut live, mut suspected) = sort(medium, expiry_s)?;
    let start = uptime();
    let what =
        format!("{} leases of pool {} that may be of hosts that are gone", suspected.len(), medium.path().display());
    let mut wait = Wait::new(what, WATCH);
    while !suspected.is_empty() && uptime().saturating_sub(start) < WATCH {
        wait.tell();
        std::thread::sleep(SETTLE);
        beat()?;
        wake(medium, &mut suspected, &mut live, |found| *found)?;
    }
    for (slot, found) in std::mem::take(&mut suspected) {
        let looked = uptime();
        let mut silent = vec![(slot, found)];
        wake(medium, &mut silent, &mut live, |found| *found)?;
        if silent.is_empty() {
            continue;
        }
        write(medium, slot, None)?;
        if uptime().saturating_sub(looked) > SETTLE {
            // The suspect may have sent a heartbeat meanwhile: its pages are not freed now.
            return Err(Error::StoodStill { path: medium.path().to_path_buf() });
        }
        suspected.append(&mut silent);
    }
    if !suspected.is_empty() {
        // The suspect may have been about to send a heartbeat.
        std::thread::sleep(SETTLE);
        wake(medium, &mut suspected, &mut live, |_| Slot::Free)?;
    }
    Ok(live)
}

/// Moves suspects whose slot differs from `expected` to `live`.
fn wake(
    medium: &dyn Medium,
    suspected: &mut Vec<(u64, Slot)>,
    live: &mut Vec<(u64, Lease)>,
    expected: impl Fn(&Slot) -> Slot,
) -> Result<(), Error> {
    let slots: Vec<(u64, Slot)> = std::mem::take(suspected);
    for (slot, before) in slots {
        // An unchanged slot need not be read again, even if it is torn: a medium may be full of torn slots.
        let found = match read_once(medium, slot)? {
            found if found == expected(&before) => found,
            _ => read(medium, slot)?,
        };
        match found {
            found if found == expected(&before) => suspected.push((slot, before)),
            Slot::Of(found) => live.push((slot, found)),
            Slot::Torn(_) => return Err(unknown(medium, slot)),
            // The lease was given back.
            Slot::Free => {}
        }
    }
    Ok(())
}

/// All slots; torn ones have been read several times.
fn read_all(medium: &dyn Medium) -> Result<Vec<(u64, Slot)>, Error> {
    let mut bytes = vec![0; (LEASE_SLOTS * LEASE_LEN) as usize];
    let mut slots = Vec::new();
    for _ in 0..READS {
        medium.read(LEASES, &mut bytes).map_err(Error::io("read the leases of", medium.path()))?;
        slots = (0..).zip(bytes.as_chunks().0.iter().map(Lease::decode)).collect();
        if !slots.iter().any(|(_, slot)| matches!(slot, Slot::Torn(_))) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(slots)
}

/// A slot; a torn one has been read several times.
fn read(medium: &dyn Medium, slot: u64) -> Result<Slot, Error> {
    for _ in 1..READS {
        match read_once(medium, slot)? {
            // A holder that found its slot torn and did not read again would take the lease for lost.
            Slot::Torn(_) => std::thread::sleep(PAUSE),
            found => return Ok(found),
        }
    }
    read_once(medium, slot)
}

fn read_once(medium: &dyn Medium, slot: u64) -> Result<Slot, Error> {
    let mut bytes = [0; LEASE_LEN as usize];
    medium.read(offset(slot), &mut bytes).map_err(Error::io("read a lease of", medium.path()))?;
    Ok(Lease::decode(&bytes))
}

fn write(medium: &dyn Medium, slot: u64, lease: Option<&Lease>) -> Result<(), Error> {
    let failed = || Error::io("write a lease of", medium.path());
    let bytes = lease.map_or([0; LEASE_LEN as usize], Lease::encode);
    medium.write(offset(slot), &bytes).map_err(failed())?;
    // Only other hosts need a flush: a lease does not outlive its process.
    if medium.facts().shared_between_hosts { medium.flush(offset(slot), LEASE_LEN).map_err(failed()) } else { Ok(()) }
}

/// A lease of this process. Given back on drop.
#[derive(Debug)]
pub struct Held {
    medium: Arc<dyn Medium>,
    state: Mutex<State>,
}

/// The place and the content of a lease.
#[derive(Clone, Copy, Debug)]
struct State {
    slot: u64,
    lease: Lease,
    /// Time of its last write, taken just before, by [`uptime`].
    said: Duration,
    /// True if the lease was still there when every host that had found the slot free must have written.
    settled: bool,
}

impl Held {
    /// Takes a lease, held by the medium's handle. Another host may have taken the same slot at the same moment, so the
    /// caller must call [`settle`](Self::settle) [`SETTLE`] later.
    ///
    /// # Errors
    /// [`Error::NoLease`], [`Error::Io`].
    pub fn take(medium: &Arc<dyn Medium>, snapshot: SnapshotId, entry: Digest) -> Result<Held, Error> {
        let holder = Holder::of(medium.as_ref())?;
        let lease = Lease { holder, beat: now(), snapshot, entry: short(entry), planned: [0; 4] };
        let state =
            if medium.is_writable() { claim(medium.as_ref(), lease)? } else { read_only(medium.as_ref(), lease)? };
        Ok(Held { medium: medium.clone(), state: Mutex::new(state) })
    }

    /// Checks whether another host has taken the same slot at the same moment, and takes another slot then. `is_there`
    /// returns whether the pool still has the entry; if not, its pages may have been freed while no lease stood.
    /// Returns whether the lease is settled; if not, the caller must call this again [`SETTLE`] later.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], and as for [`take`](Self::take).
    pub fn settle(&self, is_there: &dyn Fn() -> Result<bool, Error>) -> Result<bool, Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.settled || !self.medium.facts().shared_between_hosts || !self.medium.is_writable() {
            return Ok(true);
        }
        match read(self.medium.as_ref(), state.slot)? {
            Slot::Of(lease) if lease == state.lease => {
                state.settled = uptime().saturating_sub(state.said) > SETTLE;
                return Ok(state.settled);
            }
            Slot::Of(lease) if lease.holder.host != state.lease.holder.host => {}
            _ => return Err(self.lost()),
        }
        let failed = Error::io("take a lease of", self.medium.path());
        self.medium.unlock(offset(state.slot)).map_err(failed)?;
        *state = claim(self.medium.as_ref(), state.lease)?;
        // A holder that cannot learn that its entry is there must not go on.
        if is_there().unwrap_or(false) { Ok(false) } else { Err(self.lost()) }
    }

    /// Writes a heartbeat.
    ///
    /// # Errors
    /// [`Error::LeaseLost`], [`Error::Io`].
    pub fn beat(&self) -> Result<(), Error> {
        self.update(|_| {})
    }

    /// Changes the content of the lease.
    ///
    /// # Errors
    /// As for [`beat`](Self::beat).
    pub fn update(&self, change: impl FnOnce(&mut Lease)) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.medium.is_writable() {
            let before = state.lease;
            change(&mut state.lease);
            let failed = Error::io("lock", self.medium.path());
            return readers::note(self.medium.as_ref(), &before, &state.lease).map_err(failed);
        }
        let looked = uptime();
        if read(self.medium.as_ref(), state.slot)? != Slot::Of(state.lease) {
            return Err(self.lost());
        }
        change(&mut state.lease);
        state.lease.beat = now();
        write(self.medium.as_ref(), state.slot, Some(&state.lease))?;
        if self.medium.facts().shared_between_hosts && stood_still(looked, state.said, WATCH) {
            // The slot may have been wiped after it was read: its content now proves nothing.
            return Err(self.lost());
        }
        if state.settled {
            state.said = looked;
        }
        Ok(())
    }

    fn lost(&self) -> Error {
        Error::LeaseLost { path: self.medium.path().to_path_buf() }
    }
}

/// Takes a lease of a medium that is open for reading only.
///
/// # Errors
/// [`Error::ReadOnly`] on a medium that other hosts share, because they have to see the lease.
fn read_only(medium: &dyn Medium, lease: Lease) -> Result<State, Error> {
    let path = medium.path();
    if medium.facts().shared_between_hosts {
        return Err(Error::ReadOnly { path: path.to_path_buf() });
    }
    if readers::take(medium, &lease).map_err(Error::io("take a lease of", path))? {
        Ok(State { slot: LEASE_SLOTS, lease, said: uptime(), settled: true })
    } else {
        Err(Error::Busy { path: path.to_path_buf(), who: "a process that keeps readers out".to_string() })
    }
}

/// Writes `lease` to a slot that is free, and locks it.
fn claim(medium: &dyn Medium, lease: Lease) -> Result<State, Error> {
    let failed = || Error::io("take a lease of", medium.path());
    let holder = lease.holder;
    let shared = medium.facts().shared_between_hosts;
    // Hosts, and processes of a host, start to look at different places.
    let start = holder.host.wrapping_add(u64::from(holder.pid)) % LEASE_SLOTS;
    for slot in (0..LEASE_SLOTS).map(|step| (start + step) % LEASE_SLOTS) {
        if !medium.try_lock(offset(slot)).map_err(failed())? {
            continue;
        }
        let said = uptime();
        // Only garbage collection may decide that another host is gone. Read once: a torn slot belongs to another
        // holder, and 2048 of them would take a minute to read again.
        let is_others = match read_once(medium, slot)? {
            Slot::Free => false,
            Slot::Torn(_) => shared,
            Slot::Of(found) => found.holder.host != holder.host && shared,
        };
        if !is_others {
            write(medium, slot, Some(&lease))?;
            if read(medium, slot)? == Slot::Of(lease) {
                // Another host that found the slot free has written by the time of `settle`.
                return Ok(State { slot, lease, said, settled: false });
            }
        }
        medium.unlock(offset(slot)).map_err(failed())?;
    }
    Err(Error::NoLease { path: medium.path().to_path_buf(), slots: LEASE_SLOTS })
}

impl Drop for Held {
    fn drop(&mut self) {
        let State { slot, lease, .. } = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.medium.is_writable() {
            // The locks end with the handle, too.
            let _ = readers::give_back(self.medium.as_ref(), &lease);
            return;
        }
        // If that fails, the lock ends with the handle, which has the same effect. Another holder's lease is left
        // alone.
        if read(self.medium.as_ref(), slot).is_ok_and(|found| found == Slot::Of(lease)) {
            let _ = write(self.medium.as_ref(), slot, None);
        }
        let _ = self.medium.unlock(offset(slot));
    }
}
