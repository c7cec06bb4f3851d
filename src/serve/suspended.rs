//! Suspended VMs: each is a directory with one snapshot directory per layer, and a record that is written last and
//! renamed or removed first. A directory without a record is of a VM that ran when its daemon ended, and is removed.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex as AsyncMutex, Notify, OwnedMutexGuard};

use super::error::ServeError;
use super::function::Function;
use super::store::{self, gone_is_fine};
use super::vm::{FormerLife, VmRecord};
use crate::snapshot;

/// Time for which a VM that could not be woken is left to requests that name it.
const PASSED_OVER: Duration = Duration::from_secs(60);

/// The record's file in the directory of a VM.
const RECORD: &str = "vm.json";
/// The name of that file while the VM is woken, and runs.
const AWAKE: &str = "vm-awake.json";

/// A snapshot of a suspended VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Layer {
    /// The name of its directory.
    pub(super) number: u64,
    /// Its space on the disk, bytes.
    pub(super) bytes: u64,
}

/// A suspended VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SuspendedVm {
    /// The VM's record, and the restore that made it first.
    pub(super) life: FormerLife,
    /// The function as it was when the VM was made.
    pub(super) function: Function,
    /// Its snapshots. The last one is the VM, and builds on those before it.
    pub(super) layers: Vec<Layer>,
    /// The end of its last request, ms since 1970.
    pub(super) used_unix_ms: u64,
}

impl SuspendedVm {
    pub(super) fn record(&self) -> &VmRecord {
        &self.life.record
    }
}

/// A VM that is suspended, or runs from the snapshots of its last suspension.
#[derive(Debug, Default)]
struct Kept {
    layers: Vec<Layer>,
    /// `None` while it runs, or is woken.
    asleep: Option<SuspendedVm>,
    /// Its record while it is woken.
    waking_record: Option<VmRecord>,
    /// Held by the request that wakes it.
    waking: Arc<AsyncMutex<()>>,
    /// The time at which it could not be woken.
    failed: Option<Instant>,
}

/// A suspended VM that only the holder of this wakes.
#[derive(Debug)]
pub(super) struct Reserved {
    pub(super) id: String,
    _waking: OwnedMutexGuard<()>,
}

/// All suspended VMs, and those that were woken and still live.
#[derive(Debug)]
pub(super) struct Suspended {
    dir: PathBuf,
    kept: Mutex<BTreeMap<String, Kept>>,
    /// VMs that were saved, or are about to be, and whose processes end.
    leaving: Mutex<BTreeMap<String, SuspendedVm>>,
    /// Space of snapshots that belong to no VM in `kept` or `leaving` yet, bytes.
    reserved: Mutex<u64>,
    /// Notified when less is reserved.
    pub(super) unreserved: Notify,
}

/// Space on the disk for a snapshot that is being made.
#[derive(Debug)]
pub(super) struct DiskSpace<'a> {
    suspended: &'a Suspended,
    bytes: u64,
}

impl DiskSpace<'_> {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds the space of another reservation.
    pub(super) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Gives back what is not needed. Returns false, and changes nothing, if more is needed.
    pub(super) fn shrink(&mut self, bytes: u64) -> bool {
        let Some(rest) = self.bytes.checked_sub(bytes) else { return false };
        *lock(&self.suspended.reserved) -= rest;
        self.suspended.unreserved.notify_waiters();
        self.bytes = bytes;
        true
    }
}

