//! Spilling: written pages of a guest that waits leave local memory for a file, and come back when they are touched.
//!
//! Anonymous memory behind a userfaultfd takes the place of the pages. A touch is answered by the thread of the spill,
//! which reads the group of 16 pages around it that left together, compares it with its checksum and installs it. The
//! touch may be the guest's, a device's, or the VMM's own, for example that of a snapshot.
//!
//! Pages that cannot be spilled: those that the fault service of the restore serves (a page has one userfaultfd), those
//! in place that only a promotion makes writable, and those that the guest has given back to the balloon at some time.

mod store;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Instant;

use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::balloon_release::Released;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::guest_ram::GuestRam;
use crate::memory::stall::Activity;
use crate::memory::touches::{TouchLog, Touched};
use crate::memory::{ChangeError, Error};
use crate::snapshot::{Extent, Fill, Gfn, GuestRange, PAGE_SIZE, PageSet, Placement, PlannedExtent};
use crate::sys::uffd::{Fault, FaultKinds, Install, Uffd};
use crate::sys::worker::Worker;
use store::{Back, GROUP_PAGES, Store, StoreCounts, bits_of, groups_of, read_ahead};

/// Counts of a spill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpillCounts {
    #[serde(flatten)]
    pub store: StoreCounts,
    /// Touches that waited for the file.
    pub faults: u64,
    /// Pages that came back.
    pub pages_back: u64,
    /// Bytes of the file that were read ahead of a touch, because their pages had come back the time before.
    pub ahead_bytes: u64,
}

/// The parts that the spill and its thread have in common.
struct Shared {
    uffd: Uffd,
    store: Mutex<Store>,
    faults: AtomicU64,
    pages_back: AtomicU64,
    ahead_bytes: Arc<AtomicU64>,
    touches: TouchLog,
    released: Arc<Released>,
    /// The ranges of guest memory and their host addresses.
    ranges: Vec<(GuestRange, usize)>,
}

/// The pages of one machine that were spilled, and the thread that brings them back. Dropped: the file is gone, and
/// pages that had not come back show zeros.
pub struct Spill {
    shared: Arc<Shared>,
    has_failed: Arc<AtomicBool>,
    worker: Worker,
}

impl Spill {
    /// Opens a file in `dir` for pages of `ram`, and starts to serve it. If a page cannot be read, the guest is ended
    /// with the reason by `ending`. `activity`: the thread notes its reads there.
    ///
    /// # Errors
    /// The file cannot be made, there is no userfaultfd or no thread.
    pub fn open(dir: &Path, ram: &GuestRam, activity: Activity, ending: Arc<EndingSignal>) -> Result<Spill, Error> {
        let failed = |source| Error::File { doing: "make a spill file in", path: PathBuf::from(dir), source };
        let shared = Arc::new(Shared {
            store: Mutex::new(Store::create(dir).map_err(failed)?),
            uffd: Uffd::open(FaultKinds::Missing).map_err(Error::Userfaultfd)?,
            faults: AtomicU64::new(0),
            pages_back: AtomicU64::new(0),
            ahead_bytes: Arc::default(),
            touches: TouchLog::default(),
            released: ram.released().clone(),
            ranges: ram.slots().map(|(range, host)| (range, host as usize)).collect(),
        });
        let stop = EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?;
        let asked = stop.try_clone().map_err(Error::os("copy an eventfd"))?;
        let has_failed = Arc::new(AtomicBool::new(false));
        let failed = has_failed.clone();
        let server = shared.clone();
        let serve = move || {
            if let Err(why) = server.serve(&asked, &activity) {
                failed.store(true, Ordering::SeqCst);
                ending.end(why);
            }
        };
        // The counter is never full: the thread reads it, or has ended.
        let stop = move || drop(stop.write(1));
        let worker = Worker::start(Builder::new().name("spill".into()), stop, serve);
        let worker = worker.map_err(Error::os("start the thread of the spill"))?;
        Ok(Spill { shared, has_failed, worker })
    }

    /// Bounds the file, from now on, to so many bytes.
    pub fn limit(&self, bytes_max: u64) {
        self.shared.store().limit(bytes_max);
    }

