//! Places that have the objects of a cold pool, and their sources of chunks: the traits that back ends implement.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use serde::Serialize;

use super::delivery::{Broken, EachChunk};
use super::index::Index;
use crate::snapshot::{Digest, SnapshotId};

/// One thread's connection to the chunks of one object at one place.
pub trait ChunkSource: Send + Sync {
    /// Called by `ColdReader`, one call at a time. Must give the stored bytes of the chunks `wanted` to `each`, each
    /// once, in this order, and return early if `each` stops or fails. After a failure the caller asks for the rest
    /// again.
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken>;
}

/// A place that has objects: a directory, a page server, an object store.
pub trait Place: Send + Sync {
    /// Its name in errors and reports.
    fn name(&self) -> &str;
    /// Returns the bytes of the index of `snapshot`, at most [`MAX_INDEX_LEN`](super::MAX_INDEX_LEN).
    fn index(&self, snapshot: SnapshotId, counters: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken>;
    /// Opens a source of the chunks of `index`, whose bytes have the digest `digest`. Must refuse another object.
    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken>;
}

/// Counts of the requests to one place.
#[derive(Debug, Default)]
pub struct SourceCounters {
    /// Set when the pool is closed: waits for this place end.
    pub closed: AtomicBool,
    pub requests: AtomicU64,
    pub round_trips: AtomicU64,
    pub connections: AtomicU64,
    /// Chunks found in a cache of this host.
    pub cached: AtomicU64,
    pub(super) chunks: AtomicU64,
    pub(super) stored: AtomicU64,
    pub(super) pages: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) damaged: AtomicU64,
}

/// [`SourceCounters`] at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceCounts {
    pub place: String,
    /// Chunks that the place gave.
    pub chunks: u64,
    /// Bytes fetched, as they are stored.
    pub bytes_stored: u64,
    /// Bytes of pages unpacked from them.
    pub bytes_pages: u64,
    /// Messages or reads that asked for chunks.
    pub requests: u64,
    /// Waits for an answer with no other request under way.
    pub round_trips: u64,
    /// Connections made.
    pub connections: u64,
    /// Chunks given that were in this host's cache directory.
    pub cached: u64,
    /// Failed attempts that were made again, at this place or another.
    pub retries: u64,
    /// Chunks that came with other bytes than were stored.
    pub damaged: u64,
}
