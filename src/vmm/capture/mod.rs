//! Capture of a machine: of a paused one at once, or of a running one by passes over its memory ([`live`]).
//!
//! The part during which the guest stands still is kept short: vCPU and device state, the dirty log, and one pass over
//! the pages that may not be zero, written straight from guest memory. Everything slow (checksummed page map, fsync,
//! rename) is [`Captured::seal`], which needs no machine and runs while the guest may go on. Reading the memory back
//! from the disk is slower still, and comes after the snapshot was acknowledged (`read_backs.rs`).

pub mod live;
mod page_writer;

use std::time::{Duration, Instant};

use super::devices::WritableDrive;
use super::error::Error;
use super::host;
use super::machine::{Core, Machine, Paused};
use super::state::{self, VcpuState, VmState};
use crate::memory;
use crate::memory::comparison::Comparison;
use crate::memory::ending::Ending;
use crate::memory::guest_ram::Backing;
use crate::snapshot::{
    Chain, Doubtful, Extent, Gfn, HostFacts, Location, MachineFacts, PAGE_SIZE, PageSet, Parent, ReadBack, SealInput,
    Sealed, Section, SectionKind, SnapshotId, SnapshotKind, SnapshotWriter, is_zero,
};
use crate::sys::dirty_log;
use crate::sys::lost;
use crate::sys::page_cache::PageCache;

/// A machine's state at one instant with its memory written; not sealed yet.
pub struct Captured {
    writer: SnapshotWriter,
    state: Vec<Section>,
    host: HostFacts,
    machine: MachineFacts,
    /// Drives that the snapshot does not copy: data that the guest believes to be on them is synced with its memory.
    drives: Vec<WritableDrive>,
    /// Pages of a diff that may equal those of its parent, and the parent.
    doubtful: Option<(Parent, PageSet)>,
    /// The comparison of the memory that the machine reads from images: damaged pages must not get a fresh checksum.
    comparison: Option<Comparison>,
    /// Time for reading state and writing memory, µs. The guest stood still for it and for its stopping; after a live
    /// capture its stopping is part of it.
    pub capture_us: u64,
    /// The course of a live capture.
    pub live: Option<LiveCounts>,
    /// Pages copied while the guest stood still, to be written.
    copied: Copied,
}

/// The course of a live capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LiveCounts {
    /// Passes over the pages written meanwhile, without the one during the pause.
    pub passes: u32,
    /// Pages written while the guest ran; a page counts each time.
    pub pages_live: u64,
    /// Pages copied while the guest stood still.
    pub pages_paused: u64,
    /// The guest wrote faster than its memory could be saved.
    pub is_cut_short: bool,
    /// Time from the beginning to the pause, µs.
    pub window_us: u64,
}

/// Pages in memory of this process: copying them keeps the guest waiting for less time than writing them.
#[derive(Default)]
struct Copied {
    extents: Vec<Extent>,
    bytes: Vec<u8>,
}

impl Copied {
    /// Makes room for `pages`: address space, without memory in place.
    fn with_room(pages: u64) -> Copied {
        Copied { extents: Vec::new(), bytes: Vec::with_capacity((pages * PAGE_SIZE) as usize) }
    }

    /// Puts memory in place for `pages` more. Returns whether all of the room has memory, and is empty again.
    fn put_memory(&mut self, pages: u64) -> bool {
        let len = self.bytes.len() + (pages * PAGE_SIZE) as usize;
        // Not zeros: the allocator gets those from the kernel, which gives memory at the first write.
        self.bytes.resize(len.min(self.bytes.capacity()), 1);
        let is_complete = self.bytes.len() == self.bytes.capacity();
        if is_complete {
            self.bytes.clear();
        }
        is_complete
    }

    /// Copies the pages of `extent`, if they fit.
    fn take(&mut self, extent: Extent, bytes: &[u8]) -> bool {
        let fits = self.bytes.capacity() - self.bytes.len() >= bytes.len();
        if fits {
            self.bytes.extend_from_slice(bytes);
            self.extents.push(extent);
        }
        fits
    }

