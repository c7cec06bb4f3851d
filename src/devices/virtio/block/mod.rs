//! The block device (VIRTIO 1.2, 5.2): a file or block device of the host as a disk of the guest.
//!
//! ```text
//!  queue ─► Request::parse ─► rate limiter ─► Sync:  preadv/pwritev on guest memory, answered at once
//!                                          └► Async: io_uring ─► eventfd ─► answered
//! ```
//!
//! No bytes are copied on the way. Any error of the image is an I/O error for the guest, never the end of the machine.

mod backing;
mod config_space;
mod limits;
mod request;
mod sys;
#[cfg(test)]
mod tests;
mod uring;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use vm_memory::{Bytes, GuestAddress};

use super::{Broken, Io, RateLimiter, RateLimiterState, RateLimits, Source, VirtioDevice, id};
use crate::devices::Error;
use crate::devices::virtio::device::decode;

pub use backing::Facts;
pub use sys::touch_pieces;

use backing::Backing;
use limits::SECTOR;
use request::{Disk, Operation, Request, Status};
use sys::{Direction, PIECES_MAX, Pieces};
use uring::{Completion, Job, Uring, Work};

const QUEUE_SIZES: [u16; 1] = [256];
const QUEUE: usize = 0;
const TOKEN_LIMITER: u32 = 0;
const TOKEN_DONE: u32 = 1;

/// The way in which requests reach the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Engine {
    /// One system call each, in the device thread.
    Sync,
    /// io_uring.
    Async,
}

/// The parameters of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockParams {
    pub id: String,
    pub path: PathBuf,
    pub read_only: bool,
    /// True if the guest can flush; if false, the device tells it that there is no cache.
    pub writeback: bool,
    pub engine: Engine,
    /// For the config only: the settings that the kernel's command line was made from.
    pub is_root: bool,
    pub partuuid: Option<String>,
}

/// A drive as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    pub params: BlockParams,
    pub limiter: RateLimiterState,
    pub facts: Facts,
}

/// The image that a restored drive gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image<'a> {
    /// The drive's own, which must not have changed.
    Own,
    /// Another one of the same size, or the drive's own in whatever state it is.
    Instead(&'a Path),
}

#[derive(Debug, Default)]
struct Counters {
    reads: u64,
    writes: u64,
    read_bytes: u64,
    write_bytes: u64,
    flushes: u64,
    discards: u64,
    failed: u64,
    refused: u64,
    engine_full: u64,
}

/// A drive.
pub struct Block {
    params: BlockParams,
    backing: Backing,
    /// The image that the drive was opened with.
    home: PathBuf,
    /// The ring of the asynchronous engine. Dropped before guest memory is: it waits for the kernel.
    uring: Option<Uring>,
    limiter: RateLimiter,
    counters: Counters,
    /// Chains were given back since the driver was last interrupted.
    given_back: bool,
}

impl Block {
    /// Opens a drive.
    ///
    /// # Errors
    /// If the image cannot be opened or locked, or the host refuses the engine.
    pub fn new(params: BlockParams, limits: RateLimits) -> Result<Self, Error> {
        Block::with_limiter(params, RateLimiter::new(limits)?)
    }

    /// Opens a drive again. The image must have its old size; `Image::Own` must be unchanged.
    ///
    /// # Errors
    /// As for [`new`](Self::new), and for an image other than the guest knows.
    pub fn restore(state: BlockState, image: Image<'_>) -> Result<Self, Error> {
        let BlockState { mut params, limiter, facts } = state;
        if let Image::Instead(path) = image {
            params.path = path.to_owned();
        }
        let block = Block::with_limiter(params, RateLimiter::restore(&limiter)?)?;
        check_fits(&block.params.id, &block.backing, &facts, image)?;
        Ok(block)
    }

