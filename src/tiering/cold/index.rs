//! The index of an object: for each chunk its pages, place, compression and checksum. It comes from another host, so
//! nothing in it is believed before it was checked.

use std::ops::{Range, RangeInclusive};

use serde::{Deserialize, Serialize};

use super::codec::Compression;
use super::delivery::{Broken, EachChunk, Flow};
use super::error::ChunkError;
use crate::snapshot::{
    Container, Digest, Extent, Gfn, MemoryLayout, ObjectKey, PAGE_SIZE, SALT_LEN, SecretKey, Section, SectionKind,
    SnapshotId, TAG_LEN, write_container,
};

/// The sizes of a chunk's window that a user can choose, in pages: 64 KiB to 2 MiB.
pub(super) const CHUNK_PAGES_RANGE: RangeInclusive<u64> = 16..=512;
/// The largest index, in bytes: of 1 TiB of guest memory in chunks of 64 KiB.
pub const MAX_INDEX_LEN: u64 = 256 << 20;
/// Section kinds of an index.
const HEAD: SectionKind = SectionKind::Other(96);
const CHUNKS: SectionKind = SectionKind::Other(97);
const ENCRYPTION: SectionKind = SectionKind::Other(98);
/// The version of all sections.
const VERSION: u32 = 1;
/// Bytes of a chunk's entry before its mask of pages: window, stored length, checksum, compression.
const ENTRY_HEAD: usize = 13;

/// The facts that an index states once, for all chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    snapshot: SnapshotId,
    layout: MemoryLayout,
    chunk_pages: u64,
    chunks: u64,
    pages: u64,
    data_len: u64,
    data_digest: Digest,
}

/// A chunk: the pages of one window that are in `mask`, ascending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Guest frame number of the window's first page divided by the window's pages.
    pub window: u32,
    /// Number of pages it holds.
    pub pages: u32,
    pub compression: Compression,
    /// CRC32C of the stored bytes.
    pub checksum: u32,
    /// Their offset in the data object.
    pub offset: u64,
    pub stored_len: u32,
}

impl Chunk {
    /// Bytes of its pages.
    pub fn len(&self) -> usize {
        self.pages as usize * PAGE_SIZE as usize
    }

    /// Always false for a chunk of a valid index: one with an empty chunk is refused.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }
}

/// The facts about the encryption of an object's chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Encryption {
    /// The random bytes that the object's keys are made of, beside the user's key.
    salt: [u8; SALT_LEN],
    /// The code over head and table ([`ObjectKey::mac`]): the index is that of the writer.
    mac: Digest,
}

/// A checked index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    head: Head,
    encryption: Option<Encryption>,
    /// In the order of the data.
    chunks: Vec<Chunk>,
    /// Words of each chunk's mask, one after the other.
    masks: Vec<u64>,
    /// Chunks ascending by window.
    by_window: Vec<u32>,
}

/// A chunk to be put into an index.
pub(crate) struct NewChunk {
    pub window: u32,
    /// The pages of the window that the chunk holds: bit `n` of word `n / 64`.
    pub mask: Vec<u64>,
    pub compression: Compression,
    pub checksum: u32,
    pub stored_len: u32,
}

impl Index {
    /// The index of chunks written one after the other; checked by the same rules as one that is read. `key`: the keys
    /// with which the chunks were encrypted, and the salt that they are made of.
    pub(crate) fn of(
        snapshot: SnapshotId,
        layout: &MemoryLayout,
        chunk_pages: u64,
        chunks: &[NewChunk],
        data_digest: Digest,
        key: Option<(&ObjectKey, &[u8; SALT_LEN])>,
    ) -> Result<Index, ChunkError> {
        let data_len = chunks.iter().map(|chunk| u64::from(chunk.stored_len)).sum();
        let pages = chunks.iter().flat_map(|chunk| &chunk.mask).map(|word| u64::from(word.count_ones())).sum();
        let chunk_count = chunks.len() as u64;
        let head =
            Head { snapshot, layout: layout.clone(), chunk_pages, chunks: chunk_count, pages, data_len, data_digest };
        let mut table = Vec::with_capacity(chunks.len() * entry_len(chunk_pages));
        for chunk in chunks {
            table.extend_from_slice(&chunk.window.to_le_bytes());
            table.extend_from_slice(&chunk.stored_len.to_le_bytes());
            table.extend_from_slice(&chunk.checksum.to_le_bytes());
            table.push(chunk.compression.number());
            let mask = chunk.mask.iter().flat_map(|word| word.to_le_bytes());
            table.extend(mask.take(mask_len(chunk_pages)));
        }
        let new = |problem| ChunkError::Index { object: "the new index".into(), problem };
        let Some((key, salt)) = key else { return build(head, &table, None).map_err(new) };
        let mac = mac_of(key, &head, &table).map_err(new)?;
        build(head, &table, Some(Encryption { salt: *salt, mac })).map_err(new)
    }

