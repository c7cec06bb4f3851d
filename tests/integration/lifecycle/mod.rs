//! The life of a VM after its restore.

mod access;
mod demote;
mod faults;
mod fork;
mod kills;
mod moments;
mod repurpose;
mod rewind;
mod spill;
mod standby;

use std::path::{Path, PathBuf};

use crate::devices::vsock::{ask, connect, with_vsock};
use crate::support::Vm;

/// A snapshot below `dir` of a guest that answers requests on vsock port 52, and the socket by which programs reach it,
/// which does not exist.
fn answering_on_vsock(dir: &Path) -> (PathBuf, PathBuf) {
    let path = dir.join("v");
    let snapshot = dir.join("snapshot");
    let mut vm = Vm::boot(&with_vsock(&path));
    vm.begin("vsock_serve port=52 lines=1");
    assert!(ask(&connect(&path, 52), "run a hello").starts_with("ok a "));
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    std::fs::remove_file(&path).unwrap();
    (snapshot, path)
}
