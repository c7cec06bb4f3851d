//! The fault service: a thread of the VMM that fetches pages of lazy extents when the guest touches them.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Instant;

use serde::Serialize;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::fault_batches::{Batches, FaultBatch};
use super::files::Unreadable;
use crate::memory::Error;
use crate::memory::balloon_release::Released;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::stall::Activity;
use crate::memory::touches::{TouchLog, Touched};
use crate::snapshot::{Extent, Gfn, PAGE_SIZE, PageSource, is_zero};
use crate::sys::clock;
use crate::sys::lost;
use crate::sys::uffd::{Fault, Install, Touch, Uffd};
use crate::sys::worker::Worker;
use crate::tiering::fault::{FaultKind, FaultObserver, PageReader};

/// A run of lazy pages: its mapping, and the source of its bytes (`None`: zeros).
#[derive(Clone, Copy, Debug)]
pub struct LazyExtent {
    pub extent: Extent,
    pub host: usize,
    pub source: Option<PageSource>,
}

impl LazyExtent {
    /// Returns the host address of page `gfn` of the extent.
    pub fn host_of(&self, gfn: Gfn) -> usize {
        self.host + ((gfn.0 - self.extent.first.0) * PAGE_SIZE) as usize
    }

    /// Returns the source of the bytes of `part`, which lies in the extent.
    pub fn source_of(&self, part: Extent) -> Option<PageSource> {
        let offset = (part.first.0 - self.extent.first.0) * PAGE_SIZE;
        self.source.map(|source| PageSource { offset: source.offset + offset, ..source })
    }
}

/// Fault-ins that the service answered.
#[derive(Debug, Default)]
pub struct FaultCounters {
    read: AtomicU64,
    write: AtomicU64,
    write_protect: AtomicU64,
    installed: AtomicU64,
    ahead: AtomicU64,
    touches: TouchLog,
    batches: Mutex<Batches>,
}

/// [`FaultCounters`] at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FaultCounts {
    /// Faults on missing pages that were reads.
    pub read: u64,
    /// Faults on missing pages that were writes.
    pub write: u64,
    /// Writes to pages that had only been read (when recording).
    pub write_protect: u64,
    /// Pages installed in answer to faults, neighbours included.
    pub pages_installed: u64,
    /// Pages installed by the second thread, before they were touched.
    pub pages_ahead: u64,
}

impl FaultCounters {
    pub fn counts(&self) -> FaultCounts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FaultCounts {
            read: get(&self.read),
            write: get(&self.write),
            write_protect: get(&self.write_protect),
            pages_installed: get(&self.installed),
            pages_ahead: get(&self.ahead),
        }
    }

    /// Returns the times at which the service was busy.
    pub fn batches(&self) -> Vec<FaultBatch> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner).kept().to_vec()
    }

    /// Takes the pages that were touched since the last call.
    pub fn take_touched(&self) -> Touched {
        self.touches.take()
    }

    fn note_batch(&self, batch: FaultBatch) {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner).note(batch);
    }

    pub fn add_ahead(&self, pages: u64) {
        self.ahead.fetch_add(pages, Ordering::Relaxed);
    }
}

/// Told of every first touch, in order.
pub type Observer = Box<dyn FaultObserver>;

/// Everything that the fault service needs.
pub struct FaultWork {
    pub uffd: Arc<Uffd>,
    /// Ascending by host address.
    pub extents: Vec<LazyExtent>,
    /// Pages fetched around a fault: a power of two.
    pub fault_pages: u64,
    /// A fault is served with all lazy extents within the aligned block around it, not only the one that it hit.
    pub whole_blocks: bool,
    pub reader: Box<dyn PageReader>,
    pub observer: Option<Observer>,
    pub counters: Arc<FaultCounters>,
    /// Pages that the guest has given back; they are installed as zeros.
    pub released: Arc<Released>,
    /// The service notes its reads here, so that the stall watch notices a source that hangs.
    pub activity: Activity,
}

/// The running service. Stops when dropped.
pub struct FaultService {
    has_failed: Arc<AtomicBool>,
    worker: Worker,
}

