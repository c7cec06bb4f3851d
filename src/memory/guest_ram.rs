//! Guest memory: address space reserved per guest RAM range, filled with pieces that say what backs them.
//!
//! Tiers are VMAs under a memslot, never memslots: changing what backs a page is an `mmap(MAP_FIXED)` in the
//! reservation, and KVM's MMU notifier drops the old translation.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use serde::Serialize;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::balloon_release::{Released, Releaser};
use super::promote::{InPlace, InPlaceExtent};
use super::stall::Activity;
use super::used_pages::UsedPages;
use crate::memory::Error;
use crate::snapshot::{Extent, Gfn, GuestRange, HUGE_PAGE_PAGES, MemoryLayout, PAGE_SIZE, PageOrigin, PageSet};
use crate::sys::guest_memory::{Memory, UnguardedMemory, region_bitmap};
use crate::sys::lost;
use crate::sys::lost::{MappedFile, Mapping, Watched};
use crate::sys::mapping::{Populator, Reservation};
use crate::sys::pagemap::Pagemap;
use crate::sys::pagemap_scan::{Mapped, PagemapScan, is_unsupported, mapped_runs};
use crate::sys::uffd::{FaultKinds, Uffd};

/// The backing of a piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Anonymous memory of this process.
    Anon,
    /// A private mapping of a file: clean pages are the page cache's, written ones this process's.
    FilePrivate,
    /// As `FilePrivate`, with faults that want huge pages.
    InPlace,
    /// Local memory that was filled before the guest ran.
    Preloaded,
    /// Anonymous memory whose first touches the fault service or a handler outside answers.
    Lazy,
}

/// A run of guest pages with one backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    pub extent: Extent,
    pub backing: Backing,
}

/// Pages that show a file.
#[derive(Clone, Copy, Debug)]
pub struct FileMapping {
    pub extent: Extent,
    /// The layer, tier or image whose file it is.
    pub origin: PageOrigin,
    /// Of the first page, bytes.
    pub offset: u64,
}

impl FileMapping {
    /// Returns whether both show the same file at the same distance, without a gap. `later` does not begin before.
    fn continues_with(&self, later: &FileMapping) -> bool {
        let distance = (later.extent.first.0 - self.extent.first.0) * PAGE_SIZE;
        let is_near = later.extent.first <= self.extent.end();
        is_near && self.origin == later.origin && self.offset + distance == later.offset
    }
}

/// Pages of guest memory that are mapped, or in swap.
#[derive(Clone, Debug, Default)]
pub struct Present {
    /// Pages that this process has a copy of.
    pub own: PageSet,
    /// Pages that show a file or the kernel's zeros.
    pub shared: PageSet,
}

/// The guest's RAM.
#[derive(Debug)]
pub struct GuestRam {
    layout: MemoryLayout,
    /// The mappings of files, by their first page.
    mappings: BTreeMap<Gfn, FileMapping>,
    /// The list of them by which a lost page is named (`sys::lost`).
    watched: Option<Watched>,
    reservations: Vec<Arc<Reservation>>,
    pieces: Vec<Piece>,
    /// Extents mapped from files, and whether any memory lies behind a userfaultfd.
    file_mapped: Vec<Extent>,
    is_served: bool,
    in_place: Option<Arc<InPlace>>,
    released: Arc<Released>,
    /// Pages that were spilled since the restore, or since a rewind: anonymous memory behind the spill's userfaultfd.
    spilled: PageSet,
    /// Pages whose use was noted before memory was given back.
    used: UsedPages,
    /// Extents of zero memory, ascending, as the last plan mapped them: anonymous, without a userfaultfd or advice.
    zero: Vec<Extent>,
    view: Memory,
}

impl GuestRam {
    /// Reserves address space for `layout`; nothing is readable until pieces are mapped.
    pub fn reserve(layout: &MemoryLayout) -> Result<Self, Error> {
        let mut reservations = Vec::new();
        let mut regions = Vec::new();
        for range in layout.ranges() {
            let failed = |source| Error::Reserve { mib: range.len >> 20, source };
            let len = usize::try_from(range.len).map_err(|_| failed(std::io::ErrorKind::OutOfMemory.into()))?;
            let reservation = Reservation::new(len).map_err(failed)?;
            regions.push(region_of(&reservation, range.gpa)?);
            reservations.push(Arc::new(reservation));
        }
        let view = Memory::from_regions(regions).map_err(|error| Error::MemoryView(error.to_string()))?;
        Ok(GuestRam {
            layout: layout.clone(),
            mappings: BTreeMap::new(),
            watched: None,
            reservations,
            pieces: Vec::new(),
            file_mapped: Vec::new(),
            is_served: false,
            in_place: None,
            released: Arc::default(),
            spilled: PageSet::new(),
            used: UsedPages::default(),
            zero: Vec::new(),
            view,
        })
    }

