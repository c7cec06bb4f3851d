//! The catalogue of a pool: a directory of entries, one for each snapshot. Publishes new states of it.

use std::collections::HashSet;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::format::{Blob, Geometry, SLOT, Superblock, superblocks};
use super::lock::Lock;
use super::medium::Medium;
use super::space::Space;
use crate::snapshot::{Digest, Extent, Gfn, MAX_GUEST_ADDRESS, PAGE_SIZE, SnapshotId};

/// Blobs start at multiples of this: a cache line.
const BLOB_ALIGN: u64 = 64;

/// A snapshot in the pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub snapshot: SnapshotId,
    /// The name of the snapshot's directory when it was added.
    pub name: String,
    /// Its [`Entry`]. Plans name the entry by this digest.
    pub entry: Blob,
    /// Time of adding, seconds since 1970.
    pub added: u64,
    /// Removed, but maybe still mapped: no VM may start to use it, and its pages stay until [gc](super::writer).
    pub retired: bool,
    pub stats: Stats,
}

/// The result of adding a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Pages of guest memory.
    pub guest_pages: u64,
    /// Pages that are not zero.
    pub nonzero: u64,
    /// Pages that the pool had already and that are shared.
    pub shared: u64,
    /// Pages that the pool had already and that were stored again, to keep mappings long.
    pub again: u64,
    /// Zero pages that were stored to keep mappings long.
    pub padding: u64,
    /// Runs: the mappings needed to show everything in place.
    pub runs: u64,
    /// Runs there would be if every page that the pool has were shared.
    pub runs_if_all_shared: u64,
    /// Whole blocks of 2 MiB that one huge page can map.
    pub huge_blocks: u64,
}

/// Pages of a snapshot that follow one another in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First page of the guest.
    pub gfn: u64,
    pub pages: u64,
    /// First page of data.
    pub at: u64,
}

impl Run {
    pub fn extent(&self) -> Extent {
        Extent { first: Gfn(self.gfn), pages: self.pages }
    }
}

/// The places of the pages of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub snapshot: SnapshotId,
    /// Ascending by guest page, disjoint. Pages in no run are zero.
    pub runs: Vec<Run>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Directory {
    heads: Vec<Head>,
}

/// One state of a pool.
#[derive(Clone, Debug)]
pub struct Catalogue {
    pub superblock: Superblock,
    slot: u64,
    pub heads: Vec<Head>,
}

impl Catalogue {
    /// Reads the newest state that is whole. A state that is being replaced while it is read is read again.
    ///
    /// # Errors
    /// As for [`superblocks`]; [`Error::Damaged`].
    pub fn read(medium: &dyn Medium) -> Result<Catalogue, Error> {
        let mut last = None;
        for _ in 0..READS {
            let found = superblocks(medium)?;
            for (slot, superblock) in &found {
                match Catalogue::of(medium, *slot, superblock) {
                    Ok(catalogue) => return Ok(catalogue),
                    Err(error) => last = last.or(Some(error)),
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::damaged(medium.path(), "it has no state")))
    }

    /// The states of both superblocks that can be read, newest first.
    pub fn read_all(medium: &dyn Medium) -> Result<Vec<Result<Catalogue, Error>>, Error> {
        let found = superblocks(medium)?;
        Ok(found.iter().map(|(slot, superblock)| Catalogue::of(medium, *slot, superblock)).collect())
    }

    fn of(medium: &dyn Medium, slot: u64, superblock: &Superblock) -> Result<Catalogue, Error> {
        let directory: Directory = read_blob(medium, &superblock.geometry, &superblock.directory, "directory")?;
        Ok(Catalogue { superblock: *superblock, slot, heads: directory.heads })
    }

    /// An empty pool, never published.
    pub fn empty(superblock: Superblock) -> Catalogue {
        Catalogue { superblock, slot: 1, heads: Vec::new() }
    }

    pub fn geometry(&self) -> &Geometry {
        &self.superblock.geometry
    }

    /// The entry of a head, checked: its runs ascend and lie within the pool.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn entry(&self, medium: &dyn Medium, head: &Head) -> Result<Entry, Error> {
        let entry: Entry = read_blob(medium, self.geometry(), &head.entry, "entry")?;
        let bad = |problem: &str| Error::damaged(medium.path(), format!("entry of {}: {problem}", head.snapshot));
        if entry.snapshot != head.snapshot {
            return Err(bad("it is of another snapshot"));
        }
        let mut next = 0;
        for run in &entry.runs {
            let end = run.gfn.checked_add(run.pages);
            let at_end = run.at.checked_add(run.pages);
            let fits = end.is_some_and(|end| end <= MAX_GUEST_ADDRESS / PAGE_SIZE)
                && at_end.is_some_and(|end| end <= self.geometry().pages());
            if run.pages == 0 || run.gfn < next || !fits {
                return Err(bad("its runs are out of order, or behind the pool's end"));
            }
            next = run.gfn + run.pages;
        }
        Ok(entry)
    }