    /// Checks that [`restore`](Self::restore) can open the image, and changes nothing. `held`: the images that this
    /// process has locked, and gives up before the restore.
    ///
    /// # Errors
    /// Those of the restore, but for the engine's.
    pub fn check(state: &BlockState, image: Image<'_>, held: &[Arc<File>]) -> Result<(), Error> {
        let BlockParams { id, path, read_only, .. } = &state.params;
        let path = match image {
            Image::Own => path,
            Image::Instead(path) => path,
        };
        let backing = Backing::open_unlocked(id, path, *read_only)?;
        if !held.iter().any(|file| backing.is(file)) {
            backing.lock(id)?;
        }
        check_fits(id, &backing, &state.facts, image)
    }

    fn with_limiter(params: BlockParams, limiter: RateLimiter) -> Result<Self, Error> {
        let backing = Backing::open(&params.id, &params.path, params.read_only)?;
        let uring = match params.engine {
            Engine::Sync => None,
            Engine::Async => Some(Uring::new(&params.id)?),
        };
        let home = params.path.clone();
        Ok(Block { params, backing, home, uring, limiter, counters: Counters::default(), given_back: false })
    }

    /// The drive's parameters, with its present path.
    pub fn params(&self) -> &BlockParams {
        &self.params
    }

    pub fn limits(&self) -> RateLimits {
        self.limiter.limits()
    }

    /// Replaces the limits that `limits` has.
    pub fn change_limits(&mut self, limits: RateLimits) {
        self.limiter.change(limits);
    }

    /// Opens another image. Requests in flight still go to the old one. The caller tells the guest.
    ///
    /// # Errors
    /// As for [`new`](Self::new); the drive then keeps its image.
    pub fn change_image(&mut self, path: &Path) -> Result<(), Error> {
        self.backing.replace(&self.params.id, path)?;
        self.params.path = self.backing.path().to_owned();
        Ok(())
    }

    /// The open image.
    pub fn image(&self) -> &Arc<File> {
        self.backing.file()
    }

    /// The size that the guest sees, in bytes.
    pub fn bytes(&self) -> u64 {
        self.backing.bytes()
    }

    fn facts(&self) -> io::Result<Facts> {
        self.backing.facts()
    }

    fn disk(&self) -> Disk {
        Disk { bytes: self.backing.bytes(), read_only: self.params.read_only, can_flush: self.params.writeback }
    }

    /// Serves the requests in the queue. Returns false if some have to stay there.
    fn serve(&mut self, io: &mut Io<'_>) -> Result<bool, Broken> {
        let mut go_on = true;
        while go_on {
            let Some(chain) = io.pop(QUEUE)? else { break };
            if self.uring.as_ref().is_some_and(|uring| !uring.has_room()) {
                self.counters.engine_full += 1;
                go_on = false;
            } else {
                let request = Request::parse(&chain, self.disk())?;
                go_on = self.limiter.admit(request.bytes());
                if go_on {
                    self.execute(request, io)?;
                }
            }
            if !go_on {
                io.unpop(QUEUE);
            }
        }
        self.submit()?;
        self.tell(io)?;
        Ok(go_on)
    }

