//! The image of a drive: a file or a block device of the host, locked while it is in use.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use super::limits::SECTOR;
use super::sys::{self, Direction, Pieces};
use crate::devices::Error;

/// Facts that tell whether a file has changed: its length and the time of its last write. For a block device only its
/// length, because it has no such time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Bytes.
    pub len: u64,
    /// Seconds and nanoseconds since the epoch; 0 for a block device.
    pub mtime: (i64, i64),
}

/// An open image.
#[derive(Debug)]
pub struct Backing {
    file: Arc<File>,
    path: PathBuf,
    read_only: bool,
    is_block_device: bool,
    /// The size that the guest sees: whole sectors.
    bytes: u64,
    inode: (u64, u64),
}

impl Backing {
    /// Opens the image of drive `id` and locks it: exclusively if it is to be written, else together with other
    /// readers. The lock (flock(2)) ends with the process.
    ///
    /// # Errors
    /// The image cannot be opened, is no file or block device, has less than one sector, or another process has locked
    /// it.
    pub fn open(id: &str, path: &Path, read_only: bool) -> Result<Self, Error> {
        let backing = Backing::open_unlocked(id, path, read_only)?;
        backing.lock(id)?;
        Ok(backing)
    }

    /// Opens the image of drive `id`, to be looked at.
    ///
    /// # Errors
    /// As for [`open`](Self::open), but for locks.
    pub fn open_unlocked(id: &str, path: &Path, read_only: bool) -> Result<Self, Error> {
        let failed = |doing| move |source| Error::DriveFile { doing, id: id.into(), path: path.into(), source };
        let unfit = |what: &str| Error::Drive { id: id.into(), path: path.into(), what: what.into() };
        // Without the flag, opening a FIFO would wait for its other end.
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
        let file = file.map_err(failed("open"))?;
        let metadata = file.metadata().map_err(failed("ask about"))?;
        let is_block_device = metadata.file_type().is_block_device();
        if !metadata.is_file() && !is_block_device {
            return Err(unfit("it is neither a file nor a block device"));
        }
        // On a file the flag means nothing but to io_uring, which would then refuse to wait for the disk.
        rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|error| failed("set up")(error.into()))?;
        let len = length(&file, is_block_device).map_err(failed("ask for the size of"))?;
        let bytes = len - len % SECTOR;
        if bytes == 0 {
            return Err(unfit("it has less than one sector of 512 bytes"));
        }
        if bytes != len {
            let path = path.display();
            tracing::warn!(drive = id, %path, len, bytes, "The end of an image is no whole sector and is left out");
        }
        let inode = (metadata.dev(), metadata.ino());
        Ok(Backing { file: Arc::new(file), path: path.to_owned(), read_only, is_block_device, bytes, inode })
    }

    /// Locks the image of drive `id` as [`open`](Self::open) does.
    ///
    /// # Errors
    /// Another process has locked it.
    pub fn lock(&self, id: &str) -> Result<(), Error> {
        let path = &self.path;
        let unfit = |what: &str| Error::Drive { id: id.into(), path: path.clone(), what: what.into() };
        lock(&self.file, self.read_only).map_err(|error| match error {
            TryLockError::WouldBlock if self.read_only => unfit("another process has locked it to write to it"),
            TryLockError::WouldBlock => unfit(
                "another process has locked it; a second writer would destroy its file system: stop the other VM, or \
                 use a copy",
            ),
            TryLockError::Error(source) => {
                Error::DriveFile { doing: "lock", id: id.into(), path: path.clone(), source }
            }
        })
    }

    /// Returns whether `file` is this image.
    pub fn is(&self, file: &File) -> bool {
        file.metadata().is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.inode)
    }

    /// Opens `path` in place of this image. It may be the same file, which then may have another size.
    ///
    /// # Errors
    /// As for [`open`](Self::open); this image is then still open.
    pub fn replace(&mut self, id: &str, path: &Path) -> Result<(), Error> {
        let same = std::fs::metadata(path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.inode);
        if !same {
            *self = Backing::open(id, path, self.read_only)?;
            return Ok(());
        }
        let len = length(&self.file, self.is_block_device);
        let failed =
            |source| Error::DriveFile { doing: "ask for the size of", id: id.into(), path: path.into(), source };
        let len = len.map_err(failed)?;
        if len < SECTOR {
            let what = "it has less than one sector of 512 bytes".into();
            return Err(Error::Drive { id: id.into(), path: path.into(), what });
        }
        (self.bytes, self.path) = (len - len % SECTOR, path.to_owned());
        Ok(())
    }

    /// Puts a device that fails in place of the image, as one that is a block device.
    #[cfg(test)]
    pub fn replace_file_for_test(&mut self, file: File) {
        (self.file, self.is_block_device) = (Arc::new(file), true);
    }

    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size that the guest sees, in bytes: a multiple of the sector size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The facts by which a later check sees that the image has not changed.
    pub fn facts(&self) -> io::Result<Facts> {
        let len = length(&self.file, self.is_block_device)?;
        let metadata = self.file.metadata()?;
        let mtime = if self.is_block_device { (0, 0) } else { (metadata.mtime(), metadata.mtime_nsec()) };
        Ok(Facts { len, mtime })
    }

    /// Checks that the file still has all of the guest's disk. A write to a file that was cut would make it longer
    /// again, with zeros where the guest's data was.
    pub fn check_not_cut(&self) -> io::Result<()> {
        let cut = !self.is_block_device && self.file.metadata()?.len() < self.bytes;
        if cut { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Reads or writes at `offset`.
    pub fn transfer(&self, direction: Direction, pieces: &mut Pieces<'_>, offset: u64) -> io::Result<()> {
        if direction == Direction::Write {
            self.check_not_cut()?;
        }
        sys::transfer(&self.file, direction, pieces, offset)
    }

    /// Makes all writes durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives space back. Reads there are undefined afterwards.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_not_cut()?;
        if self.is_block_device {
            return sys::discard(&self.file, offset, len);
        }
        self.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    /// Makes a range read as zeros, and gives its space back if it `may_unmap`.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_not_cut()?;
        if self.is_block_device {
            return sys::zero_out(&self.file, offset, len);
        }
        let way = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        self.fallocate(way, offset, len)
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        loop {
            match rustix::fs::fallocate(&*self.file, mode | FallocateFlags::KEEP_SIZE, offset, len) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

/// Locks without waiting. On a file system without locks it does nothing; Firecracker never locks.
fn lock(file: &File, shared: bool) -> Result<(), TryLockError> {
    let locked = if shared { file.try_lock_shared() } else { file.try_lock() };
    match locked {
        Err(TryLockError::Error(error)) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOLCK)) => {
            tracing::warn!(%error, "The file system of a drive has no locks: nothing keeps two VMs from writing to it");
            Ok(())
        }
        locked => locked,
    }
}

fn length(file: &File, is_block_device: bool) -> io::Result<u64> {
    if is_block_device {
        // stat(2) says 0 for it. All I/O names its offset, so moving the file's own does no harm.
        return Ok(rustix::fs::seek(file, SeekFrom::End(0))?);
    }
    Ok(file.metadata()?.len())
}
