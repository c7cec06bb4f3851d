//! The restore engine: carries out any plan, and knows no policy's name.
//!
//! Mappings come first, as few as possible (neighbours that can share one do), then the memory that must be local
//! before the guest runs. The rest is left to page faults, the fault service and the background thread.

use std::sync::Arc;

use serde::Serialize;

use super::fault_service::LazyExtent;
use super::files::{Files, Mapped};
use super::reads::{self, Wanted};
use crate::memory::Error;
use crate::memory::guest_ram::{Backing, FileMapping, GuestRam, Piece};
use crate::memory::promote::{InPlaceExtent, Resort};
use crate::snapshot::InPlaceMapping;
use crate::snapshot::{
    BackgroundAction, CHUNK_PAGES, Extent, Fill, Folios, Gfn, HUGE_PAGE_PAGES, Mapping, MemoryLayout, PAGE_SIZE,
    PageOrigin, PageSet, PageSource, Placement, PlacementCounts, PlannedExtent, RestorePlan, Snapshot, View, chunk_of,
};
use crate::sys::lost;
use crate::sys::mapping::Buffer;
use crate::sys::seccomp;
use crate::sys::timeline::{Slice, Timeline};
use crate::sys::uffd::{FaultKinds, Install, Uffd};

/// Counts and times of carrying out a plan.
#[derive(Clone, Debug, Default, Serialize)]
pub struct EngineReport {
    /// Pages by placement.
    pub planned: PlacementCounts,
    /// Extents of the plan.
    pub extents: u64,
    /// System calls made for guest memory, by kind.
    pub mmap_calls: u64,
    pub madvise_calls: u64,
    pub read_calls: u64,
    /// Threads that filled memory at once.
    pub read_threads: u64,
    pub uffd_calls: u64,
    /// Bytes put into local DRAM before the vCPUs start.
    pub bytes_preloaded: u64,
    /// True if images were read past the page cache, where the plan asked for it.
    pub direct_reads: bool,
    /// The part of it that KVM mapped for the guest ahead.
    pub prefault: PrefaultReport,
}

/// Guest memory as the plan places it, and the work left while the guest runs.
pub struct Built {
    pub ram: GuestRam,
    pub filled: Filled,
}

/// The outcome of filling guest memory.
pub struct Filled {
    pub report: EngineReport,
    /// The userfaultfd and the pages behind it, if the plan has any.
    pub lazy: Option<Served>,
}

/// A userfaultfd and the pages behind it.
pub type Served = (Arc<Uffd>, Vec<LazyExtent>);

/// Options of carrying out a plan that the plan does not contain.
#[derive(Clone, Copy, Debug)]
pub struct BuildOptions {
    /// The fault service serves every page, whatever its placement, page by page (for recording).
    pub observed: bool,
    /// Mapping of pages in place on a tier that allows more than one.
    pub in_place: InPlaceMapping,
}

/// Builds guest memory by `plan`.
pub fn build(
    files: &Files,
    plan: &RestorePlan,
    layout: &MemoryLayout,
    options: BuildOptions,
    timeline: &mut Timeline,
) -> Result<Built, Error> {
    plan.validate(layout, &files.chain().layer_file_lens())?;
    let mut ram = GuestRam::reserve(layout)?;
    let filled = fill(&mut ram, files, plan, options, timeline)?;
    Ok(Built { ram, filled })
}

