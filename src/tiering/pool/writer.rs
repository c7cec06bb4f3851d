//! The one process that changes a pool: makes it, removes snapshots, collects what nobody uses.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::catalogue::{Catalogue, Entry, Head, Run};
use super::error::Error;
use super::format::{BLOCK, BLOCK_PAGES, Geometry, SLOT, Superblock, WRITER, superblocks};
use super::lease::{self, EXPIRY_S, Holder, now};
use super::medium::Medium;
use super::space::Space;
use crate::snapshot::PoolId;

/// Bytes of the writer's record: host, pid, heartbeat, checksum.
const RECORD: usize = 24;
/// How often a writer says that it lives.
const BEAT: Duration = Duration::from_secs(5);

/// Makes a pool of `medium`. `format`: the name of the medium, if the user gave one to have it formatted whatever is on it;
/// `name` is what that must be. `is_blank`: nothing else can be on it.
///
/// # Errors
/// [`Error::Exists`], [`Error::Foreign`], [`Error::TooSmall`], [`Error::Io`].
pub fn create(medium: &dyn Medium, id: PoolId, format: Option<&str>, name: &str) -> Result<(), Error> {
    let path = medium.path().to_path_buf();
    let geometry = Geometry::of(medium.size(), &path)?;
    if format != Some(name) {
        refuse_what_is_there(medium, name)?;
        if medium.facts().kind == "dax" {
            // Zeros at its start say nothing about the rest.
            return Err(Error::Foreign { path, name: name.to_string() });
        }
    }
    let _lock = Lock::take(medium)?;
    let writing = || Error::io("format", &path);
    // No older state may come back, and no lease.
    let zeros = vec![0; 64 << 10];
    for at in (0..BLOCK).step_by(zeros.len()) {
        // The writer's record is the lock's.
        if at == 0 {
            medium.write(0, &zeros[..2 * SLOT as usize]).map_err(writing())?;
        } else {
            medium.write(at, &zeros).map_err(writing())?;
        }
    }
    medium.flush(0, BLOCK).map_err(writing())?;
    let superblock =
        Superblock { id, generation: 0, created: now(), geometry, directory: super::format::Blob::default() };
    Catalogue::empty(superblock).publish(medium, &[], Vec::new(), &[])?;
    Ok(())
}

fn refuse_what_is_there(medium: &dyn Medium, name: &str) -> Result<(), Error> {
    let (path, name) = (medium.path().to_path_buf(), name.to_string());
    match superblocks(medium) {
        Ok(_) => {
            let snapshots = Catalogue::read(medium).map_or(0, |catalogue| catalogue.heads.len());
            Err(Error::Exists { path, name, snapshots })
        }
        Err(Error::NotAPool { .. }) => {
            let mut head = vec![0; 64 << 10];
            medium.read(0, &mut head).map_err(Error::io("read the start of", &path))?;
            if head.iter().any(|byte| *byte != 0) { Err(Error::Foreign { path, name }) } else { Ok(()) }
        }
        Err(Error::Newer { .. } | Error::Damaged { .. }) => Err(Error::Foreign { path, name }),
        Err(error) => Err(error),
    }
}

/// The right to write. Given back on drop.
struct Lock<'m> {
    medium: &'m dyn Medium,
    beaten: Instant,
}

impl<'m> Lock<'m> {
    fn take(medium: &'m dyn Medium) -> Result<Lock<'m>, Error> {
        let path = medium.path();
        let busy = |who: String| Error::Busy { path: path.to_path_buf(), who };
        let failed = || Error::io("lock", path);
        let locked = medium.try_lock(WRITER).map_err(failed())?;
        let mut record = [0; RECORD];
        medium.read(WRITER, &mut record).map_err(failed())?;
        let (other, beat) = decode(&record);
        if !locked {
            return Err(busy(format!("process {} of this host", other.pid)));
        }
        let me = Holder::this_process();
        let age = now().saturating_sub(beat);
        if medium.facts().shared_between_hosts && other.host != 0 && other.host != me.host && age <= WRITER_EXPIRY_S {
            let who = format!("process {} of another host, last heard of {age} s ago", other.pid);
            medium.unlock(WRITER).map_err(failed())?;
            return Err(busy(who));
        }
        let mut lock = Lock { medium, beaten: Instant::now() };
        lock.write(me)?;
        medium.read(WRITER, &mut record).map_err(failed())?;
        match decode(&record).0 == me {
            true => Ok(lock),
            // Two hosts at the same moment: the later one has it.
            false => Err(busy("another host".to_string())),
        }
    }

    fn write(&mut self, holder: Holder) -> Result<(), Error> {
        self.beaten = Instant::now();
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&holder.host.to_le_bytes());
        record[8..12].copy_from_slice(&holder.pid.to_le_bytes());
        record[12..20].copy_from_slice(&now().to_le_bytes());
        let sum = crc32c::crc32c(&record[..20]);
        record[20..].copy_from_slice(&sum.to_le_bytes());
        let failed = || Error::io("lock", self.medium.path());
        self.medium.write(WRITER, &record).map_err(failed())?;
        if self.medium.facts().shared_between_hosts {
            self.medium.flush(WRITER, RECORD as u64).map_err(failed())?;
        }
        Ok(())
    }
}

