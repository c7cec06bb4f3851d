//! Writes the pages of a live capture on a thread of its own. The main loop, which also carries the guest's input and
//! answers requests, does not wait for the disk: it copies pages into batches and passes these on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::write_extent;
use crate::snapshot::{Extent, SnapshotWriter};
use crate::sys::worker::Worker;
use crate::vmm::error::Error;

/// Pages of a batch: the guest waits for the main loop while one is copied.
pub const BATCH_PAGES: u64 = 128;
/// Batches that wait to be written, at most.
const BATCHES: usize = 16;
/// Time for a write to end when the capture is given up. A disk that hangs is left alone after it.
const GIVE_UP: Duration = Duration::from_secs(3);

/// Pages, and their bytes one after the other.
#[derive(Default)]
pub struct Batch {
    extents: Vec<Extent>,
    bytes: Vec<u8>,
}

impl Batch {
    /// Adds the pages of `extent`. Returns the place for their bytes.
    pub fn add(&mut self, extent: Extent) -> &mut [u8] {
        let before = self.bytes.len();
        self.extents.push(extent);
        self.bytes.resize(before + extent.bytes() as usize, 0);
        &mut self.bytes[before..]
    }

    fn clear(&mut self) {
        self.extents.clear();
        self.bytes.clear();
    }

    fn write(&self, writer: &mut SnapshotWriter) -> Result<(), Error> {
        let mut rest = self.bytes.as_slice();
        self.extents.iter().try_for_each(|extent| {
            let (bytes, after) = rest.split_at(extent.bytes() as usize);
            rest = after;
            write_extent(*extent, bytes, writer)
        })
    }
}

/// The writer of a live capture, and its thread.
pub struct PageWriter {
    /// Locked by the thread while it writes a batch. Empty after an error.
    writer: Arc<Mutex<Option<SnapshotWriter>>>,
    batches: Sender<Batch>,
    written: Receiver<Result<Batch, Error>>,
    /// Batches that are being written, or wait for that.
    under_way: usize,
    free: Vec<Batch>,
    thread: Option<Worker>,
}

impl PageWriter {
    /// Starts the thread. It makes `event` readable whenever it has written a batch, or has failed.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(writer: SnapshotWriter, event: Arc<EventFd>) -> Result<PageWriter, Error> {
        let writer = Arc::new(Mutex::new(Some(writer)));
        let (batches, to_write) = channel::<Batch>();
        let (done, written) = channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let work = Writing { writer: writer.clone(), event, is_over: is_over.clone() };
        let stop = move || is_over.store(true, Ordering::Relaxed);
        let thread = Worker::start(Builder::new().name("live-snapshot".into()), stop, move || {
            to_write.iter().map_while(|batch| work.write(batch)).for_each(|result| {
                // An error means that the capture was given up.
                let _ = done.send(result);
                work.wake();
            });
        });
        let thread = thread.map_err(Error::os("start the thread that writes the snapshot"))?;
        Ok(PageWriter { writer, batches, written, under_way: 0, free: Vec::new(), thread: Some(thread) })
    }

    /// An empty batch; `None` while too many wait to be written.
    ///
    /// # Errors
    /// That of a write. Nothing can be written any more.
    pub fn free_batch(&mut self) -> Result<Option<Batch>, Error> {
        self.collect()?;
        if self.under_way == BATCHES {
            return Ok(None);
        }
        Ok(Some(self.free.pop().unwrap_or_default()))
    }

    /// Passes a batch to the thread.
    pub fn write(&mut self, batch: Batch) {
        self.under_way += 1;
        // An error means that the thread has failed: `collect` says why.
        let _ = self.batches.send(batch);
    }

    /// Returns the writer if all batches are written, and `None` before.
    ///
    /// # Errors
    /// That of a write. Nothing can be written any more.
    pub fn idle(&mut self) -> Result<Option<Idle<'_>>, Error> {
        self.collect()?;
        Ok((self.under_way == 0).then(|| Idle(lock(&self.writer))))
    }

    /// Gives the memory of batches back. Call when no more are needed.
    pub fn free_memory(&mut self) {
        self.free = Vec::new();
    }

    /// Takes the writer. Call when all batches are written; the thread ends by itself.
    ///
    /// # Errors
    /// The thread has failed.
    pub fn into_writer(mut self) -> Result<SnapshotWriter, Error> {
        let writer = lock(&self.writer).take();
        if let Some(thread) = self.thread.take() {
            thread.abandon(Instant::now());
        }
        writer.ok_or_else(gone)
    }

    fn collect(&mut self) -> Result<(), Error> {
        loop {
            match self.written.try_recv() {
                Ok(result) => {
                    let mut batch = result?;
                    batch.clear();
                    self.under_way -= 1;
                    self.free.push(batch);
                }
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err(gone()),
            }
        }
    }
}

impl Drop for PageWriter {
    /// Ends the thread, which may be waiting for a batch or for the disk.
    fn drop(&mut self) {
        self.batches = channel().0;
        if let Some(thread) = self.thread.take() {
            thread.abandon(Instant::now() + GIVE_UP);
        }
    }
}

/// The writer while the thread has nothing to write.
pub struct Idle<'a>(MutexGuard<'a, Option<SnapshotWriter>>);

impl Idle<'_> {
    pub fn next_pass(&mut self) {
        self.0.iter_mut().for_each(SnapshotWriter::next_pass);
    }
}

/// The thread's part.
struct Writing {
    writer: Arc<Mutex<Option<SnapshotWriter>>>,
    event: Arc<EventFd>,
    is_over: Arc<AtomicBool>,
}

impl Writing {
    /// Writes a batch. After an error the files of the snapshot are removed. `None` if the capture was given up.
    fn write(&self, batch: Batch) -> Option<Result<Batch, Error>> {
        let mut writer = lock(&self.writer);
        if self.is_over.load(Ordering::Relaxed) {
            return None;
        }
        let written = writer.as_mut().ok_or_else(gone).and_then(|writer| batch.write(writer));
        if written.is_err() {
            *writer = None;
        }
        Some(written.map(|()| batch))
    }

    fn wake(&self) {
        // A counter that is full is readable as well.
        let _ = self.event.write(1);
    }
}

impl Drop for Writing {
    /// Also after a panic, so that the main loop finds out.
    fn drop(&mut self) {
        self.wake();
    }
}

fn gone() -> Error {
    Error::Os { doing: "write the snapshot", source: std::io::Error::other("the thread that writes it has ended") }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
