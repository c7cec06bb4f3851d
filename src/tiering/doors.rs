//! Fuzz doors of profiles, plans, pools and cold pools (`docs/fuzzing.md`).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::cold::{Compression, Decoder, Flow, Index, lower};
use super::fit::Fit;
use super::plan_file::PlanFile;
use super::plan_json;
use super::pool::catalogue::Catalogue;
use super::pool::format::{Blob, Geometry, SLOT, Superblock};
use super::pool::{Facts, Medium, PoolTier, fsck};
use super::profile::{MergeKind, Profile, merge};
use super::tier::Tier;
use crate::snapshot::doors::resealed;
use crate::snapshot::{Container, Digest, Extent, Gfn, InPlaceMapping, MemoryLayout, PAGE_SIZE, PoolId, RestorePlan};

/// The file that errors of doors name.
const NAME: &str = "door";
/// Bytes of the medium of the door of pools.
const MEDIUM: u64 = Geometry::LEAST;

/// A profile as it is, and with its checksums made right.
pub fn profile(data: &[u8]) {
    for bytes in [data.to_vec(), resealed(data)] {
        let Ok(profile) = Profile::from_bytes(bytes) else { continue };
        let again = profile.to_bytes().and_then(Profile::from_bytes);
        assert_eq!(again.ok().as_ref(), Some(&profile), "a profile changes when it is written");
        let pages: u64 = profile.in_order().iter().map(|extent| extent.pages).sum();
        assert_eq!(pages, profile.working_set().len(), "the order of a profile is not of its pages");
        for first in profile.in_order().iter().take(64).map(|extent| extent.first) {
            let touched = profile.touch_probability(first);
            assert!((0.0..=1.0).contains(&touched) && (0.0..=1.0).contains(&profile.write_probability(first)));
        }
        let twice = [profile.clone(), profile];
        for kind in MergeKind::ALL {
            let Ok((merged, _)) = merge(&twice, kind) else { continue };
            let lost = twice[0].working_set().difference(&merged.working_set());
            assert!(lost.is_empty() || kind != MergeKind::Union, "a union of profiles loses pages");
        }
    }
}

/// Guest memory of the plans of the doors.
fn layout() -> Option<MemoryLayout> {
    MemoryLayout::from_gpa_ranges(&[(0, 2048 * PAGE_SIZE), (1 << 32, 1024 * PAGE_SIZE)]).ok()
}

/// A plan file as it is, and with its checksums made right.
pub fn plan(data: &[u8]) {
    for bytes in [data.to_vec(), resealed(data)] {
        let Ok(container) = Container::parse(bytes) else { continue };
        if let Ok(file) = PlanFile::decode(Path::new(NAME), &container) {
            check_plan(file.plan);
        }
    }
}

/// A plan in JSON.
pub fn plan_json(data: &[u8]) {
    if let Ok(Some(document)) = plan_json::parse(Path::new(NAME), data) {
        check_plan(document.plan);
    }
}

/// Everything that is done with a plan that is valid for the layout of the doors.
fn check_plan(plan: RestorePlan) {
    let Some(layout) = layout() else { return };
    let lens = [layout.file_len(); 3];
    // Plans of files are for other layouts, too: their own extents make the layout that they may be valid for.
    let own: Vec<(u64, u64)> = plan.extents.iter().filter_map(|item| bytes_of(item.extent)).collect();
    let own = MemoryLayout::from_gpa_ranges(&own).ok();
    for layout in [Some(layout), own].into_iter().flatten() {
        if plan.validate(&layout, &lens).is_err() {
            continue;
        }
        let pages: u64 = layout.extents().map(|extent| extent.pages).sum();
        assert_eq!(plan.counts().total(), pages, "a valid plan does not have the layout's pages");
        for in_place in [InPlaceMapping::Shared, InPlaceMapping::Private] {
            let mapped: u64 = plan.mappings(&layout, in_place).map(|mapping| mapping.extent.pages).sum();
            assert_eq!(mapped, pages);
        }
        let mut joined = plan.clone();
        joined.coalesce(&layout);
        assert!(joined.validate(&layout, &lens).is_ok(), "a plan is not valid when its neighbours are joined");
        assert_eq!(joined.counts(), plan.counts());
        let _ = Fit::of(&plan, &Profile::new(plan.snapshot, super::profile::RecorderKind::Uffd, NAME));
    }
}

fn bytes_of(extent: Extent) -> Option<(u64, u64)> {
    Some((extent.first.0.checked_mul(PAGE_SIZE)?, extent.pages.checked_mul(PAGE_SIZE)?))
}

/// An index of a cold pool as it is, and with its checksums made right.
pub fn chunk_index(data: &[u8]) {
    for bytes in [data.to_vec(), resealed(data)] {
        // The snapshot is the first field of the head, which is the first section of the indexes that tvmm writes.
        let text = bytes.get(64 + 2 * 40 + 1..64 + 2 * 40 + 1 + 64).map(String::from_utf8_lossy);
        let snapshot = text.and_then(|text| text.parse().ok()).unwrap_or_default();
        let Ok(index) = Index::parse(NAME, bytes, snapshot) else { continue };
        check_index(&index);
        let again = index.to_bytes().and_then(|bytes| Index::parse(NAME, bytes, index.snapshot()));
        assert_eq!(again.ok().as_ref(), Some(&index), "an index changes when it is written");
    }
}

