//! Cold pools: the pages of snapshots as compressed chunks, fetched over a network or from slow storage.
//!
//! A cold pool holds, per snapshot (the whole chain, keyed by the tip's id), one immutable object: a *data object*, the
//! compressed chunks one after the other, and an *index* with the pages, compression and checksum of each chunk. A
//! chunk holds the pages of one aligned window of guest memory, so a fault needs one chunk (two if the object was
//! packed by a profile), and a run of chunks is a run of bytes. `docs/remote.md` describes every byte.
//!
//! [`Place`] and [`ChunkSource`] hide where the bytes are; this module checks all bytes, whatever place sent them.

mod codec;
mod delivery;
pub(crate) mod error;
pub(crate) mod index;
mod lower;
pub(crate) mod pack;
mod place;
pub(crate) mod reader;
#[cfg(test)]
pub(crate) mod sample;
pub mod store;
#[cfg(test)]
mod tests;

pub use codec::{Compression, Decoder, Encoder};
pub use delivery::{Broken, EachChunk, Flow};
pub use error::ChunkError;
pub use index::{Chunk, Index, MAX_INDEX_LEN};
pub use lower::lower;
pub use pack::{PackSpec, Packed, pack};
pub use place::{ChunkSource, Place, SourceCounters, SourceCounts};
pub use reader::{ColdCounts, ColdPool, ColdReader, fill};

/// The default window, in pages (measured: `docs/remote.md`).
pub const DEFAULT_CHUNK_PAGES: u64 = 32;
/// The default bandwidth of the link to a cold pool, MB/s: 10 Gbit/s.
pub const DEFAULT_BANDWIDTH_MBPS: u64 = 1200;