    fn write(self, writer: &mut SnapshotWriter) -> Result<(), Error> {
        if self.extents.is_empty() {
            return Ok(());
        }
        writer.next_pass();
        let mut rest = self.bytes.as_slice();
        self.extents.into_iter().try_for_each(|extent| {
            let (bytes, after) = rest.split_at(extent.bytes() as usize);
            rest = after;
            write_extent(extent, bytes, writer)
        })
    }
}

/// The time at which a snapshot's memory is read back from the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadBackWhen {
    /// Before the snapshot has its name.
    First,
    /// By [`ReadBack::run`], which the caller calls.
    Later,
}

impl Captured {
    /// Makes the snapshot one that need not survive a crash of the host: nothing is synced to a disk.
    pub fn unsynced(mut self) -> Captured {
        self.writer.leave_unsynced();
        self.drives.clear();
        self
    }

    /// Makes the snapshot final: everything is on disk under its name, and verified or still to be.
    pub fn seal(mut self, when: ReadBackWhen) -> Result<(Sealed, Option<ReadBack>), Error> {
        self.copied.write(&mut self.writer)?;
        for drive in &self.drives {
            drive.image.sync_data().map_err(Error::os("make a drive durable"))?;
        }
        if let Some((parent, pages)) = self.doubtful.take() {
            drop_unchanged(&mut self.writer, &parent, &pages)?;
        }
        if let Some(comparison) = &self.comparison {
            comparison.wait(Instant::now() + COMPARED_TIMEOUT)?;
        }
        let input = SealInput { state: self.state, host: self.host, machine: self.machine, cache: &PageCache };
        match when {
            ReadBackWhen::First => Ok((self.writer.seal(input)?, None)),
            ReadBackWhen::Later => {
                let (sealed, read_back) = self.writer.seal_unproven(input)?;
                Ok((sealed, Some(read_back)))
            }
        }
    }
}

/// Removes the pages of `pages` that equal those of `parent` from the diff.
fn drop_unchanged(writer: &mut SnapshotWriter, parent: &Parent, pages: &PageSet) -> Result<(), Error> {
    match Chain::open(&parent.location) {
        Ok(chain) if chain.tip().id() == parent.id => Ok(writer.drop_unchanged(Doubtful { parent: &chain, pages })?),
        // The parent's memory is elsewhere (in a pool), or was moved: the diff is right with these pages in it.
        _ => Ok(()),
    }
}

/// Limit on the wait of a seal for the comparison of images with their checksums. The guest may run meanwhile.
const COMPARED_TIMEOUT: Duration = Duration::from_secs(30);

/// The files of a snapshot that is being taken.
struct Opened {
    writer: SnapshotWriter,
    kind: SnapshotKind,
    parent: Option<Parent>,
}

/// Pages that a diff has to hold.
struct Changes {
    /// Pages to look at.
    pages: PageSet,
    /// Pages known to be zero; reading them would bring them back.
    gone: PageSet,
}

/// Changes of memory that KVM does not see.
struct Noted {
    /// Pages written by devices.
    written: PageSet,
    /// Pages given back to the balloon.
    released: PageSet,
}

impl Machine<Paused> {
    /// Writes the machine's memory to `target` and reads its state. Afterwards the machine may run on; call
    /// [`seal_finished`](Self::seal_finished) with the outcome of [`Captured::seal`].
    ///
    /// With `copy_drives`, the snapshot gets copies of the drives that the guest can write.
    pub fn capture(&mut self, target: Location, kind: SnapshotKind, copy_drives: bool) -> Result<Captured, Error> {
        let start = Instant::now();
        let mut opened = self.open_capture(target, kind)?;
        let (state, drives) = self.capture_state(&mut opened, copy_drives)?;
        let log = self.core.read_dirty_log()?;
        let released = self.core.note_changes().released;
        let looked_at = match kind {
            SnapshotKind::Full => {
                self.core.lineage.add_changed(&log.pages);
                let candidates = self.core.maybe_nonzero()?;
                self.core.read_pages(&candidates, |extent, bytes| write_extent(extent, bytes, &mut opened.writer))?;
                PageSet::new()
            }
            SnapshotKind::Diff => {
                let Changes { pages, gone } = self.core.changes(&log, &released)?;
                self.core.mark_gone(&gone, &mut opened.writer)?;
                self.core.read_pages(&pages, |extent, bytes| write_extent(extent, bytes, &mut opened.writer))?;
                pages
            }
        };
        // Cleared only now: if a write had failed, KVM's log would still hold the pages.
        self.core.clear_dirty_log(&log)?;
        Ok(self.captured(opened, &looked_at, (state, drives), start))
    }

