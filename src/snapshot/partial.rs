//! Temporary files and directories, for all rooms. A file being written stands beside its final name as `.tvmm-<32
//! random hexadecimal digits>.partial` and is renamed when it is complete.
//!
//! The name is random and created exclusively, so two writers never meet in it and no name that a user gives can be it.
//! The directory is that of the final name, so the rename stays within one file system.
//!
//! The writer holds an flock on the temporary file or directory itself. The lock ends with the process however it dies,
//! so one that can be locked is abandoned, and [`sweep`] removes it. Locking the directory (and not a file in it)
//! leaves nothing to remove before the rename.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;

use super::files::Durability;
use super::{Error, Result, files};

const PREFIX: &[u8] = b".tvmm-";
const SUFFIX: &[u8] = b".partial";
/// Random bytes of a name.
const RANDOM_BYTES: usize = 16;
/// Number of names tried before giving up.
const ATTEMPTS: usize = 64;
/// Temporary files of versions before 0.2 have no lock: one that was not written for so long is abandoned.
const UNLOCKED_ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// Random hexadecimal digits, two a byte.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0; bytes];
    // The kernel's generator is ready long before any process of ours: it is asked again until it is.
    while rustix::rand::getrandom(&mut buffer[..], rustix::rand::GetRandomFlags::empty()) != Ok(bytes) {}
    buffer.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The path of a temporary file or directory and its lock. Removed with everything in it when dropped, unless renamed.
#[derive(Debug)]
struct Entry {
    path: PathBuf,
    locked: File,
    armed: bool,
}

impl Entry {
    /// Makes an entry in `dir` by `make` under a new name, and locks it.
    fn create(dir: &Path, make: impl Fn(&Path) -> io::Result<File>) -> Result<Entry> {
        let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
        for _ in 0..ATTEMPTS {
            let name = [PREFIX, random_hex(RANDOM_BYTES).as_bytes(), SUFFIX].concat();
            let path = dir.join(OsStr::from_bytes(&name));
            let file = match make(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                // A sweeper came between mkdir and open.
                Err(error) if error.kind() == io::ErrorKind::NotFound && dir.is_dir() => continue,
                Err(error) => return Err(Error::io("create the temporary", &path)(error)),
            };
            match lock(&file, &path) {
                Ok(()) => return Ok(Entry { path, locked: file, armed: true }),
                // A sweeper came between creation and lock and took it for abandoned.
                Err(error) => last = error,
            }
        }
        Err(Error::io("create a temporary in", dir)(last))
    }

    fn remove(&self) {
        let removed = match self.locked.metadata() {
            Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(&self.path),
            _ => fs::remove_file(&self.path),
        };
        // If removing fails, the next sweep of the directory removes it.
        let _ = removed;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.armed {
            self.remove();
        }
    }
}

/// A directory that gets its final name when it is complete. Only its owner may look into it.
#[derive(Debug)]
pub struct PartialDir(Entry);

impl PartialDir {
    /// Makes a temporary directory in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<PartialDir> {
        Entry::create(dir, |path| {
            DirBuilder::new().mode(0o700).create(path)?;
            open_nofollow(path, OFlags::DIRECTORY)
        })
        .map(PartialDir)
    }

    /// Its present path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Renames it to `to`, which must be free and in the same directory. To survive a crash of the host, the content
    /// must have been synced.
    ///
    /// # Errors
    /// [`Error::TargetExists`], [`Error::Io`]; then the directory is removed.
    pub fn publish(mut self, to: &Path, durability: Durability) -> Result<()> {
        durability.sync_names(&self.0.path)?;
        files::rename_dir_to_free_name(&self.0.path, to)?;
        self.0.armed = false;
        durability.sync_names(&files::parent_dir(to))
    }
}

/// A file that gets its final name when it is complete.
#[derive(Debug)]
pub struct PartialFile(Entry);

impl PartialFile {
    /// Makes an empty temporary file in `dir`, open for reading and writing. Only its owner may read it: all files
    /// written this way hold guest memory, device state, or what a guest did.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<PartialFile> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(files::PRIVATE);
        let open = |path: &Path| options.open(path);
        Entry::create(dir, open).map(PartialFile)
    }

    /// Its present path.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.0.locked
    }

    /// Renames it to `to`, which must be in the same directory. An older file of that name is replaced. Neither content
    /// nor name is made durable: see [`PartialFile::publish_durably`].
    ///
    /// # Errors
    /// [`Error::Io`]; then the file is removed.
    pub fn publish(mut self, to: &Path) -> Result<()> {
        fs::rename(&self.0.path, to).map_err(Error::io("rename a finished file to", to))?;
        self.0.armed = false;
        Ok(())
    }

    /// Makes the content durable, publishes the file as [`PartialFile::publish`] does, then makes the name durable.
    ///
    /// # Errors
    /// [`Error::Io`]; then the file is removed, or has its final name and may lose it in a crash.
    pub fn publish_durably(self, to: &Path) -> Result<()> {
        self.0.locked.sync_all().map_err(Error::io("sync", &self.0.path))?;
        self.publish(to)?;
        files::sync_dir(&files::parent_dir(to))
    }
}

