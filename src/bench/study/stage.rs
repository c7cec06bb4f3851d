//! Snapshots and profiles to measure with: made once, kept while the study runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::door::{self, Door};
use super::subject::Subject;
use super::workload::{Inputs, Workload};
use crate::bench::commands::{add_to_pool, recording, remove_from_pool, to_end};
use crate::bench::guest::{Guest, snapshot_to};
use crate::snapshot::{Location, Snapshot, SnapshotId};
use crate::sys::api_client::Client;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::profile::RecorderKind;

/// A directory of snapshots, with the profiles recorded on them.
pub struct Stage {
    exe: PathBuf,
    dir: PathBuf,
    /// A directory for the sockets of its VMs, which have short paths there.
    sockets: PathBuf,
    /// The size of the guests' runtime image; `None`: the guest's default.
    runtime_mib: Option<u64>,
    /// The snapshots that this stage has added to the pool: their names there, by id.
    pooled: BTreeMap<SnapshotId, String>,
    /// Results of functions, by guest and function: every flow must compute the same.
    digests: BTreeMap<String, String>,
}

impl Stage {
    pub fn new(exe: &Path, dir: &Path, sockets: &Path, runtime_mib: Option<u64>) -> Result<Stage, BoxError> {
        // VMMs that run in a directory of their own get these paths.
        let dir = std::path::absolute(dir)?;
        let sockets = std::path::absolute(sockets)?;
        let exe = exe.to_owned();
        Ok(Stage { exe, dir, sockets, runtime_mib, pooled: BTreeMap::new(), digests: BTreeMap::new() })
    }

    /// The directory of a workload.
    pub fn dir_of(&self, workload: &Workload) -> PathBuf {
        self.dir.join(workload.name)
    }

    /// The snapshot of a guest that is ready to run the function with these inputs, asked at `door`.
    pub fn snapshot(&self, workload: &Workload, inputs: Inputs, door: Door) -> Result<PathBuf, BoxError> {
        let dir = self.dir_of(workload).join(match (inputs, door) {
            (Inputs::Two, Door::Console) => "two",
            (Inputs::Sizes, Door::Console) => "sizes",
            (Inputs::Two, Door::Vsock) => "two-vsock",
            (Inputs::Sizes, Door::Vsock) => "sizes-vsock",
        });
        let snapshot_dir = dir.join("snapshot");
        // A snapshot gets its name when it is complete.
        if snapshot_dir.exists() {
            return Ok(snapshot_dir);
        }
        make(&dir)?;
        let socket = self.sockets.join("stage.sock");
        let mut guest = self.booted(workload, inputs, door, &socket)?;
        if door == Door::Vsock {
            guest.ask(door::SERVE)?;
            let socket = self.sockets.join(door::SOCKET);
            // The snapshot is of an instance that has run, and been asked in this way.
            door::call_once_served(&socket, &workload.a())?;
        }
        snapshot_to(&Client::new(&socket), &snapshot_dir)?;
        Ok(snapshot_dir)
    }

    /// A guest that is ready to run the function with these inputs, and takes requests on its console. With
    /// [`Door::Vsock`] it has a vsock device.
    pub fn booted(&self, workload: &Workload, inputs: Inputs, door: Door, socket: &Path) -> Result<Guest, BoxError> {
        let dir = self.dir_of(workload);
        make(&dir)?;
        let config = dir.join("vm.json");
        let kernel = write_kernel(&self.exe, &dir)?;
        let mut boot = json!({ "boot-source": { "kernel_image_path": kernel }, "machine-config": workload.machine() });
        if door == Door::Vsock {
            boot["vsock"] = json!({ "guest_cid": 3, "uds_path": door::SOCKET });
        }
        std::fs::write(&config, boot.to_string())?;
        remove(socket)?;
        remove(&self.sockets.join(door::SOCKET))?;
        let mut command = Command::new(&self.exe);
        command.arg("--config").arg(&config).arg("--api-sock").arg(std::path::absolute(socket)?);
        // The configuration has the socket of the vsock device by a relative path.
        command.current_dir(&self.sockets);
        let mut guest = Guest::boot_by(command)?;
        for request in workload.prepare(inputs, self.runtime_mib) {
            guest.call(&request)?;
        }
        Ok(guest)
    }

    /// The profile of the recorded run of `subject`, by `recorder`.
    pub fn profile(&self, subject: &Subject, recorder: RecorderKind) -> Result<PathBuf, BoxError> {
        let snapshot = &subject.snapshot;
        let function = &subject.recorded;
        let name: String = function.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let path = snapshot.with_file_name(format!("{name}-{recorder}.profile"));
        if path.exists() {
            return Ok(path);
        }
        let mut command = recording(&self.exe, snapshot, function, &recorder.to_string(), &path);
        if subject.door == Door::Vsock {
            // The snapshot has the socket of its device by a relative path.
            remove(&self.sockets.join(door::SOCKET))?;
            command.args(["--run-port", &door::PORT.to_string()]).current_dir(&self.sockets);
        }
        to_end(&mut command)?;
        Ok(path)
    }

    /// Adds the snapshot to the pool, laid out by `profile`, unless it is there.
    pub fn add_to_pool(&mut self, pool: &Path, snapshot: &Path, profile: &Path) -> Result<(), BoxError> {
        // Copies of a snapshot share its id.
        let id = Snapshot::open(&Location::Dir(snapshot.to_owned()))?.id();
        if !self.pooled.contains_key(&id) {
            let name = format!("tvmm-bench-{}-{}", std::process::id(), self.pooled.len());
            add_to_pool(&self.exe, pool, snapshot, profile, &name)?;
            self.pooled.insert(id, name);
        }
        Ok(())
    }

    /// Removes from the pool the snapshots that this stage has added.
    pub fn leave_pool(&mut self, pool: &Path) -> Result<(), BoxError> {
        let names = std::mem::take(&mut self.pooled).into_values();
        names.into_iter().try_for_each(|name| remove_from_pool(&self.exe, pool, &name))
    }

    /// Records the result of `function` in a guest of `subject`. It does not depend on the way in which it is asked.
    ///
    /// # Errors
    /// The result differs from an earlier one: a restored guest that computes wrongly must not be measured.
    pub fn check_digest(&mut self, subject: &Subject, function: &str, digest: &str) -> Result<(), BoxError> {
        let key = format!("{} {:?} {function}", subject.workload.name, subject.inputs);
        let known = self.digests.entry(key).or_insert_with(|| digest.to_string());
        if known != digest {
            return refuse(format!("{function:?} came to {digest}, and to {known} before"));
        }
        Ok(())
    }
}

fn make(dir: &Path) -> Result<(), BoxError> {
    Ok(std::fs::create_dir_all(dir).map_err(|error| format!("Cannot make {}: {error}", dir.display()))?)
}

/// The kernel of the guests, as a file that any VMM can boot.
pub fn write_kernel(exe: &Path, dir: &Path) -> Result<PathBuf, BoxError> {
    let path = dir.join("guest.elf");
    to_end(Command::new(exe).arg("guest").arg("--functions").arg(&path))?;
    Ok(path)
}

/// Removes a file that may be there.
pub fn remove(path: &Path) -> Result<(), BoxError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            refuse(format!("Cannot remove {}: {error}", path.display()))
        }
        _ => Ok(()),
    }
}