    /// Answers a request, or puts it in flight.
    fn execute(&mut self, request: Request<'_>, io: &mut Io<'_>) -> Result<(), Broken> {
        let Request { head, status, operation } = request;
        let (result, written) = match operation {
            Operation::Transfer { direction, offset, data } => {
                self.count(direction, data.len());
                let written = if direction == Direction::Read { data.len() } else { 0 };
                // Marked before the bytes arrive, because they may arrive at any time from now on; captures happen when
                // no request is in flight.
                data.mark_written(written);
                let pieces = Pieces::of(&data);
                if let Some(uring) = self.uring.as_mut().filter(|_| data.slices().len() <= PIECES_MAX) {
                    // SAFETY: guest memory is unmapped only after the devices are gone, and dropping `uring` waits
                    // until the kernel is done.
                    let pieces = unsafe { pieces.outliving() };
                    let whole = if direction == Direction::Write { self.backing.check_not_cut() } else { Ok(()) };
                    let file = self.backing.file().clone();
                    let written = written as u32 + 1;
                    let work = Work::Transfer { direction, pieces, offset };
                    match whole {
                        Ok(()) => return start(uring, Job { head, status, written, file, work }),
                        Err(error) => (Err(error), 0),
                    }
                } else {
                    let mut pieces = pieces;
                    (self.backing.transfer(direction, &mut pieces, offset), written)
                }
            }
            Operation::Flush => {
                self.counters.flushes += 1;
                if let Some(uring) = &mut self.uring {
                    let file = self.backing.file().clone();
                    return start(uring, Job { head, status, written: 1, file, work: Work::Flush });
                }
                (self.backing.flush(), 0)
            }
            Operation::Discard(ranges) => {
                self.counters.discards += 1;
                (ranges.iter().try_for_each(|range| self.backing.discard(range.offset, range.len)), 0)
            }
            Operation::WriteZeroes(ranges) => {
                self.counters.discards += 1;
                let zero = |range: &request::Range| self.backing.write_zeroes(range.offset, range.len, range.may_unmap);
                (ranges.iter().try_for_each(zero), 0)
            }
            Operation::GetId(buffer) => (Ok(()), buffer.write_at(0, &self.serial())),
            Operation::Refused(refusal) => {
                self.counters.refused += 1;
                return self.give_back(head, status, refusal, 1, io);
            }
        };
        self.answer(Completion { head, status, written: written as u32 + 1, result }, io)
    }

    /// The disk's serial number: the start of its id, which is the same wherever the guest is restored.
    fn serial(&self) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let id = self.params.id.as_bytes();
        let len = id.len().min(serial.len());
        serial[..len].copy_from_slice(&id[..len]);
        serial
    }

    fn count(&mut self, direction: Direction, bytes: usize) {
        let (requests, sum) = match direction {
            Direction::Read => (&mut self.counters.reads, &mut self.counters.read_bytes),
            Direction::Write => (&mut self.counters.writes, &mut self.counters.write_bytes),
        };
        *requests += 1;
        *sum += bytes as u64;
    }

    /// Gives the result of a request to the driver.
    fn answer(&mut self, done: Completion, io: &mut Io<'_>) -> Result<(), Broken> {
        let status = match &done.result {
            Ok(()) => Status::Ok,
            Err(error) if is_unsupported(error) => Status::Unsupported,
            Err(error) => {
                // Only the first failure is logged: a disk that is full or gone would fill the log.
                if self.counters.failed == 0 {
                    let drive = &self.params.id;
                    let path = self.params.path.display();
                    tracing::warn!(drive, %path, %error, "A request of the guest failed; later ones are only counted");
                }
                self.counters.failed += 1;
                Status::IoError
            }
        };
        let written = if status == Status::Ok { done.written } else { 1 };
        self.give_back(done.head, done.status, status, written, io)
    }

    fn give_back(
        &mut self,
        head: u16,
        at: GuestAddress,
        status: Status,
        written: u32,
        io: &mut Io<'_>,
    ) -> Result<(), Broken> {
        io.memory.write_obj(status as u8, at)?;
        self.given_back = true;
        io.push(QUEUE, head, written)
    }

    /// Interrupts the driver if chains were given back.
    fn tell(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        if std::mem::take(&mut self.given_back) { io.signal(QUEUE) } else { Ok(()) }
    }

    fn submit(&mut self) -> Result<(), Broken> {
        let failed = |source| Broken::Host { doing: "give requests to io_uring", source };
        self.uring.as_mut().map_or(Ok(()), |uring| uring.submit().map_err(failed))
    }

    fn wait_all(&mut self) -> Result<Vec<Completion>, Broken> {
        let failed = |source| Broken::Host { doing: "wait for requests in flight", source };
        self.uring.as_mut().map_or(Ok(Vec::new()), |uring| uring.wait_all().map_err(failed))
    }

    fn answer_all(&mut self, done: Vec<Completion>, io: &mut Io<'_>) -> Result<(), Broken> {
        done.into_iter().try_for_each(|done| self.answer(done, io))?;
        self.tell(io)
    }
}

