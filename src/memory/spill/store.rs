//! The spill file: pages that left local memory, compressed, with checksums.
//!
//! Pages go there in blocks: those of one aligned group of 16 that left at the same time. A block is held in memory
//! until it is written, and its space in the file is used again when its last page has come back. The file has no name
//! and ends with the process, so only this module knows its form.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Advice, Mode, OFlags};
use rustix::io::Errno;

use crate::snapshot::{Extent, Gfn, PAGE_SIZE, PRIVATE, PageSet, random_hex};

/// Pages of one group: one read brings 64 KiB.
pub const GROUP_PAGES: u64 = 16;
const PAGE: usize = PAGE_SIZE as usize;
/// Space in the file is taken in units of so many bytes: a block has the fewest that hold it.
const UNIT: u64 = 512;
/// The most bytes of a block: LZ4 makes incompressible bytes a little longer.
const BLOCK_MAX: usize = lz4_flex::block::get_maximum_output_size(GROUP_PAGES as usize * PAGE);
const SIZES: usize = BLOCK_MAX.div_ceil(UNIT as usize) + 1;
/// Bytes of a BLAKE3 digest that are kept.
const DIGEST: usize = 16;
/// The most bytes between two blocks that are read ahead together.
const AHEAD_GAP: u64 = 64 << 10;

/// The bytes of a block.
#[derive(Debug)]
enum Content {
    /// Not written yet.
    Held(Arc<[u8]>),
    /// LZ4 (block format) in the file. The digest is that of the compressed bytes.
    Written { offset: u64, len: u32, digest: [u8; DIGEST] },
}

/// Pages of one group that left together.
#[derive(Debug)]
struct Block {
    /// The pages in it, one bit each.
    pages: u16,
    /// Those that have not come back.
    away: u16,
    content: Content,
}

impl Block {
    /// The place of a page among the bytes.
    fn place(&self, bit: u32) -> usize {
        (self.pages & ((1 << bit) - 1)).count_ones() as usize * PAGE
    }
}

/// A run of pages that comes back.
#[derive(Debug)]
pub struct Back<'a> {
    pub run: Extent,
    pub bytes: &'a [u8],
}

/// The pages that are away, and the file that has them.
#[derive(Debug)]
pub struct Store {
    file: Arc<File>,
    dir: PathBuf,
    end: u64,
    /// The most bytes that the file may have.
    bytes_max: u64,
    /// Places of blocks that have come back, by their size in units.
    free: Vec<BTreeSet<u64>>,
    /// By group; the latest last. Each page is away in one block at most.
    groups: BTreeMap<u64, Vec<Block>>,
    held: Vec<u64>,
    /// Groups that have come back since pages left last.
    recalled: BTreeSet<u64>,
    /// Those that had come back before that: they probably will again.
    expected: BTreeSet<u64>,
    counts: StoreCounts,
}

/// The room that the file had for the blocks that were held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Enough,
    /// Blocks that are still held would make it longer than it may be.
    Full,
}

/// The contents of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct StoreCounts {
    /// Pages that are not in local memory.
    pub pages_away: u64,
    /// Bytes of the file that hold pages.
    pub file_bytes: u64,
    /// The file's length, bytes.
    pub file_len: u64,
}

impl Store {
    /// Makes a file without a name in `dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(dir: &Path) -> io::Result<Store> {
        let file = Arc::new(unnamed(dir)?);
        // One block is read at a time: its neighbours in the file are no neighbours in memory.
        rustix::fs::fadvise(&file, 0, None, Advice::Random)?;
        let (groups, held, counts) = Default::default();
        let free = vec![BTreeSet::new(); SIZES];
        Ok(Store {
            file,
            dir: dir.to_path_buf(),
            end: 0,
            bytes_max: u64::MAX,
            free,
            groups,
            held,
            recalled: BTreeSet::new(),
            expected: BTreeSet::new(),
            counts,
        })
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn counts(&self) -> StoreCounts {
        StoreCounts { file_len: self.end, ..self.counts }
    }

