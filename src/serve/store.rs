//! The daemon's directory: what a restart finds again. JSON files, written beside, made durable and renamed.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ServeError;
use crate::snapshot::{self, read_limited, replace_file};

/// No file of ours is larger.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// Kinds of things kept as one JSON file each.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Functions,
    Snapshots,
    Networks,
}

impl Kind {
    fn folder(self) -> &'static str {
        match self {
            Kind::Functions => "functions",
            Kind::Snapshots => "snapshot-records",
            Kind::Networks => "net-ifaces",
        }
    }
}

/// The directory, held by this process alone.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    _lock: File,
    /// Who writes: two writers would meet in the file beside.
    writing: Mutex<()>,
}

impl Store {
    /// Opens or makes the directory and what is in it, and clears what an earlier daemon has left running things in.
    pub(super) fn open(dir: &Path) -> Result<Store, ServeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| ServeError::Directory { path, source }
        };
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path));
        make(dir)?;
        let dir = fs::canonicalize(dir).map_err(failed(dir))?;
        let lock_path = dir.join("lock");
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(failed(&lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ServeError::InUse { path: dir }),
            Err(errno) => return Err(failed(&lock_path)(errno.into())),
        }
        for folder in [Kind::Functions, Kind::Snapshots, Kind::Networks].map(Kind::folder) {
            make(&dir.join(folder))?;
        }
        let store = Store { dir, _lock: lock, writing: Mutex::new(()) };
        store.clear_run()?;
        ["run", "snapshots", "profiles"].iter().try_for_each(|folder| make(&store.dir.join(folder)))?;
        Ok(store)
    }

    /// Removes what VMs have left: sockets and images.
    pub(super) fn clear_run(&self) -> Result<(), ServeError> {
        let run = self.dir.join("run");
        gone_is_fine(fs::remove_dir_all(&run)).map_err(|source| ServeError::Directory { path: run, source })
    }

    /// All things of a kind. A file that cannot be understood is an error: it is not ours to drop.
    pub(super) fn load_all<T: DeserializeOwned>(&self, kind: Kind) -> Result<BTreeMap<String, T>, ServeError> {
        let folder = self.dir.join(kind.folder());
        let failed = |source| ServeError::Directory { path: folder.clone(), source };
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match (path.file_stem().and_then(|stem| stem.to_str()), path.extension()) {
                (Some(name), Some(extension)) if extension == "json" => {
                    found.insert(name.to_string(), load(&path)?);
                }
                // What was being written when an earlier daemon ended never got its name.
                (_, Some(extension)) if extension == "partial" => fs::remove_file(&path).map_err(failed)?,
                _ => return Err(ServeError::Stranger { path }),
            }
        }
        Ok(found)
    }

    fn path(&self, kind: Kind, name: &str) -> PathBuf {
        self.dir.join(kind.folder()).join(format!("{name}.json"))
    }

    /// Keeps one thing. Blocks for the disk.
    pub(super) fn save(&self, kind: Kind, name: &str, what: &impl Serialize) -> snapshot::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        save(&self.path(kind, name), what)
    }

    /// Writes down the VMs as they are when it is this writer's turn.
    pub(super) fn save_vms<T: Serialize>(&self, records: impl FnOnce() -> Vec<T>) -> snapshot::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        save(&self.vms_path(), &records())
    }

    /// Forgets one thing, if it is there.
    pub(super) fn remove(&self, kind: Kind, name: &str) -> io::Result<()> {
        gone_is_fine(fs::remove_file(self.path(kind, name)))
    }

    /// The VMs that lived when they were last written down.
    pub(super) fn load_vms<T: DeserializeOwned>(&self) -> Result<Vec<T>, ServeError> {
        let path = self.vms_path();
        if path.exists() { load(&path) } else { Ok(Vec::new()) }
    }

    /// Where the VMs that live are written down.
    fn vms_path(&self) -> PathBuf {
        self.dir.join("vms.json")
    }

    /// The directory of all snapshots.
    pub(super) fn snapshots_dir(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    /// The directory of a snapshot.
    pub(super) fn snapshot_dir(&self, id: &str) -> PathBuf {
        self.dir.join("snapshots").join(id)
    }

    /// The directory of a snapshot's profiles.
    pub(super) fn profiles_dir(&self, id: &str) -> PathBuf {
        self.dir.join("profiles").join(id)
    }

    /// Where a VM's own images of drives are.
    pub(super) fn drives_dir(&self, vm: &str) -> PathBuf {
        self.dir.join("run").join(format!("{vm}.drives"))
    }

    /// Where a VM's vsock device has its socket.
    pub(super) fn vsock_path(&self, vm: &str) -> PathBuf {
        self.dir.join("run").join(format!("{vm}.vsock"))
    }
}

/// Writes JSON durably.
fn save(path: &Path, what: &impl Serialize) -> snapshot::Result<()> {
    // Only keys and values that JSON has are ever given.
    let bytes = serde_json::to_vec_pretty(what).unwrap_or_default();
    replace_file(path, &bytes)
}

/// Nothing to remove is as good as removed.
pub(super) fn gone_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ServeError> {
    let bytes = read_limited(path, MAX_JSON_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|source| ServeError::Unreadable { path: path.to_owned(), source })
}
