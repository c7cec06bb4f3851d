//! Snapshots are acknowledged when they are durable, and read back from the disk afterwards.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::artefact::{content, inspect};
use crate::support::service::wait_until;
use crate::support::{Vm, config, run_ok, scratch, text};

fn read_backs(vm: &Vm) -> Value {
    vm.api_ok("GET", "/tvmm/report", None)["read_backs"].clone()
}

/// A guest with 8000 pages of its own, and their digest.
fn filled() -> (Vm, String) {
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=8000 seed=1");
    let digest = vm.call("check").digest;
    (vm, digest)
}

fn assert_restores(snapshot: &Path, digest: &str) {
    for policy in ["eager", "firecracker"] {
        assert_eq!(Vm::restore(snapshot, policy).call("check").digest, digest, "{policy}");
    }
}

#[test]
fn snapshot_is_read_back_after_it_was_acknowledged_and_the_report_says_so() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (mut vm, digest) = filled();
    assert_eq!(read_backs(&vm), json!({ "pending": 0, "good": 0, "failed": 0, "failures": [] }));
    // The guest works on for a moment after its answer, so it stands still between the two.
    run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&path("full"))]);
    // At once, whatever the VM still does with the file.
    assert_restores(&path("full"), &digest);
    vm.snapshot(&path("diff"), &["--diff"]);
    assert_restores(&path("diff"), &digest);
    wait_until("both are read back", || read_backs(&vm)["pending"] == 0);
    assert_eq!(read_backs(&vm), json!({ "pending": 0, "good": 2, "failed": 0, "failures": [] }));
    assert_eq!(vm.call("check").digest, digest);
    assert_eq!(content(&path("full")), content(&path("diff")));
}

#[test]
fn snapshot_that_is_to_be_verified_first_was_read_back_when_it_is_acknowledged() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (vm, digest) = filled();
    vm.snapshot(&path("cli"), &["--verify"]);
    assert_eq!(read_backs(&vm)["good"], 1);
    vm.pause();
    let body = json!({ "snapshot_path": path("api"), "tvmm": { "verify": true } });
    vm.api_ok("PUT", "/snapshot/create", Some(body));
    assert_eq!(read_backs(&vm), json!({ "pending": 0, "good": 2, "failed": 0, "failures": [] }));
    assert_restores(&path("api"), &digest);
}

#[test]
fn vmm_that_is_killed_before_it_has_read_back_leaves_whole_snapshots() {
    let dir = scratch();
    let (vm, digest) = filled();
    vm.pause();
    let paths: Vec<PathBuf> = (0..6).map(|index| dir.path().join(format!("s{index}"))).collect();
    // More than may wait to be read back.
    for path in &paths {
        vm.capture(path, "Full");
    }
    vm.kill();
    for path in &paths {
        inspect(path);
        assert_eq!(content(path), content(&paths[0]));
    }
    assert_restores(&paths[5], &digest);
}

#[test]
fn vmm_that_is_asked_to_end_reads_back_first() {
    let dir = scratch();
    let report = dir.path().join("report");
    let config = dir.path().join("vm.json");
    std::fs::write(&config, crate::support::config(1, 128).to_string()).unwrap();
    let mut vm = Vm::spawn(scratch(), &["--config", text(&config), "--report", text(&report)]);
    vm.call("fill pages=8000 seed=1");
    vm.snapshot(&dir.path().join("out"), &[]);
    let (status, stderr) = vm.terminate();
    assert!(!stderr.contains("before its last snapshots were read back"), "{status:?} {stderr}");
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&report).unwrap()).unwrap();
    assert_eq!(written["read_backs"], json!({ "pending": 0, "good": 1, "failed": 0, "failures": [] }));
    run_ok(&["inspect", text(&dir.path().join("out"))]);
}
