//! Snapshots under test: taking them at one instant, and what `tvmm inspect` says about them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tvmm::snapshot::LoadHuge;

use super::{TIMEOUT, Vm, run_ok, text};

impl Vm {
    /// Snapshots the paused VM, which stays paused. `kind` is `Full` or `Diff`.
    pub fn capture(&self, out: &Path, kind: &str) {
        let body = json!({ "snapshot_path": out, "snapshot_type": kind });
        let (status, body) = self.api("PUT", "/snapshot/create", Some(body));
        assert_eq!(status, 200, "{body}");
    }

    /// Waits until the API tells that the machine is in `state`.
    pub fn wait_for_state(&self, state: &str) {
        self.wait_for_socket();
        let deadline = Instant::now() + TIMEOUT;
        while self.api("GET", "/", None).1["state"] != state {
            assert!(Instant::now() < deadline, "not {state}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the process as it stands; the rest of the guest's output, an unfinished line included.
    pub fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.lines.iter().collect()
    }

    /// The number of times that the guest has read a port: it does so for each byte of input, and not while it waits.
    pub fn port_reads(&self) -> u64 {
        self.api_ok("GET", "/tvmm/report", None)["exits"]["exit_io_in"]["count"].as_u64().expect("a count")
    }

    /// The names of what this process has open.
    pub fn open_files(&self) -> Vec<String> {
        let name = |path: PathBuf| std::fs::read_link(path).map_or(String::new(), |to| to.display().to_string());
        let mut names: Vec<String> = entries(&format!("/proc/{}/fd", self.pid())).into_iter().map(name).collect();
        names.sort();
        names
    }

    /// The names of this process's threads.
    pub fn threads(&self) -> Vec<String> {
        let name = |path: PathBuf| std::fs::read_to_string(path.join("comm")).unwrap_or_default().trim().to_string();
        let mut names: Vec<String> = entries(&format!("/proc/{}/task", self.pid())).into_iter().map(name).collect();
        names.sort();
        names
    }
}

fn entries(dir: &str) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Leaves the page cache as it is.
pub struct NoCache;

impl LoadHuge for NoCache {
    fn load_huge(&self, _: &std::fs::File, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

/// `tvmm inspect --json`, which must find nothing wrong.
pub fn inspect(snapshot: &Path) -> Value {
    serde_json::from_str(&run_ok(&["inspect", "--json", text(snapshot)])).unwrap()
}

/// The digest of all guest memory the snapshot and its parents describe.
pub fn content(snapshot: &Path) -> String {
    inspect(snapshot)["memory"]["content_digest"].as_str().expect("a sound snapshot has one").to_string()
}

/// Pages this snapshot itself holds, and pages it records as zero.
pub fn pages(snapshot: &Path) -> (u64, u64) {
    let memory = &inspect(snapshot)["memory"];
    (memory["pages_held"].as_u64().unwrap(), memory["pages_zero"].as_u64().unwrap())
}

/// Bytes a file takes on its disk.
pub fn disk_use(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Names in a directory, sorted, with what is in its directories.
pub fn names_below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for path in entries(text(dir)) {
        if path.is_dir() {
            names.extend(names_below(&path));
        }
        names.push(path.display().to_string());
    }
    names.sort();
    names
}