    /// Takes `pages` of `ram`, which this process has copies of, out of local memory: they are held until
    /// [`write`](Self::write) is called. No vCPU runs and all devices are quiet.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn take(&self, ram: &mut GuestRam, pages: &PageSet) -> Result<(), ChangeError> {
        for (group, runs) in groups_of(pages) {
            let mut bits = 0;
            let mut bytes = Vec::with_capacity((GROUP_PAGES * PAGE_SIZE) as usize);
            for run in &runs {
                // SAFETY: no vCPU runs and all devices are quiet (see above).
                bytes.extend_from_slice(unsafe { ram.bytes(*run) }.map_err(ChangeError::Kept)?);
                bits |= bits_of(*run);
            }
            let mut away = 0;
            let mut rest = &bytes[..];
            let vacated = runs.into_iter().try_for_each(|run| {
                let (of_run, after) = rest.split_at(run.bytes() as usize);
                self.vacate(ram, run, of_run)?;
                rest = after;
                away |= bits_of(run);
                Ok(())
            });
            self.shared.store().put(group, bits, away, bytes.into());
            vacated?;
        }
        Ok(())
    }

    /// Puts missing memory in the place of `run`, whose bytes are `bytes`.
    fn vacate(&self, ram: &mut GuestRam, run: Extent, bytes: &[u8]) -> Result<(), ChangeError> {
        let is_new = !ram.spilled().contains_run(run);
        if is_new {
            ram.map_anon(run).map_err(ChangeError::Kept)?;
            // From now on a rewind maps the plan's memory here again.
            ram.note_spilled(run);
        }
        if let Err(error) = ram.register(run, &self.shared.uffd, FaultKinds::Missing) {
            if is_new {
                // SAFETY: no vCPU runs and all devices are quiet (see `take`); the run is anonymous memory of its own.
                unsafe { ram.bytes_mut(run) }.map_err(ChangeError::Lost)?.copy_from_slice(bytes);
            }
            return Err(ChangeError::Kept(error));
        }
        ram.discard(run).map_err(ChangeError::Lost)
    }

    /// Writes the pages that are held. Those for which the file has no room come back to local memory, and their number
    /// is returned; if the file cannot be written, those that are not in it come back as well.
    ///
    /// # Errors
    /// Those of the file.
    pub fn write(&self) -> Result<u64, ChangeError> {
        let mut store = self.shared.store();
        let written = store.write_held();
        let mut stayed = 0;
        for gfn in store.held() {
            let brought = self.shared.install_block(&mut store, gfn);
            let brought = brought.map_err(Error::os("bring back pages that could not be spilled"));
            stayed += brought.map_err(ChangeError::Lost)?;
        }
        match written {
            Ok(_) => Ok(stayed),
            Err(source) => {
                let path = store.dir().to_path_buf();
                Err(ChangeError::Kept(Error::File { doing: "write the spill file in", path, source }))
            }
        }
    }

    /// Begins to take the file out of the page cache, where it costs as much memory as it has bytes.
    pub fn settle(&self) {
        let file = self.shared.store().file().clone();
        let settle = move || {
            let synced = rustix::fs::fdatasync(&*file);
            let dropped = synced.and_then(|()| rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed));
            if let Err(error) = dropped {
                tracing::warn!(%error, "The spill file stays in the page cache");
            }
        };
        // Without a thread the kernel writes the file later, and drops it when memory is short. The thread has nothing
        // but the file, and may outlive the machine.
        if let Ok(worker) = Worker::start(Builder::new().name("spill-sync".into()), || {}, settle) {
            worker.abandon(Instant::now());
        }
    }

    /// The directory of the file.
    pub fn dir(&self) -> PathBuf {
        self.shared.store().dir().to_path_buf()
    }

    pub fn counts(&self) -> SpillCounts {
        let store = self.shared.store();
        SpillCounts {
            store: store.counts(),
            ahead_bytes: self.shared.ahead_bytes.load(Ordering::Relaxed),
            faults: self.shared.faults.load(Ordering::Relaxed),
            pages_back: self.shared.pages_back.load(Ordering::Relaxed),
        }
    }

    /// Takes the pages that were touched while they were away, since the last call.
    pub fn take_touched(&self) -> Touched {
        self.shared.touches.take()
    }

    /// Returns whether a page could not be read: threads that wait for pages wait for ever.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst)
    }

    /// Asks the thread to end and waits for it until `deadline`. Returns whether it has ended.
    pub fn finish(&self, deadline: Instant) -> bool {
        self.worker.finish(deadline)
    }
}

/// Returns whether pages of `planned` that differ from the snapshot can be spilled from `ram`.
pub fn can_spill(planned: &PlannedExtent, ram: &GuestRam) -> bool {
    let is_served = matches!((planned.placement, planned.fill), (Placement::Lazy, _) | (_, Fill::Install));
    let is_guarded = planned.mapped().is_some() && ram.in_place().is_some();
    !is_served && !is_guarded
}