    /// Reads the state of vCPUs and devices, and copies drives if that is asked for. Returns the drives that were not
    /// copied.
    fn capture_state(
        &self,
        opened: &mut Opened,
        copy_drives: bool,
    ) -> Result<(Vec<Section>, Vec<WritableDrive>), Error> {
        let state = self.save_state()?;
        let mut drives = self.core.devices.virtio.writable_drives();
        if copy_drives {
            for drive in drives.drain(..) {
                opened.writer.copy_drive(&drive.id, &drive.image, drive.bytes)?;
            }
        }
        Ok((state, drives))
    }

    /// Called when all memory is written. `looked_at`: the pages of a diff. The machine stood still since `start`.
    fn captured(
        &mut self,
        opened: Opened,
        looked_at: &PageSet,
        (state, drives): (Vec<Section>, Vec<WritableDrive>),
        start: Instant,
    ) -> Captured {
        let pages = self.core.lineage.doubtful(looked_at);
        let doubtful = opened.parent.filter(|_| !pages.is_empty()).map(|parent| (parent, pages));
        self.core.lineage.begin_seal();
        let shape = &self.core.shape;
        Captured {
            writer: opened.writer,
            state,
            host: host::facts(&self.core.kvm),
            machine: MachineFacts { vcpu_count: u32::from(shape.vcpu_count), mem_size_mib: shape.mem_size_mib },
            drives,
            doubtful,
            comparison: self.core.services.comparison().cloned(),
            capture_us: start.elapsed().as_micros() as u64,
            live: None,
            copied: Copied::default(),
        }
    }

    fn save_state(&self) -> Result<Vec<Section>, Error> {
        let core = &self.core;
        let indices = state::msr_indices(&core.kvm)?;
        let mut sections = vec![state::section(SectionKind::Machine, 0, &core.machine_state())?];
        for thread in &self.state.threads {
            let vcpu = thread.vcpu();
            let saved = VcpuState::save(&vcpu.fd, vcpu.index, &indices)?;
            sections.push(state::section(SectionKind::Vcpu, u32::from(vcpu.index), &saved)?);
        }
        // After the vCPUs: reading their events may still move interrupts between LAPIC and controllers.
        sections.push(state::section(SectionKind::Vm, 0, &VmState::save(&core.vm)?)?);
        sections.push(state::section(SectionKind::Serial, 0, &core.devices.serial.save())?);
        sections.push(state::section(SectionKind::I8042, 0, &core.devices.i8042.save())?);
        sections.push(state::section(SectionKind::Metadata, 0, &core.devices.fw_cfg.save())?);
        if let Some(vmgenid) = &core.devices.vmgenid {
            sections.push(state::section(SectionKind::VmGenId, 0, &vmgenid.save())?);
        }
        for (index, saved) in core.devices.virtio.save()?.iter().enumerate() {
            sections.push(state::section(SectionKind::Virtio, index as u32, saved)?);
        }
        Ok(sections)
    }
}

impl<S> Machine<S> {
    /// Checks that a snapshot can be taken now, and makes its files.
    fn open_capture(&self, target: Location, kind: SnapshotKind) -> Result<Opened, Error> {
        if self.core.lineage.is_sealing() {
            return Err(Error::SnapshotInProgress);
        }
        // Reading such pages would end the process before the caller gets an answer.
        if let Some(why) = lost::behind_an_end() {
            self.core.ending.end(Ending::MemoryLost(why.clone()));
            return Err(memory::Error::Lost(why).into());
        }
        self.core.services.comparison().map_or(Ok(()), Comparison::check)?;
        let parent = match kind {
            SnapshotKind::Full => None,
            SnapshotKind::Diff => Some(self.core.diff_parent()?),
        };
        let writer = SnapshotWriter::create(target, self.core.ram.layout().clone(), kind, parent.clone())?;
        Ok(Opened { writer, kind, parent })
    }

