//! A cold pool in a directory, read through the page cache, or past it by an io_uring.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backends::Error;
use crate::snapshot::{Digest, SnapshotId};
use crate::sys::direct_ring::DirectRing;
use crate::tiering;
use crate::tiering::cold::store::Store;
use crate::tiering::cold::{Broken, ChunkError, ChunkSource, EachChunk, Flow, Index, Place, SourceCounters};

/// Most bytes read by one call.
const READ_BYTES: u64 = 1 << 20;

/// Bytes of one read past the page cache: large enough for any device, and as long as the longest chunk.
const DIRECT_BYTES: u64 = 256 << 10;

pub struct FilePlace {
    name: String,
    store: Store,
    /// Concurrent reads past the page cache; `None`: reads go through it.
    direct: Option<usize>,
}

impl FilePlace {
    pub fn open(dir: &Path, direct: Option<usize>) -> Result<FilePlace, Error> {
        let name = if direct.is_some() { format!("direct:{}", dir.display()) } else { dir.display().to_string() };
        Ok(FilePlace { name, store: Store::open(dir).map_err(tiering::Error::from)?, direct })
    }
}

/// A permanent failure: a directory that has refused a request will refuse it again.
fn refused(error: ChunkError) -> Broken {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    Broken::Refused(format!("{error}{cause}"))
}

impl Place for FilePlace {
    fn name(&self) -> &str {
        &self.name
    }

    fn index(&self, snapshot: SnapshotId, _: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken> {
        self.store.index_bytes(snapshot).map_err(refused)
    }

    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken> {
        let bytes = self.store.index_bytes(index.snapshot()).map_err(refused)?;
        if digest.0 != *blake3::hash(&bytes).as_bytes() {
            return Err(Broken::Refused("it holds another packing of the snapshot".to_string()));
        }
        let file = self.store.open_data(index).map_err(refused)?;
        counters.connections.fetch_add(1, Ordering::Relaxed);
        if let Some(depth) = self.direct {
            let path = self.store.data_path(index.snapshot());
            let opened = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
            let file = opened.map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => Broken::Refused("its file system cannot be read past the page cache".to_string()),
                _ => Broken::Refused(format!("its data object cannot be opened: {error}")),
            })?;
            return Ok(Box::new(DirectSource { file, ring: Mutex::new(None), depth, index: index.clone(), counters }));
        }
        Ok(Box::new(FileSource { file, index: index.clone(), counters, buffer: Vec::new() }))
    }
}

fn unreadable(error: std::io::Error) -> Broken {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Broken::Damaged("its data object has been cut off".to_string()),
        _ => Broken::Transient(format!("its data object cannot be read: {error}")),
    }
}

struct FileSource {
    file: File,
    index: Arc<Index>,
    counters: Arc<SourceCounters>,
    buffer: Vec<u8>,
}

impl ChunkSource for FileSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        for span in self.index.spans(wanted, READ_BYTES) {
            let range = self.index.span(span.clone());
            self.buffer.resize((range.end - range.start) as usize, 0);
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            self.counters.round_trips.fetch_add(1, Ordering::Relaxed);
            let read = self.file.read_exact_at(&mut self.buffer, range.start);
            read.map_err(unreadable)?;
            if self.index.deliver(span, &self.buffer, each)? == Flow::Stop {
                return Ok(());
            }
        }
        Ok(())
    }
}

struct DirectSource {
    file: File,
    /// Made by the first fetch, and again by one that can keep more reads under way. The lock is never contended.
    ring: Mutex<Option<DirectRing>>,
    depth: usize,
    index: Arc<Index>,
    counters: Arc<SourceCounters>,
}

impl DirectSource {
    /// A ring that keeps as many reads under way as `reads` needs, up to the depth.
    fn ring(&mut self, reads: usize) -> Result<&mut DirectRing, Broken> {
        let ring = self.ring.get_mut().unwrap_or_else(PoisonError::into_inner);
        let depth = reads.clamp(1, self.depth);
        let ring = match ring.take().filter(|ring| ring.depth() >= depth) {
            Some(fits) => ring.insert(fits),
            None => {
                let longest = self.index.chunks().iter().map(|chunk| u64::from(chunk.stored_len)).max().unwrap_or(0);
                let made = self
                    .file
                    .try_clone()
                    .and_then(|file| DirectRing::new(file, longest.max(DIRECT_BYTES) as usize, depth));
                let failed =
                    |error| Broken::Refused(format!("an io_uring with {depth} buffers cannot be made: {error}"));
                ring.insert(made.map_err(failed)?)
            }
        };
        Ok(ring)
    }
}

impl ChunkSource for DirectSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        let index = self.index.clone();
        let counters = self.counters.clone();
        let spans = index.spans(wanted, DIRECT_BYTES);
        let ranges: Vec<_> = spans.iter().map(|span| index.span(span.clone())).collect();
        counters.requests.fetch_add(spans.len() as u64, Ordering::Relaxed);
        counters.round_trips.fetch_add(1, Ordering::Relaxed);
        let mut delivered = Ok(Flow::Continue);
        let read = self.ring(ranges.len())?.read(&ranges, &mut |at, bytes| {
            delivered = index.deliver(spans[at].clone(), bytes, each);
            delivered == Ok(Flow::Continue)
        });
        delivered?;
        read.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => Broken::Refused("its file system cannot be read past the page cache".to_string()),
            _ => unreadable(error),
        })
    }
}
