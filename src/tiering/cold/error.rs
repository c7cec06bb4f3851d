//! The errors of cold pools.

use std::io;
use std::path::PathBuf;

use crate::snapshot::{self, SnapshotId};

/// A failure, and the object it happened to.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    #[error("{object} cannot be used as the index of a cold pool: {problem}")]
    Index { object: String, problem: String },
    #[error("{object} is not a valid index of a cold pool")]
    IndexContainer { object: String, source: Box<snapshot::Error> },
    #[error("{object} is of snapshot {found}, not of {expected}")]
    OtherSnapshot { object: String, expected: SnapshotId, found: SnapshotId },
    #[error("{object} is not what the snapshot's manifest says: {problem}")]
    OtherMemory { object: String, problem: String },
    #[error("{path} is not a cold pool: {problem}", path = path.display())]
    NotAPool { path: PathBuf, problem: String },
    #[error(
        "{path} was made by a later tvmm in format {format}, this build reads {reads}", path = path.display()
    )]
    FutureFormat { path: PathBuf, format: u32, reads: u32 },
    #[error("A cold pool cannot be made at {path}: {problem}", path = path.display())]
    CannotMake { path: PathBuf, problem: &'static str },
    #[error("A chunk cannot hold {kib} KiB of guest memory, only a power of two from 64 to 2048")]
    ChunkSize { kib: u64 },
    #[error("{path} already holds snapshot {snapshot}", path = path.display())]
    AlreadyHeld { path: PathBuf, snapshot: SnapshotId },
    #[error("{path} does not hold snapshot {snapshot}", path = path.display())]
    NotHeld { path: PathBuf, snapshot: SnapshotId },
    #[error("Another tvmm is writing to {path}", path = path.display())]
    Busy { path: PathBuf },
    #[error("The snapshot is damaged and was not added")]
    Damaged { source: Box<snapshot::Error> },
    #[error(
        "Cannot read {object}: it is encrypted. Only a restore can read it, with its key (--decrypt-key, \
         `tvmm.decrypt_key`)"
    )]
    Encrypted { object: String },
    #[error("Cannot trust {object}: it is not encrypted. Restore from it without a key if you trust its writer")]
    NotEncrypted { object: String },
    #[error("Cannot decrypt {object}: its index is damaged, or was written with another key")]
    OtherKey { object: String },
    #[error("No cold pool that was given can be used: {0}")]
    NoPlace(String),
    #[error("The object store at {url} cannot be used: {why}")]
    ObjectStore { url: String, why: String },
    #[error("Chunk {chunk} cannot be compressed")]
    Compress { chunk: usize, source: io::Error },
    #[error("Cannot {doing} {path}", path = path.display())]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

impl ChunkError {
    /// Adapts an `io::Error`: `map_err(ChunkError::file("read", path))`.
    pub(crate) fn file(doing: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> ChunkError {
        let path = path.to_path_buf();
        move |source| ChunkError::File { doing, path, source }
    }
}