impl FaultService {
    /// Starts serving. If a page cannot be read, the guest is ended with the reason: it never runs on wrong bytes, and
    /// never waits for ever.
    pub fn start(mut work: FaultWork, ending: Arc<EndingSignal>) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?;
        let asked = stop.try_clone().map_err(Error::os("copy an eventfd"))?;
        let has_failed = Arc::new(AtomicBool::new(false));
        let failed = has_failed.clone();
        let serve = move || {
            if let Err(why) = work.serve(&asked) {
                failed.store(true, Ordering::SeqCst);
                ending.end(why);
            }
        };
        // The counter is never full: the thread reads it, or has ended.
        let stop = move || drop(stop.write(1));
        let worker = Worker::start(Builder::new().name("faults".into()), stop, serve);
        Ok(FaultService { has_failed, worker: worker.map_err(Error::os("start the fault service"))? })
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

impl FaultWork {
    /// Serves until asked to stop. The error names the failed action and its page.
    fn serve(&mut self, stop: &EventFd) -> Result<(), Ending> {
        let failed = |error: io::Error| Ending::Failed(format!("The fault service cannot wait for faults: {error}"));
        let mut buffer = vec![0; (self.fault_pages * PAGE_SIZE) as usize];
        loop {
            self.uffd.wait(stop).map_err(failed)?;
            if stop.read().is_ok() {
                return Ok(());
            }
            let start_ns = clock::monotonic_ns();
            let before = self.counters.installed.load(Ordering::Relaxed);
            let faults = self.uffd.faults().map_err(failed)?;
            let count = faults.len() as u64;
            for fault in faults {
                self.answer(fault, &mut buffer)?;
            }
            if count > 0 {
                let pages = self.counters.installed.load(Ordering::Relaxed) - before;
                let end_ns = clock::monotonic_ns();
                self.counters.note_batch(FaultBatch { start_ns, end_ns, faults: count, pages });
            }
        }
    }