impl Shared {
    /// Serves until asked to stop. The error names the failed action and its page.
    fn serve(&self, stop: &EventFd, activity: &Activity) -> Result<(), Ending> {
        let failed = |error: io::Error| Ending::Failed(format!("The spill cannot wait for faults: {error}"));
        loop {
            self.uffd.wait(stop).map_err(failed)?;
            if stop.read().is_ok() {
                return Ok(());
            }
            for Fault { address, touch } in self.uffd.faults().map_err(failed)? {
                let gfn = self.gfn_at(address).ok_or_else(|| {
                    Ending::Failed(format!("A fault at host address {address:#x} is in no spilled memory"))
                })?;
                self.touches.note(gfn, touch);
                let _reads = activity.recalls(Extent { first: gfn, pages: 1 });
                self.answer(gfn, address).map_err(|error| {
                    let gpa = gfn.gpa();
                    Ending::MemoryLost(format!("Cannot bring back the page at guest-physical {gpa:#x}: {error}"))
                })?;
            }
        }
    }

    fn answer(&self, gfn: Gfn, address: usize) -> io::Result<()> {
        self.faults.fetch_add(1, Ordering::Relaxed);
        let pages = self.bring(gfn)?;
        self.pages_back.fetch_add(pages, Ordering::Relaxed);
        if self.released.read().ever().contains(gfn) {
            match self.uffd.install_zero(address) {
                Ok(_) => return Ok(()),
                // The release has mapped zeros of the kernel's over the page: its waiter is to look again.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        } else if pages > 0 {
            return Ok(());
        }
        // The page came back with a neighbour, after this fault was reported.
        self.uffd.wake(address, PAGE_SIZE as usize)
    }

    /// Brings back the pages that left together with `gfn`, because one of them was touched. Returns their number. With
    /// the first ones, the kernel begins to read those that came back the time before.
    fn bring(&self, gfn: Gfn) -> io::Result<u64> {
        let mut pages = 0;
        let mut store = self.store();
        let parts = store.bring(gfn, |back| self.install(back, &mut pages))?;
        let file = store.file().clone();
        drop(store);
        if !parts.is_empty() {
            self.begin_reading(file, parts);
        }
        Ok(pages)
    }

    /// Brings back the pages that left together with `gfn`. Returns their number.
    fn install_block(&self, store: &mut Store, gfn: Gfn) -> io::Result<u64> {
        let mut pages = 0;
        store.bring_one(gfn, |back| self.install(back, &mut pages))?;
        Ok(pages)
    }

    /// Installs pages that come back, and adds their number to `pages`.
    fn install(&self, Back { run, bytes }: Back<'_>, pages: &mut u64) -> io::Result<()> {
        // Nothing is given back while the record is locked.
        let books = self.released.read();
        for part in books.still_snapshot(run) {
            let Some(host) = self.host_of(part.first) else { continue };
            let start = ((part.first.0 - run.first.0) * PAGE_SIZE) as usize;
            let bytes = &bytes[start..start + part.bytes() as usize];
            *pages += self.uffd.install(host, bytes, Install { wake: true, write_protect: false })?;
        }
        Ok(())
    }

    /// Lets a thread of its own read parts of the file ahead: the kernel may make it wait for the disk, and the next
    /// touch must not. The thread has nothing but the file, and may outlive the machine.
    fn begin_reading(&self, file: Arc<File>, parts: Vec<Range<u64>>) {
        let ahead_bytes = self.ahead_bytes.clone();
        let read = move || {
            ahead_bytes.fetch_add(read_ahead(&file, &parts), Ordering::Relaxed);
        };
        // Without a thread, each touch waits for its own read.
        if let Ok(worker) = Worker::start(Builder::new().name("spill-ahead".into()), || {}, read) {
            worker.abandon(Instant::now());
        }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gfn_at(&self, address: usize) -> Option<Gfn> {
        let in_range = |(range, host): &&(GuestRange, usize)| (*host..*host + range.len as usize).contains(&address);
        let (range, host) = self.ranges.iter().find(in_range)?;
        Some(Gfn((range.gpa + (address - host) as u64) / PAGE_SIZE))
    }

    fn host_of(&self, gfn: Gfn) -> Option<usize> {
        let gpa = gfn.gpa();
        let in_range = |(range, _): &&(GuestRange, usize)| (range.gpa..range.gpa + range.len).contains(&gpa);
        let (range, host) = self.ranges.iter().find(in_range)?;
        Some(host + (gpa - range.gpa) as usize)
    }
}