/// Fills `ram`, which was just reserved or forgotten, by `plan`, which is valid for it. No vCPU runs, and nothing else
/// refers to the memory.
pub fn fill(
    ram: &mut GuestRam,
    files: &Files,
    plan: &RestorePlan,
    options: BuildOptions,
    timeline: &mut Timeline,
) -> Result<Filled, Error> {
    let layout = &ram.layout().clone();
    let kept = ram.keep_zero()?;
    let mut engine = Engine { files, plan, layout, in_place: options.in_place, report: EngineReport::default() };
    engine.report.planned = plan.counts();
    engine.report.extents = plan.extents.len() as u64;
    let lazy = if options.observed {
        let lazy = engine.map_observed(ram)?;
        timeline.lap(Slice::Map);
        lazy
    } else {
        let (in_place, mapped) = engine.map(ram, &kept)?;
        ram.set_zero(zero_memory(plan));
        let mapped_files = files.mapped_files(&mapped)?;
        ram.note_mappings(mapped);
        ram.watch(mapped_files)?;
        if !in_place.is_empty() {
            ram.guard(&in_place)?;
        }
        timeline.lap(Slice::Map);
        engine.copy(ram)?;
        engine.break_cow(ram)?;
        // After the copies, because memory copied between lazy pages is registered too. A copy into registered memory
        // would fault and wait for this thread itself.
        let lazy = engine.register_lazy(ram)?;
        if let Some((uffd, _)) = &lazy {
            engine.install(ram, uffd)?;
        }
        lazy
    };
    ram.set_pieces(pieces(plan, options.observed));
    ram.set_mapped(if options.observed { Vec::new() } else { file_mapped(plan) }, lazy.is_some());
    timeline.lap(Slice::Preload);
    Ok(Filled { report: engine.report, lazy })
}

/// Memory that a handler outside serves: anonymous, all of it behind one userfaultfd. `tells_removals`: the handler is
/// notified of pages that the guest gives back.
pub fn build_external(layout: &MemoryLayout, tells_removals: bool, timeline: &mut Timeline) -> Result<Built, Error> {
    let mut ram = GuestRam::reserve(layout)?;
    let uffd = if tells_removals { Uffd::open_telling_removals() } else { Uffd::open(FaultKinds::Missing) };
    let uffd = uffd.map_err(Error::Userfaultfd)?;
    let mut report = EngineReport::default();
    for extent in layout.extents() {
        report.mmap_calls += 1;
        report.uffd_calls += 1;
        report.planned.lazy += extent.pages;
        ram.map_anon(extent)?;
        ram.register(extent, &uffd, FaultKinds::Missing)?;
    }
    ram.set_pieces(layout.extents().map(|extent| Piece { extent, backing: Backing::Lazy }).collect());
    ram.set_mapped(Vec::new(), true);
    timeline.lap(Slice::Map);
    Ok(Built { ram, filled: Filled { report, lazy: Some((Arc::new(uffd), Vec::new())) } })
}

struct Engine<'a> {
    files: &'a Files,
    plan: &'a RestorePlan,
    layout: &'a MemoryLayout,
    in_place: InPlaceMapping,
    report: EngineReport,
}

