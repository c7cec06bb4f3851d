//! Snapshots that are acknowledged and still to be read back from the disk.
//!
//! A snapshot is durable and valid when it is acknowledged. Reading its memory back shows whether the disk kept it, and
//! leaves it in the page cache in large folios. This takes several times as long as writing it, so it comes after.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::snapshot::{ReadBack, Result};
use crate::sys::page_cache::PageCache;

/// Snapshots that may wait to be read back. Further ones are read back before they are acknowledged.
const PENDING_MAX: usize = 4;
/// Failures that are kept for reports; all are counted and logged.
const FAILURES_MAX: usize = 16;

/// The record of snapshots being read back. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ReadBacks(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    books: Mutex<Books>,
    changed: Condvar,
    /// Held while one snapshot is read: two at once would only slow down the disk.
    turn: Mutex<()>,
}

#[derive(Debug, Default)]
struct Books {
    pending: usize,
    good: u64,
    failed: u64,
    failures: Vec<(PathBuf, String)>,
}

/// A snapshot to be read back; it counts as pending until this is dropped.
pub struct Pending {
    read_back: ReadBack,
    path: PathBuf,
    books: ReadBacks,
}

impl ReadBacks {
    /// Returns true if so many wait that the next snapshot must be read back before it is acknowledged.
    pub fn are_many(&self) -> bool {
        self.books().pending >= PENDING_MAX
    }

    /// Counts the snapshot at `path` as pending.
    pub fn add(&self, path: PathBuf, read_back: ReadBack) -> Pending {
        self.books().pending += 1;
        Pending { read_back, path, books: self.clone() }
    }

    /// Counts a snapshot that was read back before it was acknowledged.
    pub fn note_first(&self) {
        self.books().good += 1;
    }

    /// Waits, at most for `patience`, until no snapshot is pending. Returns whether none is.
    pub fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut books = self.books();
        while books.pending > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            books = self.0.changed.wait_timeout(books, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// For reports and metrics.
    pub fn json(&self) -> Value {
        let books = self.books();
        let failures = books.failures.iter();
        let failures: Vec<Value> = failures.map(|(path, why)| json!({ "snapshot": path, "why": why })).collect();
        json!({ "pending": books.pending, "good": books.good, "failed": books.failed, "failures": failures })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    /// Reads the snapshot back and records the outcome.
    ///
    /// # Errors
    /// Those of [`ReadBack::run`].
    pub fn run(self) -> Result<()> {
        let result = {
            let _turn = self.books.0.turn.lock().unwrap_or_else(PoisonError::into_inner);
            self.read_back.run(&PageCache)
        };
        let mut books = self.books.books();
        match &result {
            Ok(()) => books.good += 1,
            Err(error) => {
                tracing::error!(
                    snapshot = %self.path.display(),
                    %error,
                    "A snapshot was acknowledged, and the disk did not keep it. Take another one, on another disk"
                );
                books.failed += 1;
                if books.failures.len() < FAILURES_MAX {
                    books.failures.push((self.path.clone(), error.to_string()));
                }
            }
        }
        drop(books);
        result
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.books.books().pending -= 1;
        self.books.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::snapshot::tests::{PAGE, seal_input, small_layout};
    use crate::snapshot::{Gfn, Location, SnapshotKind, SnapshotWriter};

    /// A snapshot of one page in `dir`, still to be read back.
    fn sealed(dir: PathBuf) -> ReadBack {
        let target = Location::Dir(dir);
        let mut writer = SnapshotWriter::create(target, small_layout(), SnapshotKind::Full, None).unwrap();
        writer.write_run(Gfn(5), &[7; PAGE]).unwrap();
        writer.seal_unproven(seal_input()).unwrap().1
    }

    #[test]
    fn what_the_disk_did_not_keep_is_told_and_what_it_kept_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let good = dir.path().join("good");
        let bad = dir.path().join("bad");
        let books = ReadBacks::default();
        let good = books.add(good.clone(), sealed(good));
        let damaged = books.add(bad.clone(), sealed(bad.clone()));
        assert_eq!(books.json()["pending"], 2);
        assert!(!books.wait(Duration::from_millis(1)));
        let memory = std::fs::OpenOptions::new().write(true).open(bad.join("memory")).unwrap();
        memory.write_all_at(b"?", 5 * PAGE as u64).unwrap();
        memory.sync_all().unwrap();
        good.run().unwrap();
        damaged.run().unwrap_err();
        assert!(books.wait(Duration::ZERO));
        let told = books.json();
        assert_eq!([&told["pending"], &told["good"], &told["failed"]], [0, 1, 1]);
        assert_eq!(told["failures"][0]["snapshot"], json!(bad));
        assert!(told["failures"][0]["why"].as_str().unwrap().contains("memory"), "{told}");
    }

    #[test]
    fn many_that_wait_hold_up_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let books = ReadBacks::default();
        let mut pending = Vec::new();
        for index in 0..PENDING_MAX {
            assert!(!books.are_many());
            let path = dir.path().join(index.to_string());
            pending.push(books.add(path.clone(), sealed(path)));
        }
        assert!(books.are_many());
        drop(pending.pop());
        assert!(!books.are_many());
    }
}