    /// The one entry that `what` names: by its name, its id, or the start of its id.
    ///
    /// # Errors
    /// [`Error::NoSnapshot`], [`Error::Ambiguous`].
    pub fn find(&self, path: &Path, what: &str) -> Result<&Head, Error> {
        let is_named =
            |head: &&Head| head.name == what || (what.len() >= 4 && head.snapshot.to_string().starts_with(what));
        let live: Vec<&Head> = self.heads.iter().filter(|head| !head.retired).filter(is_named).collect();
        match live[..] {
            [head] => Ok(head),
            [] => Err(Error::NoSnapshot { path: path.to_path_buf(), what: what.to_string() }),
            _ => Err(Error::Ambiguous { path: path.to_path_buf(), what: what.to_string(), count: live.len() }),
        }
    }

    /// The entry of a snapshot that may be used.
    pub fn live(&self, snapshot: SnapshotId) -> Option<&Head> {
        self.heads.iter().find(|head| !head.retired && head.snapshot == snapshot)
    }

    /// Makes `heads` the state of the pool, with blobs for `fresh` entries (by their place in `heads`). `older`: states
    /// whose blobs must stay, because a reader, or a recovery from a torn write, may still use them.
    ///
    /// # Errors
    /// [`Error::CatalogueFull`] before anything is changed; [`Error::Ousted`], [`Error::StoodStill`], [`Error::Io`].
    pub(super) fn publish(
        &self,
        lock: &mut Lock,
        older: &[Catalogue],
        mut heads: Vec<Head>,
        fresh: &[(usize, Entry)],
    ) -> Result<Catalogue, Error> {
        let medium = lock.medium();
        let path = medium.path();
        let part = self.geometry().catalogue;
        let mut space = Space::new(part.offset, part.offset + part.len);
        for state in older.iter().chain([self]) {
            let blobs = state.heads.iter().map(|head| head.entry).chain([state.superblock.directory]);
            blobs.for_each(|blob| space.take(blob.offset, padded(blob.len)));
        }
        let mut blobs = Vec::new();
        for (index, entry) in fresh {
            let (blob, bytes) = place(&mut space, entry, path)?;
            heads[*index].entry = blob;
            blobs.push((blob, bytes));
        }
        let directory = Directory { heads };
        let (blob, bytes) = place(&mut space, &directory, path)?;
        blobs.push((blob, bytes));
        let writing = || Error::io("write the catalogue of", path);
        for (blob, bytes) in &blobs {
            lock.beat()?;
            medium.write(blob.offset, bytes).map_err(writing())?;
            medium.flush(blob.offset, blob.len).map_err(writing())?;
        }
        let generation = self.superblock.generation + 1;
        let superblock = Superblock { generation, directory: blob, ..self.superblock };
        let slot = 1 - self.slot;
        lock.as_writer(|| {
            medium.write(slot * SLOT, &superblock.encode()).map_err(writing())?;
            medium.flush(slot * SLOT, SLOT).map_err(writing())
        })?;
        Ok(Catalogue { superblock, slot, heads: directory.heads })
    }

    /// Pages of data that the entries of this state use.
    pub fn used(&self, medium: &dyn Medium) -> Result<Vec<Run>, Error> {
        let mut runs = Vec::new();
        let mut seen = HashSet::new();
        for head in self.heads.iter().filter(|head| seen.insert(head.entry.offset)) {
            runs.extend(self.entry(medium, head)?.runs);
        }
        Ok(runs)
    }
}

/// Reads of a state that changes under the reader.
const READS: usize = 4;

fn padded(len: u64) -> u64 {
    len.next_multiple_of(BLOB_ALIGN)
}

fn place<T: Serialize>(space: &mut Space, value: &T, path: &Path) -> Result<(Blob, Vec<u8>), Error> {
    let unencodable = |error: postcard::Error| Error::damaged(path, error.to_string());
    let bytes = postcard::to_stdvec(value).map_err(unencodable)?;
    let len = bytes.len() as u64;
    let full = || Error::CatalogueFull { path: path.to_path_buf(), need: len };
    let offset = space.allocate(padded(len), 0, BLOB_ALIGN).ok_or_else(full)?;
    let digest = Digest(*blake3::hash(&bytes).as_bytes());
    Ok((Blob { offset, len, digest }, bytes))
}

fn read_blob<T: DeserializeOwned>(
    medium: &dyn Medium,
    geometry: &Geometry,
    blob: &Blob,
    what: &str,
) -> Result<T, Error> {
    let path = medium.path();
    let part = geometry.catalogue;
    let inside = blob.offset >= part.offset
        && blob.offset.checked_add(blob.len).is_some_and(|end| end <= part.offset + part.len);
    if !inside {
        return Err(Error::damaged(path, format!("its {what} lies outside its catalogue")));
    }
    let mut bytes = vec![0; blob.len as usize];
    medium.read(blob.offset, &mut bytes).map_err(Error::io("read the catalogue of", path))?;
    if *blake3::hash(&bytes).as_bytes() != blob.digest.0 {
        return Err(Error::damaged(path, format!("the checksum of its {what} is wrong")));
    }
    postcard::from_bytes(&bytes).map_err(|error| Error::damaged(path, format!("its {what}: {error}")))
}