    /// The keys of the object's chunks. None: they are not encrypted, and there is no key.
    ///
    /// # Errors
    /// [`ChunkError::Encrypted`] without a key, [`ChunkError::NotEncrypted`] with one for nothing,
    /// [`ChunkError::OtherKey`] for an index that was not written with this key. `object` names it in errors.
    pub fn object_key(&self, object: &str, key: Option<&SecretKey>) -> Result<Option<ObjectKey>, ChunkError> {
        let object = object.to_string();
        let Some(Encryption { salt, mac }) = &self.encryption else {
            return if key.is_some() { Err(ChunkError::NotEncrypted { object }) } else { Ok(None) };
        };
        let Some(key) = key else { return Err(ChunkError::Encrypted { object }) };
        let key = ObjectKey::new(key, salt, self.head.snapshot);
        let found = mac_of(&key, &self.head, &self.table());
        let found = found.map_err(|problem| ChunkError::Index { object: object.clone(), problem })?;
        if constant_time_eq::constant_time_eq_32(&found.0, &mac.0) {
            Ok(Some(key))
        } else {
            Err(ChunkError::OtherKey { object })
        }
    }

    /// The bytes of the index object.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ChunkError> {
        let failed = |error: postcard::Error| ChunkError::Index {
            object: "the new index".into(),
            problem: format!("it cannot be written: {error}"),
        };
        let section = |kind, payload| Section { kind, instance: 0, version: VERSION, payload };
        let head = postcard::to_stdvec(&self.head).map_err(failed)?;
        let mut sections = vec![section(HEAD, head), section(CHUNKS, self.table())];
        if let Some(Encryption { salt, mac }) = &self.encryption {
            sections.push(section(ENCRYPTION, [*salt, mac.0].concat()));
        }
        Ok(write_container(&sections))
    }

    fn table(&self) -> Vec<u8> {
        let mut table = Vec::with_capacity(self.chunks.len() * entry_len(self.head.chunk_pages));
        for (number, chunk) in self.chunks.iter().enumerate() {
            for field in [chunk.window, chunk.stored_len, chunk.checksum] {
                table.extend_from_slice(&field.to_le_bytes());
            }
            table.push(chunk.compression.number());
            let mask = self.mask(number as u32).iter().flat_map(|word| word.to_le_bytes());
            table.extend(mask.take(mask_len(self.head.chunk_pages)));
        }
        table
    }

    /// Reads an index that is said to be of `snapshot`; `object` names it in errors.
    ///
    /// # Errors
    /// [`ChunkError::IndexContainer`] if it is no container or a damaged one, [`ChunkError::OtherSnapshot`],
    /// [`ChunkError::Index`] if it contradicts itself or the format.
    pub fn parse(object: &str, bytes: Vec<u8>, snapshot: SnapshotId) -> Result<Index, ChunkError> {
        let in_container = |source| ChunkError::IndexContainer { object: object.to_string(), source: Box::new(source) };
        let bad = |problem: String| ChunkError::Index { object: object.to_string(), problem };
        let container = Container::parse(bytes).map_err(in_container)?;
        let is_encrypted = container.sections().iter().any(|info| info.kind == ENCRYPTION);
        let kinds: &[SectionKind] = if is_encrypted { &[HEAD, CHUNKS, ENCRYPTION] } else { &[HEAD, CHUNKS] };
        if container.sections().len() != kinds.len() {
            return Err(bad(format!("it has {} sections, not {}", container.sections().len(), kinds.len())));
        }
        for &kind in kinds {
            let version = container.info(kind, 0).map_err(in_container)?.version;
            if version != VERSION {
                return Err(bad(format!(
                    "section {} has version {version}, this build reads {VERSION}; it was written by tvmm {}",
                    kind.number(),
                    container.writer()
                )));
            }
        }
        let head = container.section(HEAD, 0).map_err(in_container)?;
        let head: Head = match postcard::take_from_bytes(head) {
            Ok((head, [])) => head,
            Ok((_, rest)) => return Err(bad(format!("{} bytes follow its head", rest.len()))),
            Err(error) => return Err(bad(error.to_string())),
        };
        if head.snapshot != snapshot {
            let object = object.to_string();
            let expected = snapshot;
            let found = head.snapshot;
            return Err(ChunkError::OtherSnapshot { object, expected, found });
        }
        let encryption = if is_encrypted {
            let bytes = container.section(ENCRYPTION, 0).map_err(in_container)?;
            Some(Encryption::parse(bytes).ok_or_else(|| bad(format!("its encryption has {} bytes", bytes.len())))?)
        } else {
            None
        };
        build(head, container.section(CHUNKS, 0).map_err(in_container)?, encryption).map_err(bad)
    }

    pub fn snapshot(&self) -> SnapshotId {
        self.head.snapshot
    }

    pub fn layout(&self) -> &MemoryLayout {
        &self.head.layout
    }

    /// Pages of a window.
    pub fn chunk_pages(&self) -> u64 {
        self.head.chunk_pages
    }

    /// Pages that are not zero.
    pub fn pages(&self) -> u64 {
        self.head.pages
    }

    /// Length of the data object, bytes.
    pub fn data_len(&self) -> u64 {
        self.head.data_len
    }

    /// BLAKE3 of the data object.
    pub fn data_digest(&self) -> Digest {
        self.head.data_digest
    }

    /// The chunks in the order of the data.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// The byte range of the stored chunks `[first, end)` in the data object.
    pub fn span(&self, chunks: Range<u32>) -> Range<u64> {
        let start = |number: u32| self.chunks.get(number as usize).map_or(self.head.data_len, |chunk| chunk.offset);
        start(chunks.start)..start(chunks.end)
    }

    /// The runs of successive chunks in `wanted` (kept in its order), none of which has more than `limit` stored bytes
    /// unless it is one chunk.
    pub fn spans(&self, wanted: &[u32], limit: u64) -> Vec<Range<u32>> {
        let mut spans: Vec<Range<u32>> = Vec::new();
        for &number in wanted {
            if let Some(last) = spans.last_mut()
                && last.end == number
                && self.span(last.start..number + 1).end - self.span(last.clone()).start <= limit
            {
                last.end += 1;
                continue;
            }
            spans.push(number..number + 1);
        }
        spans
    }

    /// Hands the stored bytes of `chunks` to `each`, chunk by chunk.
    pub fn deliver(&self, chunks: Range<u32>, bytes: &[u8], each: &mut EachChunk) -> Result<Flow, Broken> {
        let start = self.span(chunks.clone()).start;
        for number in chunks {
            let span = self.span(number..number + 1);
            if each(number, &bytes[(span.start - start) as usize..(span.end - start) as usize])? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Continue)
    }

    /// The window a page lies in.
    pub fn window_of(&self, gfn: Gfn) -> Extent {
        let pages = self.head.chunk_pages;
        Extent { first: Gfn(gfn.0 / pages * pages), pages }
    }

    /// The chunks that hold pages of `extent`, ascending by window.
    pub fn chunks_of(&self, extent: Extent) -> impl Iterator<Item = u32> + '_ {
        let pages = self.head.chunk_pages;
        let last = extent.end().0.saturating_sub(1) / pages;
        let window = |number: u32| u64::from(self.chunks[number as usize].window);
        let at = self.by_window.partition_point(|number| window(*number) < extent.first.0 / pages);
        let near = self.by_window[at..].iter().copied().take_while(move |number| window(*number) <= last);
        near.filter(move |number| self.runs(*number).any(|(run, _)| run.intersection(&extent).is_some()))
    }

    /// The runs of pages of a chunk, ascending, each with the offset of its bytes within the chunk's pages.
    pub fn runs(&self, number: u32) -> impl Iterator<Item = (Extent, usize)> + '_ {
        let first = u64::from(self.chunks[number as usize].window) * self.head.chunk_pages;
        let mut offset = 0;
        mask_runs(self.mask(number)).map(move |(start, pages)| {
            let at = offset;
            offset += (pages * PAGE_SIZE) as usize;
            (Extent { first: Gfn(first + start), pages }, at)
        })
    }

    fn mask(&self, number: u32) -> &[u64] {
        let words = mask_words(self.head.chunk_pages);
        &self.masks[number as usize * words..][..words]
    }
}

