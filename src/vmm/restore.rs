//! The restore engine: carries out any plan, and knows no policy's name.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::error::Error;
use super::lineage::Lineage;
use super::machine::{Built, Machine, Outside, Shape, open_kvm};
use super::memory::GuestRam;
use super::state::{self, MachineState, VcpuState, VmState};
use super::timeline::{Slice, Timeline};
use super::{config, host};
use crate::devices::{I8042State, SerialState};
use crate::snapshot::{
    CHUNK_PAGES, Chain, Extent, Gfn, MemoryLayout, PageSet, Placement, PlacementCounts, PlannedExtent, RestorePlan,
    SectionInfo, SectionKind, Snapshot, chunk_of,
};

/// What carrying out a plan came to.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct EngineReport {
    /// Pages by placement.
    pub planned: PlacementCounts,
    /// `mmap` calls made.
    pub mappings: u64,
    /// Bytes copied into local DRAM before the vCPUs start.
    pub bytes_preloaded: u64,
}

/// The state of a snapshot, decoded.
struct SavedState {
    machine: MachineState,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    serial: SerialState,
}

impl SavedState {
    fn read(snapshot: &Snapshot) -> Result<Self, Error> {
        let machine: MachineState = state::decode(snapshot, SectionKind::Machine, 0)?;
        let count = machine.vcpu_count;
        if !(1..=config::MAX_VCPU_COUNT).contains(&count) {
            return Err(Error::State { section: "Machine".into(), what: format!("it has {count} vCPUs") });
        }
        let vcpus = (0..u32::from(count)).map(|index| state::decode(snapshot, SectionKind::Vcpu, index));
        let state = SavedState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: state::decode(snapshot, SectionKind::Vm, 0)?,
            serial: state::decode(snapshot, SectionKind::Serial, 0)?,
            machine,
        };
        let I8042State {} = state::decode(snapshot, SectionKind::I8042, 0)?;
        snapshot.sections().iter().try_for_each(|section| check_known(section, count))?;
        Ok(state)
    }
}

/// A section this build does not know may be a device the guest depends on.
fn check_known(section: &SectionInfo, vcpu_count: u8) -> Result<(), Error> {
    let known = match section.kind {
        SectionKind::Machine | SectionKind::Vm | SectionKind::Serial | SectionKind::I8042 => section.instance == 0,
        SectionKind::Vcpu => section.instance < u32::from(vcpu_count),
        _ => false,
    };
    let what = "this build of tvmm does not know it; restore with the version that wrote it".to_string();
    let name = || format!("{:?} {}", section.kind, section.instance);
    if known { Ok(()) } else { Err(Error::State { section: name(), what }) }
}

impl Machine<Built> {
    /// Builds the machine of `chain`'s tip with its memory placed as `plan` says.
    pub fn restore(
        chain: Arc<Chain>,
        plan: &RestorePlan,
        track_dirty_pages: bool,
        outside: Outside,
        timeline: &mut Timeline,
    ) -> Result<(Self, EngineReport), Error> {
        let tip = chain.tip();
        let saved = SavedState::read(tip)?;
        let shape =
            Shape { vcpu_count: saved.machine.vcpu_count, mem_size_mib: saved.machine.mem_size_mib, track_dirty_pages };
        let layout = &tip.manifest().layout;
        let is_possible = shape.mem_size_mib <= config::MAX_MEM_SIZE_MIB;
        if !is_possible || !shape.layout().is_ok_and(|own| own == *layout) {
            let what = format!("{} MiB of memory do not fit the manifest's layout", shape.mem_size_mib);
            return Err(Error::State { section: "Machine".into(), what });
        }
        let kvm = open_kvm()?;
        let boot = &saved.vcpus[0];
        host::check(&tip.manifest().host, &boot.cpuid()?, boot.xcr0()?, &kvm)?;
        timeline.lap(Slice::StateLoad);
        let (ram, report) = build_memory(&chain, plan, layout, timeline)?;
        let mut machine = Machine::build(kvm, ram, shape, outside, timeline)?;
        machine.apply(&saved.vm, &saved.vcpus)?;
        machine.serial().restore(&saved.serial)?;
        machine.core.lineage = Lineage::restored(chain);
        timeline.lap(Slice::StateLoad);
        Ok((machine, report))
    }
}

