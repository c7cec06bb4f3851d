//! Tests of the room as a whole. Tests of one file's inner rules are in that file.

mod hostile;
mod round_trip;
mod unchanged;

use std::path::Path;

use proptest::prelude::*;

use super::*;

pub(crate) const PAGE: usize = PAGE_SIZE as usize;

/// The expected memory of a guest: one byte per page stands for the page's content, 0 for a zero page.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Model {
    pub(crate) layout: MemoryLayout,
    /// Indexed by the page's place in the memory file.
    pub(crate) pages: Vec<u8>,
}

/// 100 pages at 0, 30 pages at 4 GiB: neither a multiple of a chunk, the second range not chunk aligned in the file.
pub(crate) fn small_layout() -> MemoryLayout {
    MemoryLayout::from_gpa_ranges(&[(0, 100 * PAGE_SIZE), ((4 << 30) + 3 * PAGE_SIZE, 30 * PAGE_SIZE)]).unwrap()
}

impl Model {
    pub(crate) fn new(pages: Vec<u8>) -> Model {
        let layout = small_layout();
        assert_eq!(pages.len() as u64, layout.pages());
        Model { layout, pages }
    }

    pub(crate) fn gfn(&self, index: usize) -> Gfn {
        self.layout.gfn_at((index * PAGE) as u64).unwrap()
    }

    /// The runs of pages for which `wanted` holds, within ranges.
    fn runs(&self, wanted: impl Fn(usize) -> bool) -> Vec<Extent> {
        let set: PageSet = (0..self.pages.len()).filter(|i| wanted(*i)).map(|i| self.gfn(i)).collect();
        set.runs().flat_map(|run| self.layout.split(run).collect::<Vec<_>>()).collect()
    }

    /// The bytes of one page.
    pub(crate) fn page(&self, index: usize) -> Vec<u8> {
        page_bytes(self.pages[index]).to_vec()
    }

    fn bytes(&self, run: Extent) -> Vec<u8> {
        let index = (self.layout.file_offset(run.first).unwrap() / PAGE_SIZE) as usize;
        self.pages[index..index + run.pages as usize].iter().flat_map(|byte| page_bytes(*byte)).collect()
    }

    pub(crate) fn write_full(&self, target: Location) -> Sealed {
        let mut writer = SnapshotWriter::create(target, self.layout.clone(), SnapshotKind::Full, None).unwrap();
        for run in self.runs(|i| self.pages[i] != 0) {
            writer.write_run(run.first, &self.bytes(run)).unwrap();
        }
        writer.seal(seal_input()).unwrap()
    }

    /// Holds the pages changed since `before` and marks those that became zero.
    pub(crate) fn write_diff(&self, before: &Model, parent: &Sealed, target: Location) -> Sealed {
        let parent = Parent { id: parent.id, location: parent.location.clone() };
        let mut writer = SnapshotWriter::create(target, self.layout.clone(), SnapshotKind::Diff, Some(parent)).unwrap();
        for run in self.runs(|i| self.pages[i] != before.pages[i] && self.pages[i] != 0) {
            writer.write_run(run.first, &self.bytes(run)).unwrap();
        }
        for run in self.runs(|i| self.pages[i] != before.pages[i] && self.pages[i] == 0) {
            writer.mark_zero(run).unwrap();
        }
        writer.seal(seal_input()).unwrap()
    }

    /// Compares every page of a chain with the model.
    pub(crate) fn assert_is(&self, chain: &Chain) {
        let mut covered = 0;
        for run in chain.resolve().unwrap() {
            assert!(self.layout.contains(run.extent));
            assert_eq!(run.extent, self.layout.split(run.extent).next().unwrap());
            let bytes = match run.content {
                Content::Zero => vec![0; run.extent.bytes() as usize],
                Content::Bytes(source) => {
                    let mut bytes = vec![0; run.extent.bytes() as usize];
                    use std::os::unix::fs::FileExt;
                    chain.layer_of(run.content).unwrap().memory().read_exact_at(&mut bytes, source.offset).unwrap();
                    bytes
                }
            };
            assert!(bytes == self.bytes(run.extent), "content of {}", run.extent);
            covered += run.extent.pages;
        }
        assert_eq!(covered, self.layout.pages());
    }
}

fn page_bytes(byte: u8) -> [u8; PAGE] {
    let mut page = [byte; PAGE];
    // A page that begins like a zero page is not one.
    page[..7].fill(0);
    page
}

pub(crate) fn sections() -> Vec<Section> {
    let section = |kind, instance, payload: &[u8]| Section { kind, instance, version: 3, payload: payload.to_vec() };
    vec![
        section(SectionKind::Machine, 0, b"machine"),
        section(SectionKind::Vcpu, 0, &[7; 300]),
        section(SectionKind::Vcpu, 1, &[8; 301]),
        section(SectionKind::Serial, 0, b""),
        section(SectionKind::Other(1000), 5, b"later"),
    ]
}

/// Leaves the page cache as it is.
pub(crate) struct NoCache;

impl LoadHuge for NoCache {
    fn load_huge(&self, _: &std::fs::File, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) fn seal_input() -> SealInput<'static> {
    let features = vec![FeatureWord { leaf: 7, subleaf: 0, register: "ebx".to_string(), value: u32::MAX }];
    let host = HostFacts {
        cpu_vendor: "GenuineTest".to_string(),
        cpu_model: "Test \"CPU\" \u{1F600}".to_string(),
        features,
        xcr0: u64::MAX,
        kernel_release: "6.0".to_string(),
        kvm_capabilities: vec![("KVM_CAP_X".to_string(), i64::MIN)],
    };
    SealInput { state: sections(), host, machine: MachineFacts { vcpu_count: 2, mem_size_mib: 1 }, cache: &NoCache }
}

pub(crate) fn dir(base: &Path, name: &str) -> Location {
    Location::Dir(base.join(name))
}

pub(crate) fn two_files(base: &Path, name: &str) -> Location {
    Location::Files { snapshot: base.join(format!("{name}.snap")), memory: base.join(format!("{name}.mem")) }
}

pub(crate) fn any_pages() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![2 => Just(0_u8), 2 => Just(1_u8), 1 => any::<u8>()], 130)
}

pub(crate) fn sample() -> Model {
    Model::new((0..130_u32).map(|i| if i % 9 < 4 { 0 } else { (i * 7 % 251 + 1) as u8 }).collect())
}
