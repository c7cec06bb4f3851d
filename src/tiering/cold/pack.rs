//! Makes an object: the pages of a chain, window by window, compressed.

use std::io::Write;
use std::os::unix::fs::FileExt;

use super::codec::{Compression, Encoder};
use super::error::ChunkError;
use super::index::{CHUNK_PAGES_RANGE, Index, NewChunk};
use crate::snapshot::{
    Chain, Content, Digest, Extent, ObjectKey, PAGE_SIZE, PageSet, ResolvedRun, SecretKey, new_salt,
};

/// The parameters of packing an object.
#[derive(Clone, Debug)]
pub struct PackSpec {
    /// Pages of a chunk's window.
    pub chunk_pages: u64,
    /// Bandwidth of the link to the pool, MB/s; decides which compression pays.
    pub bandwidth_mbps: u64,
    /// Pages stored first, in chunks of their own, so that they are fetched without the others.
    pub hot: Option<PageSet>,
    /// The key with which chunks are encrypted.
    pub key: Option<SecretKey>,
}

/// The result of packing.
#[derive(Clone, Debug)]
pub struct Packed {
    pub index: Index,
    /// Per [`Compression`], in the order of its numbers: chunks, bytes of pages, bytes stored.
    pub methods: [(u64, u64, u64); Compression::ALL.len()],
}

/// Writes the data object of `chain` to `data` and makes its index. The layers are verified first. `progress` gets
/// bytes done and to do.
///
/// # Errors
/// [`ChunkError::Damaged`] for a layer with wrong bytes, [`ChunkError::ChunkSize`], and errors of reading and writing.
pub fn pack(
    chain: &Chain,
    spec: &PackSpec,
    data: &mut dyn Write,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Packed, ChunkError> {
    if !spec.chunk_pages.is_power_of_two() || !CHUNK_PAGES_RANGE.contains(&spec.chunk_pages) {
        return Err(ChunkError::ChunkSize { kib: spec.chunk_pages.saturating_mul(PAGE_SIZE) >> 10 });
    }
    for layer in chain.layers() {
        verify(layer)?;
    }
    let runs = chain.resolve()?;
    let held: PageSet = runs.iter().filter(|run| run.content != Content::Zero).map(|run| run.extent).collect();
    let hot = spec.hot.as_ref().map(|hot| held.intersection(hot)).unwrap_or_default();
    let mut cold = held.clone();
    cold.subtract(&hot);
    let salt = new_salt();
    let key = spec.key.as_ref().map(|key| ObjectKey::new(key, &salt, chain.tip().id()));
    let mut packer = Packer {
        chain,
        key,
        runs: &runs,
        encoder: Encoder::new(spec.bandwidth_mbps).map_err(|source| ChunkError::Compress { chunk: 0, source })?,
        chunk_pages: spec.chunk_pages,
        hasher: blake3::Hasher::new(),
        chunks: Vec::new(),
        methods: Default::default(),
        data,
    };
    let mut done = 0;
    let total = held.len() * PAGE_SIZE;
    for set in [&hot, &cold] {
        let mut window: Vec<Extent> = Vec::new();
        for part in set.runs().flat_map(|run| run.chunks(spec.chunk_pages)) {
            let number = |extent: &Extent| extent.first.0 / spec.chunk_pages;
            if window.first().is_some_and(|first| number(first) != number(&part)) {
                done += packer.add(&window)?;
                progress(done, total);
                window.clear();
            }
            window.push(part);
        }
        done += packer.add(&window)?;
    }
    progress(done, total);
    let digest = Digest(*packer.hasher.finalize().as_bytes());
    let key = packer.key.as_ref().map(|key| (key, &salt));
    let index = Index::of(chain.tip().id(), chain.layout(), spec.chunk_pages, &packer.chunks, digest, key)?;
    Ok(Packed { index, methods: packer.methods })
}

fn verify(layer: &crate::snapshot::Snapshot) -> Result<(), ChunkError> {
    let verified = layer.verify(&mut |_, _| {})?.into_result(layer.object());
    verified.map(drop).map_err(|source| ChunkError::Damaged { source: Box::new(source) })
}

struct Packer<'a> {
    chain: &'a Chain,
    key: Option<ObjectKey>,
    runs: &'a [ResolvedRun],
    encoder: Encoder,
    chunk_pages: u64,
    hasher: blake3::Hasher,
    chunks: Vec<NewChunk>,
    methods: [(u64, u64, u64); Compression::ALL.len()],
    data: &'a mut dyn Write,
}

impl Packer<'_> {
    /// Adds a chunk with these pages of one window (none: no chunk). Returns the bytes of the pages.
    fn add(&mut self, window: &[Extent]) -> Result<u64, ChunkError> {
        let Some(first) = window.first() else { return Ok(0) };
        let number = first.first.0 / self.chunk_pages;
        let mut mask = vec![0_u64; self.chunk_pages.div_ceil(64) as usize];
        let mut pages = Vec::new();
        for extent in window {
            for bit in 0..extent.pages {
                let bit = extent.first.0 - number * self.chunk_pages + bit;
                mask[bit as usize / 64] |= 1 << (bit % 64);
            }
            self.read(*extent, &mut pages)?;
        }
        let chunk = self.chunks.len();
        let compress = |source| ChunkError::Compress { chunk, source };
        let (compression, mut stored) = self.encoder.encode(&pages).map_err(compress)?;
        if let Some(key) = &self.key {
            // Each chunk has its number to itself, and so its nonce.
            key.seal(chunk as u32, &mut stored)
                .map_err(|_| ChunkError::Compress { chunk, source: std::io::Error::other("it cannot be encrypted") })?;
        }
        self.hasher.update(&stored);
        let failed = |source| {
            ChunkError::Snapshot(crate::snapshot::Error::Io {
                action: "write the data object of",
                path: self.chain.tip().memory_path().to_path_buf(),
                source,
            })
        };
        self.data.write_all(&stored).map_err(failed)?;
        let method = &mut self.methods[compression.number() as usize];
        *method = (method.0 + 1, method.1 + pages.len() as u64, method.2 + stored.len() as u64);
        // Layouts end below 2^44, so that windows fit 32 bits; chunks are at most 2 MiB.
        self.chunks.push(NewChunk {
            window: number as u32,
            mask,
            compression,
            checksum: crc32c::crc32c(&stored),
            stored_len: stored.len() as u32,
        });
        Ok(pages.len() as u64)
    }

    /// Appends the bytes of `extent`, which the chain holds.
    fn read(&self, extent: Extent, pages: &mut Vec<u8>) -> Result<(), ChunkError> {
        let at = self.runs.partition_point(|run| run.extent.end() <= extent.first);
        for run in self.runs[at..].iter().take_while(|run| run.extent.first < extent.end()) {
            let Content::Bytes(source) = run.content else { continue };
            let Some(layer) = self.chain.layer_of(run.content) else { continue };
            let Some(part) = run.extent.intersection(&extent) else { continue };
            let start = pages.len();
            pages.resize(start + part.bytes() as usize, 0);
            let offset = source.offset + (part.first.0 - run.extent.first.0) * PAGE_SIZE;
            let read = layer.memory().read_exact_at(&mut pages[start..], offset);
            read.map_err(ChunkError::file("read", layer.memory_path()))?;
        }
        Ok(())
    }
}
