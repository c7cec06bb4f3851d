//! The daemon's directory: the state that a restart finds again. JSON files, written beside, synced and renamed.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::ServeError;
use crate::snapshot::{self, read_limited, write_limited};
use crate::sys::bounded_wait::Wait;

/// The file that marks a directory as one of `tvmm serve`'s.
const MARK: &str = "tvmm-serve";
/// Its text.
const MARK_TEXT: &str =
    "This directory belongs to tvmm serve, which removes what it does not know in run/ and snapshots/.\nFormat 1\n";
/// The file that a daemon locks while it uses the directory.
const LOCK: &str = "lock";
/// The file that a daemon's VMs keep locked while they live.
const VMS_LOCK: &str = "vms.lock";
/// The VMs of a daemon that was killed end by themselves; a new daemon waits for them for this time.
const FORMER_VMS_TIME: Duration = Duration::from_secs(10);
const FORMER_VMS_POLL: Duration = Duration::from_millis(5);
/// The list of living VMs when it was last written.
const VMS: &str = "vms.json";

/// No file of the daemon is larger.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// Kinds of objects that are stored in one JSON file each.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Functions,
    Snapshots,
    Networks,
}

/// The owner of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The directory is empty, except for the lock of a daemon that is about to use it.
    Nobody,
    /// The directory has the mark.
    Marked,
    /// No mark, but the folders that each version of `tvmm serve` before the mark made at its start.
    Unmarked,
    /// The directory has other contents.
    Another,
}

impl Owner {
    /// Finds the owner, and changes nothing.
    fn of(dir: &Path) -> io::Result<Owner> {
        match fs::symlink_metadata(dir.join(MARK)) {
            Ok(metadata) if metadata.is_file() && metadata.len() <= MARK_TEXT.len() as u64 => {
                // A daemon that was killed while it wrote the mark has left its beginning.
                let is_ours = MARK_TEXT.as_bytes().starts_with(&fs::read(dir.join(MARK))?);
                return Ok(if is_ours { Owner::Marked } else { Owner::Another });
            }
            Ok(_) => return Ok(Owner::Another),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let entries = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
        let is_lock = |path: &Path| fs::symlink_metadata(path).is_ok_and(|it| it.is_file() && it.len() == 0);
        let has_lock = is_lock(&dir.join(LOCK));
        if entries.iter().all(|name| has_lock && name == LOCK) {
            return Ok(Owner::Nobody);
        }
        // A link to a directory elsewhere counts: an administrator may have moved a part to another disk.
        let folders = [Kind::Functions, Kind::Snapshots, Kind::Networks].map(Kind::folder);
        let has_all = folders.iter().chain(&["snapshots", "profiles"]).all(|folder| dir.join(folder).is_dir());
        Ok(if has_lock && has_all { Owner::Unmarked } else { Owner::Another })
    }
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
    /// Its VMs inherit the descriptor, and with it the lock.
    _vms_lock: File,
    /// Serialises writers: two would use the same temporary file.
    writing: Mutex<()>,
}

impl Store {
    /// Opens or makes the directory and its folders, and clears the files of an earlier daemon's VMs.
    pub(super) fn open(dir: &Path) -> Result<Store, ServeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| ServeError::Directory { path, source }
        };
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path));
        make(dir)?;
        let dir = fs::canonicalize(dir).map_err(failed(dir))?;
        // Checked before anything is made in it.
        let owner = |dir: &Path| match Owner::of(dir).map_err(failed(dir))? {
            Owner::Another => Err(ServeError::NotOurs { path: dir.to_owned() }),
            owner => Ok(owner),
        };
        owner(&dir)?;
        let lock_path = dir.join(LOCK);
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(failed(&lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ServeError::InUse { path: dir }),
            Err(errno) => return Err(failed(&lock_path)(errno.into())),
        }
        // Another daemon may have used and left the directory before the lock was taken.
        if owner(&dir)? != Owner::Marked {
            let mark = dir.join(MARK);
            write_mark(&mark).map_err(failed(&mark))?;
        }
        for folder in [Kind::Functions, Kind::Snapshots, Kind::Networks].map(Kind::folder) {
            make(&dir.join(folder))?;
        }
        let vms_lock_path = dir.join(VMS_LOCK);
        let vms_lock = lock_for_vms(&vms_lock_path).map_err(failed(&vms_lock_path))?;
        let store = Store { dir, _lock: lock, _vms_lock: vms_lock, writing: Mutex::new(()) };
        store.clear_run()?;
        ["run", "snapshots", "profiles"].iter().try_for_each(|folder| make(&store.dir.join(folder)))?;
        Ok(store)
    }

    /// Removes the sockets and images of ended VMs.
    pub(super) fn clear_run(&self) -> Result<(), ServeError> {
        let run = self.dir.join("run");
        gone_is_fine(fs::remove_dir_all(&run)).map_err(|source| ServeError::Directory { path: run, source })
    }

    /// All objects of a kind. A file that cannot be parsed is an error, and is not removed.
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
                // A file that an earlier daemon was writing at its end never got its name.
                (_, Some(extension)) if extension == "partial" => fs::remove_file(&path).map_err(failed)?,
                _ => return Err(ServeError::Stranger { path }),
            }
        }
        Ok(found)
    }

    fn path(&self, kind: Kind, name: &str) -> PathBuf {
        self.dir.join(kind.folder()).join(format!("{name}.json"))
    }

    /// Stores one object. Blocks for the disk.
    pub(super) fn save(&self, kind: Kind, name: &str, what: &impl Serialize) -> snapshot::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        save(&self.path(kind, name), what)
    }

    /// Writes the list of VMs. The records are taken when it is this writer's turn.
    pub(super) fn save_vms<T: Serialize>(&self, records: impl FnOnce() -> Vec<T>) -> snapshot::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        save(&self.vms_path(), &records())
    }

    /// Removes one object, if it is there.
    pub(super) fn remove(&self, kind: Kind, name: &str) -> io::Result<()> {
        gone_is_fine(fs::remove_file(self.path(kind, name)))
    }

    /// The list of living VMs when it was last written.
    pub(super) fn load_vms<T: DeserializeOwned>(&self) -> Result<Vec<T>, ServeError> {
        let path = self.vms_path();
        if path.exists() { load(&path) } else { Ok(Vec::new()) }
    }

    /// The file of the list of living VMs.
    fn vms_path(&self) -> PathBuf {
        self.dir.join(VMS)
    }

    /// The directory, without symbolic links.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of the profiles of all snapshots.
    pub(super) fn profiles_root(&self) -> PathBuf {
        self.dir.join("profiles")
    }

    /// The directory of suspended VMs.
    pub(super) fn suspended_dir(&self) -> PathBuf {
        self.dir.join("suspended")
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
        self.profiles_root().join(id)
    }

    /// The directory of a VM's own drive images.
    pub(super) fn drives_dir(&self, vm: &str) -> PathBuf {
        self.dir.join("run").join(format!("{vm}.drives"))
    }

    /// The directory of files that end with VMs.
    pub(super) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The socket of a VM's vsock device.
    pub(super) fn vsock_path(&self, vm: &str) -> PathBuf {
        self.dir.join("run").join(format!("{vm}.vsock"))
    }
}

