//! The asynchronous engine: requests go to the kernel through an io_uring, and an eventfd reports that some are done.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::sys::{self, Direction, Pieces};
use crate::devices::Error;

/// Requests in flight at once; more wait in the driver's queue.
pub const DEPTH: usize = 128;

/// The kernel's part of a request.
#[derive(Debug)]
pub enum Work {
    Transfer { direction: Direction, pieces: Pieces<'static>, offset: u64 },
    Flush,
}

/// A request in flight.
#[derive(Debug)]
pub struct Job {
    pub head: u16,
    pub status: GuestAddress,
    /// Bytes that are written to guest memory on success.
    pub written: u32,
    pub file: Arc<File>,
    pub work: Work,
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    pub head: u16,
    pub status: GuestAddress,
    pub written: u32,
    pub result: io::Result<()>,
}

/// The ring and the requests in flight. Dropping it waits for them.
pub struct Uring {
    ring: IoUring,
    event: EventFd,
    /// By the number that the kernel gives back with the result.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
}

impl Uring {
    /// Makes the ring for drive `id`.
    ///
    /// # Errors
    /// [`Error::IoUring`] where the host does not permit it.
    pub fn new(id: &str) -> Result<Self, Error> {
        let failed = |source| Error::IoUring { id: id.to_owned(), source };
        let ring = IoUring::new(DEPTH as u32).map_err(failed)?;
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?;
        ring.submitter().register_eventfd(event.as_raw_fd()).map_err(failed)?;
        Ok(Uring { ring, event, jobs: (0..DEPTH).map(|_| None).collect(), free: (0..DEPTH).rev().collect() })
    }

    /// Readable when requests are done.
    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a request; [`submit`](Self::submit) gives it to the kernel. Returns the job if there is no room for it.
    pub fn start(&mut self, job: Job) -> Result<(), Job> {
        let Some(slot) = self.free.pop() else { return Err(job) };
        let entry = entry(&job).user_data(slot as u64);
        self.jobs[slot] = Some(job);
        // SAFETY: the entry points into the job, which stays in its slot, with its list of pieces where it is on the
        // heap, until the kernel has given the number back; what the pieces point to outlives the ring (the contract
        // of `Pieces::outliving`), which waits for all of them when it is dropped.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.free.push(slot);
            return self.jobs[slot].take().map_or(Ok(()), Err);
        }
        Ok(())
    }

    /// Gives the queued requests to the kernel.
    pub fn submit(&mut self) -> io::Result<()> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => result.map(drop)?,
            }
        }
    }

    /// Takes the requests that are done.
    pub fn completed(&mut self) -> Vec<Completion> {
        let _ = self.event.read();
        let results: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        let mut done = Vec::with_capacity(results.len());
        for (slot, result) in results {
            let slot = slot as usize;
            if let Some(job) = self.jobs.get_mut(slot).and_then(Option::take) {
                self.free.push(slot);
                done.push(job.finish(result));
            }
        }
        done
    }

    /// Removes `count` free places.
    #[cfg(test)]
    pub fn take_places_for_test(&mut self, count: usize) {
        self.free.truncate(DEPTH - count);
    }

    /// Waits until nothing is in flight; returns the requests done by then.
    pub fn wait_all(&mut self) -> io::Result<Vec<Completion>> {
        let mut done = self.completed();
        while self.jobs.iter().any(Option::is_some) {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => done.extend(self.completed()),
            }
        }
        Ok(done)
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if let Err(error) = self.wait_all() {
            // Guest memory is about to be unmapped, and the kernel may still write to its address.
            tracing::error!(%error, "Requests in flight cannot be waited for");
            std::process::abort();
        }
    }
}

fn entry(job: &Job) -> squeue::Entry {
    let fd = types::Fd(job.file.as_raw_fd());
    match &job.work {
        Work::Transfer { direction, pieces, offset } => {
            let iovecs = pieces.iovecs();
            let pointer = iovecs.as_ptr();
            let count = iovecs.len() as u32;
            match direction {
                Direction::Read => opcode::Readv::new(fd, pointer, count).offset(*offset).build(),
                Direction::Write => opcode::Writev::new(fd, pointer, count).offset(*offset).build(),
            }
        }
        Work::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

impl Job {
    /// Turns the kernel's result into the request's. Finishes a partial transfer here, because that is rare.
    fn finish(self, result: i32) -> Completion {
        let Job { head, status, written, file, work } = self;
        let again = matches!(-result, libc::EINTR | libc::EAGAIN);
        let result = match (work, usize::try_from(result)) {
            (Work::Transfer { pieces, .. }, Err(_)) if !again => {
                Err(pieces.error(io::Error::from_raw_os_error(-result)))
            }
            (Work::Flush, Err(_)) if !again => Err(io::Error::from_raw_os_error(-result)),
            (Work::Flush, Ok(_)) => Ok(()),
            (Work::Flush, Err(_)) => file.sync_data(),
            (Work::Transfer { pieces, .. }, Ok(0)) if pieces.left() > 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            (Work::Transfer { direction, mut pieces, offset }, done) => {
                let done = done.unwrap_or(0);
                pieces.advance(done);
                sys::transfer(&file, direction, &mut pieces, offset + done as u64)
            }
        };
        Completion { head, status, written, result }
    }
}
