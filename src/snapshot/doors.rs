//! Fuzz doors of the artefact (`docs/fuzzing.md`).

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, memfd_create};

use super::container::{ENTRY_LEN, HEADER_LEN, container_len, write_container};
use super::reader::section_digest;
use super::{
    Container, Digests, Extent, FileSizes, Gfn, HostFacts, Location, MachineFacts, Manifest, MemoryLayout, PAGE_SIZE,
    PageMap, PageSet, Result, Section, SectionKind, Snapshot, SnapshotId, SnapshotKind,
};

/// Guest memory of the snapshots that doors make: two ranges and a hole, bytes.
const RANGES: [(u64, u64); 2] = [(0, 64 * PAGE_SIZE), (1 << 32, 64 * PAGE_SIZE)];

/// Makes the length and all checksums of a container right, as a forger does. A part that does not lie within the
/// bytes is left alone.
pub(crate) fn reseal(bytes: &mut [u8]) {
    if bytes.len() < HEADER_LEN {
        return;
    }
    let len = bytes.len() as u64;
    bytes[24..32].copy_from_slice(&len.to_le_bytes());
    let count = u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]) as usize;
    let table = HEADER_LEN..HEADER_LEN.saturating_add(count.saturating_mul(ENTRY_LEN));
    if table.end <= bytes.len() {
        for entry in table.clone().step_by(ENTRY_LEN) {
            let number = |at: usize| bytes[entry + at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let start = number(16) as usize;
            let payload = bytes.get(start..start.saturating_add(number(24) as usize)).map(crc32c::crc32c);
            if let Some(sum) = payload {
                bytes[entry + 32..entry + 36].copy_from_slice(&sum.to_le_bytes());
            }
        }
        let sum = crc32c::crc32c(&bytes[table]);
        bytes[48..52].copy_from_slice(&sum.to_le_bytes());
    }
    let sum = crc32c::crc32c(&bytes[..HEADER_LEN - 4]);
    bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&sum.to_le_bytes());
}

/// Returns the bytes with the checksums made right.
pub(crate) fn resealed(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    reseal(&mut bytes);
    bytes
}

