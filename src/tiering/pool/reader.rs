//! A pool as a tier: open for one snapshot, under a lease.

use std::io;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::Builder;

use super::catalogue::{Catalogue, Entry, Head};
use super::error::Error;
use super::format::{Geometry, SUM_LEN};
use super::lease::{BEAT, Held, SETTLE};
use super::medium::Medium;
use crate::snapshot::{PAGE_SIZE, PlacementCounts, SnapshotId, TierAccess, TierSource};
use crate::sys::worker::Worker;
use crate::tiering::tier::{Mappable, Tier, TierRun};

/// A snapshot in a pool. Its pages stay in place while this lives.
#[derive(Debug)]
pub struct PoolTier {
    medium: Arc<dyn Medium>,
    catalogue: Catalogue,
    head: Head,
    entry: OnceLock<Entry>,
    /// Before the lease: dropped, and so stopped, first.
    _heart: Option<Worker>,
    lease: Option<Arc<Held>>,
}

/// Called once when the lease is lost: pages that the VM maps may be freed and reused.
pub type OnLost = Box<dyn FnOnce(Error) + Send>;

impl PoolTier {
    /// Opens a snapshot of the pool on `medium`. `leased` is given if its bytes will be mapped: the callback for a
    /// lease that another host ends.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], [`Error::NoLease`], and as for [`Catalogue::read`].
    pub fn open(medium: Arc<dyn Medium>, snapshot: SnapshotId, leased: Option<OnLost>) -> Result<PoolTier, Error> {
        let path = medium.path().to_path_buf();
        let missing = || Error::NoSnapshot { path: path.clone(), what: snapshot.to_string() };
        let mut catalogue = Catalogue::read(medium.as_ref())?;
        let mut head = catalogue.live(snapshot).cloned().ok_or_else(missing)?;
        let mut lease = None;
        while leased.is_some() && lease.is_none() {
            let held = Held::take(&medium, snapshot, head.entry.digest)?;
            // From here on the lease keeps the entry's pages; before, a collection could free them.
            catalogue = Catalogue::read(medium.as_ref())?;
            let now = catalogue.live(snapshot).cloned();
            if now.as_ref().is_some_and(|now| now.entry == head.entry) {
                lease = Some(Arc::new(held));
            } else {
                head = now.ok_or_else(missing)?;
            }
        }
        let beats = lease.clone().zip(leased).filter(|_| medium.facts().shared_between_hosts);
        let is_there = is_there(&medium, &head);
        let heart = beats.map(|(held, on_lost)| start_heart(held, is_there, on_lost)).transpose();
        let _heart = heart.map_err(Error::io("keep a lease of", &path))?;
        Ok(PoolTier { medium, catalogue, head, entry: OnceLock::new(), _heart, lease })
    }

    /// Writes the VM's planned pages into the lease, for `tvmm pool show`.
    pub fn note_plan(&self, counts: &PlacementCounts) -> Result<(), Error> {
        let Some(lease) = &self.lease else { return Ok(()) };
        let pages = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let planned =
            [pages(counts.in_place + counts.cow_file), pages(counts.preload), pages(counts.zero), pages(counts.lazy)];
        lease.settle(&is_there(&self.medium, &self.head))?;
        lease.update(|lease| lease.planned = planned)
    }

    fn geometry(&self) -> &Geometry {
        self.catalogue.geometry()
    }

    fn entry(&self) -> Result<&Entry, Error> {
        if let Some(entry) = self.entry.get() {
            return Ok(entry);
        }
        let entry = self.catalogue.entry(self.medium.as_ref(), &self.head)?;
        Ok(self.entry.get_or_init(|| entry))
    }
}

/// Returns a function that tells whether the pool still has the entry.
fn is_there(medium: &Arc<dyn Medium>, head: &Head) -> impl Fn() -> Result<bool, Error> + Send + use<> {
    let medium = medium.clone();
    let snapshot = head.snapshot;
    let entry = head.entry;
    move || Ok(Catalogue::read(medium.as_ref())?.live(snapshot).is_some_and(|now| now.entry == entry))
}

impl Tier for PoolTier {
    fn source(&self) -> TierSource {
        let access = if self.medium.facts().copy_on_write { TierAccess::MapPrivate } else { TierAccess::MapShared };
        let pool = self.catalogue.superblock.id;
        let entry = self.head.entry.digest;
        TierSource { pool, entry, access, len: self.geometry().data.len }
    }

    fn path(&self) -> &Path {
        self.medium.path()
    }

    fn runs(&self) -> Result<Vec<TierRun>, crate::tiering::Error> {
        let run = |run: &super::catalogue::Run| TierRun { extent: run.extent(), offset: run.at * PAGE_SIZE };
        Ok(self.entry()?.runs.iter().map(run).collect())
    }

    fn is_complete(&self) -> bool {
        true
    }

    fn mapping(&self) -> Option<Mappable<'_>> {
        let facts = self.medium.facts();
        Some(Mappable {
            file: self.medium.file(),
            base: self.geometry().data.offset,
            align: facts.align,
            copy_on_write: facts.copy_on_write,
            huge: facts.huge,
            readable: facts.readable,
        })
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.medium.read(self.geometry().data.offset + offset, bytes)?;
        self.verify(offset, &[bytes])
    }

    fn verify(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let first = offset / PAGE_SIZE;
        let pages = parts.iter().map(|part| part.len() as u64).sum::<u64>() / PAGE_SIZE;
        let mut sums = vec![0; (pages * SUM_LEN) as usize];
        self.medium.read(self.geometry().sums.offset + first * SUM_LEN, &mut sums)?;
        let each = parts
            .iter()
            .flat_map(|part| part.chunks_exact(PAGE_SIZE as usize))
            .zip(sums.chunks_exact(SUM_LEN as usize));
        match (first..).zip(each).find(|(_, (page, sum))| crc32c::crc32c(page).to_le_bytes() != **sum) {
            None => Ok(()),
            Some((page, _)) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("page {page:#x} of pool {} does not match its checksum", self.medium.path().display()),
            )),
        }
    }
}

/// Starts the thread that sends the heartbeats of a lease that other hosts watch.
fn start_heart(
    lease: Arc<Held>,
    is_there: impl Fn() -> Result<bool, Error> + Send + 'static,
    on_lost: OnLost,
) -> io::Result<Worker> {
    let (stop, stopped) = channel();
    let beat = move || {
        let mut settled = false;
        while stopped.recv_timeout(if settled { BEAT } else { SETTLE }) == Err(RecvTimeoutError::Timeout) {
            let beaten = if settled { lease.beat() } else { lease.settle(&is_there).map(|stands| settled = stands) };
            match beaten {
                Ok(()) => {}
                // Without a lease nothing protects its pages.
                Err(error @ (Error::LeaseLost { .. } | Error::NoLease { .. })) => return on_lost(error),
                Err(error) => tracing::error!(%error, "The lease of a pool cannot be kept alive"),
            }
        }
    };
    let stop = move || {
        // A failure means that the thread has ended.
        let _ = stop.send(());
    };
    Worker::start(Builder::new().name("lease".into()), stop, beat)
}
