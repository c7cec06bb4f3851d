//! Persistent memory (VIRTIO 1.2, 5.19): an image that the guest sees as memory, without a copy of its own.
//!
//! The builder of the machine maps the image shared into the guest's physical address space (see [`Pmem::image`]), so
//! that all guests of one image use the same pages of the host's page cache. The device itself only reports the
//! address, and makes the guest's writes durable on request.

mod image;
mod params;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Broken, Io, RateLimiter, RateLimiterState, RateLimits, Source, VirtioDevice, id};
use crate::devices::Error;
use crate::snapshot::HUGE_PAGE_SIZE;

pub use params::PmemParams;

use image::{Facts, Image};

const QUEUE_SIZES: [u16; 1] = [256];
const QUEUE: usize = 0;
const TOKEN_LIMITER: u32 = 0;

/// The only request (VIRTIO 1.2, 5.19.6), and its answers.
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = 1;
const RESPONSE: usize = 4;

/// The step in which guests map memory; so do hosts that have huge pages.
pub const ALIGNMENT: u64 = HUGE_PAGE_SIZE;

/// A pmem device as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemState {
    pub params: PmemParams,
    limiter: RateLimiterState,
    facts: Facts,
}

impl PmemState {
    /// Bytes of guest-physical address space that it takes.
    pub fn size(&self) -> u64 {
        self.facts.len.next_multiple_of(ALIGNMENT)
    }
}

/// The mapping that the device needs.
#[derive(Clone, Debug)]
pub struct PmemImage {
    pub file: Arc<File>,
    /// Bytes of the file.
    pub len: u64,
    /// Bytes of the mapping: whole 2 MiB, zeros behind the file's end.
    pub size: u64,
    pub gpa: u64,
    pub read_only: bool,
}

#[derive(Debug, Default)]
struct Counters {
    flushes: u64,
    failed: u64,
    refused: u64,
}

/// The device.
pub struct Pmem {
    params: PmemParams,
    image: Image,
    limiter: RateLimiter,
    counters: Counters,
}

impl Pmem {
    /// Opens an image and locks it: exclusively if the guest may write it, else together with other readers.
    ///
    /// # Errors
    /// The image cannot be opened, is no file, is empty or too large, or another process has locked it.
    pub fn new(params: PmemParams, limits: RateLimits) -> Result<Self, Error> {
        Pmem::with_limiter(params, RateLimiter::new(limits)?)
    }

    /// Opens an image again. It must have its old size and not have been written since. If `instead` names a file,
    /// which may be the same one, only the size counts.
    ///
    /// # Errors
    /// As for [`new`](Self::new), and for an image other than the guest knows.
    pub fn restore(state: PmemState, instead: Option<&Path>) -> Result<Self, Error> {
        let PmemState { mut params, limiter, facts } = state;
        if let Some(path) = instead {
            params.path = path.to_owned();
        }
        let pmem = Pmem::with_limiter(params, RateLimiter::restore(&limiter)?)?;
        pmem.image.check(&pmem.params, facts, instead.is_none())?;
        Ok(pmem)
    }

    fn with_limiter(params: PmemParams, limiter: RateLimiter) -> Result<Self, Error> {
        let image = Image::open(&params)?;
        Ok(Pmem { params, image, limiter, counters: Counters::default() })
    }

    pub fn params(&self) -> &PmemParams {
        &self.params
    }

    pub fn limits(&self) -> RateLimits {
        self.limiter.limits()
    }

    pub fn change_limits(&mut self, limits: RateLimits) {
        self.limiter.change(limits);
    }

    /// The mapping that the device needs.
    pub fn image(&self) -> PmemImage {
        let len = self.image.len();
        let gpa = self.params.gpa;
        let read_only = self.params.read_only;
        PmemImage { file: self.image.file().clone(), len, size: self.size(), gpa, read_only }
    }

    /// Bytes of guest-physical address space that it takes.
    pub fn size(&self) -> u64 {
        self.image.len().next_multiple_of(ALIGNMENT)
    }

    /// Serves requests until the queue is empty, or the limit is reached: then it returns false.
    fn serve(&mut self, io: &mut Io<'_>) -> Result<bool, Broken> {
        let mut admitted = true;
        while let Some(chain) = io.pop(QUEUE)? {
            // As in Firecracker: a flush is one operation, of as many bytes as the image has.
            if !self.limiter.admit(self.image.len()) {
                io.unpop(QUEUE);
                admitted = false;
                break;
            }
            let answer = match chain.readable.read_obj::<u32>(0).map(u32::from_le) {
                Ok(FLUSH) => self.flush(),
                _ => {
                    self.counters.refused += 1;
                    FAILED
                }
            };
            if chain.writable.len() < RESPONSE {
                return Err(Broken::Chain("it has no room for an answer"));
            }
            chain.writable.write_at(0, &answer.to_le_bytes());
            io.push(QUEUE, chain.head, RESPONSE as u32)?;
        }
        io.signal(QUEUE)?;
        Ok(admitted)
    }

    /// Makes the guest's writes durable.
    fn flush(&mut self) -> u32 {
        self.counters.flushes += 1;
        match self.sync() {
            Ok(()) => DONE,
            Err(error) => {
                self.counters.failed += 1;
                tracing::warn!(id = self.params.id, %error, "A pmem image cannot be synced");
                FAILED
            }
        }
    }

    fn sync(&self) -> std::io::Result<()> {
        if self.params.read_only { Ok(()) } else { self.image.file().sync_all() }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        id::PMEM
    }

    fn name(&self) -> &str {
        &self.params.id
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    /// `start`, `size` (VIRTIO 1.2, 5.19.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 16];
        space[..8].copy_from_slice(&self.params.gpa.to_le_bytes());
        space[8..].copy_from_slice(&self.size().to_le_bytes());
        let start = usize::try_from(offset).unwrap_or(space.len()).min(space.len());
        let len = data.len().min(space.len() - start);
        data[..len].copy_from_slice(&space[start..start + len]);
    }

    fn reset(&mut self) {}

    fn process_queue(&mut self, _queue: usize, io: &mut Io<'_>) -> Result<(), Broken> {
        io.drain_while(QUEUE, |io| self.serve(io))
    }

    fn sources(&self) -> Vec<Source> {
        vec![self.limiter.source(TOKEN_LIMITER)]
    }

    fn process_event(&mut self, _token: u32, io: &mut Io<'_>) -> Result<(), Broken> {
        self.process_queue(QUEUE, io)
    }

    /// Syncs, so that the disk has the image as the snapshot knows it, and later writes of this guest change its time.
    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        self.sync().map_err(|source| Broken::Host { doing: "sync a pmem image", source })
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        let facts = self.image.facts().map_err(|_| postcard::Error::SerializeBufferFull)?;
        postcard::to_stdvec(&PmemState { params: self.params.clone(), limiter: self.limiter.save(), facts })
    }

    fn metrics(&self) -> serde_json::Value {
        serde_json::json!({
            "flush_count": self.counters.flushes,
            "flush_fails": self.counters.failed,
            "invalid_reqs_count": self.counters.refused,
            "rate_limiter_throttled_events": self.limiter.throttled(),
        })
    }
}