/// Returns a file without a name that holds `bytes`, and a path by which it can be opened while it is open here.
pub(crate) fn file_of(bytes: &[u8]) -> std::io::Result<(File, PathBuf)> {
    let mut file = File::from(memfd_create("tvmm-door", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok((file, path))
}

/// A directory that is removed with what is in it.
pub(crate) struct OwnDir(PathBuf);

impl OwnDir {
    pub(crate) fn new() -> Option<OwnDir> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tvmm-door-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        Some(OwnDir(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for OwnDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A container as it is, and with its checksums made right.
pub fn container(data: &[u8]) {
    for bytes in [data.to_vec(), resealed(data)] {
        let Ok(container) = Container::parse(bytes) else { continue };
        let _ = container.writer();
        for info in container.sections() {
            let _ = container.payload(info);
            let _ = container.section(info.kind, info.instance);
        }
        let Ok(sections) = container.copy_sections(|_| true) else { continue };
        let again = Container::parse(write_container(&sections)).and_then(|again| again.copy_sections(|_| true));
        assert_eq!(again.ok(), Some(sections), "a container that was read is not the one that is written");
    }
}

/// A manifest as it is, and with its identity made right.
pub fn manifest(data: &[u8]) {
    let parsed = Manifest::parse("door", data);
    let forged = serde_json::from_slice::<Manifest>(data).ok().and_then(|mut manifest| {
        manifest.id = manifest.compute_id("door").ok()?;
        Manifest::parse("door", &manifest.to_json("door").ok()?).ok()
    });
    for manifest in parsed.into_iter().chain(forged) {
        let json = manifest.to_json("door").unwrap_or_default();
        assert_eq!(Manifest::parse("door", &json).ok().as_ref(), Some(&manifest), "a manifest changes when written");
        if let Some(parent) = &manifest.parent {
            let _ = parent.location.resolve(&PathBuf::from("/snapshots/a"));
        }
        let layout = &manifest.layout;
        for range in layout.ranges() {
            assert_eq!(layout.file_offset(range.extent().first), Some(range.file_offset));
        }
    }
}

/// The three sections of a page map. The input has the lengths of the first two, and their bytes.
pub fn page_map(data: &[u8]) {
    let Ok(layout) = MemoryLayout::from_gpa_ranges(&RANGES) else { return };
    let Some((head, rest)) = data.split_first_chunk::<5>() else { return };
    let [kind, a0, a1, b0, b1] = *head;
    let held_len = usize::from(u16::from_le_bytes([a0, a1])).min(rest.len());
    let (held, rest) = rest.split_at(held_len);
    let (zero, sums) = rest.split_at(usize::from(u16::from_le_bytes([b0, b1])).min(rest.len()));
    set(held);
    let kind = if kind % 2 == 0 { SnapshotKind::Full } else { SnapshotKind::Diff };
    let Ok(container) = Container::parse(write_container(&page_sections(held, zero, sums))) else { return };
    let Ok(map) = PageMap::from_container(&container, &layout, kind) else { return };
    let chunks: Vec<(u64, u32)> = map.checksums().collect();
    let held: u64 = chunks.iter().flat_map(|(chunk, _)| map.chunk_runs(*chunk)).map(|run| run.pages).sum();
    assert_eq!(held, map.held().len(), "the chunks of a page map do not hold its pages");
    for (index, (chunk, sum)) in chunks.iter().enumerate() {
        assert_eq!((map.chunk_at(index), map.checksum(*chunk)), (Some(*chunk), Some(*sum)));
        let _ = map.verify_chunk("door", *chunk, &[0; PAGE_SIZE as usize]);
        let _ = map.verify_run("door", Gfn(*chunk * 16), &[0; 16 * PAGE_SIZE as usize]);
    }
    let Ok(again) = Container::parse(write_container(&map.to_sections())) else { return };
    let again = PageMap::from_container(&again, &layout, kind);
    assert_eq!(again.ok().as_ref(), Some(&map), "a page map changes when it is written");
}

fn page_sections(held: &[u8], zero: &[u8], sums: &[u8]) -> [Section; 3] {
    let section = |kind, payload: &[u8]| Section { kind, instance: 0, version: 1, payload: payload.to_vec() };
    [
        section(SectionKind::PagesHeld, held),
        section(SectionKind::PagesZero, zero),
        section(SectionKind::ChunkChecksums, sums),
    ]
}

/// A set of pages, and the laws of its arithmetic.
fn set(bytes: &[u8]) {
    let Ok(set) = PageSet::deserialize(bytes) else { return };
    assert_eq!(PageSet::deserialize(&set.serialize()).ok().as_ref(), Some(&set));
    // A few bytes can stand for 2^32 pages in 2^31 runs: look at some.
    let few: PageSet = set.runs().take(256).collect();
    let window = Extent { first: few.first().unwrap_or_default(), pages: 1 << 20 };
    let inside: PageSet = few.runs_in(window).collect();
    assert_eq!(inside.len(), few.len_in(window));
    let outside = few.difference(&inside);
    assert!(outside.is_disjoint(&inside));
    assert_eq!(outside.union(&inside), few);
    assert_eq!(few.intersection(&inside), inside);
}

/// The snapshot whose state is `state`, as one file whose digests and checksums are right.
pub(crate) fn snapshot_of(state: &[Section]) -> Result<Snapshot> {
    let layout = MemoryLayout::from_gpa_ranges(&RANGES)?;
    let pages = page_sections(&PageSet::new().serialize(), &PageSet::new().serialize(), &[]);
    let digests = Digests { vmstate: section_digest(state), pages: section_digest(&pages) };
    let memory = layout.file_len();
    let mut manifest = Manifest {
        format: 1,
        id: SnapshotId::default(),
        kind: SnapshotKind::Full,
        tvmm_version: env!("CARGO_PKG_VERSION").to_string(),
        created_unix_ms: 0,
        parent: None,
        layout,
        pages_held: 0,
        pages_zero: 0,
        machine: MachineFacts { vcpu_count: 1, mem_size_mib: 1 },
        host: HostFacts::default(),
        digests,
        sizes: FileSizes { vmstate: container_len(state), pages: container_len(&pages), memory },
        drives: Vec::new(),
        stands_for: Vec::new(),
    };
    manifest.id = manifest.compute_id("door")?;
    let payload = manifest.to_json("door")?;
    let mut sections = vec![Section { kind: SectionKind::Manifest, instance: 0, version: 1, payload }];
    sections.extend(pages);
    sections.extend_from_slice(state);
    let failed = |source| super::Error::Io { action: "make", path: PathBuf::from("door"), source };
    let (_file, snapshot) = file_of(&write_container(&sections)).map_err(failed)?;
    let (memory_file, memory_path) = file_of(&[]).map_err(failed)?;
    memory_file.set_len(memory).map_err(failed)?;
    Snapshot::open(&Location::Files { snapshot, memory: memory_path })
}