/// Returns whether a path in the directory is one that the daemon itself writes; the directory is too.
pub(super) fn is_the_daemons(path: &Path) -> bool {
    let folders = [Kind::Functions, Kind::Snapshots, Kind::Networks].map(Kind::folder);
    let first = path.iter().next().and_then(|name| name.to_str());
    let others = [MARK, LOCK, VMS, VMS_LOCK, "run", "snapshots", "profiles", "suspended"];
    first.is_none_or(|first| folders.iter().chain(&others).any(|own| *own == first))
}

/// Writes the mark durably.
fn write_mark(path: &Path) -> io::Result<()> {
    let mut mark = File::options().create_new(true).write(true).mode(0o600).open(path)?;
    mark.write_all(MARK_TEXT.as_bytes())?;
    mark.sync_all()
}

/// Writes JSON durably.
pub(super) fn save(path: &Path, what: &impl Serialize) -> snapshot::Result<()> {
    // Serialising cannot fail: all keys are strings.
    let bytes = serde_json::to_vec_pretty(what).unwrap_or_default();
    write_limited(path, &bytes, MAX_JSON_BYTES)
}

/// Waits until the VMs of a daemon that was killed have ended, which may be in the middle of writing a snapshot, and
/// returns a lock that the VMs of this daemon inherit.
fn lock_for_vms(path: &Path) -> io::Result<File> {
    let lock = File::options().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    let mut wait = Wait::new("the end of an earlier daemon's VMs", FORMER_VMS_TIME);
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if !wait.is_over() => std::thread::sleep(FORMER_VMS_POLL),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                tracing::warn!("VMs of an earlier daemon are still alive; the files that they are writing are left");
                break;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    // Shared: two daemons after one another may have VMs that live on.
    rustix::fs::flock(&lock, FlockOperation::LockShared)?;
    rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty())?;
    Ok(lock)
}

/// Treats a missing file as removed.
pub(super) fn gone_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

pub(super) fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ServeError> {
    let bytes = read_limited(path, MAX_JSON_BYTES)?;
    serde_json::from_slice(&bytes).map_err(|source| ServeError::Unreadable { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_daemon_are_known() {
        for own in ["", "vms.lock", "vms.json", "suspended/a/1/memory", "functions/f.json"] {
            assert!(is_the_daemons(Path::new(own)), "{own}");
        }
        assert!(!is_the_daemons(Path::new("images/vms.lock")));
    }

    #[test]
    fn only_an_empty_directory_and_those_of_daemons_are_used() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert_eq!(Owner::of(dir.path()).unwrap(), Owner::Nobody);
        fs::write(at(LOCK), "").unwrap();
        assert_eq!(Owner::of(dir.path()).unwrap(), Owner::Nobody);
        for folder in ["functions", "snapshot-records", "net-ifaces", "snapshots"] {
            fs::create_dir(at(folder)).unwrap();
            assert_eq!(Owner::of(dir.path()).unwrap(), Owner::Another, "{folder}");
        }
        fs::create_dir(at("profiles")).unwrap();
        assert_eq!(Owner::of(dir.path()).unwrap(), Owner::Unmarked);
        fs::write(at(LOCK), "7").unwrap();
        assert_eq!(Owner::of(dir.path()).unwrap(), Owner::Another);
        for (text, owner) in [
            ("", Owner::Marked),
            (&MARK_TEXT[..20], Owner::Marked),
            (MARK_TEXT, Owner::Marked),
            ("Another text", Owner::Another),
            (&MARK_TEXT.replace("Format 1", "Format 2"), Owner::Another),
            (&MARK_TEXT.repeat(2), Owner::Another),
        ] {
            fs::write(at(MARK), text).unwrap();
            assert_eq!(Owner::of(dir.path()).unwrap(), owner, "{text}");
        }
        fs::remove_file(at(MARK)).unwrap();
        std::os::unix::fs::symlink(at(LOCK), at(MARK)).unwrap();
        assert_eq!(Owner::of(dir.path()).unwrap(), Owner::Another);
    }
}
