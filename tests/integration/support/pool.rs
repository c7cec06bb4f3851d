//! A pool of a test.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use super::skip::skip;
use super::{Vm, config, run_err, run_ok, scratch, text};

/// A pool in a directory of its own.
pub struct Pool {
    pub dir: TempDir,
}

impl Pool {
    /// Makes one of `gib` GiB.
    pub fn create(gib: &str) -> Pool {
        let dir = scratch();
        run_ok(&["pool", "create", "--tier", "cxl", "--at", text(dir.path()), "--size", gib]);
        Pool { dir }
    }

    pub fn path(&self) -> &str {
        text(self.dir.path())
    }

    /// The file that it is.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("pool.tvmm")
    }

    /// Runs `tvmm pool COMMAND POOL …` that must succeed, and returns its JSON.
    pub fn json(&self, command: &str, more: &[&str]) -> Value {
        let mut args = vec!["pool", command, self.path()];
        args.extend(more);
        args.push("--json");
        serde_json::from_str(&run_ok(&args)).unwrap()
    }

    pub fn add(&self, snapshot: &Path) -> Value {
        self.json("add", &[text(snapshot)])
    }

    /// As [`json`](Self::json) for a command that has none, or must fail; returns what was said.
    pub fn ok(&self, command: &str, more: &[&str]) -> String {
        run_ok(&[&["pool", command, self.path()], more].concat())
    }

    pub fn err(&self, command: &str, more: &[&str]) -> String {
        run_err(&[&["pool", command, self.path()], more].concat())
    }

    /// Restores a snapshot that the pool has.
    pub fn restore(&self, snapshot: &Path, policy: &str, more: &[&str]) -> Vm {
        Vm::restore_with(snapshot, policy, &[&["--pool", self.path()], more].concat())
    }

    /// Changes a byte of the file.
    pub fn flip(&self, at: u64) {
        let file = File::options().read(true).write(true).open(self.file()).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }
}

/// The testbed's far memory.
pub const DEVICE: &str = "/dev/dax0.0";

/// The testbed's far memory, for one test at a time; `None`, which is said, without.
pub fn far_memory() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    // A test that failed leaves nothing that the next one minds.
    let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if !Path::new(DEVICE).exists() {
        skip!("dax", "no {DEVICE} (make testbed)");
        return None;
    }
    Some(guard)
}

/// A guest of 64 MiB that has filled `pages` pages, its snapshot at `out`, and the digest of what it filled.
pub fn filled(out: &Path, pages: u64, seed: u64) -> String {
    let mut vm = Vm::boot(&config(1, 64));
    vm.call(&format!("fill pages={pages} seed={seed}"));
    let digest = vm.call("check").digest;
    vm.snapshot(out, &[]);
    digest
}

/// Takes the files away that a restore from a pool must not need.
pub fn take_memory_away(snapshot: &Path) {
    std::fs::remove_file(snapshot.join("memory")).unwrap();
    std::fs::remove_file(snapshot.join("pages")).unwrap();
}