/// A writer of another host that has not been heard of for so long is gone.
const WRITER_EXPIRY_S: u64 = 60;

fn decode(record: &[u8; RECORD]) -> (Holder, u64) {
    let long = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap_or_default());
    let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().unwrap_or_default());
    let whole = crc32c::crc32c(&record[..20]) == word(20);
    let nobody = (Holder { host: 0, pid: 0 }, 0);
    if whole { (Holder { host: long(0), pid: word(8) }, long(12)) } else { nobody }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // If that fails, the lock itself still ends with its handle.
        let _ = self.write(Holder { host: 0, pid: 0 });
        let _ = self.medium.unlock(WRITER);
    }
}

/// A pool open for changes.
pub struct Writer<'m> {
    pub(super) medium: &'m dyn Medium,
    pub(super) state: Catalogue,
    /// The state before, if it is still whole: a torn write of the next one may bring it back.
    pub(super) older: Vec<Catalogue>,
    lock: Lock<'m>,
}

/// What a collection freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Removed snapshots whose pages are free now.
    pub snapshots: u64,
    pub pages: u64,
    /// Removed snapshots that VMs still run from.
    pub held: u64,
}

impl<'m> Writer<'m> {
    /// # Errors
    /// [`Error::Busy`], and as for [`Catalogue::read`].
    pub fn open(medium: &'m dyn Medium) -> Result<Writer<'m>, Error> {
        // Not a pool: nothing is written to it.
        superblocks(medium)?;
        let lock = Lock::take(medium)?;
        let mut states = Catalogue::read_all(medium)?.into_iter().filter_map(Result::ok);
        let state = states.next().ok_or_else(|| Error::damaged(medium.path(), "none of its states is whole"))?;
        Ok(Writer { medium, state, older: states.collect(), lock })
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.state
    }

    /// Says that this writer lives, if that was long ago.
    pub(super) fn beat(&mut self) -> Result<(), Error> {
        match self.lock.beaten.elapsed() > BEAT {
            true => self.lock.write(Holder::this_process()),
            false => Ok(()),
        }
    }

    pub(super) fn publish(&mut self, heads: Vec<Head>, fresh: &[(usize, Entry)]) -> Result<(), Error> {
        let next = self.state.publish(self.medium, &self.older, heads, fresh)?;
        self.older = vec![std::mem::replace(&mut self.state, next)];
        Ok(())
    }

    /// The pages of data that no state needs, the older one included.
    pub(super) fn space(&self) -> Result<Space, Error> {
        let mut space = Space::new(0, self.state.geometry().pages());
        for state in self.older.iter().chain([&self.state]) {
            for Run { at, pages, .. } in state.used(self.medium)? {
                space.take(at, pages);
            }
        }
        Ok(space)
    }

    /// Removes a snapshot: nobody can start to use it any more. Its pages stay until [`collect`](Self::collect).
    ///
    /// # Errors
    /// As for [`Catalogue::find`]; [`Error::Io`].
    pub fn remove(&mut self, what: &str) -> Result<Head, Error> {
        let head = self.state.find(self.medium.path(), what)?.clone();
        let mut heads = self.state.heads.clone();
        heads.iter_mut().filter(|other| other.entry == head.entry).for_each(|head| head.retired = true);
        self.publish(heads, &[])?;
        Ok(head)
    }

    /// Frees the pages of removed snapshots that no VM maps. `expiry_s`: as for [`lease::live`].
    pub fn collect(&mut self, expiry_s: Option<u64>) -> Result<Collected, Error> {
        let before = self.space()?.free();
        let leases = lease::live(self.medium, expiry_s.unwrap_or(EXPIRY_S))?;
        let held: HashSet<[u8; 16]> = leases.iter().map(|(_, lease)| lease.entry).collect();
        let is_held = |head: &Head| held.contains(&lease::short(head.entry.digest));
        let (retired, mut heads): (Vec<Head>, Vec<Head>) =
            self.state.heads.iter().cloned().partition(|head| head.retired);
        let (keep, gone): (Vec<Head>, Vec<Head>) = retired.into_iter().partition(is_held);
        let mut done = Collected { snapshots: gone.len() as u64, held: keep.len() as u64, pages: 0 };
        if gone.is_empty() {
            return Ok(done);
        }
        heads.extend(keep);
        // Twice, so that no state is left that needs the pages.
        self.publish(heads.clone(), &[])?;
        self.publish(heads, &[])?;
        let space = self.space()?;
        done.pages = space.free().saturating_sub(before);
        self.discard(&space)?;
        Ok(done)
    }

    /// Gives whole free blocks back to the host.
    pub(super) fn discard(&self, space: &Space) -> Result<(), Error> {
        let geometry = self.state.geometry();
        for (start, len) in space.runs() {
            let first = start.next_multiple_of(BLOCK_PAGES);
            let end = (start + len) / BLOCK_PAGES * BLOCK_PAGES;
            if first < end {
                let bytes = (end - first) / BLOCK_PAGES * BLOCK;
                let failed = Error::io("give back memory of", self.medium.path());
                self.medium.discard(geometry.page(first), bytes).map_err(failed)?;
            }
        }
        Ok(())
    }
}
