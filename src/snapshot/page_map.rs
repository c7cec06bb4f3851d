//! A layer's statement about every page (held, zero, or the parent's) and the checksums of the held pages.

use super::container::{Section, SectionKind};
use super::{Container, Error, Extent, Gfn, MemoryLayout, PAGE_SIZE, PageSet, Result, SnapshotKind};

/// Pages under one checksum: 64 KiB of guest-physical memory, aligned to its size.
pub const CHUNK_PAGES: u64 = 16;

/// The number of the checksum chunk that has the page.
pub fn chunk_of(gfn: Gfn) -> u64 {
    gfn.0 / CHUNK_PAGES
}

/// The pages of a layer and their checksums, checked against each other and against the layout.
#[derive(Clone, Debug, PartialEq)]
pub struct PageMap {
    held: PageSet,
    zero: PageSet,
    /// The numbers of the chunks that have a held page, ascending.
    chunks: Vec<u32>,
    /// CRC32C over the held pages of the chunk with the same index, in page order.
    checksums: Vec<u32>,
}

impl PageMap {
    /// Puts a page map together.
    ///
    /// # Errors
    /// A description of the contradiction: pages outside the layout, pages both held and zero, or a number of
    /// checksums that is not the number of chunks with held pages.
    pub(crate) fn new(
        layout: &MemoryLayout,
        held: PageSet,
        zero: PageSet,
        checksums: Vec<u32>,
    ) -> Result<PageMap, String> {
        for (what, set) in [("held", &held), ("zero", &zero)] {
            let inside: u64 = layout.extents().map(|range| set.len_in(range)).sum();
            if inside != set.len() {
                return Err(format!("{} {what} pages are outside guest memory", set.len() - inside));
            }
        }
        if !held.is_disjoint(&zero) {
            return Err("a page is both held and zero".to_string());
        }
        // Counted before they are listed: a few bytes of roaring can stand for 2^32 pages.
        let chunk_count: u64 = chunk_runs_of(&held).map(|(first, last)| last - first + 1).sum();
        if chunk_count != checksums.len() as u64 {
            return Err(format!("it has {} checksums for {chunk_count} chunks", checksums.len()));
        }
        let chunks = chunk_runs_of(&held).flat_map(|(first, last)| first as u32..=last as u32).collect();
        Ok(PageMap { held, zero, chunks, checksums })
    }

    /// Reads the page sections of a container.
    ///
    /// # Errors
    /// [`Error::MissingSection`], [`Error::Checksum`], [`Error::PageSet`], [`Error::Malformed`].
    pub(crate) fn from_container(container: &Container, layout: &MemoryLayout, kind: SnapshotKind) -> Result<PageMap> {
        let set = |kind| container.section(kind, 0).and_then(PageSet::deserialize);
        let held = set(SectionKind::PagesHeld)?;
        let zero = set(SectionKind::PagesZero)?;
        let (words, rest) = container.section(SectionKind::ChunkChecksums, 0)?.as_chunks::<4>();
        let malformed = |problem: String| Error::malformed(container.object(), problem);
        if !rest.is_empty() {
            return Err(malformed("its checksums are not whole words".to_string()));
        }
        if kind == SnapshotKind::Full && !zero.is_empty() {
            return Err(malformed("a full snapshot lists zero pages".to_string()));
        }
        let checksums = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        PageMap::new(layout, held, zero, checksums).map_err(malformed)
    }

    /// The sections that [`PageMap::from_container`] reads.
    pub(crate) fn to_sections(&self) -> Vec<Section> {
        let section = |kind, payload| Section { kind, instance: 0, version: 1, payload };
        vec![
            section(SectionKind::PagesHeld, self.held.serialize()),
            section(SectionKind::PagesZero, self.zero.serialize()),
            section(SectionKind::ChunkChecksums, self.checksums.iter().flat_map(|crc| crc.to_le_bytes()).collect()),
        ]
    }

    /// The pages whose bytes are in the layer's memory file.
    pub fn held(&self) -> &PageSet {
        &self.held
    }

    /// The pages a diff knows to be zero. Empty for a full snapshot, where every page not held is zero.
    pub fn zero(&self) -> &PageSet {
        &self.zero
    }

    /// `(chunk number, CRC32C)` of every chunk with a held page, ascending.
    pub fn checksums(&self) -> impl ExactSizeIterator<Item = (u64, u32)> + '_ {
        self.chunks.iter().map(|chunk| u64::from(*chunk)).zip(self.checksums.iter().copied())
    }

    /// The number of the chunk with the checksum of this index, which is below `checksums().len()`.
    pub fn chunk_at(&self, index: usize) -> Option<u64> {
        self.chunks.get(index).map(|chunk| u64::from(*chunk))
    }

    /// The checksum of a chunk; `None` if the layer holds no page of it.
    pub fn checksum(&self, chunk: u64) -> Option<u32> {
        let index = self.chunks.binary_search(&u32::try_from(chunk).ok()?).ok()?;
        self.checksums.get(index).copied()
    }

    /// The held pages of a chunk, as runs in page order: the pages that its checksum covers.
    pub fn chunk_runs(&self, chunk: u64) -> impl Iterator<Item = Extent> + '_ {
        self.held.runs_in(Extent { first: Gfn(chunk.saturating_mul(CHUNK_PAGES)), pages: CHUNK_PAGES })
    }

    /// Checks the held pages of one chunk, whose bytes are given in page order without gaps.
    ///
    /// # Errors
    /// [`Error::BadMemory`] if the bytes are not those that were written; `object` names the layer in it.
    pub fn verify_chunk(&self, object: &str, chunk: u64, bytes: &[u8]) -> Result<()> {
        if self.checksum(chunk) == Some(crc32c::crc32c(bytes)) {
            return Ok(());
        }
        let first = Extent { first: Gfn(chunk.saturating_mul(CHUNK_PAGES)), pages: CHUNK_PAGES };
        Err(Error::BadMemory { object: object.to_string(), bad: 1, first })
    }

    /// Checks the bytes of a run of held pages as far as it has whole chunks (chunks of which it has all held pages),
    /// and returns the number of pages checked. For a reader that loads large runs and wants them verified on the way.
    ///
    /// # Errors
    /// [`Error::BadMemory`] as for [`PageMap::verify_chunk`].
    pub fn verify_run(&self, object: &str, first: Gfn, bytes: &[u8]) -> Result<u64> {
        let run = Extent { first, pages: bytes.len() as u64 / PAGE_SIZE };
        let mut verified = 0;
        let mut at = 0;
        for part in run.chunks(CHUNK_PAGES) {
            let end = at + part.bytes() as usize;
            let chunk = chunk_of(part.first);
            if self.chunk_runs(chunk).eq([part]) {
                self.verify_chunk(object, chunk, bytes.get(at..end).unwrap_or_default())?;
                verified += part.pages;
            }
            at = end;
        }
        Ok(verified)
    }
}