    /// Bounds the file to so many bytes. A longer one stays as it is, and grows no more.
    pub fn limit(&mut self, bytes_max: u64) {
        self.bytes_max = bytes_max;
    }

    /// Takes `pages` of one group, whose bytes, ascending, are `bytes`. Those of `away` have left local memory.
    pub fn put(&mut self, group: u64, pages: u16, away: u16, bytes: Arc<[u8]>) {
        if away == 0 {
            return;
        }
        if !self.recalled.is_empty() {
            self.expected = std::mem::take(&mut self.recalled);
        }
        self.counts.pages_away += u64::from(away.count_ones());
        self.groups.entry(group).or_default().push(Block { pages, away, content: Content::Held(bytes) });
        self.held.push(group);
    }

    /// Returns whether a page is away.
    #[cfg(test)]
    fn has(&self, gfn: Gfn) -> bool {
        let bit = bit_of(gfn);
        let blocks = self.groups.get(&group_of(gfn));
        blocks.is_some_and(|blocks| blocks.iter().any(|block| block.away & (1 << bit) != 0))
    }

    /// Writes the blocks that are held, as far as the file has room for them. The rest stays held, also after an error.
    ///
    /// # Errors
    /// Those of the file.
    pub fn write_held(&mut self) -> io::Result<Room> {
        while let Some(group) = self.held.last() {
            for block in self.groups.get_mut(group).into_iter().flatten() {
                let Content::Held(bytes) = &block.content else { continue };
                let packed = lz4_flex::block::compress(bytes);
                let len = packed.len() as u32;
                let free = &mut self.free[units_of(len) as usize];
                let offset = free.first().copied().unwrap_or(self.end);
                if offset == self.end && offset + units_of(len) * UNIT > self.bytes_max {
                    return Ok(Room::Full);
                }
                self.file.write_all_at(&packed, offset)?;
                free.remove(&offset);
                self.end = self.end.max(offset + units_of(len) * UNIT);
                block.content = Content::Written { offset, len, digest: digest(&packed) };
                self.counts.file_bytes += u64::from(len);
            }
            self.held.pop();
        }
        Ok(Room::Enough)
    }

    /// Brings back the block that has `gfn`. With the first one since pages have left, returns the parts of the file
    /// that have those which came back the time before: they are to be read ahead. See [`bring_one`](Self::bring_one).
    pub fn bring(&mut self, gfn: Gfn, install: impl FnMut(Back) -> io::Result<()>) -> io::Result<Vec<Range<u64>>> {
        if !self.bring_one(gfn, install)? {
            return Ok(Vec::new());
        }
        self.recalled.insert(group_of(gfn));
        Ok(if self.recalled.len() == 1 { self.ahead() } else { Vec::new() })
    }

    /// The parts of the file that have blocks of the expected groups, ascending.
    fn ahead(&self) -> Vec<Range<u64>> {
        let blocks = self.expected.iter().filter_map(|group| self.groups.get(group)).flatten();
        let place = |block: &Block| match block.content {
            Content::Written { offset, len, .. } => Some(offset..offset + u64::from(len)),
            Content::Held(_) => None,
        };
        let mut places: Vec<Range<u64>> = blocks.filter_map(place).collect();
        places.sort_unstable_by_key(|place| place.start);
        let mut parts: Vec<Range<u64>> = Vec::new();
        for place in places {
            match parts.last_mut() {
                Some(last) if place.start <= last.end + AHEAD_GAP => last.end = place.end,
                _ => parts.push(place),
            }
        }
        parts
    }