    fn answer(&mut self, fault: Fault, buffer: &mut [u8]) -> Result<(), Ending> {
        let Some((at, index)) = find(&self.extents, fault.address) else {
            let what = format!("A fault at host address {:#x} is in no lazy extent", fault.address);
            return Err(Ending::Failed(what));
        };
        let lazy = self.extents[at];
        let gfn = Gfn(lazy.extent.first.0 + index);
        let failed = |what: &str, error: io::Error| unavailable(what, &lazy, gfn, &error);
        let (counter, kind) = match fault.touch {
            Touch::Read => (&self.counters.read, FaultKind::Read),
            Touch::Write => (&self.counters.write, FaultKind::Write),
            Touch::WriteProtected => (&self.counters.write_protect, FaultKind::WriteProtect),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if fault.touch != Touch::WriteProtected && self.released.read().ever().contains(gfn) {
            return self.install_zero(&lazy, gfn).map_err(|error| failed("install", error));
        }
        self.counters.touches.note(gfn, fault.touch);
        if let Some(observer) = &mut self.observer {
            observer.fault(gfn, kind, clock::monotonic_ns());
        }
        if fault.touch == Touch::WriteProtected {
            return self.uffd.unprotect(fault.address, PAGE_SIZE as usize).map_err(|error| failed("unprotect", error));
        }
        let write_protect = self.observer.is_some() && fault.touch == Touch::Read;
        self.bring(&lazy, gfn, write_protect, buffer)?;
        if self.released.read().ever().contains(gfn) {
            return self.install_zero(&lazy, gfn).map_err(|error| failed("install", error));
        }
        if !self.whole_blocks {
            return Ok(());
        }
        // The guest already goes on; neighbours of the page are installed before a fault asks for them.
        let window = Extent { first: Gfn(gfn.0 / self.fault_pages * self.fault_pages), pages: self.fault_pages };
        for other in neighbours(&self.extents, at, window) {
            let first = other.extent.first.max(window.first);
            self.bring(&other, first, false, buffer)?;
        }
        Ok(())
    }

    /// Fetches the part of a lazy extent that lies in the block around `gfn`, and installs it.
    fn bring(&mut self, lazy: &LazyExtent, gfn: Gfn, write_protect: bool, buffer: &mut [u8]) -> Result<(), Ending> {
        let failed = |what: &str, error: io::Error| unavailable(what, lazy, gfn, &error);
        let block = block_around(lazy, gfn, self.fault_pages);
        let bytes = &mut buffer[..block.bytes() as usize];
        {
            let _reads = self.activity.reads(block, lazy.source_of(block));
            fetch(self.reader.as_mut(), lazy, block, bytes).map_err(|error| failed("fetch", error))?;
        }
        // Pages may have been given back during the read; none are given back while the record is locked.
        let books = self.released.read();
        for run in books.still_snapshot(block) {
            let start = ((run.first.0 - block.first.0) * PAGE_SIZE) as usize;
            let bytes = &bytes[start..start + run.bytes() as usize];
            let installed = if self.whole_blocks {
                self.install_sparse(lazy, run, bytes)
            } else {
                self.uffd.install(lazy.host_of(run.first), bytes, Install { wake: true, write_protect })
            };
            self.counters.installed.fetch_add(installed.map_err(|error| failed("install", error))?, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Installs a run of pages; zero pages get no memory of their own.
    fn install_sparse(&self, lazy: &LazyExtent, run: Extent, bytes: &[u8]) -> io::Result<u64> {
        let mut installed = 0;
        let pages: Vec<&[u8]> = bytes.chunks_exact(PAGE_SIZE as usize).collect();
        let mut first = run.first;
        for like in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let part = Extent { first, pages: like.len() as u64 };
            first = part.end();
            if is_zero(like[0]) {
                for page in 0..part.pages {
                    installed += u64::from(self.uffd.install_zero(lazy.host_of(Gfn(part.first.0 + page)))?);
                }
                continue;
            }
            let start = ((part.first.0 - run.first.0) * PAGE_SIZE) as usize;
            let how = Install { wake: true, write_protect: false };
            installed += self.uffd.install(lazy.host_of(part.first), &bytes[start..][..part.bytes() as usize], how)?;
        }
        Ok(installed)
    }

    /// Answers a fault on a page that the guest has given back. The snapshot is not touched, so no observer is told.
    fn install_zero(&self, lazy: &LazyExtent, gfn: Gfn) -> io::Result<()> {
        let installed = self.uffd.install_zero(lazy.host_of(gfn))?;
        self.counters.installed.fetch_add(u64::from(installed), Ordering::Relaxed);
        Ok(())
    }
}

/// Returns the reason for ending a guest whose page `gfn` cannot be read.
pub fn unavailable(doing: &str, lazy: &LazyExtent, gfn: Gfn, error: &io::Error) -> Ending {
    let offset = lazy.source_of(Extent { first: gfn, pages: 1 }).map_or(0, |source| source.offset);
    match error.get_ref().and_then(|cause| cause.downcast_ref::<Unreadable>()) {
        Some(source) => {
            Ending::MemoryLost(lost::sentence(gfn.gpa(), &source.path, offset, &lost::cause_of(&source.cause)))
        }
        None => Ending::Failed(format!("Cannot {doing} the page at guest-physical {:#x}: {error}", gfn.gpa())),
    }
}

/// Reads the bytes of `part` of a lazy extent.
pub fn fetch(reader: &mut dyn PageReader, lazy: &LazyExtent, part: Extent, bytes: &mut [u8]) -> io::Result<()> {
    match lazy.source_of(part) {
        None => bytes.fill(0),
        Some(source) => reader.read(source, bytes)?,
    }
    Ok(())
}

/// Returns the lazy extent at a host address, and the page within it.
fn find(extents: &[LazyExtent], address: usize) -> Option<(usize, u64)> {
    let at = extents.partition_point(|lazy| lazy.host <= address).checked_sub(1)?;
    let lazy = extents[at];
    let index = ((address - lazy.host) as u64) / PAGE_SIZE;
    (index < lazy.extent.pages).then_some((at, index))
}

/// Returns the lazy extents other than `at` that have pages of `window`.
fn neighbours(extents: &[LazyExtent], at: usize, window: Extent) -> Vec<LazyExtent> {
    let has = |lazy: &&LazyExtent| lazy.extent.intersection(&window).is_some();
    let before = extents[..at].iter().rev().take_while(has);
    let after = extents[at + 1..].iter().take_while(has);
    before.chain(after).copied().collect()
}

/// The aligned block of `pages` around `gfn`, cut to the extent.
fn block_around(lazy: &LazyExtent, gfn: Gfn, pages: u64) -> Extent {
    let start = Gfn(gfn.0 / pages * pages);
    Extent { first: start, pages }.intersection(&lazy.extent).unwrap_or(Extent { first: gfn, pages: 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_around_a_fault_stays_within_its_extent() {
        let lazy = LazyExtent { extent: Extent { first: Gfn(10), pages: 20 }, host: 0x10_0000, source: None };
        let block = |gfn, pages| {
            let Extent { first, pages } = block_around(&lazy, Gfn(gfn), pages);
            (first.0, pages)
        };
        assert_eq!(block(12, 1), (12, 1));
        assert_eq!(block(12, 16), (10, 6));
        assert_eq!(block(17, 16), (16, 14));
        assert_eq!(find(&[lazy], 0x10_0000 + 20 * 4096).map(|(_, index)| index), None);
        assert_eq!(find(&[lazy], 0x10_0000 + 19 * 4096 + 5), Some((0, 19)));
        assert!(find(&[lazy], 0xf_ffff).is_none());
    }

    #[test]
    fn neighbours_of_a_fault_are_the_lazy_extents_in_its_block() {
        let lazy = |first, pages| LazyExtent {
            extent: Extent { first: Gfn(first), pages },
            host: 0x10_0000 + first as usize * 4096,
            source: None,
        };
        let extents = [lazy(0, 16), lazy(17, 2), lazy(20, 1), lazy(30, 9), lazy(40, 1)];
        let of = |at| {
            let found = neighbours(&extents, at, Extent { first: Gfn(16), pages: 16 });
            found.iter().map(|lazy| lazy.extent.first.0).collect::<Vec<_>>()
        };
        assert_eq!(of(2), [17, 30]);
        assert_eq!(of(1), [20, 30]);
    }
}
