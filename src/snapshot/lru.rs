//! Directories that cache files, of bounded size: the files used longest ago are removed first. A file's modification
//! time is the time it was last used.

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Notes that a file is used now. A file that this process may not change keeps its time, and is removed the sooner.
pub fn note_use(file: &File) {
    let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
}

/// Bytes of those files of a directory whose names `is_cached` accepts.
///
/// # Errors
/// The directory cannot be read.
pub fn cached_bytes(dir: &Path, is_cached: impl Fn(&OsStr) -> bool) -> io::Result<u64> {
    Ok(entries(dir, is_cached)?.iter().map(|(_, len, _)| len).sum())
}

/// Removes the files used longest ago, of those whose names `is_cached` accepts, until the rest has at most `limit`
/// bytes; `spared` stays in any case. Returns how many bytes are left. A process that has a removed file open goes on
/// with it.
///
/// # Errors
/// The directory cannot be read.
pub fn shrink(dir: &Path, limit: u64, spared: &Path, is_cached: impl Fn(&OsStr) -> bool) -> io::Result<u64> {
    let entries = entries(dir, is_cached)?;
    let mut held: u64 = entries.iter().map(|(_, len, _)| len).sum();
    for (_, len, path) in entries.iter().filter(|(_, _, path)| path != spared) {
        if held <= limit {
            break;
        }
        // Another process may have removed it.
        let _ = fs::remove_file(path);
        held -= len;
    }
    Ok(held)
}

/// Time a file was last used, its bytes, its path.
type Entry = (SystemTime, u64, PathBuf);

/// The entries, the one used longest ago first.
fn entries(dir: &Path, is_cached: impl Fn(&OsStr) -> bool) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir)?.flatten().filter(|entry| is_cached(&entry.file_name())) {
        // Another process may just have removed it.
        if let Ok(metadata) = entry.metadata() {
            entries.push((metadata.modified()?, metadata.len(), entry.path()));
        }
    }
    entries.sort_unstable();
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn files_used_longest_ago_go_first_and_strangers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (age, name) in [(4, "a.image"), (3, "b.image"), (9, "stranger"), (2, "c.plan"), (1, "d.image")] {
            fs::write(path(name), [0; 100]).unwrap();
            let then = SystemTime::now() - Duration::from_secs(age * 100);
            File::options().write(true).open(path(name)).unwrap().set_modified(then).unwrap();
        }
        let is_cached = |name: &OsStr| name != "stranger";
        assert_eq!(cached_bytes(dir.path(), is_cached).unwrap(), 400);
        note_use(&File::open(path("a.image")).unwrap());
        assert_eq!(shrink(dir.path(), 250, &path("b.image"), is_cached).unwrap(), 200);
        let left = ["a.image", "b.image", "c.plan", "d.image", "stranger"].map(|name| path(name).exists());
        assert_eq!(left, [true, true, false, false, true]);
        assert_eq!(shrink(dir.path(), 0, &path("none"), is_cached).unwrap(), 0);
        assert!(path("stranger").exists());
    }
}
