//! The writer of a pool, one process at a time: makes the pool, removes snapshots, collects unused pages.

use super::catalogue::{Catalogue, Entry, Head, Run};
use super::error::Error;
use super::format::{BLOCK, BLOCK_PAGES, Geometry, LEASES, SLOT, Superblock, superblocks};
use super::lease::{self, EXPIRY_S};
use super::lease_record::now;
use super::lock::Lock;
use super::medium::Medium;
use super::space::Space;
use crate::snapshot::PoolId;

/// Makes a pool of `medium`. `format`: the medium's name, if the user gave one to have it formatted whatever is on it;
/// it must equal `name`. `is_blank`: nothing else can be on it.
///
/// # Errors
/// [`Error::Exists`], [`Error::Foreign`], [`Error::InUse`], [`Error::TooSmall`], [`Error::Io`].
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
    let mut lock = Lock::take(medium)?;
    let in_use = |vms: usize| if vms > 0 { Err(Error::InUse { path: path.clone(), vms }) } else { Ok(()) };
    in_use(lease::live(medium, EXPIRY_S)?.len())?;
    let writing = || Error::io("format", &path);
    // VMs may run from the pool even if its superblocks are damaged. Once they are zero no VM starts: it takes its
    // lease first, and reads the superblocks then.
    let mut before = vec![0; 2 * SLOT as usize];
    medium.read(0, &mut before).map_err(writing())?;
    let put = |bytes: &[u8]| medium.write(0, bytes).and_then(|()| medium.flush(0, 2 * SLOT)).map_err(writing());
    lock.as_writer(|| put(&vec![0; before.len()]))?;
    let unused = lease::abandon(medium, EXPIRY_S, &mut || lock.beat()).and_then(|vms| in_use(vms.len()));
    if let Err(error) = unused {
        // An ousted writer leaves the pool to its successor.
        if lock.check().is_ok() {
            put(&before)?;
        }
        return Err(error);
    }
    // Wiped, so that no older state comes back, and no lease.
    let zeros = vec![0; 64 << 10];
    for at in (zeros.len() as u64..BLOCK).step_by(zeros.len()) {
        lock.beat()?;
        medium.write(at, &zeros).map_err(writing())?;
    }
    medium.flush(LEASES, BLOCK - LEASES).map_err(writing())?;
    let superblock =
        Superblock { id, generation: 0, created: now(), geometry, directory: super::format::Blob::default() };
    Catalogue::empty(superblock).publish(&mut lock, &[], Vec::new(), &[])?;
    Ok(())
}

fn refuse_what_is_there(medium: &dyn Medium, name: &str) -> Result<(), Error> {
    let path = medium.path().to_path_buf();
    let name = name.to_string();
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

/// A pool open for changes.
pub struct Writer<'m> {
    pub(super) medium: &'m dyn Medium,
    pub(super) state: Catalogue,
    /// The state before, if it is still whole: a torn write of the next one may bring it back.
    pub(super) older: Vec<Catalogue>,
    lock: Lock<'m>,
}

/// The result of a collection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Removed snapshots whose pages are free now.
    pub snapshots: u64,
    pub pages: u64,
    /// Removed snapshots that VMs still run from.
    pub held: u64,
}

impl<'m> Writer<'m> {
    /// Opens the pool on `medium` for changes.
    ///
    /// # Errors
    /// [`Error::Busy`], and as for [`Catalogue::read`].
    pub fn open(medium: &'m dyn Medium) -> Result<Writer<'m>, Error> {
        // Fails before anything is written, if the medium is no pool.
        superblocks(medium)?;
        let lock = Lock::take(medium)?;
        let mut states = Catalogue::read_all(medium)?.into_iter().filter_map(Result::ok);
        let state = states.next().ok_or_else(|| Error::damaged(medium.path(), "none of its states is whole"))?;
        Ok(Writer { medium, state, older: states.collect(), lock })
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.state
    }

    /// Checks that this process is still the writer, and writes a heartbeat if the last one is old.
    pub(super) fn beat(&mut self) -> Result<(), Error> {
        self.lock.beat()
    }

    pub(super) fn publish(&mut self, heads: Vec<Head>, fresh: &[(usize, Entry)]) -> Result<(), Error> {
        let next = self.state.publish(&mut self.lock, &self.older, heads, fresh)?;
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

    /// Removes a snapshot: no VM can start to use it any more. Its pages stay until [`collect`](Self::collect).
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

    /// Frees the pages of removed snapshots that no VM maps, and ends leases of other hosts that have been silent for
    /// `expiry_s`, after watching them.
    pub fn collect(&mut self, expiry_s: Option<u64>) -> Result<Collected, Error> {
        let before = self.space()?.free();
        let leases = lease::abandon(self.medium, expiry_s.unwrap_or(EXPIRY_S), &mut || self.lock.beat())?;
        let is_held = |head: &Head| leases.iter().any(|(_, lease)| lease.is_of(head.entry.digest));
        let (retired, mut heads): (Vec<Head>, Vec<Head>) =
            self.state.heads.iter().cloned().partition(|head| head.retired);
        let (keep, gone): (Vec<Head>, Vec<Head>) = retired.into_iter().partition(is_held);
        let mut done = Collected { snapshots: gone.len() as u64, held: keep.len() as u64, pages: 0 };
        if gone.is_empty() {
            return Ok(done);
        }
        heads.extend(keep);
        // Published twice, so that neither state needs the pages.
        self.publish(heads.clone(), &[])?;
        self.publish(heads, &[])?;
        let space = self.space()?;
        done.pages = space.free().saturating_sub(before);
        self.discard(&space)?;
        Ok(done)
    }

    /// Gives whole free blocks back to the host.
    pub(super) fn discard(&self, space: &Space) -> Result<(), Error> {
        self.lock.check()?;
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