fn mask_words(chunk_pages: u64) -> usize {
    chunk_pages.div_ceil(64) as usize
}

fn mask_len(chunk_pages: u64) -> usize {
    chunk_pages.div_ceil(8) as usize
}

fn entry_len(chunk_pages: u64) -> usize {
    ENTRY_HEAD + mask_len(chunk_pages)
}

/// The runs of set bits: first bit, number of bits.
fn mask_runs(mask: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut at = 0;
    let end = mask.len() as u64 * 64;
    let is_set = |bit: u64| mask[bit as usize / 64] >> (bit % 64) & 1 == 1;
    std::iter::from_fn(move || {
        let first = (at..end).find(|bit| is_set(*bit))?;
        at = (first..end).find(|bit| !is_set(*bit)).unwrap_or(end);
        Some((first, at - first))
    })
}

impl Encryption {
    fn parse(bytes: &[u8]) -> Option<Encryption> {
        let (salt, mac) = bytes.split_at_checked(SALT_LEN)?;
        Some(Encryption { salt: salt.try_into().ok()?, mac: Digest(mac.try_into().ok()?) })
    }
}

/// The code that authenticates an index.
fn mac_of(key: &ObjectKey, head: &Head, table: &[u8]) -> Result<Digest, String> {
    let head = postcard::to_stdvec(head).map_err(|error| format!("it cannot be written: {error}"))?;
    Ok(key.mac(&[&head, table]))
}