/// Builds guest memory by `plan`: one anonymous mapping per range, file mappings over it, then the copies.
fn build_memory(
    chain: &Chain,
    plan: &RestorePlan,
    layout: &MemoryLayout,
    timeline: &mut Timeline,
) -> Result<(GuestRam, EngineReport), Error> {
    plan.validate(layout, &chain.layer_file_lens())?;
    let mut report = EngineReport { planned: plan.counts(), ..EngineReport::default() };
    let mut ram = GuestRam::reserve(layout)?;
    // Runs of neighbours that are anonymous at first (zero, or copied into later) take one mapping.
    let mut anonymous: Option<Extent> = None;
    for planned in &plan.extents {
        match (planned.placement, &mut anonymous) {
            (Placement::InPlace, _) => return Err(Error::Placement("in-place")),
            (Placement::Lazy, _) => return Err(Error::Placement("lazy")),
            (Placement::CowFile, _) => {
                map_anonymous(&mut ram, anonymous.take(), &mut report)?;
                map_file(&mut ram, chain, planned, &mut report)?;
            }
            (_, Some(run)) if run.end() == planned.extent.first && layout.contains(join(*run, planned.extent)) => {
                run.pages += planned.extent.pages;
            }
            (_, run) => {
                map_anonymous(&mut ram, run.replace(planned.extent), &mut report)?;
            }
        }
    }
    map_anonymous(&mut ram, anonymous, &mut report)?;
    timeline.lap(Slice::Map);
    preload(&ram, chain, plan, &mut report)?;
    timeline.lap(Slice::Preload);
    Ok((ram, report))
}

fn join(run: Extent, next: Extent) -> Extent {
    Extent { first: run.first, pages: run.pages + next.pages }
}

fn map_anonymous(ram: &mut GuestRam, extent: Option<Extent>, report: &mut EngineReport) -> Result<(), Error> {
    let Some(extent) = extent else { return Ok(()) };
    report.mappings += 1;
    ram.map_anon(extent)
}

fn map_file(
    ram: &mut GuestRam,
    chain: &Chain,
    planned: &PlannedExtent,
    report: &mut EngineReport,
) -> Result<(), Error> {
    // `validate` has made sure that every placement but zero has a source inside its layer's file.
    let Some(source) = planned.source else { return Ok(()) };
    report.mappings += 1;
    ram.map_file_private(planned.extent, chain.layers()[source.layer].memory(), source.layer, source.offset)
}

/// 2 MiB in pages.
const HUGE_PAGES: u64 = 512;

/// Fills the `preload` extents from their layers and verifies what was read.
fn preload(ram: &GuestRam, chain: &Chain, plan: &RestorePlan, report: &mut EngineReport) -> Result<(), Error> {
    let mut per_layer = vec![PageSet::new(); chain.layers().len()];
    for planned in plan.extents.iter().filter(|planned| planned.placement == Placement::Preload) {
        let Some(source) = planned.source else { continue };
        let layer = &chain.layers()[source.layer];
        advise_whole_huge_pages(ram, planned.extent)?;
        // SAFETY: the machine does not exist yet; nothing else refers to this memory.
        let bytes = unsafe { ram.bytes_mut(planned.extent) }?;
        read_layer(layer, bytes, source.offset)?;
        report.bytes_preloaded += planned.extent.bytes();
        per_layer[source.layer].insert_run(planned.extent);
    }
    for (index, pages) in per_layer.iter().enumerate().filter(|(_, pages)| !pages.is_empty()) {
        verify(ram, chain, index, pages)?;
    }
    Ok(())
}

/// Whole 2 MiB blocks are filled four times faster through huge pages and cost no extra memory.
fn advise_whole_huge_pages(ram: &GuestRam, extent: Extent) -> Result<(), Error> {
    let first = extent.first.0.next_multiple_of(HUGE_PAGES);
    let end = extent.end().0 / HUGE_PAGES * HUGE_PAGES;
    if end <= first {
        return Ok(());
    }
    match ram.advise_huge(Extent { first: Gfn(first), pages: end - first }) {
        // EINVAL: a kernel built without transparent huge pages. Small pages hold the same bytes.
        Err(Error::Map { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

/// Checks the pages read from one layer against its checksums. A chunk of which newer layers hide some pages is read
/// whole for that.
fn verify(ram: &GuestRam, chain: &Chain, index: usize, pages: &PageSet) -> Result<(), Error> {
    let layer = &chain.layers()[index];
    let map = layer.page_map()?;
    let mut last_chunk = None;
    let parts = pages.runs().flat_map(|run| run.chunks(CHUNK_PAGES).collect::<Vec<_>>());
    for part in parts {
        let chunk = chunk_of(part.first);
        if last_chunk.replace(chunk) == Some(chunk) {
            continue;
        }
        let mut bytes = Vec::new();
        for held in map.chunk_runs(chunk) {
            if pages.contains_run(held) {
                // SAFETY: the machine does not exist yet; nothing else refers to this memory.
                bytes.extend_from_slice(unsafe { ram.bytes(held) }?);
            } else {
                let start = bytes.len();
                bytes.resize(start + held.bytes() as usize, 0);
                let offset = layer.layout().file_offset(held.first).unwrap_or(u64::MAX);
                read_layer(layer, &mut bytes[start..], offset)?;
            }
        }
        map.verify_chunk(layer.object(), chunk, &bytes)?;
    }
    Ok(())
}

fn read_layer(layer: &Snapshot, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
    let failed = |source| Error::File { doing: "read guest memory from", path: layer.memory_path().to_owned(), source };
    layer.memory().read_exact_at(bytes, offset).map_err(failed)
}
