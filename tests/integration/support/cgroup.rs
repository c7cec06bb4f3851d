//! Control groups that bound what runs in them, by version 1 or 2 of their interface.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A control group with a limit. Removed when dropped, once what runs in it has ended.
pub struct ControlGroup {
    dir: PathBuf,
    limit: PathBuf,
}

impl ControlGroup {
    /// Makes a group of `controller`, whose limit is in the file `version_1` or `version_2`; `None` where this user may
    /// not.
    pub fn new(controller: &str, version_1: &str, version_2: &str) -> Option<ControlGroup> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("tvmm-test-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let root = Path::new("/sys/fs/cgroup");
        for (parent, file) in [(root.join(controller), version_1), (root.to_path_buf(), version_2)] {
            let dir = parent.join(&name);
            if std::fs::create_dir(&dir).is_err() {
                continue;
            }
            let group = ControlGroup { limit: dir.join(file), dir };
            if group.limit.exists() {
                return Some(group);
            }
        }
        None
    }

    pub fn set_limit(&self, limit: u64) {
        std::fs::write(&self.limit, limit.to_string()).unwrap();
    }

    /// The file that takes the numbers of processes.
    pub fn procs(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// The number behind `key` in the first of `files` that is there.
    pub fn number(&self, files: &[&str], key: &str) -> u64 {
        let text = files.iter().find_map(|file| std::fs::read_to_string(self.dir.join(file)).ok());
        let text = text.unwrap_or_else(|| panic!("{} has none of {files:?}", self.dir.display()));
        let number = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        number.unwrap_or_else(|| panic!("no {key:?} in {text:?}"))
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