impl Engine<'_> {
    /// Makes the mappings, but for zero memory in `kept`. Returns those in place that cannot be written, and all
    /// mappings of files.
    fn map(&mut self, ram: &GuestRam, kept: &[Extent]) -> Result<(Vec<InPlaceExtent>, Vec<FileMapping>), Error> {
        let mut in_place = Vec::new();
        let mut mapped = Vec::new();
        let files = self.files;
        for Mapping { extent, view, .. } in self.plan.mappings(self.layout, self.in_place) {
            match view {
                View::Anonymous => {
                    for run in without(extent, kept) {
                        self.report.mmap_calls += 1;
                        ram.map_anon(run)?;
                    }
                }
                View::File { source: PageSource { origin, offset }, folios, shared } => {
                    self.report.mmap_calls += 1;
                    let Mapped { file, base, align, .. } = files.mapping(origin)?;
                    mapped.push(FileMapping { extent, origin, offset: base + offset });
                    if shared {
                        ram.map_in_place(extent, file, base + offset)?;
                        in_place.push(InPlaceExtent { extent, align_pages: align / PAGE_SIZE });
                    } else {
                        ram.map_file_private(extent, file, base + offset)?;
                    }
                    if folios == Folios::Huge {
                        self.advise_huge(ram, extent)?;
                    }
                }
            }
        }
        for blocks in &self.plan.huge {
            self.advise_huge(ram, *blocks)?;
        }
        Ok((in_place, mapped))
    }

    fn advise_huge(&mut self, ram: &GuestRam, extent: Extent) -> Result<(), Error> {
        self.report.madvise_calls += 1;
        match ram.advise_huge(extent) {
            // EINVAL: a kernel built without transparent huge pages. Small pages hold the same bytes.
            Err(Error::Map { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }

    /// Maps everything anonymous and behind one userfaultfd, with writes told apart from reads.
    fn map_observed(&mut self, ram: &GuestRam) -> Result<Option<Served>, Error> {
        let uffd = Uffd::open(FaultKinds::MissingAndProtected).map_err(Error::Userfaultfd)?;
        for extent in self.layout.extents() {
            self.report.mmap_calls += 1;
            self.report.uffd_calls += 1;
            ram.map_anon(extent)?;
            ram.register(extent, &uffd, FaultKinds::MissingAndProtected)?;
        }
        let lazy = self.plan.extents.iter().map(|planned| lazy_extent(ram, planned)).collect::<Result<_, _>>()?;
        Ok(Some((Arc::new(uffd), sorted(lazy))))
    }

    /// Registers lazy extents, and those installed ahead into the same memory, with a userfaultfd. Copies between them
    /// are registered too: none of their pages is missing, so they need not be cut out.
    fn register_lazy(&mut self, ram: &GuestRam) -> Result<Option<Served>, Error> {
        let served = served_runs(self.plan, self.layout);
        if served.is_empty() {
            return Ok(None);
        }
        let uffd = Uffd::open(FaultKinds::Missing).map_err(Error::Userfaultfd)?;
        for run in &served {
            self.report.uffd_calls += 1;
            ram.register(*run, &uffd, FaultKinds::Missing)?;
        }
        let inside = items_in(self.plan, &served);
        let lazy = inside.map(|planned| lazy_extent(ram, planned)).collect::<Result<_, _>>()?;
        Ok(Some((Arc::new(uffd), sorted(lazy))))
    }

    /// Reads `preload` extents into anonymous memory; whole 2 MiB blocks through huge pages, which is several times
    /// faster and costs no extra memory.
    fn copy(&mut self, ram: &GuestRam) -> Result<(), Error> {
        let plan = self.plan;
        let runs = copy_runs(plan, self.layout);
        if runs.is_empty() {
            return Ok(());
        }
        // A huge page that comes with a copied page would bring zeros for the lazy pages around it.
        for run in served_runs(plan, self.layout) {
            self.report.madvise_calls += 1;
            ram.advise_small(run)?;
        }
        let mut wanted = Vec::with_capacity(runs.len());
        for &(extent, source) in &runs {
            if let Some(blocks) = whole_huge_pages(extent) {
                self.advise_huge(ram, blocks)?;
            }
            // SAFETY: no vCPU runs and nothing else refers to this memory (see `fill`); the runs of a valid plan share
            // no page.
            wanted.push(Wanted { source, bytes: unsafe { ram.bytes_mut(extent) }? });
            self.report.bytes_preloaded += extent.bytes();
        }
        let filled = reads::fill(self.files, wanted, plan.direct)?;
        self.report.read_calls += filled.calls;
        self.report.read_threads = filled.threads;
        self.report.direct_reads = filled.direct;
        if plan.verify { self.verify_copied(ram, &runs) } else { Ok(()) }
    }

    /// Checks the pages copied from the chain's layers.
    fn verify_copied(&self, ram: &GuestRam, runs: &[(Extent, PageSource)]) -> Result<(), Error> {
        let layers = self.files.chain().layers();
        let mut per_layer = vec![PageSet::new(); layers.len()];
        for (extent, source) in runs {
            if let PageOrigin::Layer(index) = source.origin
                && let Some(pages) = per_layer.get_mut(index)
            {
                pages.insert_run(*extent);
            }
        }
        let read = layers.iter().zip(&per_layer).filter(|(_, pages)| !pages.is_empty());
        read.into_iter().try_for_each(|(layer, pages)| verify(ram, layer, pages))
    }

    fn break_cow(&mut self, ram: &GuestRam) -> Result<(), Error> {
        let wanted = |planned: &&PlannedExtent| is_preload(planned, Fill::BreakCow);
        for planned in self.plan.extents.iter().filter(wanted) {
            self.report.madvise_calls += 1;
            let failed = |source| match lost::within(planned.extent) {
                Some(why) => Error::Lost(why),
                None => Error::Map { gpa: planned.extent.gpa(), pages: planned.extent.pages, source },
            };
            // Pages that the kernel cannot copy are promoted.
            match ram.in_place().filter(|in_place| in_place.has(planned.extent)) {
                Some(in_place) => in_place.promote_as(Resort::Ahead, planned.extent),
                None => ram.populator(planned.extent)?.populate_write(),
            }
            .map_err(failed)?;
            if let Some(source) = planned.source.filter(|source| self.files.image(source.origin).is_some()) {
                // SAFETY: no vCPU runs; nothing else refers to this memory (see `fill`).
                self.files.verify_image(source, &[unsafe { ram.bytes(planned.extent) }?])?;
            }
            self.report.bytes_preloaded += planned.extent.bytes();
        }
        Ok(())
    }

    /// Reads each image to install in one go, past the page cache, and installs its pages; pages of layers and tiers
    /// are installed extent by extent.
    fn install(&mut self, ram: &GuestRam, uffd: &Uffd) -> Result<(), Error> {
        let plan = self.plan;
        let mut bytes = Vec::new();
        for planned in plan.extents.iter().filter(|planned| is_preload(planned, Fill::Install)) {
            let Some(source) = planned.source.filter(|source| self.files.image(source.origin).is_none()) else {
                continue;
            };
            bytes.resize(planned.extent.bytes() as usize, 0);
            self.report.read_calls += 1;
            self.files.read(source, &mut bytes)?;
            self.install_extent(ram, uffd, planned.extent, &bytes)?;
        }
        for (index, image) in plan.images.iter().enumerate() {
            let origin = PageOrigin::Image(index);
            let from_here = |planned: &&PlannedExtent| {
                is_preload(planned, Fill::Install) && planned.source.is_some_and(|source| source.origin == origin)
            };
            let wanted: Vec<&PlannedExtent> = plan.extents.iter().filter(from_here).collect();
            if wanted.is_empty() {
                continue;
            }
            let buffer = self.read_direct(origin, image.file_len() as usize)?;
            self.install_image(ram, uffd, &wanted, buffer.bytes())?;
        }
        Ok(())
    }

    /// Installs the extents of one image, whose `bytes` were read, while another thread compares them with their
    /// checksums: both must only be done before the guest runs.
    fn install_image(
        &mut self,
        ram: &GuestRam,
        uffd: &Uffd,
        wanted: &[&PlannedExtent],
        bytes: &[u8],
    ) -> Result<(), Error> {
        let sourced = || wanted.iter().filter_map(|planned| Some((planned.extent, planned.source?)));
        let bytes_of = |extent: Extent, source: PageSource| &bytes[source.offset as usize..][..extent.bytes() as usize];
        let files = self.files;
        let compare = || {
            seccomp::enter_thread();
            sourced().try_for_each(|(extent, source)| files.verify_image(source, &[bytes_of(extent, source)]))
        };
        std::thread::scope(|scope| {
            let comparing = std::thread::Builder::new().name("compare".into()).spawn_scoped(scope, compare);
            let installed = sourced()
                .try_for_each(|(extent, source)| self.install_extent(ram, uffd, extent, bytes_of(extent, source)));
            let compared = match comparing {
                // A panic of the thread goes on here.
                Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                // If no thread can be started, this one compares.
                Err(_) => compare(),
            };
            compared.and(installed)
        })
    }

    fn install_extent(&mut self, ram: &GuestRam, uffd: &Uffd, extent: Extent, bytes: &[u8]) -> Result<(), Error> {
        let address = ram.populator(extent)?.address();
        self.report.uffd_calls += 1;
        let failed = |source| Error::Map { gpa: extent.gpa(), pages: extent.pages, source };
        uffd.install(address, bytes, Install::default()).map_err(failed)?;
        self.report.bytes_preloaded += extent.bytes();
        Ok(())
    }

    /// Reads a whole file at once, past the page cache.
    fn read_direct(&mut self, origin: PageOrigin, len: usize) -> Result<Buffer, Error> {
        let mut buffer = Buffer::new(len).map_err(Error::os("make a read buffer"))?;
        self.report.read_calls += 1;
        let source = PageSource { origin, offset: 0 };
        self.report.direct_reads = self.files.read_direct(source, buffer.bytes_mut())?;
        Ok(buffer)
    }
}

fn is_preload(planned: &PlannedExtent, fill: Fill) -> bool {
    planned.placement == Placement::Preload && planned.fill == fill
}

/// Returns whether the extent lies behind the userfaultfd.
fn is_served(planned: &PlannedExtent) -> bool {
    planned.placement == Placement::Lazy || is_preload(planned, Fill::Install)
}

/// The runs that lie behind the userfaultfd, including copies between two served extents.
fn served_runs(plan: &RestorePlan, layout: &MemoryLayout) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    // End of the copied extents that follow the last run without a gap.
    let mut reach = Gfn(0);
    for planned in &plan.extents {
        let extent = planned.extent;
        if is_served(planned) {
            match runs.last_mut() {
                Some(last) if reach == extent.first && layout.range_of(last.first) == layout.range_of(extent.first) => {
                    last.pages = extent.end().0 - last.first.0;
                }
                _ => runs.push(extent),
            }
            reach = extent.end();
        } else if is_preload(planned, Fill::Copy) && reach == extent.first {
            reach = extent.end();
        }
    }
    runs
}

/// The extents of the plan within `runs`, which are made of whole extents.
fn items_in<'p>(plan: &'p RestorePlan, runs: &[Extent]) -> impl Iterator<Item = &'p PlannedExtent> {
    let mut runs = runs.iter().copied().peekable();
    plan.extents.iter().filter(move |planned| {
        while runs.next_if(|run| run.end() <= planned.extent.first).is_some() {}
        runs.peek().is_some_and(|run| run.first <= planned.extent.first)
    })
}