    /// Reserves `layout` and fills it with anonymous zero memory, for a boot.
    pub fn anonymous(layout: &MemoryLayout) -> Result<Self, Error> {
        let mut ram = GuestRam::reserve(layout)?;
        layout.extents().try_for_each(|extent| ram.map_anon(extent))?;
        ram.set_pieces(layout.extents().map(|extent| Piece { extent, backing: Backing::Anon }).collect());
        Ok(ram)
    }

    /// Forgets all that is recorded about the memory, which is to be mapped over and filled anew: until then the former
    /// guest's bytes are there. No vCPU runs, no device works, and the services of the memory have ended. Holders of
    /// [`view`](Self::view) and [`in_place`](Self::in_place) must take them anew once the memory is filled.
    ///
    /// Mapping zero memory over it first would take as long again: KVM looks at each page of a mapping that goes away.
    /// Zero memory stays known, for [`keep_zero`](Self::keep_zero).
    pub fn forget(&mut self) {
        self.watched = None;
        self.mappings.clear();
        self.pieces = Vec::new();
        self.file_mapped = Vec::new();
        self.is_served = false;
        self.in_place = None;
        self.released = Arc::default();
        if !self.spilled.is_empty() {
            self.zero.clear();
            self.forget_spilled();
        }
        self.used = UsedPages::default();
        self.view = self.view.without_gate();
        self.take_written();
    }

    /// Maps all of the memory as zero memory of its own, and gives the former guest's back to the host. Follows
    /// [`forget`](Self::forget).
    pub fn vacate(&mut self) -> Result<(), Error> {
        let all: Vec<Extent> = self.layout.extents().collect();
        all.iter().try_for_each(|extent| self.map_anon(*extent))?;
        self.zero = all;
        Ok(())
    }

    /// Records zero memory of a plan: ascending extents that were mapped by [`map_anon`](Self::map_anon), and got
    /// neither a userfaultfd nor advice.
    pub fn set_zero(&mut self, zero: Vec<Extent>) {
        self.zero = zero;
    }

    /// Empties the zero memory of the former guest and returns its extents, ascending: a plan that has zero memory
    /// there need not map it again. KVM looks at each page of a mapping that goes away, but only at those with content
    /// here, so this takes the time of the pages that the former guest has touched, not of all.
    ///
    /// Nothing is returned before Linux 6.7, which cannot find those pages.
    pub fn keep_zero(&mut self) -> Result<Vec<Extent>, Error> {
        let zero = std::mem::take(&mut self.zero);
        if zero.is_empty() {
            return Ok(zero);
        }
        // A plan may have thousands of extents.
        let mut scan = PagemapScan::open().map_err(Error::os("open /proc/self/pagemap"))?;
        for extent in &zero {
            let mut touched: Vec<Extent> = Vec::new();
            let mut note = |first, pages, _| {
                let run = Extent { first: Gfn(extent.first.0 + first), pages };
                match touched.last_mut() {
                    // One call for both costs less than two.
                    Some(last) if run.first.0 - last.end().0 < HUGE_PAGE_PAGES => {
                        last.pages = run.end().0 - last.first.0;
                    }
                    _ => touched.push(run),
                }
            };
            match scan.mapped_runs(self.host_address(extent.first)?, extent.pages, &mut note) {
                Err(error) if is_unsupported(&error) => return Ok(Vec::new()),
                scanned => scanned.map_err(Error::os("find the pages that the former guest has touched"))?,
            }
            touched.into_iter().try_for_each(|run| self.discard(run))?;
        }
        Ok(zero)
    }

    pub fn layout(&self) -> &MemoryLayout {
        &self.layout
    }

    /// The end of the RAM that starts at address zero.
    pub fn low_end(&self) -> u64 {
        self.layout.ranges().first().map_or(0, |range| range.gpa + range.len)
    }