/// Writes a file beside `path`, makes it durable, and renames it to `path`; an older file of that name is replaced.
/// Also removes the temporaries of dead writers beside it.
///
/// # Errors
/// [`Error::Io`]; then `path` is as it was.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if path.file_name().is_none() {
        return Err(Error::BadTarget { path: path.to_path_buf(), problem: "it has no file name" });
    }
    let dir = files::parent_dir(path);
    sweep(&dir);
    let partial = PartialFile::create(&dir)?;
    partial.file().write_all(bytes).map_err(Error::io("write", partial.path()))?;
    partial.publish_durably(path)
}

/// As [`replace_file`], for a file that is read by [`files::read_limited`] with this limit.
///
/// # Errors
/// [`Error::TooLarge`] before anything is written; [`Error::Io`].
pub fn write_limited(path: &Path, bytes: &[u8], limit: u64) -> Result<()> {
    let len = bytes.len() as u64;
    if len > limit {
        return Err(Error::TooLarge { object: path.display().to_string(), len, limit });
    }
    replace_file(path, bytes)
}

/// True if a file name is that of a temporary, of this version or an earlier one that locked it.
pub fn is_partial(name: &OsStr) -> bool {
    is_random_name(name.as_bytes()) || is_numbered_name(name.as_bytes())
}

fn is_random_name(name: &[u8]) -> bool {
    let digits = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    digits.is_some_and(|digits| digits.len() == 2 * RANDOM_BYTES && digits.iter().all(is_digit))
}

/// `.<name>.partial-<pid>-<number>`: a writer's directory before 0.2.
fn is_numbered_name(name: &[u8]) -> bool {
    const MIDDLE: &[u8] = b".partial-";
    let Some(at) = name.windows(MIDDLE.len()).rposition(|window| window == MIDDLE) else { return false };
    let mut parts = name[at + MIDDLE.len()..].split(|byte| *byte == b'-');
    let is_number = |part: Option<&[u8]>| part.is_some_and(is_digits);
    at > 1 && name[0] == b'.' && is_number(parts.next()) && is_number(parts.next()) && parts.next().is_none()
}

fn is_digits(text: &[u8]) -> bool {
    !text.is_empty() && text.iter().all(u8::is_ascii_digit)
}

/// Removes the temporaries in `dir` whose writer is gone, and returns the number of bytes their files had. A temporary
/// that cannot be removed is left for the next sweep.
pub fn sweep(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let abandoned = entries.flatten().filter(|entry| is_partial(&entry.file_name()));
    abandoned.filter_map(|entry| remove_abandoned(&entry.path())).sum()
}

/// As [`sweep`], for a directory that holds nothing but files of ours: also removes the unlocked temporary files
/// (`<name>.partial`, `<name>.<pid>.partial`, `<name>.partial-<pid>`) of versions before 0.2 that were not written for
/// an hour.
pub fn sweep_own(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return sweep(dir) };
    let mut freed = sweep(dir);
    for entry in entries.flatten().filter(|entry| is_unlocked_name(entry.file_name().as_bytes())) {
        let Ok(metadata) = entry.metadata() else { continue };
        let age = metadata.modified().ok().and_then(|at| at.elapsed().ok()).unwrap_or_default();
        if metadata.is_file() && age >= UNLOCKED_ABANDONED_AFTER && fs::remove_file(entry.path()).is_ok() {
            freed += metadata.len();
        }
    }
    freed
}

fn is_unlocked_name(name: &[u8]) -> bool {
    if name.starts_with(PREFIX) {
        return false;
    }
    let dash = name.iter().rposition(|byte| *byte == b'-');
    let has_pid = dash.is_some_and(|at| name[..at].ends_with(SUFFIX) && is_digits(&name[at + 1..]));
    has_pid || name.ends_with(SUFFIX)
}

fn remove_abandoned(path: &Path) -> Option<u64> {
    let metadata = fs::symlink_metadata(path).ok()?;
    // A FIFO, a device or a link of such a name is none of ours.
    let flags = match (metadata.is_dir(), metadata.is_file()) {
        (true, _) => OFlags::DIRECTORY,
        (_, true) => OFlags::NONBLOCK,
        _ => return None,
    };
    let file = open_nofollow(path, flags).ok()?;
    lock(&file, path).ok()?;
    let len = if metadata.is_dir() { 0 } else { metadata.len() };
    Entry { path: path.to_path_buf(), locked: file, armed: false }.remove();
    Some(len)
}

fn open_nofollow(path: &Path, flags: OFlags) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags((flags | OFlags::NOFOLLOW).bits() as i32).open(path)
}