fn lazy_extent(ram: &GuestRam, planned: &PlannedExtent) -> Result<LazyExtent, Error> {
    let host = ram.populator(planned.extent)?.address();
    Ok(LazyExtent { extent: planned.extent, host, source: planned.source })
}

fn sorted(mut lazy: Vec<LazyExtent>) -> Vec<LazyExtent> {
    lazy.sort_unstable_by_key(|lazy| lazy.host);
    lazy
}

fn pieces(plan: &RestorePlan, observed: bool) -> Vec<Piece> {
    let backing = |planned: &PlannedExtent| match (planned.placement, planned.source) {
        _ if observed => Backing::Lazy,
        (Placement::Lazy, _) => Backing::Lazy,
        (Placement::InPlace, Some(_)) => Backing::InPlace,
        (Placement::CowFile, Some(_)) => Backing::FilePrivate,
        (Placement::Preload, _) => Backing::Preloaded,
        _ => Backing::Anon,
    };
    plan.extents.iter().map(|planned| Piece { extent: planned.extent, backing: backing(planned) }).collect()
}

/// Zero memory of the plan that is mapped without advice, in extents of a huge page and more.
fn zero_memory(plan: &RestorePlan) -> Vec<Extent> {
    let zero = plan.extents.iter().filter(|planned| planned.placement == Placement::Zero);
    let is_advised = |extent: &Extent| plan.huge.iter().any(|huge| huge.intersection(extent).is_some());
    let zero = zero.map(|planned| planned.extent).filter(|extent| extent.pages >= HUGE_PAGE_PAGES);
    zero.filter(|extent| !is_advised(extent)).collect()
}