fn start(uring: &mut Uring, job: Job) -> Result<(), Broken> {
    let full = |_| Broken::Host { doing: "queue a request in io_uring", source: io::ErrorKind::WouldBlock.into() };
    uring.start(job).map_err(full)
}

/// Checks that drive `id`, which had these `facts`, can have the image: it must have its old size, and `Image::Own` be
/// unchanged.
fn check_fits(id: &str, backing: &Backing, facts: &Facts, image: Image<'_>) -> Result<(), Error> {
    let path = backing.path();
    let unfit = |what| Err(Error::Drive { id: id.to_owned(), path: path.to_owned(), what });
    let had = facts.len - facts.len % SECTOR;
    let has = backing.bytes();
    if had != has {
        return unfit(format!("the guest knows a disk of {had} bytes, this one has {has}"));
    }
    let failed = |source| Error::DriveFile { doing: "ask about", id: id.to_owned(), path: path.to_owned(), source };
    if image == Image::Own && backing.facts().map_err(failed)? != *facts {
        let what = "it was written to after the snapshot was taken, so the guest's memory and its disk no longer fit \
                    together; restore with another image (--drive ID=PATH, tvmm.drive_overrides), or name this one \
                    there if you know that it is right";
        return unfit(what.into());
    }
    Ok(())
}

/// True if the file system or device lacks the operation, which is not a failure of the disk.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS))
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        id::BLOCK
    }

    fn name(&self) -> &str {
        &self.params.id
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        features |= if self.params.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        if self.params.writeback {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(self.backing.bytes(), offset, data);
    }

    fn reset(&mut self) {
        // The driver may use its buffers for something else from now on. If waiting fails, dropping tries again.
        if let Err(error) = self.wait_all() {
            tracing::error!(drive = self.params.id, %error, "A reset of a drive is not complete");
        }
        self.given_back = false;
    }

    fn process_queue(&mut self, _queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain_while(QUEUE, |io| self.serve(io))
    }

    fn sources(&self) -> Vec<Source> {
        let done = self.uring.as_ref().map(|uring| Source { fd: uring.event_fd(), token: TOKEN_DONE });
        [Some(self.limiter.source(TOKEN_LIMITER)), done].into_iter().flatten().collect()
    }

    fn process_event(&mut self, token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        if token == TOKEN_DONE {
            let done = self.uring.as_mut().map(Uring::completed).unwrap_or_default();
            self.answer_all(done, io)?;
        }
        // Requests in the queue may have waited for this.
        self.process_queue(QUEUE, io)
    }

    fn quiesce(&mut self, io: &mut Io<'_>) -> Result<(), Broken> {
        let done = self.wait_all()?;
        self.answer_all(done, io)
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        let facts = self.facts().map_err(|_| postcard::Error::SerializeBufferFull)?;
        postcard::to_stdvec(&BlockState { params: self.params.clone(), limiter: self.limiter.save(), facts })
    }

    /// Requests in flight have been answered by `quiesce`. The image is that of the restore again; one that the guest
    /// can write is opened anew, because its caller has put a fresh copy there.
    fn rewind(&mut self, state: &[u8]) -> Result<(), Error> {
        let state: BlockState = decode("drive", state)?;
        self.wait_all().map_err(|_| Error::State { device: "drive", what: "its requests do not end" })?;
        let home = self.home.clone();
        if !self.params.read_only || self.params.path != home {
            self.change_image(&home)?;
        }
        self.limiter.rewind(&state.limiter);
        self.given_back = false;
        Ok(())
    }

    fn metrics(&self) -> serde_json::Value {
        let Counters { reads, writes, read_bytes, write_bytes, flushes, discards, failed, refused, engine_full } =
            self.counters;
        serde_json::json!({
            "read_count": reads,
            "write_count": writes,
            "read_bytes": read_bytes,
            "write_bytes": write_bytes,
            "flush_count": flushes,
            "discard_count": discards,
            "execute_fails": failed,
            "invalid_reqs_count": refused,
            "rate_limiter_throttled_events": self.limiter.throttled(),
            "io_engine_throttled_events": engine_full,
        })
    }
}
