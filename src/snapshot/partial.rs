//! The work directory of a writer: `.<name>.partial-<pid>-<n>` beside the target.
//!
//! The owner holds an flock on the directory itself. The lock ends with the process however it dies, so a partial
//! directory that can be locked is abandoned. Locking the directory (and not a file in it) leaves nothing to remove
//! before the rename.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;

use super::{Error, Result, files};

/// How many names are tried before giving up.
const ATTEMPTS: usize = 64;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A locked work directory; removed with everything in it when dropped, unless it was kept.
#[derive(Debug)]
pub(crate) struct Partial {
    path: PathBuf,
    /// Held for its lock only.
    _lock: File,
    armed: bool,
}

impl Partial {
    /// Sweeps what dead writers of the same target left, then makes a work directory for it.
    pub(crate) fn create(target: &Path) -> Result<Partial> {
        let Some(name) = target.file_name() else {
            return Err(Error::BadTarget { path: target.to_path_buf(), problem: "it has no final name" });
        };
        let dir = files::parent_dir(target);
        sweep(&dir, name);
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for _ in 0..ATTEMPTS {
            let mut file_name = prefix(name);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            file_name.extend_from_slice(format!("{}-{n}", std::process::id()).as_bytes());
            let path = dir.join(OsStr::from_bytes(&file_name));
            // Guest memory is nobody else's business.
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io("create the work directory", &path)(error)),
            }
            match lock(&path) {
                Ok(lock) => return Ok(Partial { path, _lock: lock, armed: true }),
                // A sweeper came between mkdir and lock and took it for abandoned.
                Err(error) => last = error,
            }
        }
        Err(Error::io("create a work directory for", target)(last))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The directory has been renamed to its final name: it is no longer this value's to remove.
    pub(crate) fn keep(mut self) {
        self.armed = false;
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.armed {
            // Nobody to tell; the next writer of the same target sweeps what is left.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn prefix(name: &OsStr) -> Vec<u8> {
    [b".", name.as_bytes(), b".partial-"].concat()
}

/// Locks a work directory, and makes sure that the path still names what was locked.
fn lock(path: &Path) -> io::Result<File> {
    let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32;
    let dir = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    dir.try_lock()?;
    let (locked, named) = (dir.metadata()?, fs::symlink_metadata(path)?);
    if (locked.dev(), locked.ino()) != (named.dev(), named.ino()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(dir)
}

/// Removes the work directories for `name` whose owner is gone. What cannot be removed is left for the next time:
/// it is in nobody's way.
fn sweep(dir: &Path, name: &OsStr) {
    let prefix = prefix(name);
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let Some(suffix) = file_name.as_bytes().strip_prefix(prefix.as_slice()) else { continue };
        if !is_pid_and_number(suffix) {
            continue;
        }
        if let Ok(_lock) = lock(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// `<digits>-<digits>`, so that a sweep never touches a directory that merely looks similar.
fn is_pid_and_number(suffix: &[u8]) -> bool {
    let mut parts = suffix.split(|byte| *byte == b'-');
    let digits = |part: Option<&[u8]>| part.is_some_and(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit));
    digits(parts.next()) && digits(parts.next()) && parts.next().is_none()
}