fn check_index(index: &Index) {
    let count = index.chunks().len() as u32;
    let all: Vec<u32> = (0..count).collect();
    let mut pages = 0;
    for (number, chunk) in all.iter().zip(index.chunks()) {
        let runs: Vec<(Extent, usize)> = index.runs(*number).collect();
        pages += runs.iter().map(|(run, _)| run.pages).sum::<u64>();
        assert_eq!(runs.iter().map(|(run, _)| run.bytes()).sum::<u64>(), chunk.len() as u64);
        for (run, _) in &runs {
            assert!(index.chunks_of(*run).any(|found| found == *number), "a chunk is not found by its pages");
        }
    }
    assert_eq!(pages, index.pages());
    let _ = index.chunks_of(Extent { first: Gfn(0), pages: u64::MAX }).count();
    assert_eq!(index.span(0..count), 0..index.data_len());
    let covered: usize = index.spans(&all, 1 << 20).iter().map(|span| span.len()).sum();
    assert_eq!(covered, all.len());
    if index.data_len() <= 1 << 20 {
        let bytes = vec![0; index.data_len() as usize];
        let delivered = index.deliver(0..count, &bytes, &mut |_, _| Ok(Flow::Continue));
        assert!(delivered.is_ok());
    }
    if let Some(layout) = layout() {
        let plan = RestorePlan::new(index.snapshot(), NAME, Vec::new());
        let _ = lower(&plan, 0, &layout, index);
    }
}

/// The stored bytes of a chunk. The input has its compression and its number of pages before them.
pub fn chunk_bytes(data: &[u8]) {
    let Some(([compression, pages], stored)) = data.split_first_chunk::<2>() else { return };
    let Some(compression) = Compression::from_number(*compression) else { return };
    let Ok(mut decoder) = Decoder::new() else { return };
    let mut bytes = vec![0; usize::from(*pages % 32) * PAGE_SIZE as usize];
    let _ = decoder.decode(compression, stored, &mut bytes);
}

/// A pool on a medium that is the input: bytes at its start, a directory, and an entry. The superblock and the digests
/// are made right, so that what they protect is reached.
pub fn pool(data: &[u8]) {
    let Some(([a0, a1, b0, b1], rest)) = data.split_first_chunk::<4>() else { return };
    let start_len = usize::from(u16::from_le_bytes([*a0, *a1])).min(rest.len()).min(2 * SLOT as usize);
    let (start, rest) = rest.split_at(start_len);
    let (directory, entry) = rest.split_at(usize::from(u16::from_le_bytes([*b0, *b1])).min(rest.len()));
    let Ok(geometry) = Geometry::of(MEDIUM, Path::new(NAME)) else { return };
    let place = geometry.catalogue.offset;
    let blob = |offset: u64, bytes: &[u8]| Blob {
        offset,
        len: bytes.len() as u64,
        digest: Digest(*blake3::hash(bytes).as_bytes()),
    };
    let entry_at = place + (directory.len() as u64).next_multiple_of(64);
    let patched = with_entry(directory, blob(entry_at, entry));
    let directory = patched.as_deref().unwrap_or(directory);
    let superblock =
        Superblock { id: PoolId([7; 32]), generation: 1, created: 0, geometry, directory: blob(place, directory) };
    let Ok(file) = File::open("/dev/null") else { return };
    let mut parts = vec![(0, superblock.encode()), (place, directory.to_vec()), (entry_at, entry.to_vec())];
    check_pool(Arc::new(Bytes { file: file.try_clone().ok(), parts: parts.clone() }));
    // The start as the input has it, in place of the superblocks.
    parts[0].1 = start.to_vec();
    check_pool(Arc::new(Bytes { file: Some(file), parts }));
}

/// The directory with the place of the entry in its first head, if it is one.
fn with_entry(directory: &[u8], entry: Blob) -> Option<Vec<u8>> {
    let mut heads: Vec<super::pool::catalogue::Head> = postcard::from_bytes(directory).ok()?;
    heads.first_mut()?.entry = entry;
    postcard::to_stdvec(&heads).ok()
}

fn check_pool(medium: Arc<Bytes>) {
    let Ok(catalogue) = Catalogue::read(medium.as_ref()) else { return };
    let _ = catalogue.used(medium.as_ref());
    for head in catalogue.heads.iter().take(8) {
        let _ = catalogue.find(Path::new(NAME), &head.name);
        let Ok(tier) = PoolTier::open(medium.clone(), head.snapshot, None) else { continue };
        if let Ok(runs) = tier.runs() {
            assert!(runs.iter().all(|run| run.offset + run.extent.bytes() <= tier.source().len));
        }
    }
    if let Ok(checked) = fsck::check(medium.as_ref(), &mut |_, _| {}) {
        assert!(checked.bad_pages.is_sorted());
    }
}

/// A medium with these bytes at these offsets, and zeros elsewhere. No other handle has it, so locks succeed.
#[derive(Debug)]
struct Bytes {
    file: Option<File>,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Medium for Bytes {
    fn path(&self) -> &Path {
        Path::new(NAME)
    }

    fn facts(&self) -> Facts {
        Facts { kind: "dir", align: 4096, copy_on_write: true, huge: true, readable: true, shared_between_hosts: false }
    }

    fn size(&self) -> u64 {
        MEDIUM
    }

    fn file(&self) -> &File {
        self.file.as_ref().expect("/dev/null was opened")
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > MEDIUM) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.fill(0);
        for (at, part) in &self.parts {
            let start = offset.max(*at);
            let end = (offset + bytes.len() as u64).min(at + part.len() as u64);
            if start < end {
                let from = &part[(start - at) as usize..(end - at) as usize];
                bytes[(start - offset) as usize..(end - offset) as usize].copy_from_slice(from);
            }
        }
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn try_lock(&self, _: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn try_lock_shared(&self, _: u64) -> io::Result<bool> {
        Ok(true)
    }

    fn locked_in(&self, _: &Range<u64>) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn unlock(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn is_locked(&self, _: u64) -> io::Result<bool> {
        Ok(false)
    }
}