    /// The pieces in ascending order of guest address.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The VMM's window to guest memory, bounds-checked at every access. Its write gate promotes pages in place.
    pub fn view(&self) -> &Memory {
        &self.view
    }

    /// The window for kernel loaders, which have no write gate. An error unless all memory is local.
    pub fn boot_view(&self) -> Result<&UnguardedMemory, Error> {
        self.view.unguarded().ok_or_else(|| Error::MemoryView("some of it lies in place on a shared tier".into()))
    }

    /// Takes the pages that were written through [`view`](Self::view) since the last call.
    pub fn take_written(&self) -> PageSet {
        let mut pages = PageSet::new();
        for (range, marks) in self.layout.ranges().iter().zip(self.view.take_marks()) {
            pages.insert_bitmap(Gfn(range.gpa / PAGE_SIZE), &marks);
        }
        pages
    }

    /// `(gpa, len, host address)` of each range, for memslots.
    pub fn slots(&self) -> impl Iterator<Item = (GuestRange, *mut u8)> + '_ {
        self.layout.ranges().iter().zip(&self.reservations).map(|(range, memory)| (*range, memory.base()))
    }

    /// Sets the backing of the memory after it was mapped: pieces ascending, each page once.
    pub fn set_pieces(&mut self, pieces: Vec<Piece>) {
        self.pieces = pieces;
    }

    /// Records where files are mapped and whether any memory lies behind a userfaultfd: balloon release depends on
    /// both.
    pub fn set_mapped(&mut self, file_mapped: Vec<Extent>, is_served: bool) {
        (self.file_mapped, self.is_served) = (file_mapped, is_served);
    }

    /// Returns whether all of the memory is this process's alone and the kernel's to fill: no userfaultfd, nothing in
    /// place that only a promotion makes writable.
    pub fn is_plain(&self) -> bool {
        !self.is_served && self.in_place.is_none()
    }

    /// Records the extents mapped in place ([`map_in_place`](Self::map_in_place)). From now on the write gate of
    /// [`view`](Self::view) promotes their pages before a write.
    pub fn guard(&mut self, mapped: &[InPlaceExtent]) -> Result<(), Error> {
        let ranges = self.layout.ranges().iter().copied().zip(self.reservations.iter().cloned());
        let in_place =
            InPlace::new(ranges, mapped).map_err(Error::os("reserve memory for copies of pages in place"))?;
        let in_place = Arc::new(in_place);
        self.view = self.view.guarded(in_place.clone());
        self.in_place = Some(in_place);
        Ok(())
    }

    /// The pages in place that only a promotion makes writable; `None` if the plan mapped none.
    pub fn in_place(&self) -> Option<&Arc<InPlace>> {
        self.in_place.as_ref()
    }

    /// Counts of pages in place and of promotions, for reports; `None` if the plan mapped none.
    pub fn promotion(&self) -> Option<serde_json::Value> {
        self.in_place.as_ref().map(|in_place| in_place.json())
    }

    /// The record of pages that the guest has given back.
    pub fn released(&self) -> &Arc<Released> {
        &self.released
    }

    /// Pages that were spilled, whether they have come back or not.
    pub fn spilled(&self) -> &PageSet {
        &self.spilled
    }

    /// Called when `run` was spilled.
    pub fn note_spilled(&mut self, run: Extent) {
        self.spilled.insert_run(run);
    }

    /// Called when pages that were spilled are as the plan of the restore has them again.
    pub fn forget_spilled(&mut self) {
        self.spilled = PageSet::new();
    }

    /// Returns the releaser of pages for the balloon. `activity`: set if a release may wait for a handler.
    pub fn releaser(&self, activity: Option<Activity>) -> Releaser {
        let ranges = self.layout.ranges().iter().copied().zip(self.reservations.iter().cloned()).collect();
        let file_mapped = self.file_mapped.iter().copied().collect();
        Releaser::new(ranges, file_mapped, !self.is_served, self.released.clone(), activity)
            .with_in_place(self.in_place.clone())
    }

    /// Backs `extent` with anonymous zero memory.
    pub fn map_anon(&self, extent: Extent) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        memory.map_anon(offset, extent.bytes() as usize).map_err(|source| map_failed(extent, source))
    }

    /// Backs `extent` with a private mapping of `file` from `file_offset`.
    pub fn map_file_private(&self, extent: Extent, file: &File, file_offset: u64) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        let len = extent.bytes() as usize;
        memory.map_file_private(offset, len, file, file_offset).map_err(|source| map_failed(extent, source))
    }

    /// Backs `extent` with a shared read-only mapping of `file` from `file_offset`. The caller must pass the extent to
    /// [`guard`](Self::guard).
    pub fn map_in_place(&self, extent: Extent, file: &File, file_offset: u64) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        let len = extent.bytes() as usize;
        memory.map_file_read_only(offset, len, file, file_offset).map_err(|source| map_failed(extent, source))
    }

    /// Records mappings of files. A mapping that goes on where a former one ends, or lies in it, becomes part of it.
    pub fn note_mappings(&mut self, mappings: impl IntoIterator<Item = FileMapping>) {
        for mapping in mappings {
            let first = mapping.extent.first;
            match self.mappings.range_mut(..=first).next_back() {
                Some((_, before)) if before.continues_with(&mapping) => {
                    let end = before.extent.end().max(mapping.extent.end());
                    before.extent.pages = end.0 - before.extent.first.0;
                }
                _ => drop(self.mappings.insert(first, mapping)),
            }
        }
    }

    /// The recorded mappings of files, ascending.
    pub fn mappings(&self) -> impl Iterator<Item = &FileMapping> {
        self.mappings.values()
    }

    /// Lists the recorded mappings, whose files are `files`, so that a lost page is reported with its file.
    pub fn watch(&mut self, files: BTreeMap<PageOrigin, MappedFile>) -> Result<(), Error> {
        let numbers: BTreeMap<PageOrigin, usize> = files.keys().copied().zip(0..).collect();
        let mut mappings = Vec::with_capacity(self.mappings.len());
        for FileMapping { extent, origin, offset } in self.mappings() {
            let address = self.host_address(extent.first)? as usize;
            let len = extent.bytes() as usize;
            mappings.push(Mapping { address, len, file: numbers[origin], offset: *offset, gpa: Some(extent.gpa()) });
        }
        self.watched = lost::watch(files.into_values().collect(), mappings);
        Ok(())
    }

    /// Lets `uffd` answer `faults` of `extent`, which is anonymous memory.
    pub fn register(&self, extent: Extent, uffd: &Uffd, faults: FaultKinds) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        let len = extent.bytes() as usize;
        uffd.register(memory, offset, len, faults).map_err(|source| map_failed(extent, source))
    }

    /// Makes the kernel map only the pages that are touched (Linux 6.7; `None` before): no fault-around and no huge
    /// pages while the result lives.
    pub fn map_single_pages(&mut self) -> Result<Option<Uffd>, Error> {
        let Some(uffd) = Uffd::open_silent().map_err(Error::Userfaultfd)? else { return Ok(None) };
        self.zero.clear();
        for (extent, memory) in self.layout.extents().zip(&self.reservations) {
            let done = memory.advise_small(0, memory.len()).and_then(|()| uffd.register_silent(memory));
            done.map_err(|source| map_failed(extent, source))?;
        }
        Ok(Some(uffd))
    }

    /// The pages that this process has populated: mapped, in swap, or spilled.
    pub fn populated(&self) -> Result<PageSet, Error> {
        let mut pages = self.spilled.clone();
        for (range, host) in self.slots() {
            let first = range.gpa / PAGE_SIZE;
            let mut insert = |run, len| pages.insert_run(Extent { first: Gfn(first + run), pages: len });
            let scanned = mapped_runs(host, range.len / PAGE_SIZE, |run, len, _| insert(run, len));
            let populated = match scanned {
                // Before Linux 6.7 the same is read entry by entry.
                Err(error) if is_unsupported(&error) => {
                    Pagemap::open().and_then(|map| map.populated_runs(host, range.len / PAGE_SIZE, insert))
                }
                scanned => scanned,
            };
            populated.map_err(Error::os("scan /proc/self/pagemap"))?;
        }
        Ok(pages)
    }

    /// The pages that the guest has used since the restore, also if their memory was given back.
    ///
    /// # Errors
    /// See [`own_pages`](Self::own_pages).
    pub fn used_pages(&self) -> Result<UsedPages, Error> {
        let mut mapped = self.populated()?;
        mapped.union_with(&self.used.mapped);
        let mut own = self.own_pages()?;
        own.union_with(&self.used.own);
        Ok(UsedPages { mapped, own })
    }

    /// Keeps the pages used so far on record. Called before memory is given back.
    pub fn note_used(&mut self) -> Result<(), Error> {
        self.used = self.used_pages()?;
        Ok(())
    }

    /// The pages that this process has a copy of, in local memory or spilled: all that the guest has written since they
    /// were mapped, and more.
    ///
    /// # Errors
    /// The kernel has no PAGEMAP_SCAN (before Linux 6.7).
    pub fn own_pages(&self) -> Result<PageSet, Error> {
        Ok(self.local_pages()?.union(&self.spilled))
    }

    /// The pages that this process has a copy of in local memory.
    ///
    /// # Errors
    /// See [`own_pages`](Self::own_pages).
    pub fn local_pages(&self) -> Result<PageSet, Error> {
        Ok(self.present()?.own)
    }

    /// The pages that are mapped now.
    ///
    /// # Errors
    /// See [`own_pages`](Self::own_pages).
    pub fn present(&self) -> Result<Present, Error> {
        let mut present = Present::default();
        for (range, host) in self.slots() {
            let first = range.gpa / PAGE_SIZE;
            let add = |run, len, what| {
                let pages = match what {
                    Mapped::Own => &mut present.own,
                    Mapped::Shared => &mut present.shared,
                };
                pages.insert_run(Extent { first: Gfn(first + run), pages: len });
            };
            mapped_runs(host, range.len / PAGE_SIZE, add).map_err(Error::os(
                "find the pages that the guest has written (PAGEMAP_SCAN, Linux 6.7). On older kernels restore with \
                 --track-dirty-pages",
            ))?;
        }
        Ok(present)
    }

    /// Unmaps the pages of `pages` that show a file, and no copies: the next touch maps them again. Returns those that
    /// were unmapped. No vCPU runs and all devices are quiet, so that no page is copied meanwhile by a write.
    ///
    /// # Errors
    /// The page map of this process cannot be read. Nothing is lost.
    pub fn unmap_clean(&self, pages: &PageSet) -> Result<PageSet, Error> {
        let mut unmapped = PageSet::new();
        let (Some(first), Some(last)) = (pages.first(), pages.last()) else { return Ok(unmapped) };
        for extent in self.layout.split(Extent { first, pages: last.0 - first.0 + 1 }) {
            let add = |run, len, what| {
                if what == Mapped::Shared {
                    unmapped.insert_run(Extent { first: Gfn(extent.first.0 + run), pages: len });
                }
            };
            let host = self.host_address(extent.first)?;
            mapped_runs(host, extent.pages, add).map_err(Error::os("find the pages of files that are mapped"))?;
        }
        unmapped.intersect_with(pages);
        for run in unmapped.runs() {
            self.layout.split(run).try_for_each(|extent| self.discard(extent))?;
        }
        Ok(unmapped)
    }

    /// Checks that [`own_pages`](Self::own_pages) works on this kernel.
    pub fn can_find_own_pages(&self) -> Result<(), Error> {
        let first = self.slots().next();
        let scanned = first.map_or(Ok(()), |(_, host)| mapped_runs(host, 1, |_, _, _| {}));
        scanned.map_err(Error::os("scan the first page (PAGEMAP_SCAN, Linux 6.7)"))
    }

    /// A handle to `extent` for another thread: it can populate the pages, not read or write them.
    pub fn populator(&self, extent: Extent) -> Result<Populator, Error> {
        let (memory, offset) = self.locate(extent)?;
        memory.populator(offset, extent.bytes() as usize).map_err(|source| map_failed(extent, source))
    }

    /// Gives the memory of `extent` back to the host: it shows its backing again, zeros or the bytes of a file.
    pub fn discard(&self, extent: Extent) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        memory.discard(offset, extent.bytes() as usize).map_err(|source| map_failed(extent, source))
    }

    /// Asks for huge pages under `extent`.
    pub fn advise_huge(&self, extent: Extent) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        memory.advise_huge(offset, extent.bytes() as usize).map_err(|source| map_failed(extent, source))
    }

    /// Forbids huge pages under `extent`.
    pub fn advise_small(&self, extent: Extent) -> Result<(), Error> {
        let (memory, offset) = self.locate(extent)?;
        memory.advise_small(offset, extent.bytes() as usize).map_err(|source| map_failed(extent, source))
    }

    /// The bytes of `extent`.
    ///
    /// # Safety
    /// No vCPU runs and nothing writes guest memory while the slice lives.
    pub unsafe fn bytes(&self, extent: Extent) -> Result<&[u8], Error> {
        let (memory, offset) = self.locate(extent)?;
        // SAFETY: passed on to the caller; every piece is mapped readable.
        unsafe { memory.bytes(offset, extent.bytes() as usize) }.map_err(|source| map_failed(extent, source))
    }

    /// The bytes of `extent`, to be filled.
    ///
    /// # Safety
    /// Only while the memory is being built, or no vCPU runs and all devices are quiet: nothing else refers to it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes_mut(&self, extent: Extent) -> Result<&mut [u8], Error> {
        let (memory, offset) = self.locate(extent)?;
        // SAFETY: passed on to the caller; every piece is mapped writable and private.
        unsafe { memory.bytes_mut(offset, extent.bytes() as usize) }.map_err(|source| map_failed(extent, source))
    }

    /// Returns the reservation that holds `extent`, and its offset there. An extent outside RAM or across two ranges is
    /// an error.
    fn locate(&self, extent: Extent) -> Result<(&Reservation, usize), Error> {
        let outside = || Error::OutsideRam { gpa: extent.first.0.saturating_mul(PAGE_SIZE), pages: extent.pages };
        if extent.pages == 0 || !self.layout.contains(extent) {
            return Err(outside());
        }
        let gpa = extent.first.0 * PAGE_SIZE;
        let mut ranges = self.layout.ranges().iter().zip(&self.reservations);
        let (range, memory) =
            ranges.find(|(range, _)| gpa >= range.gpa && gpa - range.gpa < range.len).ok_or_else(outside)?;
        Ok((memory, (gpa - range.gpa) as usize))
    }

    /// The host address of a page, for the kernel's page map.
    pub fn host_address(&self, gfn: Gfn) -> Result<*const u8, Error> {
        let (memory, offset) = self.locate(Extent { first: gfn, pages: 1 })?;
        // `locate` has checked that the offset lies inside the reservation.
        Ok(memory.base().wrapping_add(offset).cast_const())
    }
}

