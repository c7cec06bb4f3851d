//! A local directory that keeps chunks fetched from far away: of bounded size, the ones used longest ago go first. Several
//! processes of a user may share it, and no other user may change it: chunks are guest memory. A chunk is a file of its stored
//! bytes, named by the object's digest and its number; a damaged one is noticed by its checksum and fetched again. Symbolic
//! links in it are not followed, and files whose names are not those of chunks are left alone.

use std::fs::{self, File, FileTimes};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use crate::snapshot::{self, Digest, SnapshotId, create_new, create_private_dir};
use crate::tiering::chunks::{Broken, ChunkSource, EachChunk, Flow, Index, Place, SourceCounters};
use crate::vmm::error::Error;
use crate::vmm::own_dir::check_owner;

/// How full the directory is after old chunks were removed.
const LOW: (u64, u64) = (3, 4);

/// A file of the cache: when it was used last, how many bytes it has, where it is.
type Entry = (SystemTime, u64, PathBuf);

/// A cache directory.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    limit: u64,
    /// Bytes there are, as far as this process knows.
    held: AtomicU64,
}

impl Cache {
    /// Uses `dir`, which is made if need be, for up to `limit` bytes.
    pub fn open(dir: &Path, limit: u64) -> Result<Arc<Cache>, Error> {
        let failed = |doing| move |source| Error::File { doing, path: dir.to_path_buf(), source };
        create_private_dir(dir).map_err(failed("make the cache directory"))?;
        check_owner(dir).map_err(failed("use the cache directory"))?;
        let cache = Cache { dir: dir.to_path_buf(), limit, held: AtomicU64::new(0) };
        cache.held.store(cache.entries().map_err(failed("read the cache directory"))?.1, Ordering::Relaxed);
        // Found now rather than at every chunk.
        let probe = cache.path(Digest([0; 32]), 0);
        write_partial(&probe, &[]).and_then(fs::remove_file).map_err(failed("write to the cache directory"))?;
        Ok(Arc::new(cache))
    }

    fn path(&self, digest: Digest, number: u32) -> PathBuf {
        self.dir.join(format!("{}-{number}.chunk", &digest.to_string()[..32]))
    }

    /// The chunks, the one used longest ago first, and how many bytes they have together.
    fn entries(&self) -> std::io::Result<(Vec<Entry>, u64)> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            // Another process may just have removed it.
            if let (true, Ok(metadata)) = (is_ours(&entry.file_name().to_string_lossy()), entry.metadata()) {
                entries.push((metadata.modified()?, metadata.len(), entry.path()));
            }
        }
        entries.sort_unstable();
        let bytes = entries.iter().map(|(_, len, _)| len).sum();
        Ok((entries, bytes))
    }

    /// The stored bytes of a chunk, if they are here and whole.
    fn get(&self, digest: Digest, number: u32, index: &Index) -> Option<Vec<u8>> {
        let (path, chunk) = (self.path(digest, number), &index.chunks()[number as usize]);
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path).ok()?;
        let mut bytes = Vec::with_capacity(chunk.stored_len as usize + 1);
        (&file).take(u64::from(chunk.stored_len) + 1).read_to_end(&mut bytes).ok()?;
        if bytes.len() != chunk.stored_len as usize || crc32c::crc32c(&bytes) != chunk.checksum {
            tracing::info!(path = %path.display(), "A cached chunk is damaged and fetched again");
            let _ = fs::remove_file(&path);
            return None;
        }
        // What was used last goes last; nobody is worse off if that cannot be noted.
        let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
        Some(bytes)
    }

    /// Keeps a chunk. That it cannot be kept is told and harms nobody.
    fn put(&self, digest: Digest, number: u32, bytes: &[u8]) {
        let len = bytes.len() as u64;
        if len > self.limit {
            return;
        }
        let path = self.path(digest, number);
        // Not synced: a chunk that a crash has cut does not have its checksum.
        let written = write_partial(&path, bytes).and_then(|partial| {
            fs::rename(&partial, &path).inspect_err(|_| {
                // What did not get the name of a chunk is of no use.
                let _ = fs::remove_file(&partial);
            })
        });
        if let Err(error) = written {
            tracing::warn!(%error, path = %path.display(), "A chunk cannot be cached");
            return;
        }
        if self.held.fetch_add(len, Ordering::Relaxed) + len > self.limit {
            self.shrink();
        }
    }

    /// Removes the chunks used longest ago.
    fn shrink(&self) {
        let Ok((entries, mut held)) = self.entries() else { return };
        let low = self.limit * LOW.0 / LOW.1;
        for (_, len, path) in entries {
            if held <= low {
                break;
            }
            // Somebody else may have removed it.
            let _ = fs::remove_file(path);
            held -= len;
        }
        self.held.store(held, Ordering::Relaxed);
    }
}

/// Writes a file beside `path` that is to be renamed to it: a new one, never one that is there, nor where a link leads.
fn write_partial(path: &Path, bytes: &[u8]) -> io::Result<PathBuf> {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    let partial = path.with_extension(format!("{thread}.partial"));
    let made = match create_new(&partial) {
        // A thread with this id was killed while it wrote.
        Err(snapshot::Error::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(&partial)?;
            create_new(&partial)
        }
        made => made,
    };
    let written = made.map_err(io::Error::other).and_then(|mut file| file.write_all(bytes));
    match written {
        Ok(()) => Ok(partial),
        Err(error) => {
            // As above.
            let _ = fs::remove_file(&partial);
            Err(error)
        }
    }
}

/// Whether a file has the name of a chunk, or of one that is being written: 32 hexadecimal digits, a number.
fn is_ours(name: &str) -> bool {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((stem, suffix)) = name.split_once('.') else { return false };
    let of_chunk =
        stem.split_once('-').is_some_and(|(digest, number)| digest.len() == 32 && is_hex(digest) && is_number(number));
    of_chunk && (suffix == "chunk" || suffix.strip_suffix(".partial").is_some_and(is_number))
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
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