/// Checks everything in head and table.
fn build(head: Head, table: &[u8], encryption: Option<Encryption>) -> Result<Index, String> {
    let tag_len = if encryption.is_some() { TAG_LEN as u64 } else { 0 };
    if !head.chunk_pages.is_power_of_two() || !CHUNK_PAGES_RANGE.contains(&head.chunk_pages) {
        return Err(format!("its chunks are of {} pages", head.chunk_pages));
    }
    let entry_len = entry_len(head.chunk_pages);
    if head.chunks.checked_mul(entry_len as u64) != Some(table.len() as u64) {
        return Err(format!("its table has {} bytes for {} chunks", table.len(), head.chunks));
    }
    let words = mask_words(head.chunk_pages);
    let count = table.len() / entry_len;
    let mut chunks = Vec::with_capacity(count);
    let mut masks = Vec::with_capacity(count * words);
    let mut offset = 0_u64;
    let mut pages = 0_u64;
    for (number, entry) in table.chunks_exact(entry_len).enumerate() {
        let word = |at: usize| entry[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let window = word(0);
        let stored_len = word(4);
        let checksum = word(8);
        let compression = Compression::from_number(entry[12])
            .ok_or_else(|| format!("chunk {number} has compression {}", entry[12]))?;
        let start = masks.len();
        masks.resize(start + words, 0_u64);
        for (bit, byte) in entry[ENTRY_HEAD..].iter().enumerate() {
            masks[start + bit / 8] |= u64::from(*byte) << (bit % 8 * 8);
        }
        let held = check_pages(&head, window, &masks[start..]).map_err(|what| format!("chunk {number} {what}"))?;
        let len = u64::from(held) * PAGE_SIZE;
        let fits = match compression {
            Compression::Raw => u64::from(stored_len) == len + tag_len,
            Compression::Lz4 | Compression::Zstd => (tag_len + 1..tag_len + len).contains(&u64::from(stored_len)),
        };
        if !fits {
            return Err(format!("chunk {number} stores {len} bytes as {stored_len} ({})", compression.name()));
        }
        chunks.push(Chunk { window, pages: held, compression, checksum, offset, stored_len });
        offset += u64::from(stored_len);
        pages += u64::from(held);
    }
    if offset != head.data_len || pages != head.pages {
        return Err(format!(
            "its chunks have {pages} pages in {offset} bytes, its head says {} in {}",
            head.pages, head.data_len
        ));
    }
    let mut by_window: Vec<u32> = (0..count as u32).collect();
    by_window.sort_by_key(|number| chunks[*number as usize].window);
    let index = Index { head, encryption, chunks, masks, by_window };
    check_disjoint(&index)?;
    Ok(index)
}

/// The number of pages in the mask; all of them must be guest memory.
fn check_pages(head: &Head, window: u32, mask: &[u64]) -> Result<u32, String> {
    let first = u64::from(window) * head.chunk_pages;
    let mut pages = 0;
    for (start, len) in mask_runs(mask) {
        let run = Extent { first: Gfn(first + start), pages: len };
        let inside: u64 = head.layout.split(run).map(|part| part.pages).sum();
        if inside != len || start + len > head.chunk_pages {
            return Err(format!("holds {run}, which is not all guest memory of its window"));
        }
        pages += len as u32;
    }
    if pages == 0 { Err("holds no pages".into()) } else { Ok(pages) }
}

fn check_disjoint(index: &Index) -> Result<(), String> {
    let mut union = vec![0; mask_words(index.head.chunk_pages)];
    let mut last = None;
    for &number in &index.by_window {
        let window = index.chunks[number as usize].window;
        if last.replace(window) != Some(window) {
            union.fill(0);
        }
        for (seen, word) in union.iter_mut().zip(index.mask(number)) {
            if *seen & word != 0 {
                return Err(format!("two chunks hold the same page of window {window}"));
            }
            *seen |= word;
        }
    }
    Ok(())
}