    /// The pages in KVM's log, which keeps them.
    pub fn dirty_pages(&self) -> Result<PageSet, Error> {
        Ok(self.core.read_dirty_log()?.pages)
    }

    /// Called with the outcome of sealing the last capture.
    pub fn seal_finished(&mut self, sealed: Option<&Sealed>) {
        match sealed {
            Some(sealed) => {
                let parent = Parent { id: sealed.id, location: sealed.location.clone() };
                self.core.lineage.seal_done(parent);
            }
            None => self.core.lineage.seal_failed(),
        }
    }

    /// Called when a snapshot read back from the disk differs from what was written.
    pub fn snapshot_damaged(&mut self, id: SnapshotId) {
        self.core.lineage.damaged(id);
    }
}

/// One reading of KVM's dirty log: the pages, and the raw bitmaps to clear it with.
pub(super) struct DirtyLog {
    pub pages: PageSet,
    bitmaps: Vec<Vec<u64>>,
}

impl Core {
    /// The snapshot that a diff taken now is a change of: the last one, or, if nothing has kept record of the writes
    /// since then, the one that the machine was restored from.
    fn diff_parent(&self) -> Result<Parent, Error> {
        if self.shape.track_dirty_pages {
            return Ok(self.lineage.parent()?.clone());
        }
        self.lineage.origin_parent()?.ok_or_else(|| {
            Error::Diff(
                "dirty page tracking is off, and the VM was not restored from a snapshot; set `track_dirty_pages` in \
                 machine-config"
                    .into(),
            )
        })
    }

    /// Moves the pages that devices have written, and those that the guest has given back, to the lineage: KVM does not
    /// see either, and reading the records clears them. Returns the pages of both kinds since the last call.
    fn note_changes(&mut self) -> Noted {
        let written = self.note_device_writes();
        let released = self.ram.released().take_fresh();
        self.lineage.add_changed(&released);
        Noted { written, released }
    }

    /// Moves the pages that devices have written to the lineage and the access record. Returns them.
    pub(super) fn note_device_writes(&mut self) -> PageSet {
        let written = self.ram.take_written();
        self.lineage.add_changed(&written);
        self.access.iter_mut().for_each(|access| access.note_written(&written));
        written
    }

    /// The pages of a diff. `released`: the pages given back since the last snapshot.
    fn changes(&mut self, log: &DirtyLog, released: &PageSet) -> Result<Changes, Error> {
        self.lineage.add_changed(&log.pages);
        if self.shape.track_dirty_pages {
            let gone = self.unpopulated(released)?;
            return Ok(Changes { pages: self.lineage.changed().difference(&gone), gone });
        }
        // Nothing has kept record since the restore. The pages that this process has no copy of are as they were.
        let released = self.ram.released().read().ever().clone();
        let gone = self.unpopulated(&released)?;
        Ok(Changes { pages: self.ram.own_pages()?.union(&released).difference(&gone), gone })
    }

    /// Records in `writer` that the pages are zero.
    fn mark_gone(&self, gone: &PageSet, writer: &mut SnapshotWriter) -> Result<(), Error> {
        let runs = gone.runs().flat_map(|run| self.ram.layout().split(run).collect::<Vec<_>>());
        runs.into_iter().try_for_each(|extent| Ok(writer.set_zero(extent)?))
    }

