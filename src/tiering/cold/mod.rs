//! Cold pools: the pages of snapshots as compressed chunks, to be fetched from far away.
//!
//! A cold pool holds, per snapshot (the whole chain, keyed by the tip's id), one immutable object: a *data object*, the
//! compressed chunks one after the other, and an *index* that says which pages each chunk holds, how it is compressed and
//! what its checksum is. A chunk holds the pages of one aligned window of guest memory, so a fault needs one chunk (two
//! if the object was packed by a profile), and a run of chunks is a run of bytes. `docs/remote.md` describes every byte.
//!
//! Where the bytes are is behind [`Place`] and [`ChunkSource`]; what is read is checked here, whoever sent it.

mod codec;
pub(crate) mod error;
pub(crate) mod index;
mod lower;
pub(crate) mod pack;
pub(crate) mod reader;
pub mod store;
#[cfg(test)]
pub(crate) mod tests;

pub use codec::{Compression, Decoder, Encoder};
pub use error::ChunkError;
pub use index::{Chunk, Index, MAX_INDEX_LEN};
pub use lower::lower;
pub use pack::{PackSpec, Packed, pack};
pub use reader::{
    Broken, ChunkSource, ColdCounts, ColdPool, ColdReader, EachChunk, Flow, Place, SourceCounters, SourceCounts, fill,
};

/// Sizes of a chunk's window that can be chosen, in pages: 64 KiB to 2 MiB.
pub const CHUNK_PAGES_RANGE: std::ops::RangeInclusive<u64> = 16..=512;
/// The window when nobody says otherwise, in pages (measured: `docs/remote.md`).
pub const DEFAULT_CHUNK_PAGES: u64 = 32;
/// What a link is taken to carry when nobody says otherwise, MB/s: 10 Gbit/s.
pub const DEFAULT_BANDWIDTH_MBPS: u64 = 1200;