/// Locks a temporary, and checks that the path still names the locked file.
fn lock(file: &File, path: &Path) -> io::Result<()> {
    file.try_lock()?;
    let locked = file.metadata()?;
    let named = fs::symlink_metadata(path)?;
    if (locked.dev(), locked.ino()) != (named.dev(), named.ino()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_temporaries_are_told_from_those_of_users() {
        let random = format!(".tvmm-{}.partial", random_hex(RANDOM_BYTES));
        for name in [random.as_str(), ".a.partial-1-0", ".a.b.partial-999999-12", "..partial-1.partial-1-0"] {
            assert!(is_partial(OsStr::new(name)), "{name}");
        }
        let others = [
            "X.partial",
            ".partial",
            ".tvmm-.partial",
            ".tvmm-0123456789abcdef0123456789abcde.partial",
            ".tvmm-0123456789abcdef0123456789abcdeg.partial",
            ".tvmm-0123456789ABCDEF0123456789ABCDEF.partial",
            "a.partial-1-0",
            ".a.partial-1",
            ".a.partial-1-",
            ".a.partial-1-2-3",
            ".partial-1-0",
        ];
        for name in others {
            assert!(!is_partial(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn sweep_keeps_temporaries_of_live_writers() {
        let dir = tempfile::tempdir().unwrap();
        let living_dir = PartialDir::create(dir.path()).unwrap();
        let living_file = PartialFile::create(dir.path()).unwrap();
        let dead_file = dir.path().join(".tvmm-00112233445566778899aabbccddeeff.partial");
        fs::write(&dead_file, "abcd").unwrap();
        let dead_dir = dir.path().join(".tvmm-10112233445566778899aabbccddeeff.partial");
        fs::create_dir(&dead_dir).unwrap();
        fs::write(dead_dir.join("memory"), "abcd").unwrap();
        let kept =
            [dir.path().join("X.partial"), dir.path().join("x.77.partial"), dir.path().join("a.image.partial-77")];
        kept.iter().for_each(|path| fs::write(path, "abcd").unwrap());
        let link = dir.path().join(".tvmm-20112233445566778899aabbccddeeff.partial");
        std::os::unix::fs::symlink(&kept[0], &link).unwrap();
        assert_eq!(sweep(dir.path()), 4);
        assert!(living_dir.path().exists() && living_file.path().exists());
        assert!(!dead_file.exists() && !dead_dir.exists());
        assert!(kept.iter().all(|path| path.exists()) && link.symlink_metadata().is_ok());
        // Unlocked temporaries of earlier versions are removed once they are old, and only from a directory that is all
        // ours.
        assert_eq!(sweep_own(dir.path()), 0);
        let old = std::time::SystemTime::now() - UNLOCKED_ABANDONED_AFTER * 2;
        kept.iter().for_each(|path| File::options().write(true).open(path).unwrap().set_modified(old).unwrap());
        assert_eq!(sweep(dir.path()), 0);
        assert_eq!(sweep_own(dir.path()), 12);
        assert!(!kept.iter().any(|path| path.exists()));
        drop((living_dir, living_file));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the link");
    }

    #[test]
    fn published_ones_have_their_name_and_nothing_is_left_beside() {
        let dir = tempfile::tempdir().unwrap();
        let longest = "n".repeat(255);
        let to = dir.path().join(&longest);
        for content in ["one", "two"] {
            let partial = PartialFile::create(dir.path()).unwrap();
            io::Write::write_all(&mut partial.file(), content.as_bytes()).unwrap();
            partial.publish_durably(&to).unwrap();
            assert_eq!(fs::read_to_string(&to).unwrap(), content);
        }
        let taken = PartialDir::create(dir.path()).unwrap().publish(&to, Durability::Synced);
        assert!(matches!(taken, Err(Error::TargetExists { .. })), "{taken:?}");
        PartialDir::create(dir.path()).unwrap().publish(&dir.path().join("d"), Durability::Unsynced).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["d", &longest]);
    }

    proptest::proptest! {
        /// Any number of writers and sweepers of one directory at once: no two temporaries share a name, and a sweep
        /// removes no live one.
        #[test]
        fn no_temporary_name_collides(writers in 1_usize..6, rounds in 1_usize..12) {
            let dir = tempfile::tempdir().unwrap();
            std::thread::scope(|scope| {
                for writer in 0..writers {
                    let dir = dir.path();
                    scope.spawn(move || {
                        for round in 0..rounds {
                            let file = PartialFile::create(dir).unwrap();
                            let text = format!("{writer} {round}");
                            io::Write::write_all(&mut file.file(), text.as_bytes()).unwrap();
                            sweep_own(dir);
                            assert_eq!(fs::read_to_string(file.path()).unwrap(), text);
                            let to = dir.join(&text);
                            file.publish(&to).unwrap();
                            assert_eq!(fs::read_to_string(to).unwrap(), text);
                        }
                    });
                }
            });
            proptest::prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), writers * rounds);
        }
    }
}