impl Drop for DiskSpace<'_> {
    fn drop(&mut self) {
        *lock(&self.suspended.reserved) -= self.bytes;
        self.suspended.unreserved.notify_waiters();
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Suspended {
    /// Finds the VMs that an earlier daemon has suspended, and removes what belongs to none.
    ///
    /// # Errors
    /// The directory cannot be read, or a record cannot be parsed; it is not removed then.
    pub(super) fn open(dir: PathBuf) -> Result<Suspended, ServeError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| ServeError::Directory { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed(&dir))?;
        let mut kept = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
            let path = entry.map_err(failed(&dir))?.path();
            let record = path.join(RECORD);
            if !record.exists() {
                tracing::warn!(path = %path.display(), "A VM that was not suspended when its daemon ended is removed");
                fs::remove_dir_all(&path).map_err(failed(&path))?;
                continue;
            }
            let vm: SuspendedVm = store::load(&record)?;
            remove_others(&path, &vm.layers).map_err(failed(&path))?;
            let id = vm.record().vm_id.clone();
            kept.insert(id, Kept { layers: vm.layers.clone(), asleep: Some(vm), ..Kept::default() });
        }
        let kept = Mutex::new(kept);
        Ok(Suspended { dir, kept, leaving: Mutex::default(), reserved: Mutex::default(), unreserved: Notify::new() })
    }

    /// The directory of a VM.
    pub(super) fn dir_of(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// The directory of a snapshot of a VM.
    pub(super) fn layer_dir(&self, id: &str, number: u64) -> PathBuf {
        self.dir_of(id).join(number.to_string())
    }

    /// The snapshots that a VM which was woken runs from.
    pub(super) fn layers_of(&self, id: &str) -> Vec<Layer> {
        lock(&self.kept).get(id).map(|kept| kept.layers.clone()).unwrap_or_default()
    }

    /// Space of all snapshots on the disk, and the space reserved for those that are being made, bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.settled_bytes() + *lock(&self.reserved)
    }

    /// Returns whether a snapshot of so many bytes has space beside those that belong to a VM.
    pub(super) fn has_space(&self, bytes: u64, most: u64) -> bool {
        self.settled_bytes() + bytes <= most
    }

    /// Space of the snapshots that belong to a VM, bytes.
    pub(super) fn settled_bytes(&self) -> u64 {
        let kept: u64 = lock(&self.kept).values().flat_map(|kept| &kept.layers).map(|layer| layer.bytes).sum();
        // The other layers of these VMs are in `kept`.
        let leaving: u64 = lock(&self.leaving).values().filter_map(|vm| Some(vm.layers.last()?.bytes)).sum();
        kept + leaving
    }

    /// Reserves space for a snapshot, until it belongs to a VM that [leaves](Self::leave). `None`: with it, all would
    /// have more than `most`.
    pub(super) fn reserve_space(&self, bytes: u64, most: u64) -> Option<DiskSpace<'_>> {
        let mut reserved = lock(&self.reserved);
        if self.settled_bytes() + *reserved + bytes > most {
            return None;
        }
        *reserved += bytes;
        Some(DiskSpace { suspended: self, bytes })
    }

    /// A suspended VM.
    pub(super) fn get(&self, id: &str) -> Option<SuspendedVm> {
        lock(&self.kept).get(id)?.asleep.clone()
    }

    /// The record of a VM that is suspended, or is woken. A VM that runs has another one.
    pub(super) fn record(&self, id: &str) -> Option<VmRecord> {
        let kept = lock(&self.kept);
        let kept = kept.get(id)?;
        kept.asleep.as_ref().map(|vm| vm.record().clone()).or_else(|| kept.waking_record.clone())
    }

    /// The records of VMs that are being woken, and of those that were woken and run.
    pub(super) fn woken_records(&self) -> Vec<VmRecord> {
        let kept = lock(&self.kept);
        kept.values().filter(|kept| kept.asleep.is_none()).filter_map(|kept| kept.waking_record.clone()).collect()
    }

    /// All suspended VMs, the one that was used last at the end.
    pub(super) fn all(&self) -> Vec<SuspendedVm> {
        let mut all: Vec<SuspendedVm> = lock(&self.kept).values().filter_map(|kept| kept.asleep.clone()).collect();
        all.sort_by_key(|vm| vm.used_unix_ms);
        all
    }

    /// The lock of the request that wakes a VM.
    pub(super) fn waking(&self, id: &str) -> Option<Arc<AsyncMutex<()>>> {
        Some(lock(&self.kept).get(id)?.waking.clone())
    }

    /// Reserves a VM to be woken: of those that fit and that no request wakes, the one that was used last.
    pub(super) fn reserve(&self, is_fit: impl Fn(&SuspendedVm) -> bool) -> Option<Reserved> {
        let kept = lock(&self.kept);
        let may_be = |kept: &&Kept| kept.failed.is_none_or(|failed| failed.elapsed() >= PASSED_OVER);
        let asleep = kept.values().filter(may_be).filter_map(|kept| Some((kept, kept.asleep.as_ref()?)));
        let mut fit: Vec<_> = asleep.filter(|(_, vm)| is_fit(vm)).collect();
        fit.sort_by_key(|(_, vm)| std::cmp::Reverse(vm.used_unix_ms));
        fit.into_iter().find_map(|(kept, vm)| {
            let waking = kept.waking.clone().try_lock_owned().ok()?;
            Some(Reserved { id: vm.record().vm_id.clone(), _waking: waking })
        })
    }

    /// Notes that a VM could not be woken, and not because there was no room.
    pub(super) fn note_failure(&self, id: &str) {
        if let Some(kept) = lock(&self.kept).get_mut(id) {
            kept.failed = Some(Instant::now());
        }
    }

    /// Takes a VM to be woken. Until [`runs_on`](Self::runs_on) a restart finds it as it is.
    pub(super) fn take(&self, id: &str) -> Option<SuspendedVm> {
        let mut kept = lock(&self.kept);
        let entry = kept.get_mut(id)?;
        let vm = entry.asleep.take()?;
        entry.waking_record = Some(vm.record().clone());
        Some(vm)
    }

    /// Called just before the guest of a VM that was [taken](Self::take) may run on: a restart must no longer find the
    /// VM as it was. Blocks for the disk.
    pub(super) fn runs_on(&self, id: &str) -> snapshot::Result<()> {
        let path = self.dir_of(id).join(RECORD);
        let renamed = gone_is_fine(fs::rename(&path, path.with_file_name(AWAKE)));
        renamed.map_err(|source| snapshot::Error::Io { action: "rename", path, source })
    }

    /// Returns a VM that was not woken; a full disk does not prevent it. Blocks for the disk.
    pub(super) fn put_back(&self, vm: SuspendedVm) -> snapshot::Result<()> {
        let path = self.dir_of(&vm.record().vm_id).join(AWAKE);
        let record = path.with_file_name(RECORD);
        let renamed = if record.exists() { Ok(()) } else { fs::rename(&path, record) };
        drop(self.insert(vm));
        renamed.map_err(|source| snapshot::Error::Io { action: "rename", path, source })
    }

    /// Writes the record of a VM. From now on a restart finds the VM. Blocks for the disk.
    pub(super) fn save(&self, vm: &SuspendedVm) -> snapshot::Result<()> {
        store::save(&self.dir_of(&vm.record().vm_id).join(RECORD), vm)
    }

    /// Removes the record of a VM that runs on though it was saved, or may have been. Blocks for the disk.
    pub(super) fn unsave(&self, id: &str) -> io::Result<()> {
        gone_is_fine(fs::remove_file(self.dir_of(id).join(RECORD)))
    }

    /// Returns the snapshots on which the VM does not build any more.
    fn insert(&self, vm: SuspendedVm) -> Vec<Layer> {
        let mut kept = lock(&self.kept);
        let entry = kept.entry(vm.record().vm_id.clone()).or_default();
        let former = std::mem::replace(&mut entry.layers, vm.layers.clone());
        entry.asleep = Some(vm);
        former.into_iter().filter(|layer| !entry.layers.contains(layer)).collect()
    }

    /// Called when the snapshot of a VM is complete, before the VM is saved: its process may end from now on.
    pub(super) fn leave(&self, vm: SuspendedVm) {
        lock(&self.leaving).insert(vm.record().vm_id.clone(), vm);
    }

    /// Called when a VM that was to [leave](Self::leave) could not be saved. Returns false if its process has ended
    /// meanwhile: then the VM is suspended, but a restart will not find it.
    pub(super) fn stay(&self, id: &str) -> bool {
        lock(&self.leaving).remove(id).is_some()
    }

    /// Called when the process of a VM has ended. Returns whether the VM is suspended; otherwise it is over, and its
    /// snapshots are removed.
    pub(super) fn has_left(&self, id: &str) -> bool {
        let left = lock(&self.leaving).remove(id);
        let is_suspended = left.is_some();
        match left {
            Some(vm) => {
                // The VM may be woken and suspended again before they are removed: others stay.
                let over: Vec<PathBuf> =
                    self.insert(vm).into_iter().map(|layer| self.layer_dir(id, layer.number)).collect();
                in_background(move || over.iter().try_for_each(|layer| gone_is_fine(fs::remove_dir_all(layer))));
            }
            None => {
                lock(&self.kept).remove(id);
                self.remove_dir(id);
            }
        }
        is_suspended
    }

    /// Removes a suspended VM and its snapshots. `None`: the VM is not suspended, or is being woken.
    pub(super) fn remove_asleep(&self, id: &str) -> Option<VmRecord> {
        let mut kept = lock(&self.kept);
        let vm = kept.get_mut(id)?.asleep.take()?;
        kept.remove(id);
        drop(kept);
        // At once: a restart would find it until its files are removed.
        if let Err(error) = self.unsave(id) {
            tracing::warn!(%error, vm = id, "Cannot remove the record of a VM that was suspended");
        }
        self.remove_dir(id);
        Some(vm.life.record)
    }

    /// Removes the directory of a VM that is over, also if it was never suspended: a suspension may have begun.
    fn remove_dir(&self, id: &str) {
        let dir = self.dir_of(id);
        in_background(move || gone_is_fine(fs::remove_dir_all(&dir)));
    }
}

