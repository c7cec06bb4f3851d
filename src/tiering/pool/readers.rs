//! Leases of VMs that open their pool only to read it, as all VMs do whose pool is a file. Nothing is written: the
//! lease is a set of locks (fcntl(2), "Open file description locks").
//!
//! Bytes from 2^62 on, which no pool has, stand for facts. The lock of byte `2^62 + kind · 2^54 + process · 2^32 +
//! value` says that the process maps an entry (kind 0: the first four bytes of its digest), or how many pages of a kind
//! its plan has (1 to 4: in place, local, zero, lazy). Locks are shared, so that VMs of one snapshot do not keep each
//! other out, and end with their process. A user with the right to read the pool can hold one; `gc` finds them all.

use std::io;
use std::ops::Range;

use super::lease_record::{Holder, Lease, now};
use super::medium::Medium;
use crate::snapshot::SnapshotId;

const FACTS: u64 = 1 << 62;
const KIND: u32 = 54;
const PROCESS: u32 = 32;
/// Process ids are smaller (`PID_MAX_LIMIT`, Linux `include/linux/threads.h`).
const PROCESSES: u64 = 1 << 22;
const KINDS: u64 = 5;
/// The most locks that are looked at: a single lock of all bytes would be one at each.
const MAX_FACTS: usize = 1 << 16;

/// The byte whose lock states this fact.
fn fact(kind: u64, pid: u32, value: u32) -> u64 {
    FACTS + (kind << KIND) + ((u64::from(pid) % PROCESSES) << PROCESS) + u64::from(value)
}

/// The start of an entry's digest, as the lock of a lease tells it.
fn prefix(entry: [u8; 16]) -> u32 {
    u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]])
}

/// Takes the lease of an entry. Returns `false` if another process has an exclusive lock of the byte.
pub fn take(medium: &dyn Medium, lease: &Lease) -> io::Result<bool> {
    medium.try_lock_shared(fact(0, lease.holder.pid, prefix(lease.entry)))
}

/// Replaces the planned pages of `before` by those of `lease`.
pub fn note(medium: &dyn Medium, before: &Lease, lease: &Lease) -> io::Result<()> {
    for (kind, (old, new)) in (1..).zip(before.planned.into_iter().zip(lease.planned)) {
        medium.unlock(fact(kind, before.holder.pid, old))?;
        // Failure to lock is ignored: `tvmm pool show` prints the number, and nothing depends on it.
        medium.try_lock_shared(fact(kind, lease.holder.pid, new))?;
    }
    Ok(())
}

/// Gives the lease back.
pub fn give_back(medium: &dyn Medium, lease: &Lease) -> io::Result<()> {
    for (kind, pages) in (1..).zip(lease.planned) {
        medium.unlock(fact(kind, lease.holder.pid, pages))?;
    }
    medium.unlock(fact(0, lease.holder.pid, prefix(lease.entry)))
}

/// The leases that other handles of this host hold. They know only the start of their entry's digest.
pub fn all(medium: &dyn Medium, host: u64) -> io::Result<Vec<Lease>> {
    let mut facts = Vec::new();
    let mut ranges = Vec::from([Range { start: FACTS, end: FACTS + (KINDS << KIND) }]);
    while let Some(range) = ranges.pop() {
        let Some(at) = medium.locked_in(&range)? else { continue };
        facts.push(at - FACTS);
        if facts.len() > MAX_FACTS {
            return Err(io::Error::other("it is locked in more places than VMs lock; end the process that does so"));
        }
        ranges.push(range.start..at);
        ranges.push(at + 1..range.end);
    }
    let pid_of = |fact: &u64| (fact >> PROCESS) % PROCESSES;
    let value_of = |fact: &u64| *fact as u32;
    let said = |kind: u64, pid: u64| facts.iter().filter(move |fact| **fact >> KIND == kind && pid_of(fact) == pid);
    let entries = facts.iter().filter(|fact| **fact >> KIND == 0);
    let lease = |fact: &u64| {
        let pid = pid_of(fact);
        let mut entry = [0; 16];
        entry[..4].copy_from_slice(&value_of(fact).to_be_bytes());
        Lease {
            holder: Holder { host, pid: pid as u32 },
            beat: now(),
            snapshot: SnapshotId::default(),
            entry,
            planned: [1, 2, 3, 4].map(|kind| said(kind, pid).map(value_of).max().unwrap_or(0)),
        }
    };
    Ok(entries.map(lease).collect())
}