/// The parts of `extent` outside of `kept`, which are ascending.
fn without(extent: Extent, kept: &[Extent]) -> Vec<Extent> {
    let mut parts = Vec::new();
    let mut at = extent.first;
    let first = kept.partition_point(|kept| kept.end() <= extent.first);
    for kept in kept[first..].iter().take_while(|kept| kept.first < extent.end()) {
        if at < kept.first {
            parts.push(Extent { first: at, pages: kept.first.0 - at.0 });
        }
        at = kept.end();
    }
    if at < extent.end() {
        parts.push(Extent { first: at, pages: extent.end().0 - at.0 });
    }
    parts
}

/// The extents under a mapping of a file.
fn file_mapped(plan: &RestorePlan) -> Vec<Extent> {
    let mapped = plan.extents.iter().filter(|planned| planned.mapped().is_some());
    mapped.map(|planned| planned.extent).collect()
}

/// The pages that only a write of the guest makes writable in the host's page tables.
pub fn writable_when_written(plan: &RestorePlan) -> PageSet {
    let mapped = plan.extents.iter().filter(|planned| {
        matches!(planned.placement, Placement::CowFile | Placement::InPlace) && planned.source.is_some()
    });
    let mut pages: PageSet = mapped.map(|planned| planned.extent).collect();
    for step in plan.background.iter().filter(|step| step.action == BackgroundAction::BreakCow) {
        pages.remove_run(step.extent);
    }
    pages
}

