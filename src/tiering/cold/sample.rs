//! An object for tests.

use std::sync::Arc;

use tempfile::TempDir;

use super::index::Index;
use super::pack::{PackSpec, pack};
use crate::snapshot::tests::NoCache;
use crate::snapshot::{
    Chain, Gfn, HostFacts, Location, MachineFacts, MemoryLayout, PAGE_SIZE, PageSet, Parent, SealInput, SnapshotKind,
    SnapshotWriter,
};

pub const PAGE: usize = PAGE_SIZE as usize;
pub const PAGES: usize = 4096;

/// An object, and the memory it is of.
pub struct Sample {
    pub index: Arc<Index>,
    pub index_bytes: Vec<u8>,
    pub data: Vec<u8>,
    pub memory: Vec<u8>,
    pub chain: Chain,
    _dir: TempDir,
}

/// Two layers; pages up to 1100 with zeros between them, some of which compress and some of which do not, and page
/// 4000.
pub fn sample() -> Sample {
    sample_with(None)
}

pub fn sample_with(hot: Option<PageSet>) -> Sample {
    let dir = tempfile::tempdir().unwrap();
    let layout = MemoryLayout::from_gpa_ranges(&[(0, (PAGES * PAGE) as u64)]).unwrap();
    let mut memory = vec![0; PAGES * PAGE];
    let mut seed = 1_u64;
    for page in (0..1100).filter(|page| page % 9 > 1).chain([4000]) {
        for word in memory[page * PAGE..][..PAGE].chunks_exact_mut(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = if page < 300 { seed } else { page as u64 + seed % 3 };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    let seal = || {
        let machine = MachineFacts { vcpu_count: 1, mem_size_mib: 16 };
        SealInput { state: Vec::new(), host: HostFacts::default(), machine, cache: &NoCache }
    };
    let is_held = |page: &usize| memory[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0);
    let base = Location::Dir(dir.path().join("base"));
    let mut writer = SnapshotWriter::create(base.clone(), layout.clone(), SnapshotKind::Full, None).unwrap();
    for page in (0..PAGES).filter(is_held) {
        // The tip has other bytes in every fourth page.
        let bytes = &memory[page * PAGE..][..PAGE];
        let bytes = if page % 4 == 0 { vec![0xee; PAGE] } else { bytes.to_vec() };
        writer.write_run(Gfn(page as u64), &bytes).unwrap();
    }
    let sealed = writer.seal(seal()).unwrap();
    let tip = Location::Dir(dir.path().join("tip"));
    let parent = Parent { id: sealed.id, location: base };
    let mut writer = SnapshotWriter::create(tip.clone(), layout, SnapshotKind::Diff, Some(parent)).unwrap();
    for page in (0..PAGES).step_by(4).filter(is_held) {
        writer.write_run(Gfn(page as u64), &memory[page * PAGE..][..PAGE]).unwrap();
    }
    writer.seal(seal()).unwrap();
    let chain = Chain::open(&tip).unwrap();
    let mut data = Vec::new();
    let spec = PackSpec { chunk_pages: 32, bandwidth_mbps: 500, hot, key: None };
    let packed = pack(&chain, &spec, &mut data, &mut |_, _| {}).unwrap();
    let index_bytes = packed.index.to_bytes().unwrap();
    Sample { index: Arc::new(packed.index), index_bytes, data, memory, chain, _dir: dir }
}