fn map_failed(extent: Extent, source: std::io::Error) -> Error {
    Error::Map { gpa: extent.first.0 * PAGE_SIZE, pages: extent.pages, source }
}

fn region_of(reservation: &Reservation, gpa: u64) -> Result<GuestRegionMmap<AtomicBitmap>, Error> {
    let failed = |what: String| Error::MemoryView(what);
    // SAFETY: the reservation is exactly `len` bytes at `base` and lives in the same object as the view built from
    // this region; the region does not own the mapping, so it is unmapped once, by the reservation.
    let builder = unsafe {
        MmapRegionBuilder::new_with_bitmap(reservation.len(), region_bitmap(reservation.len()))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_raw_mmap_pointer(reservation.base())
    };
    let region = builder.build().map_err(|error| failed(error.to_string()))?;
    GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or_else(|| failed("the range wraps around".into()))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn zero_memory_of_a_former_guest_is_emptied_where_it_was_touched() {
        let pages = 8 * HUGE_PAGE_PAGES;
        let layout = MemoryLayout::from_gpa_ranges(&[(0, pages * PAGE_SIZE)]).unwrap();
        let mut ram = GuestRam::anonymous(&layout).unwrap();
        let zero = Extent { first: Gfn(HUGE_PAGE_PAGES), pages: 6 * HUGE_PAGE_PAGES };
        ram.set_zero(vec![zero]);
        let touched = [0, HUGE_PAGE_PAGES, HUGE_PAGE_PAGES + 3, 6 * HUGE_PAGE_PAGES, pages - 1];
        let address = |page: u64| GuestAddress(page * PAGE_SIZE);
        touched.iter().for_each(|page| ram.view().write_obj(7_u8, address(*page)).unwrap());
        ram.forget();
        let kept = ram.keep_zero().unwrap();
        let bytes = touched.map(|page| ram.view().read_obj::<u8>(address(page)).unwrap());
        // Before Linux 6.7 nothing is kept.
        if !kept.is_empty() {
            assert_eq!((kept, bytes), (vec![zero], [7, 0, 0, 0, 7]));
        }
        assert_eq!(ram.keep_zero().unwrap(), [], "it is kept once");
    }
}