/// Removes everything but the record and these layers: snapshots that were given up, and those before a full one. Only
/// for a VM that no request can wake meanwhile.
fn remove_others(dir: &Path, layers: &[Layer]) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_kept = |name: &str| name == RECORD || layers.iter().any(|layer| layer.number.to_string() == name);
        if name.to_str().is_some_and(is_kept) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            gone_is_fine(fs::remove_dir_all(entry.path()))?;
        } else {
            gone_is_fine(fs::remove_file(entry.path()))?;
        }
    }
    Ok(())
}

/// The space of the files in a directory and those below it, bytes.
pub(super) fn space_of(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        bytes += 512 * entry.metadata()?.blocks();
        if entry.file_type()?.is_dir() {
            bytes += space_of(&entry.path())?;
        }
    }
    Ok(bytes)
}

/// Removes files without making requests wait. Files that cannot be removed are removed at the next start.
fn in_background(remove: impl FnOnce() -> io::Result<()> + Send + 'static) {
    let remove = move || {
        if let Err(error) = remove() {
            tracing::warn!(%error, "Cannot remove the snapshots of a VM that was suspended");
        }
    };
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(remove)),
        Err(_) => remove(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_reserved_as_long_as_there_is_any() {
        let dir = tempfile::tempdir().unwrap();
        let suspended = Suspended::open(dir.path().join("suspended")).unwrap();
        let mut one = suspended.reserve_space(60, 100).unwrap();
        assert!(suspended.reserve_space(41, 100).is_none() && suspended.has_space(100, 100));
        let mut other = suspended.reserve_space(30, 100).unwrap();
        other.join(suspended.reserve_space(10, 100).unwrap());
        assert!(!one.shrink(61) && one.shrink(10));
        assert_eq!((one.bytes(), other.bytes(), suspended.bytes()), (10, 40, 50));
        drop(other);
        drop(one);
        assert_eq!(suspended.bytes(), 0);
    }

    #[test]
    fn a_vm_that_ends_in_its_first_suspension_leaves_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let suspended = Suspended::open(dir.path().join("suspended")).unwrap();
        let layer = suspended.layer_dir("a", 1);
        fs::create_dir_all(&layer).unwrap();
        fs::write(layer.join("memory"), "x").unwrap();
        assert!(!suspended.has_left("a"));
        assert!(!suspended.dir_of("a").exists());
        // Most VMs were never suspended.
        assert!(!suspended.has_left("b"));
    }
}
