//! The encodings of a chunk's pages: raw, LZ4 (the block format) or zstd, whichever reaches a guest soonest.

use std::io;

use crate::snapshot::PAGE_SIZE;

/// The encoding of a chunk's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Compression {
    /// Uncompressed.
    Raw,
    /// LZ4 block format, no frame (github.com/lz4/lz4 `doc/lz4_Block_format.md`).
    Lz4,
    /// A zstd frame (RFC 8878).
    Zstd,
}

impl Compression {
    pub const ALL: [Compression; 3] = [Compression::Raw, Compression::Lz4, Compression::Zstd];

    /// The number in the index.
    pub fn number(self) -> u8 {
        self as u8
    }

    pub fn from_number(number: u8) -> Option<Compression> {
        Compression::ALL.into_iter().find(|compression| compression.number() == number)
    }

    pub fn name(self) -> &'static str {
        match self {
            Compression::Raw => "raw",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }

    /// The cost of unpacking a page, ns: medians of guest memory on the development host (`docs/remote.md`). Only their
    /// ratio to a page's cost on the link matters.
    fn decode_page_ns(self) -> u64 {
        match self {
            Compression::Raw => 0,
            Compression::Lz4 => 1_500,
            Compression::Zstd => 3_500,
        }
    }
}

/// The level at which zstd's decoding is as fast as at any other and its encoding still faster than a disk.
const ZSTD_LEVEL: i32 = 3;

/// Compresses chunks.
pub struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    bandwidth_mbps: u64,
}

impl Encoder {
    /// An encoder for a link of this many MB/s (not 0).
    pub fn new(bandwidth_mbps: u64) -> io::Result<Encoder> {
        Ok(Encoder { zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL)?, bandwidth_mbps: bandwidth_mbps.max(1) })
    }

    /// The bytes to store for `pages` (whole pages), and their encoding: the one that takes least time to fetch and
    /// unpack together.
    pub fn encode(&mut self, pages: &[u8]) -> io::Result<(Compression, Vec<u8>)> {
        let raw = self.cost_ns(Compression::Raw, pages.len(), pages.len());
        let mut best = (raw, Compression::Raw, Vec::new());
        for (compression, bytes) in
            [(Compression::Lz4, lz4_flex::block::compress(pages)), (Compression::Zstd, self.zstd.compress(pages)?)]
        {
            let cost = self.cost_ns(compression, pages.len(), bytes.len());
            if bytes.len() < pages.len() && cost < best.0 {
                best = (cost, compression, bytes);
            }
        }
        let (_, compression, bytes) = best;
        Ok((compression, if compression == Compression::Raw { pages.to_vec() } else { bytes }))
    }

    fn cost_ns(&self, compression: Compression, len: usize, stored: usize) -> u64 {
        let pages = len as u64 / PAGE_SIZE;
        stored as u64 * 1000 / self.bandwidth_mbps + pages * compression.decode_page_ns()
    }
}

/// Unpacks chunks.
pub struct Decoder(zstd::bulk::Decompressor<'static>);

impl Decoder {
    pub fn new() -> io::Result<Decoder> {
        Ok(Decoder(zstd::bulk::Decompressor::new()?))
    }

    /// Fills `pages` from the stored bytes; fails if they do not unpack to exactly as many bytes.
    pub fn decode(&mut self, compression: Compression, stored: &[u8], pages: &mut [u8]) -> Result<(), String> {
        let len = match compression {
            Compression::Raw => {
                if stored.len() != pages.len() {
                    return Err(format!("{} bytes are stored for {}", stored.len(), pages.len()));
                }
                pages.copy_from_slice(stored);
                return Ok(());
            }
            Compression::Lz4 => lz4_flex::block::decompress_into(stored, pages).map_err(|error| error.to_string())?,
            Compression::Zstd => self.0.decompress_to_buffer(stored, pages).map_err(|error| error.to_string())?,
        };
        if len == pages.len() { Ok(()) } else { Err(format!("{len} bytes came out of it, not {}", pages.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that no method makes smaller.
    fn noise(len: usize, mut seed: u64) -> Vec<u8> {
        std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn each_chunk_is_stored_the_way_that_pays_and_comes_back() {
        let text: Vec<u8> = (0..16 * 1024u32).flat_map(|n| (n / 7 % 1000).to_le_bytes()).collect();
        let cases = [
            (noise(65536, 1), 1200, Compression::Raw),
            (vec![7; 65536], 1200, Compression::Lz4),
            (text.clone(), 10, Compression::Zstd),
            (text, 100_000, Compression::Raw),
        ];
        let mut decoder = Decoder::new().unwrap();
        for (pages, bandwidth, expected) in cases {
            let (compression, stored) = Encoder::new(bandwidth).unwrap().encode(&pages).unwrap();
            assert_eq!(compression, expected, "at {bandwidth} MB/s");
            assert!(stored.len() <= pages.len());
            let mut back = vec![0; pages.len()];
            decoder.decode(compression, &stored, &mut back).unwrap();
            assert_eq!(back, pages);
        }
    }

    #[test]
    fn bytes_that_are_no_chunk_are_refused() {
        let pages = vec![3; 65536];
        let (compression, stored) = Encoder::new(1200).unwrap().encode(&pages).unwrap();
        let mut decoder = Decoder::new().unwrap();
        let mut short = vec![0; 61440];
        let mut long = vec![0; 69632];
        for method in Compression::ALL {
            assert!(decoder.decode(method, &noise(100, 3), &mut short).is_err(), "{method:?}");
            assert!(decoder.decode(method, &stored, &mut short).is_err(), "{method:?}");
            assert!(decoder.decode(method, &stored, &mut long).is_err(), "{method:?}");
        }
        assert!(decoder.decode(compression, &stored[..stored.len() - 1], &mut vec![0; 65536]).is_err());
    }
}
