//! File I/O straight into and out of guest memory, and the ioctls of block devices.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::devices::virtio::chain::{Buffers, Slice, touch};

/// `IOV_MAX`: the most pieces one system call takes.
pub const PIECES_MAX: usize = 1024;

// linux/fs.h: _IO(0x12, 119) and _IO(0x12, 127).
const BLKDISCARD: u64 = 0x1277;
const BLKZEROOUT: u64 = 0x127f;

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file into guest memory.
    Read,
    /// From guest memory into the file.
    Write,
}

/// Pieces of guest memory as the kernel takes them, without the part already transferred.
#[derive(Debug)]
pub struct Pieces<'m> {
    iovecs: Vec<libc::iovec>,
    first: usize,
    left: usize,
    memory: PhantomData<Slice<'m>>,
}

// SAFETY: the pointers lead to guest memory, which any thread may access (the guest does at the same time), and which
// lives as long as 'm.
unsafe impl Send for Pieces<'_> {}

impl<'m> Pieces<'m> {
    pub fn of(buffers: &Buffers<'m>) -> Self {
        let iovec =
            |slice: &Slice<'m>| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
        let iovecs = buffers.slices().iter().filter(|slice| !slice.is_empty()).map(iovec).collect();
        Pieces { iovecs, first: 0, left: buffers.len(), memory: PhantomData }
    }

    /// Bytes still to be transferred.
    pub fn left(&self) -> usize {
        self.left
    }

    /// The rest, at most [`PIECES_MAX`] pieces of it.
    pub fn iovecs(&self) -> &[libc::iovec] {
        let rest = &self.iovecs[self.first.min(self.iovecs.len())..];
        &rest[..rest.len().min(PIECES_MAX)]
    }

    /// Removes the next `done` bytes.
    pub fn advance(&mut self, done: usize) {
        let mut done = done.min(self.left);
        self.left -= done;
        while let Some(piece) = self.iovecs.get_mut(self.first).filter(|_| done > 0) {
            let part = piece.iov_len.min(done);
            piece.iov_base = piece.iov_base.wrapping_byte_add(part);
            piece.iov_len -= part;
            done -= part;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// The error of a failed transfer of the pieces: `error`, unless guest memory is lost, which ends the guest here.
    pub fn error(&self, error: io::Error) -> io::Error {
        if error.raw_os_error() == Some(libc::EFAULT) {
            // SAFETY: the pieces are guest memory that lives as long as 'm (`Pieces::of`, `outliving`), and `advance`
            // only shortens them.
            unsafe { touch_pieces(self.iovecs()) };
        }
        error
    }

    /// Lets the kernel work on the pieces after this call returns.
    ///
    /// # Safety
    /// Guest memory stays mapped until the kernel is done with the pieces and they are dropped.
    pub unsafe fn outliving(self) -> Pieces<'static> {
        Pieces { iovecs: self.iovecs, first: self.first, left: self.left, memory: PhantomData }
    }
}

/// Touches each page of `pieces`, as [`touch`] does.
///
/// # Safety
/// The pieces are memory that is mapped until this returns. Nothing is written.
pub unsafe fn touch_pieces(pieces: &[libc::iovec]) {
    // SAFETY: passed on to the caller.
    touch(pieces.iter().map(|piece| unsafe { VolatileSlice::<()>::new(piece.iov_base.cast(), piece.iov_len) }));
}

/// Transfers all of `pieces` from or to `offset`. Fails at the end of the file.
pub fn transfer(file: &File, direction: Direction, pieces: &mut Pieces<'_>, mut offset: u64) -> io::Result<()> {
    while pieces.left() > 0 {
        let fd = file.as_raw_fd();
        let iovecs = pieces.iovecs();
        let at = offset as libc::off64_t;
        let pointer = iovecs.as_ptr();
        let count = iovecs.len() as libc::c_int;
        let done = match direction {
            // SAFETY: the pieces are guest memory that lives as long as `pieces`; the guest may see the bytes while
            // they arrive, as with any device, and this process has no reference to them.
            Direction::Read => unsafe { libc::preadv64(fd, pointer, count, at) },
            // SAFETY: as above; the kernel only reads.
            Direction::Write => unsafe { libc::pwritev64(fd, pointer, count, at) },
        };
        match usize::try_from(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                pieces.advance(done);
                offset += done as u64;
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(pieces.error(error)),
            },
        }
    }
    Ok(())
}

/// Tells a block device that `[offset, offset + len)` is no longer needed.
pub fn discard(device: &File, offset: u64, len: u64) -> io::Result<()> {
    range_ioctl(device, BLKDISCARD, [offset, len])
}

/// Makes a block device read zeros in `[offset, offset + len)`.
pub fn zero_out(device: &File, offset: u64, len: u64) -> io::Result<()> {
    range_ioctl(device, BLKZEROOUT, [offset, len])
}

fn range_ioctl(device: &File, request: u64, range: [u64; 2]) -> io::Result<()> {
    // SAFETY: both requests read two u64 and write nothing.
    match unsafe { ioctl_with_ref(device, request, &range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