/// The chunks that have a page of the set, as inclusive runs of chunk numbers, ascending, each chunk once.
fn chunk_runs_of(held: &PageSet) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut next = 0;
    held.runs().filter_map(move |run| {
        let first = chunk_of(run.first).max(next);
        let last = chunk_of(Gfn(run.end().0 - 1));
        next = last + 1;
        (first <= last).then_some((first, last))
    })
}

/// Computes chunk checksums from held pages that come by in ascending order.
#[derive(Clone, Debug, Default)]
pub struct ChunkHasher {
    current: Option<(u64, u32)>,
    done: Vec<(u64, u32)>,
}

impl ChunkHasher {
    /// A hasher that has seen no page.
    pub fn new() -> ChunkHasher {
        ChunkHasher::default()
    }

    /// Takes the bytes of the pages from `first` on. Pages must come in ascending order over all calls.
    pub fn update(&mut self, first: Gfn, bytes: &[u8]) {
        let mut rest = bytes;
        for part in (Extent { first, pages: bytes.len() as u64 / PAGE_SIZE }).chunks(CHUNK_PAGES) {
            let (now, later) = rest.split_at((part.bytes() as usize).min(rest.len()));
            rest = later;
            let chunk = chunk_of(part.first);
            let crc = match self.current.take() {
                Some((current, crc)) if current == chunk => crc,
                other => {
                    self.done.extend(other);
                    0
                }
            };
            self.current = Some((chunk, crc32c::crc32c_append(crc, now)));
        }
    }

    /// `(chunk number, CRC32C)` of every chunk with a page, ascending.
    pub fn finish(mut self) -> Vec<(u64, u32)> {
        self.done.extend(self.current.take());
        self.done
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout() -> MemoryLayout {
        MemoryLayout::from_gpa_ranges(&[(0, 1 << 20)]).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn hasher_and_map_agree_however_the_bytes_come(gfns in prop::collection::btree_set(0_u64..256, 1..200)) {
            let held: PageSet = gfns.iter().map(|gfn| Gfn(*gfn)).collect();
            let page = |gfn: u64| vec![gfn as u8 ^ 0x5a; PAGE_SIZE as usize];
            let mut by_run = ChunkHasher::new();
            let mut by_page = ChunkHasher::new();
            for run in held.runs() {
                let bytes: Vec<u8> = (run.first.0..run.end().0).flat_map(page).collect();
                by_run.update(run.first, &bytes);
            }
            gfns.iter().for_each(|gfn| by_page.update(Gfn(*gfn), &page(*gfn)));
            let checksums = by_run.finish();
            prop_assert_eq!(&checksums, &by_page.finish());
            let words = checksums.iter().map(|(_, crc)| *crc).collect();
            let map = PageMap::new(&layout(), held.clone(), PageSet::new(), words).unwrap();
            prop_assert_eq!(map.checksums().collect::<Vec<_>>(), checksums);
            for (chunk, _) in map.checksums() {
                let runs: Vec<_> = map.chunk_runs(chunk).collect();
                let mut bytes: Vec<u8> = runs.iter().flat_map(|run| run.first.0..run.end().0).flat_map(page).collect();
                prop_assert!(map.verify_chunk("x", chunk, &bytes).is_ok());
                if let [run] = runs[..] {
                    prop_assert_eq!(map.verify_run("x", run.first, &bytes).unwrap(), run.pages);
                }
                bytes[0] ^= 1;
                prop_assert!(map.verify_chunk("x", chunk, &bytes).is_err());
            }
        }
    }

    #[test]
    fn map_that_contradicts_itself_is_refused() {
        let set = |gfn: u64| PageSet::from_iter([Gfn(gfn)]);
        assert!(PageMap::new(&layout(), set(1), set(2), vec![0]).is_ok());
        assert!(PageMap::new(&layout(), set(256), PageSet::new(), vec![0]).is_err());
        assert!(PageMap::new(&layout(), PageSet::new(), set(256), vec![]).is_err());
        assert!(PageMap::new(&layout(), set(1), set(1), vec![0]).is_err());
        assert!(PageMap::new(&layout(), set(1), set(2), vec![]).is_err());
        assert!(PageMap::new(&layout(), set(1), set(2), vec![0, 0]).is_err());
    }
}
