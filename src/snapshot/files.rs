//! Small file helpers that put the path into the error and bound their reads.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;

use super::{Error, Result};

/// Opens a regular file for reading and gives its length in bytes.
///
/// Never blocks: a FIFO put where a file is expected is refused, not waited for.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    let flags = OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("stat", path))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile { path: path.to_path_buf() });
    }
    Ok((file, metadata.len()))
}

/// The whole content of a regular file of at most `limit` bytes.
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, len) = open_regular(path)?;
    let too_large = |len| Err(Error::TooLarge { object: path.display().to_string(), len, limit });
    if len > limit {
        return too_large(len);
    }
    // One byte more than the file has, so that a single read sees the end.
    let mut bytes = Vec::with_capacity(len as usize + 1);
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return too_large(bytes.len() as u64);
    }
    Ok(bytes)
}

/// The events that a new snapshot survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// A crash of the host: its files are synced.
    Synced,
    /// The end of the process only: the kernel writes its files when it likes.
    Unsynced,
}

impl Durability {
    /// Syncs an open file or directory, if this asks for it.
    pub(crate) fn sync(self, file: &File, path: &Path) -> Result<()> {
        match self {
            Durability::Synced => file.sync_all().map_err(Error::io("sync", path)),
            Durability::Unsynced => Ok(()),
        }
    }

    /// As [`sync`](Self::sync), for the names in a directory.
    pub(crate) fn sync_names(self, dir: &Path) -> Result<()> {
        match self {
            Durability::Synced => sync_dir(dir),
            Durability::Unsynced => Ok(()),
        }
    }
}

/// Writes a new file.
pub(crate) fn write_new(path: &Path, bytes: &[u8], durability: Durability) -> Result<()> {
    let mut file = create_new(path)?;
    file.write_all(bytes).map_err(Error::io("write", path))?;
    durability.sync(&file, path)
}

/// The mode of files that hold guest memory, device state, or the record of a guest's actions: only their owner reads
/// them.
pub const PRIVATE: u32 = 0o600;

/// Creates a file that must not exist yet, for reading and writing by its owner only ([`PRIVATE`]). A symbolic link at
/// its place is not followed (open(2), `O_EXCL`).
pub fn create_new(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(PRIVATE);
    options.open(path).map_err(Error::io("create", path))
}

/// Opens a file to be written anew; a new file can be read by its owner only.
pub fn overwrite_private(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(PRIVATE).open(path)
}

/// Opens a regular file to append to it; a new file can be read by its owner only. A symbolic link at its place is not
/// followed, and a pipe is refused instead of waited for.
pub fn append_private(path: &Path) -> Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits() as i32;
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(PRIVATE).custom_flags(flags);
    let file = options.open(path).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("stat", path))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile { path: path.to_path_buf() });
    }
    Ok(file)
}

/// Makes a directory, and its parents, for files that only their owner reads.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The first stretch of `range` that is not a hole; all of it where the file system does not tell holes.
pub(crate) fn data_in(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(range.start)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(range)),
        Err(errno) => return Err(errno.into()),
    };
    if start >= range.end {
        return Ok(None);
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end.min(range.end)))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(Error::io("sync the directory", path))
}

/// Drops a clean file from the page cache.
pub(crate) fn evict(file: &File, path: &Path) -> Result<()> {
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).map_err(|errno| Error::Io {
        action: "evict from the page cache",
        path: path.to_path_buf(),
        source: errno.into(),
    })
}

/// Renames a directory to a name that must be free.
pub(crate) fn rename_dir_to_free_name(from: &Path, to: &Path) -> Result<()> {
    let cwd = rustix::fs::CWD;
    match rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(Error::TargetExists { path: to.to_path_buf() }),
        // A file system without NOREPLACE. Plain rename replaces nothing but an empty directory, and `to` was not
        // there when the writer was created.
        Err(Errno::INVAL | Errno::NOSYS) => {
            if to.symlink_metadata().is_ok() {
                return Err(Error::TargetExists { path: to.to_path_buf() });
            }
            std::fs::rename(from, to).map_err(Error::io("rename a finished snapshot to", to))
        }
        Err(errno) => Err(Error::io("rename a finished snapshot to", to)(errno.into())),
    }
}

/// The directory that holds `path`; `.` for a bare name.
pub(crate) fn parent_dir(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}
