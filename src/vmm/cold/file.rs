//! A cold pool in a directory, read through the page cache.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::snapshot::{Digest, SnapshotId};
use crate::tiering;
use crate::tiering::chunks::store::Store;
use crate::tiering::chunks::{Broken, ChunkError, ChunkSource, EachChunk, Flow, Index, Place, SourceCounters};
use crate::vmm::error::Error;

/// Read by one call at most.
const READ_BYTES: u64 = 1 << 20;

pub struct FilePlace {
    name: String,
    store: Store,
}

impl FilePlace {
    pub fn open(dir: &Path) -> Result<FilePlace, Error> {
        Ok(FilePlace { name: dir.display().to_string(), store: Store::open(dir).map_err(tiering::Error::from)? })
    }
}

/// What a pool in a directory says no to, it will say no to again.
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
        Ok(Box::new(FileSource { file, index: index.clone(), counters, buffer: Vec::new() }))
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
            read.map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Broken::Damaged("its data object has been cut off".to_string()),
                _ => Broken::Transient(format!("its data object cannot be read: {error}")),
            })?;
            if self.index.deliver(span, &self.buffer, each)? == Flow::Stop {
                return Ok(());
            }
        }
        Ok(())
    }
}