    /// Brings back the block that has `gfn`: passes all its pages that are away to `install`, run by run.
    /// Returns whether the page was away.
    ///
    /// # Errors
    /// The file cannot be read, it has other bytes than were written, or that of `install`.
    pub fn bring_one(&mut self, gfn: Gfn, mut install: impl FnMut(Back) -> io::Result<()>) -> io::Result<bool> {
        let group = group_of(gfn);
        let wanted = bit_of(gfn);
        let Some(blocks) = self.groups.get_mut(&group) else { return Ok(false) };
        let Some(at) = blocks.iter().position(|block| block.away & (1 << wanted) != 0) else { return Ok(false) };
        let block = &mut blocks[at];
        let bytes = match &block.content {
            Content::Held(bytes) => bytes.clone(),
            Content::Written { offset, len, digest } => read(&self.file, *offset, *len, digest, block.pages)?.into(),
        };
        while block.away != 0 {
            let bit = block.away.trailing_zeros();
            let pages = (block.away >> bit).trailing_ones();
            let run = Extent { first: Gfn(group * GROUP_PAGES + u64::from(bit)), pages: u64::from(pages) };
            install(Back { run, bytes: &bytes[block.place(bit)..][..run.bytes() as usize] })?;
            block.away &= !bits_of(run);
            self.counts.pages_away -= run.pages;
        }
        if let Content::Written { offset, len, .. } = block.content {
            self.counts.file_bytes -= u64::from(len);
            self.free[units_of(len) as usize].insert(offset);
        }
        let blocks = self.groups.entry(group).or_default();
        blocks.remove(at);
        if blocks.is_empty() {
            self.groups.remove(&group);
        }
        if self.groups.is_empty() {
            self.empty();
        }
        Ok(true)
    }

    /// The first pages of the blocks that are held.
    pub fn held(&self) -> Vec<Gfn> {
        let blocks = self.groups.iter().flat_map(|(group, blocks)| blocks.iter().map(move |block| (*group, block)));
        let held = blocks.filter(|(_, block)| matches!(block.content, Content::Held(_)));
        held.map(|(group, block)| Gfn(group * GROUP_PAGES + u64::from(block.away.trailing_zeros()))).collect()
    }

    /// Gives the space of the file back to the file system: no page is away.
    fn empty(&mut self) {
        if let Err(error) = self.file.set_len(0) {
            // Its space is used again all the same.
            return tracing::warn!(%error, "The spill file cannot be cut");
        }
        self.end = 0;
        self.free.iter_mut().for_each(BTreeSet::clear);
    }
}

/// Asks the kernel to read parts of a file into the page cache. Returns the bytes that it will read.
///
/// It is advice: without it, each touch waits for its own read. Parts may have been written anew or cut meanwhile.
pub fn read_ahead(file: &File, parts: &[Range<u64>]) -> u64 {
    let read = |part: &&Range<u64>| {
        let len = NonZeroU64::new(part.end - part.start);
        rustix::fs::fadvise(file, part.start, len, Advice::WillNeed).is_ok()
    };
    parts.iter().filter(read).map(|part| part.end - part.start).sum()
}

/// Makes a file without a name in `dir`.
fn unnamed(dir: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        // The file system has no such files.
        Err(Errno::OPNOTSUPP) => unlinked(dir),
        opened => Ok(File::from(opened?)),
    }
}

/// Makes a file in `dir`, and removes its name.
fn unlinked(dir: &Path) -> io::Result<File> {
    let path = dir.join(format!(".tvmm-{}.spill", random_hex(8)));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(PRIVATE).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Reads and unpacks a block of `pages`.
fn read(file: &File, offset: u64, len: u32, expected: &[u8; DIGEST], pages: u16) -> io::Result<Vec<u8>> {
    let mut packed = vec![0; len as usize];
    file.read_exact_at(&mut packed, offset)?;
    let other = || io::Error::new(io::ErrorKind::InvalidData, "the spill file has other bytes than were written");
    if digest(&packed) != *expected {
        return Err(other());
    }
    let mut bytes = vec![0; pages.count_ones() as usize * PAGE];
    match lz4_flex::block::decompress_into(&packed, &mut bytes) {
        Ok(unpacked) if unpacked == bytes.len() => Ok(bytes),
        _ => Err(other()),
    }
}

fn units_of(len: u32) -> u64 {
    u64::from(len).div_ceil(UNIT)
}

fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    let mut digest = [0; DIGEST];
    digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..DIGEST]);
    digest
}