    pub(super) fn read_dirty_log(&self) -> Result<DirtyLog, Error> {
        let mut log = DirtyLog { pages: PageSet::new(), bitmaps: Vec::new() };
        if !self.logs_writes {
            return Ok(log);
        }
        for (slot, range) in self.ram.layout().ranges().iter().enumerate() {
            let bitmap =
                self.vm.get_dirty_log(slot as u32, range.len as usize).map_err(Error::kvm("read the dirty log"))?;
            log.pages.insert_bitmap(Gfn(range.gpa / PAGE_SIZE), &bitmap);
            log.bitmaps.push(bitmap);
        }
        Ok(log)
    }

    /// Clears the log of the pages that were read from it, and notes them in the access record.
    pub(super) fn clear_dirty_log(&mut self, log: &DirtyLog) -> Result<(), Error> {
        self.access.iter_mut().for_each(|access| access.note_logged(&log.pages));
        for (slot, (bitmap, range)) in log.bitmaps.iter().zip(self.ram.layout().ranges()).enumerate() {
            dirty_log::clear(&self.vm, slot as u32, range.len / PAGE_SIZE, bitmap)
                .map_err(Error::os("clear the dirty log"))?;
        }
        Ok(())
    }

    /// Passes the bytes of `pages` to `work`, extent by extent. The machine must be paused.
    fn read_pages(
        &self,
        pages: &PageSet,
        mut work: impl FnMut(Extent, &[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        for run in pages.runs() {
            for extent in self.ram.layout().split(run) {
                // SAFETY: the machine is paused (only `Machine<Paused>` gets here), its devices are quiet, and pieces
                // are not remapped while `self` is borrowed.
                let bytes = unsafe { self.ram.bytes(extent) }?;
                work(extent, bytes)?;
            }
        }
        Ok(())
    }

    /// Pages that may not be zero: those that this process has populated, and those that a layer or tier holds under a
    /// mapping of it, which may never have been touched.
    fn maybe_nonzero(&self) -> Result<PageSet, Error> {
        let mut pages = self.ram.populated()?;
        if let Some(chain) = self.lineage.origin() {
            let mut mapped = PageSet::new();
            for piece in self.ram.pieces().iter().filter(|piece| piece.backing != Backing::Anon) {
                mapped.insert_run(piece.extent);
            }
            // A released page is populated if it was touched since, and zero otherwise.
            mapped.subtract(self.ram.released().read().ever());
            if !self.services.tiers().is_empty() {
                for tier in self.services.tiers() {
                    let mut held: PageSet =
                        tier.runs().map_err(memory::Error::from)?.into_iter().map(|run| run.extent).collect();
                    held.intersect_with(&mapped);
                    pages.union_with(&held);
                }
                return Ok(pages);
            }
            for layer in chain.layers() {
                let mut held = layer.page_map()?.held().clone();
                held.intersect_with(&mapped);
                pages.union_with(&held);
            }
        }
        Ok(pages)
    }

    /// The pages of `released` that have not been touched since: they are zero.
    fn unpopulated(&self, released: &PageSet) -> Result<PageSet, Error> {
        if released.is_empty() {
            return Ok(PageSet::new());
        }
        let gone = self.ram.released().read().ever().intersection(released);
        Ok(gone.difference(&self.ram.populated()?))
    }
}

/// Most pages written with one call: 4 MiB.
const RUN_PAGES: u64 = 1024;

/// Writes the pages of `extent`, whose bytes are `bytes`. Pages of zeros are only recorded.
fn write_extent(extent: Extent, bytes: &[u8], writer: &mut SnapshotWriter) -> Result<(), Error> {
    let page = PAGE_SIZE as usize;
    let at = |index: u64| Gfn(extent.first.0 + index);
    let mut index = 0;
    while index < extent.pages {
        let run_is_zero = is_zero(&bytes[index as usize * page..][..page]);
        let mut end = index + 1;
        while end < extent.pages
            && (run_is_zero || end - index < RUN_PAGES)
            && is_zero(&bytes[end as usize * page..][..page]) == run_is_zero
        {
            end += 1;
        }
        if run_is_zero {
            writer.set_zero(Extent { first: at(index), pages: end - index })?;
        } else {
            writer.write_run(at(index), &bytes[index as usize * page..end as usize * page])?;
        }
        index = end;
    }
    Ok(())
}
