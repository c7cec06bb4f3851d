//! Fork points: snapshots that live as long as the VMs forked from them.
//!
//! A fork point is the snapshot `snapshot` in a directory `.tvmm-<32 random hexadecimal digits>.fork`. Each process
//! that uses it holds a shared flock on that directory. The lock ends with the process however it dies, so a directory
//! that can be locked exclusively has no users, and [`ForkPoint::sweep`] removes it with everything in it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::partial::random_hex;
use super::{Error, Location, Result};

const PREFIX: &str = ".tvmm-";
const SUFFIX: &str = ".fork";
/// Random bytes of a name.
const RANDOM_BYTES: usize = 16;
/// Number of names tried before giving up.
const ATTEMPTS: usize = 64;
/// The snapshot's name in the directory.
const SNAPSHOT: &str = "snapshot";

/// A fork point that this process uses. It is not swept before this is dropped.
#[derive(Debug)]
pub struct ForkPoint {
    dir: PathBuf,
    locked: File,
    /// Nothing uses it yet: it is removed when this is dropped.
    is_new: bool,
}

impl ForkPoint {
    /// Makes the directory of a new fork point in `dir`, after removing those there that have no users. It is removed
    /// again when the result is dropped, unless that is [kept](Self::keep).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<ForkPoint> {
        ForkPoint::sweep(dir);
        for _ in 0..ATTEMPTS {
            let path = dir.join(format!("{PREFIX}{}{SUFFIX}", random_hex(RANDOM_BYTES)));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(Error::io("create the fork point", &path))?,
            }
            // A sweep that came between creation and lock has removed the directory.
            if let Some(locked) = lock_shared(&path)? {
                return Ok(ForkPoint { dir: path, locked, is_new: true });
            }
        }
        Err(Error::io("create a fork point in", dir)(io::ErrorKind::AlreadyExists.into()))
    }

    /// Holds the fork point that `snapshot` lies in; `None` for any other snapshot.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::ForkPointGone`] if the fork point is being removed.
    pub fn hold(snapshot: &Path) -> Result<Option<ForkPoint>> {
        let Some(dir) = dir_of(snapshot) else { return Ok(None) };
        match lock_shared(dir)? {
            Some(locked) => Ok(Some(ForkPoint { dir: dir.to_path_buf(), locked, is_new: false })),
            None => Err(Error::ForkPointGone { path: dir.to_path_buf() }),
        }
    }

    /// Returns whether a snapshot lies in a fork point, and ends with it.
    pub fn has(location: &Location) -> bool {
        match location {
            Location::Dir(dir) => dir_of(dir).is_some(),
            Location::Files { .. } => false,
        }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The place of the snapshot.
    pub fn snapshot(&self) -> PathBuf {
        self.dir.join(SNAPSHOT)
    }

    /// Leaves the fork point to its users when this is dropped.
    pub fn keep(mut self) -> ForkPoint {
        self.is_new = false;
        self
    }

    /// Removes the fork points in `dir` that no process uses. One that cannot be removed is left for the next sweep.
    pub fn sweep(dir: &Path) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        entries.flatten().filter(|entry| is_name(&entry.file_name())).for_each(|entry| remove_unused(&entry.path()));
    }
}

impl Drop for ForkPoint {
    fn drop(&mut self) {
        if self.is_new && self.locked.unlock().is_ok() {
            remove_unused(&self.dir);
        }
    }
}

/// The fork point's directory that a snapshot's path leads through.
fn dir_of(snapshot: &Path) -> Option<&Path> {
    let dir = snapshot.parent()?;
    (snapshot.file_name()? == SNAPSHOT && is_name(dir.file_name()?)).then_some(dir)
}

fn is_name(name: &OsStr) -> bool {
    let digits = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
    let is_digit = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
    digits.is_some_and(|digits| digits.len() == 2 * RANDOM_BYTES && digits.bytes().all(is_digit))
}

/// A link of such a name is none of ours.
fn open(dir: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(dir)
}

/// Locks a directory for one more user; `None` if it is being removed.
fn lock_shared(dir: &Path) -> Result<Option<File>> {
    let file = match open(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io("open the fork point", dir))?,
    };
    match file.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(Error::io("lock the fork point", dir)(error)),
    }
    Ok(is_at(&file, dir).then_some(file))
}

/// Returns whether the path still names the open directory.
fn is_at(file: &File, dir: &Path) -> bool {
    let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let opened = file.metadata().map(inode);
    opened.is_ok_and(|opened| fs::symlink_metadata(dir).map(inode).is_ok_and(|named| named == opened))
}

fn remove_unused(dir: &Path) {
    let Ok(file) = open(dir) else { return };
    if file.try_lock().is_ok() && is_at(&file, dir) {
        // If removing fails, the next sweep removes the rest.
        let _ = fs::remove_dir_all(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_point_lives_as_long_as_a_user() {
        let dir = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(dir.path()).unwrap().count();
        let first = ForkPoint::create(dir.path()).unwrap();
        fs::create_dir(first.snapshot()).unwrap();
        fs::write(first.snapshot().join("memory"), "abcd").unwrap();
        let second = ForkPoint::hold(&first.snapshot()).unwrap().expect("a fork point");
        let path = first.dir().to_path_buf();
        drop(first);
        ForkPoint::sweep(dir.path());
        assert!(path.join("snapshot/memory").exists(), "the second user holds it");
        drop(second);
        assert_eq!(names(), 1, "only a new one is removed at once");
        drop(ForkPoint::create(dir.path()).unwrap());
        assert_eq!(names(), 0);
        let kept = ForkPoint::create(dir.path()).unwrap().keep();
        drop(kept);
        assert_eq!(names(), 1);
        ForkPoint::sweep(dir.path());
        assert_eq!(names(), 0);
        let error = ForkPoint::hold(&path.join("snapshot")).unwrap_err();
        assert!(matches!(error, Error::ForkPointGone { .. }), "{error}");
    }

    #[test]
    fn nothing_else_is_held_or_swept() {
        let dir = tempfile::tempdir().unwrap();
        let short = dir.path().join(".tvmm-0123.fork");
        let other = dir.path().join("a.fork");
        let digits = "0123456789abcdef0123456789abcdef";
        let link = dir.path().join(format!(".tvmm-{digits}.fork"));
        [&short, &other].into_iter().for_each(|path| fs::create_dir(path).unwrap());
        std::os::unix::fs::symlink(&short, &link).unwrap();
        ForkPoint::sweep(dir.path());
        assert!(short.exists() && other.exists() && link.symlink_metadata().is_ok());
        assert!(ForkPoint::hold(&short.join("snapshot")).unwrap().is_none());
        assert!(ForkPoint::hold(&dir.path().join("snapshot")).unwrap().is_none());
        assert!(ForkPoint::has(&Location::Dir(link.join("snapshot"))));
        assert!(!ForkPoint::has(&Location::Dir(link.join("other"))));
        assert!(!ForkPoint::has(&Location::Dir("snapshot".into())));
    }
}