pub fn group_of(gfn: Gfn) -> u64 {
    gfn.0 / GROUP_PAGES
}

fn bit_of(gfn: Gfn) -> u32 {
    (gfn.0 % GROUP_PAGES) as u32
}

/// The bits of `run`, which lies in one group.
pub fn bits_of(run: Extent) -> u16 {
    (((1u32 << run.pages) - 1) << bit_of(run.first)) as u16
}

/// Splits pages into the runs of each group.
pub fn groups_of(pages: &PageSet) -> Vec<(u64, Vec<Extent>)> {
    let mut groups: Vec<(u64, Vec<Extent>)> = Vec::new();
    for run in pages.runs() {
        let mut at = run.first;
        while at < run.end() {
            let group = group_of(at);
            let end = Gfn(((group + 1) * GROUP_PAGES).min(run.end().0));
            let part = Extent { first: at, pages: end.0 - at.0 };
            match groups.last_mut() {
                Some((last, runs)) if *last == group => runs.push(part),
                _ => groups.push((group, vec![part])),
            }
            at = end;
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE]
    }

    fn brought(store: &mut Store, gfn: u64) -> Vec<(u64, u8)> {
        let mut pages = Vec::new();
        let install = |back: Back| {
            for (gfn, bytes) in (back.run.first.0..back.run.end().0).zip(back.bytes.chunks(PAGE)) {
                assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                pages.push((gfn, bytes[0]));
            }
            Ok(())
        };
        store.bring(Gfn(gfn), install).unwrap();
        pages
    }

    #[test]
    fn a_block_comes_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path()).unwrap();
        for is_written in [false, true] {
            let bits = 0b1000_0000_0001_0010;
            store.put(2, bits, bits, [page(1), page(4), page(15)].concat().into());
            store.put(3, 0b1, 0b1, page(7).into());
            // The first page of two did not leave.
            store.put(9, 0b11, 0b10, [page(5), page(6)].concat().into());
            if is_written {
                store.write_held().unwrap();
                assert!(store.counts().file_bytes > 0);
            }
            assert!(store.has(Gfn(36)) && !store.has(Gfn(34)));
            assert_eq!(store.counts().pages_away, 5);
            assert_eq!(brought(&mut store, 144), []);
            assert_eq!(brought(&mut store, 145), [(145, 6)]);
            assert_eq!(brought(&mut store, 47), [(33, 1), (36, 4), (47, 15)]);
            assert_eq!(brought(&mut store, 33), []);
            // Pages that come and go again are in a block of their own.
            store.put(3, 0b110, 0b110, [page(8), page(9)].concat().into());
            assert_eq!(brought(&mut store, 49), [(49, 8), (50, 9)]);
            assert_eq!(brought(&mut store, 48), [(48, 7)]);
            assert_eq!(store.counts(), StoreCounts::default());
        }
    }

    #[test]
    fn space_of_pages_that_came_back_is_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path()).unwrap();
        // A page stays away all the time.
        store.put(1000, 1, 1, page(1).into());
        let mut longest = 0;
        for round in 0..200_u8 {
            for group in 0..8 {
                let bytes: Vec<u8> = (0..16 * PAGE).map(|at| (at / (1 + group) % 251) as u8 ^ round).collect();
                store.put(group as u64, u16::MAX, u16::MAX, bytes.into());
            }
            store.write_held().unwrap();
            if round == 0 {
                longest = store.counts().file_len;
            }
            (0..8).for_each(|group| assert!(store.bring_one(Gfn(group * GROUP_PAGES), |_| Ok(())).unwrap()));
        }
        assert!(store.counts().file_len <= 2 * longest, "{} of {longest}", store.counts().file_len);
        assert_eq!(brought(&mut store, 16000), [(16000, 1)]);
        assert_eq!((store.counts(), store.file().metadata().unwrap().len()), (StoreCounts::default(), 0));
    }

    #[test]
    fn groups_that_came_back_before_are_read_ahead_of_the_next_touch() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path()).unwrap();
        let spill = |store: &mut Store, groups: &[u64]| {
            for group in groups {
                store.put(*group, u16::MAX, u16::MAX, vec![*group as u8; 16 * PAGE].into());
            }
            store.write_held().unwrap();
        };
        let touch = |store: &mut Store, group: u64| {
            assert!(store.has(Gfn(group * GROUP_PAGES)));
            let parts = store.bring(Gfn(group * GROUP_PAGES), |_| Ok(())).unwrap();
            read_ahead(store.file(), &parts)
        };
        spill(&mut store, &[1, 2, 3, 4]);
        [1, 3].into_iter().for_each(|group| assert_eq!(touch(&mut store, group), 0, "nothing is known at first"));
        spill(&mut store, &[1, 3]);
        assert!(touch(&mut store, 1) > 0);
        assert_eq!(touch(&mut store, 2), 0, "once for each time that pages have left");
        // Groups that did not come back the last time are not read.
        spill(&mut store, &[1]);
        store.expected.iter().for_each(|group| assert!([1, 2].contains(group)));
        assert!(touch(&mut store, 4) > 0);
    }

    #[test]
    fn a_file_does_not_grow_beyond_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path()).unwrap();
        let mut state = 1_u64;
        // Bytes that no compression makes fewer.
        let mut noise = || -> Vec<u8> {
            let byte = |_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (state >> 56) as u8
            };
            (0..16 * PAGE).map(byte).collect()
        };
        store.limit(1 << 20);
        (0..20).for_each(|group| store.put(group, u16::MAX, u16::MAX, noise().into()));
        assert_eq!(store.write_held().unwrap(), Room::Full);
        let len = store.file().metadata().unwrap().len();
        assert!((1 << 19..=1 << 20).contains(&len), "{len}");
        // All pages are there, written or held.
        (0..20).for_each(|group| assert!(store.bring_one(Gfn(group * GROUP_PAGES), |_| Ok(())).unwrap()));
        store.put(0, u16::MAX, u16::MAX, noise().into());
        assert_eq!(store.write_held().unwrap(), Room::Enough);
        assert_eq!(store.counts().pages_away, GROUP_PAGES);
    }

    #[test]
    fn a_file_whose_name_was_removed_serves_where_there_are_none_without_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = unlinked(dir.path()).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        let mode = file.metadata().unwrap().permissions().mode();
        assert_eq!((mode & 0o777, std::fs::read_dir(dir.path()).unwrap().count()), (PRIVATE, 0));
    }

    #[test]
    fn bytes_that_changed_in_the_file_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path()).unwrap();
        store.put(0, 1, 1, page(3).into());
        store.write_held().unwrap();
        store.file().write_all_at(b"x", 5).unwrap();
        let error = store.bring(Gfn(0), |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("other bytes"), "{error}");
        assert!(store.has(Gfn(0)));
    }

    #[test]
    fn groups_have_the_pages_of_one_aligned_block_each() {
        let run = |first, pages| Extent { first: Gfn(first), pages };
        let pages: PageSet = [run(3, 2), run(14, 4), run(40, 1)].into_iter().collect();
        let groups = groups_of(&pages);
        let expected = vec![(0, vec![run(3, 2), run(14, 2)]), (1, vec![run(16, 2)]), (2, vec![run(40, 1)])];
        assert_eq!(groups, expected);
        assert_eq!(bits_of(run(3, 2)), 0b1_1000);
        assert_eq!(bits_of(run(16, 16)), u16::MAX);
    }
}
