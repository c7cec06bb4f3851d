//! A local directory that keeps chunks fetched from other hosts, of bounded size: the chunks used longest ago go first.
//! Several processes of a user may share it, and no other user may change it: chunks are guest memory. A chunk is a
//! file of its stored bytes, named by the object's digest and its number; a damaged one is noticed by its checksum and
//! fetched again. Symbolic links in it are not followed, and files whose names are not those of chunks are left alone.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backends::Error;
use crate::snapshot::{self, Digest, PartialFile, SnapshotId, create_private_dir, lru, sweep};
use crate::sys::own_dir::check_owner;
use crate::tiering::cold::{Broken, ChunkSource, EachChunk, Flow, Index, Place, SourceCounters};

/// Digits of an object's digest in the names of its chunks.
const DIGEST_DIGITS: usize = 32;
/// The part of the limit that old chunks are removed down to.
const LOW: (u64, u64) = (3, 4);

/// Returns whether [`Cache::path`] gives this file name: other files in the directory are not the cache's.
fn is_chunk_name(name: &OsStr) -> bool {
    let parts = name.to_str().and_then(|name| name.strip_suffix(".chunk")?.split_once('-'));
    parts.is_some_and(|(digest, number)| {
        digest.len() == DIGEST_DIGITS && digest.chars().all(|c| c.is_ascii_hexdigit()) && number.parse::<u32>().is_ok()
    })
}

/// A cache directory.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    limit: u64,
    /// Bytes in the directory, as far as this process knows.
    held: AtomicU64,
}

impl Cache {
    /// Uses `dir` for up to `limit` bytes, and makes it if it does not exist.
    pub fn open(dir: &Path, limit: u64) -> Result<Arc<Cache>, Error> {
        let failed = |doing| move |source| Error::File { doing, path: dir.to_path_buf(), source };
        create_private_dir(dir).map_err(failed("make the cache directory"))?;
        check_owner(dir).map_err(failed("use the cache directory"))?;
        let cache = Cache { dir: dir.to_path_buf(), limit, held: AtomicU64::new(0) };
        cache.held.store(
            lru::cached_bytes(dir, is_chunk_name).map_err(failed("read the cache directory"))?,
            Ordering::Relaxed,
        );
        // The test file finds a missing permission now rather than at every chunk.
        sweep(dir);
        PartialFile::create(dir)?;
        Ok(Arc::new(cache))
    }

    fn path(&self, digest: Digest, number: u32) -> PathBuf {
        self.dir.join(format!("{}-{number}.chunk", &digest.to_string()[..DIGEST_DIGITS]))
    }

    /// Returns the stored bytes of a chunk if the cache has them whole.
    fn get(&self, digest: Digest, number: u32, index: &Index) -> Option<Vec<u8>> {
        let path = self.path(digest, number);
        let chunk = &index.chunks()[number as usize];
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path).ok()?;
        let mut bytes = Vec::with_capacity(chunk.stored_len as usize + 1);
        (&file).take(u64::from(chunk.stored_len) + 1).read_to_end(&mut bytes).ok()?;
        if bytes.len() != chunk.stored_len as usize || crc32c::crc32c(&bytes) != chunk.checksum {
            tracing::info!(path = %path.display(), "A cached chunk is damaged and fetched again");
            let _ = fs::remove_file(&path);
            return None;
        }
        lru::note_use(&file);
        Some(bytes)
    }

    /// Keeps a chunk. A failure is logged, and the chunk is fetched again next time.
    fn put(&self, digest: Digest, number: u32, bytes: &[u8]) {
        let len = bytes.len() as u64;
        if len > self.limit {
            return;
        }
        let path = self.path(digest, number);
        if let Err(error) = self.write(&path, bytes) {
            tracing::warn!(%error, path = %path.display(), "A chunk cannot be cached");
            return;
        }
        if self.held.fetch_add(len, Ordering::Relaxed) + len > self.limit {
            self.shrink();
        }
    }

    /// Not synced: a chunk that a crash has cut does not have its checksum.
    fn write(&self, path: &Path, bytes: &[u8]) -> snapshot::Result<()> {
        let partial = PartialFile::create(&self.dir)?;
        let written = partial.file().write_all(bytes);
        written.map_err(snapshot::Error::io("write", partial.path()))?;
        partial.publish(path)
    }

    /// Removes the chunks used longest ago.
    fn shrink(&self) {
        let low = self.limit * LOW.0 / LOW.1;
        if let Ok(held) = lru::shrink(&self.dir, low, Path::new(""), is_chunk_name) {
            self.held.store(held, Ordering::Relaxed);
        }
    }
}

/// A place whose chunks are kept in a cache.
pub struct CachedPlace {
    pub place: Box<dyn Place>,
    pub cache: Arc<Cache>,
}

impl Place for CachedPlace {
    fn name(&self) -> &str {
        self.place.name()
    }

    fn index(&self, snapshot: SnapshotId, counters: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken> {
        self.place.index(snapshot, counters)
    }

    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken> {
        let far = self.place.open(index, digest, counters.clone())?;
        Ok(Box::new(CachedSource { far, cache: self.cache.clone(), index: index.clone(), digest, counters }))
    }
}

struct CachedSource {
    far: Box<dyn ChunkSource>,
    cache: Arc<Cache>,
    index: Arc<Index>,
    digest: Digest,
    counters: Arc<SourceCounters>,
}

impl ChunkSource for CachedSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        let CachedSource { far, cache, index, digest, counters } = self;
        let mut rest = wanted;
        while let Some((&first, others)) = rest.split_first() {
            if let Some(bytes) = cache.get(*digest, first, index) {
                counters.cached.fetch_add(1, Ordering::Relaxed);
                rest = others;
                if each(first, &bytes)? == Flow::Stop {
                    return Ok(());
                }
                continue;
            }
            let is_there = |number: &u32| cache.path(*digest, *number).exists();
            let missing = 1 + others.iter().take_while(|number| !is_there(number)).count();
            let (missing, behind) = rest.split_at(missing);
            let mut stopped = false;
            far.fetch(missing, &mut |number, bytes| {
                if crc32c::crc32c(bytes) == index.chunks()[number as usize].checksum {
                    cache.put(*digest, number, bytes);
                }
                let flow = each(number, bytes)?;
                stopped = flow == Flow::Stop;
                Ok(flow)
            })?;
            if stopped {
                return Ok(());
            }
            rest = behind;
        }
        Ok(())
    }
}