/// The extents to copy, neighbours in guest memory and file joined.
fn copy_runs(plan: &RestorePlan, layout: &MemoryLayout) -> Vec<(Extent, PageSource)> {
    let mut runs: Vec<(Extent, PageSource)> = Vec::new();
    for planned in plan.extents.iter().filter(|planned| is_preload(planned, Fill::Copy)) {
        let Some(source) = planned.source else { continue };
        if let Some((last, from)) = runs.last_mut() {
            let both = Extent { first: last.first, pages: last.pages + planned.extent.pages };
            let continues = from.continues_at(last.bytes(), source);
            if continues && last.end() == planned.extent.first && layout.contains(both) {
                *last = both;
                continue;
            }
        }
        runs.push((planned.extent, source));
    }
    runs
}

fn whole_huge_pages(extent: Extent) -> Option<Extent> {
    let first = extent.first.0.next_multiple_of(HUGE_PAGE_PAGES);
    let end = extent.end().0 / HUGE_PAGE_PAGES * HUGE_PAGE_PAGES;
    (first < end).then(|| Extent { first: Gfn(first), pages: end - first })
}

/// Checks the pages read from one layer against its checksums. A chunk of which newer layers hide some pages is read
/// whole for that.
fn verify(ram: &GuestRam, layer: &Snapshot, pages: &PageSet) -> Result<(), Error> {
    use std::os::unix::fs::FileExt;
    let map = layer.page_map()?;
    let mut last_chunk = None;
    let mut bytes = Vec::with_capacity((CHUNK_PAGES * PAGE_SIZE) as usize);
    for part in pages.runs().flat_map(|run| run.chunks(CHUNK_PAGES)) {
        let chunk = chunk_of(part.first);
        if last_chunk.replace(chunk) == Some(chunk) {
            continue;
        }
        bytes.clear();
        for held in map.chunk_runs(chunk) {
            if pages.contains_run(held) {
                // SAFETY: no vCPU runs; nothing else refers to this memory (see `fill`).
                bytes.extend_from_slice(unsafe { ram.bytes(held) }?);
                continue;
            }
            let start = bytes.len();
            bytes.resize(start + held.bytes() as usize, 0);
            let offset = layer.layout().file_offset(held.first).unwrap_or(u64::MAX);
            let failed =
                |source| Error::File { doing: "read guest memory from", path: layer.memory_path().to_owned(), source };
            layer.memory().read_exact_at(&mut bytes[start..], offset).map_err(failed)?;
        }
        map.verify_chunk(layer.object(), chunk, &bytes)?;
    }
    Ok(())
}

/// The outcome of mapping preloaded memory for the guest.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct PrefaultReport {
    pub outcome: PrefaultOutcome,
    /// Calls of `KVM_PRE_FAULT_MEMORY`.
    pub calls: u64,
    /// Pages it mapped.
    pub pages: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefaultOutcome {
    /// The plan preloads nothing, or a handler serves its memory.
    #[default]
    NothingToDo,
    /// This KVM does not have the call (before Linux 6.11, or another kind of KVM).
    Unavailable,
    /// Left out: writable translations made ahead would count as written by the guest.
    DirtyPagesTracked,
    /// KVM has the call but not for this vCPU: it shadows the guest's page tables.
    Unsupported,
    /// KVM made no progress and was stopped; the guest's own accesses map the rest.
    Stalled,
    /// Everything preloaded is mapped.
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(first: u64, end: u64) -> Extent {
        Extent { first: Gfn(first), pages: end - first }
    }

    #[test]
    fn kept_memory_is_left_out_of_an_extent() {
        let kept = [extent(10, 20), extent(20, 25), extent(40, 50)];
        assert_eq!(without(extent(0, 60), &kept), [extent(0, 10), extent(25, 40), extent(50, 60)]);
        assert_eq!(without(extent(12, 45), &kept), [extent(25, 40)]);
        assert_eq!(without(extent(25, 40), &kept), [extent(25, 40)]);
        assert_eq!(without(extent(41, 50), &kept), []);
        assert_eq!(without(extent(50, 51), &[]), [extent(50, 51)]);
    }
}
