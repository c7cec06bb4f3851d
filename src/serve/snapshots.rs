//! `/snapshots`: taking them of VMs, copying, caching and deleting them.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::Path as FilePath;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{Path, State};
use axum::http::Uri;
use serde::Deserialize;
use utoipa::ToSchema;

use super::blocking::blocking;
use super::body::{Body, check_name, query};
use super::counters::Counters;
use super::daemon::{Daemon, Shared};
use super::fault::{Fault, FaultBody, Reply};
use super::snapshot_record::{SnapshotRecord, derived};
use super::standby;
use super::store::Kind;
use super::vm::Vm;
use super::vm::control::ControlError;
use super::wake;
use super::working_set::{self, CacheState};
use crate::config::bodies::{CreateBody, CreateExtension, WantedState};
use crate::config::control::SnapshotTaken;
use crate::snapshot::{
    self, Chain, Durability, Location, MAX_CHAIN_DEPTH, PartialDir, Snapshot, SnapshotKind, copy_drive, is_partial,
    random_hex,
};

/// A snapshot to be taken.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotBody {
    #[serde(rename = "vmId")]
    vm_id: String,
    /// Name of the snapshot; none: a new name.
    #[serde(rename = "ssId")]
    ss_id: Option<String>,
    /// `Full` (the default), or `Diff`: the pages written since the VM's last snapshot. On top of 16 layers, the daemon
    /// takes a full one instead of a diff, and sets `compacted`.
    snapshot_type: Option<String>,
    /// True: at once and while the VM runs, also in the middle of a request. Default: between requests, with the VM
    /// paused.
    #[serde(default)]
    live: bool,
    /// Refused: the daemon's directory holds the snapshots.
    snapshot_path: Option<String>,
    /// Refused for the same reason.
    mem_file_path: Option<String>,
    /// Refused: there is one format.
    version: Option<String>,
    /// FaaSnap: record the regions that are not zero. A snapshot always does; false is refused.
    record_regions: Option<bool>,
    /// FaaSnap: regions smaller than this are left out. Only 0.
    size_threshold: Option<u64>,
    /// FaaSnap: gaps smaller than this many pages are included. Only 32, FaaSnap's own.
    interval_threshold: Option<u64>,
}

/// Changes to a snapshot's files.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotPatch {
    /// FaaSnap: make holes of zero pages. In a snapshot every zero page is a hole already; false is refused.
    dig_hole: Option<bool>,
    /// Bring its files into the page cache.
    #[serde(default)]
    load_cache: bool,
    /// Drop its files from the page cache.
    #[serde(default)]
    drop_cache: bool,
}

/// All snapshots.
#[utoipa::path(get, path = "/snapshots", tag = "snapshots",
    responses((status = 200, description = "All snapshots", body = Vec<SnapshotRecord>)))]
pub(super) async fn get_snapshots(State(daemon): State<Shared>) -> Reply<Vec<SnapshotRecord>> {
    Reply(daemon.snapshots().values().cloned().collect())
}

/// One snapshot.
#[utoipa::path(get, path = "/snapshots/{id}", tag = "snapshots", params(("id" = String, Path)),
    responses((status = 200, description = "The snapshot", body = SnapshotRecord),
        (status = 404, body = FaultBody, description = "The snapshot does not exist")))]
pub(super) async fn get_snapshot(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<SnapshotRecord>, Fault> {
    daemon.snapshot(&id).map(Reply)
}

/// Takes a snapshot of a VM, between its requests or live. The VM runs on.
#[utoipa::path(post, path = "/snapshots", tag = "snapshots", request_body = SnapshotBody,
    responses((status = 200, description = "The record of the snapshot", body = SnapshotRecord),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The VM does not exist"),
        (status = 409, body = FaultBody, description = "A snapshot of that name exists, or the VM has ended"),
        (status = 422, body = FaultBody, description = "The VM refuses the snapshot"),
        (status = 507, body = FaultBody, description = "The disk is full")))]
pub(super) async fn post_snapshot(
    State(daemon): State<Shared>,
    Body(body): Body<SnapshotBody>,
) -> Result<Reply<SnapshotRecord>, Fault> {
    // Once begun it is finished, whether or not the client waits.
    let task = tokio::spawn(async move { take(&daemon, body).await });
    task.await.unwrap_or_else(|_| Err(Fault::internal("The snapshot was given up."))).map(Reply)
}

async fn take(daemon: &Arc<Daemon>, body: SnapshotBody) -> Result<SnapshotRecord, Fault> {
    if body.snapshot_path.is_some() || body.mem_file_path.is_some() || body.version.is_some() {
        return Err(Fault::bad(
            "Snapshots are kept in the daemon's directory, in one format: leave out `snapshot_path`, `mem_file_path` \
             and `version`.",
        ));
    }
    if body.record_regions == Some(false) {
        return Err(Fault::bad("`record_regions` cannot be false: a snapshot always knows which pages are not zero."));
    }
    working_set::check_thresholds(body.size_threshold, body.interval_threshold)?;
    let kind = match body.snapshot_type.as_deref() {
        None | Some("Full") => SnapshotKind::Full,
        Some("Diff") => SnapshotKind::Diff,
        Some(other) => return Err(Fault::bad(format!("Unknown snapshot type `{other}`; known: Full, Diff."))),
    };
    let mut claim = claim_name(daemon, body.ss_id)?;
    let claimed = wake::claim(daemon, &body.vm_id).await?;
    let vm = claimed.using.vm();
    let _quiet = if body.live { None } else { Some(vm.quiet().await) };
    let dir = daemon.snapshot_dir(&claim.id);
    let parent = vm.diff_parent().filter(|_| kind == SnapshotKind::Diff);
    let layers = parent.as_ref().map_or(0, |parent| layers_of(&daemon.snapshots(), parent));
    // A diff of a VM that was suspended would build on a snapshot that ends with the VM.
    let compacted = kind == SnapshotKind::Diff && (layers >= COMPACT_LAYERS || vm.former_life().is_some());
    let kind = if compacted { SnapshotKind::Full } else { kind };
    if let Some(parent) = parent.filter(|_| !compacted) {
        // From here until the diff is kept or given up, its parent cannot be deleted, even if the VM ends.
        claim.need(parent);
    }
    if compacted {
        tracing::info!(
            snapshot = claim.id,
            layers,
            "A full snapshot is taken in place of a diff: its chain would be long, or its VM was suspended"
        );
    }
    let taken = if body.live { capture_live(vm, kind, &dir).await? } else { capture(vm, kind, &dir).await? };
    vm.was_snapshotted(&claim.id);
    let opened = blocking({
        let dir = dir.clone();
        move || Snapshot::open(&Location::Dir(dir))
    });
    let opened = opened.await?.map_err(|error| Fault::of(&error))?;
    let parent = opened.parent_location().map(|location| match location {
        Location::Dir(dir) | Location::Files { snapshot: dir, .. } => dir,
    });
    let record = SnapshotRecord {
        ss_id: claim.id.clone(),
        vm_id: vm.id.clone(),
        snapshot_type: format!("{kind:?}"),
        parent: parent.and_then(|dir| Some(dir.file_name()?.to_str()?.to_string())),
        compacted,
        copy_of: None,
        identity: opened.id().to_string(),
        memory_bytes: taken.memory_bytes,
        capture_us: taken.capture_us,
        created_unix_ms: opened.manifest().created_unix_ms,
        drive_copies: opened.manifest().drives.iter().map(|copy| copy.drive_id.clone()).collect(),
        function: vm.function.clone(),
    };
    let record = keep(daemon, record).await?;
    if compacted {
        Counters::count(&daemon.counters.snapshots_compacted);
    }
    Ok(record)
}

/// Most layers of a chain on which a diff is taken: each makes restores slower, and no restore opens more than
/// [`MAX_CHAIN_DEPTH`].
const COMPACT_LAYERS: usize = MAX_CHAIN_DEPTH / 4;

/// The number of layers in the chain of a stored snapshot.
fn layers_of(snapshots: &BTreeMap<String, SnapshotRecord>, ss_id: &str) -> usize {
    let parent_of = |record: &&SnapshotRecord| record.parent.as_ref().and_then(|parent| snapshots.get(parent));
    std::iter::successors(snapshots.get(ss_id), parent_of).take(MAX_CHAIN_DEPTH).count()
}

/// Pauses the VM, takes the snapshot, and resumes the VM whatever the outcome.
pub(super) async fn capture(vm: &Vm, kind: SnapshotKind, dir: &FilePath) -> Result<SnapshotTaken, Fault> {
    vm.set_state(WantedState::Paused).await.map_err(refused)?;
    let extension = CreateExtension { resume: true, copy_drives: vm.function.writes_image(), ..Default::default() };
    let taken = vm.send("PUT", "/snapshot/create", &create_body(dir, kind, extension)).await;
    if taken.is_err() {
        vm.set_state(WantedState::Resumed).await.map_err(refused)?;
    }
    taken.map_err(refused)
}

/// Takes the snapshot while the VM runs.
pub(super) async fn capture_live(vm: &Vm, kind: SnapshotKind, dir: &FilePath) -> Result<SnapshotTaken, Fault> {
    let extension = CreateExtension { live: true, copy_drives: vm.function.writes_image(), ..Default::default() };
    vm.send("PUT", "/snapshot/create", &create_body(dir, kind, extension)).await.map_err(refused)
}

fn create_body(dir: &FilePath, kind: SnapshotKind, tvmm: CreateExtension) -> CreateBody {
    CreateBody { snapshot_path: dir.to_owned(), mem_file_path: None, snapshot_type: kind, tvmm }
}

fn refused(error: ControlError) -> Fault {
    error.fault(format!("Cannot take the snapshot: {}.", error.to_string().trim_end_matches('.')))
}

/// Stores a snapshot's record; if that fails, the snapshot is removed.
async fn keep(daemon: &Arc<Daemon>, record: SnapshotRecord) -> Result<SnapshotRecord, Fault> {
    let kept = blocking({
        let daemon = daemon.clone();
        let record = record.clone();
        move || {
            let kept = daemon.store.save(Kind::Snapshots, &record.ss_id, &record);
            if kept.is_err() {
                // Best effort: files without a record are removed at the next start.
                let _ = fs::remove_dir_all(daemon.snapshot_dir(&record.ss_id));
            }
            kept
        }
    });
    kept.await?.map_err(|error| Fault::of(&error))?;
    daemon.snapshots().insert(record.ss_id.clone(), record.clone());
    daemon.standby.changed.notify_one();
    daemon.counters.snapshots_made.fetch_add(1, Ordering::Relaxed);
    Ok(record)
}

/// Reserves a name for a snapshot. The snapshots that it needs cannot be deleted while this lives.
struct Claim {
    id: String,
    names: Arc<Mutex<BTreeMap<String, Vec<String>>>>,
}

impl Claim {
    fn need(&mut self, ss_id: String) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.entry(self.id.clone()).or_default().push(ss_id);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

fn claim_name(daemon: &Daemon, wanted: Option<String>) -> Result<Claim, Fault> {
    let id = wanted.unwrap_or_else(|| random_hex(6));
    check_name("snapshot", &id)?;
    let is_free = match daemon.names.lock().unwrap_or_else(PoisonError::into_inner).entry(id.clone()) {
        Entry::Vacant(free) => {
            free.insert(Vec::new());
            true
        }
        Entry::Occupied(_) => false,
    };
    let taken = Fault::conflict(format!("There is a snapshot `{id}` already: snapshots do not change."));
    if !is_free {
        return Err(taken);
    }
    let claim = Claim { id, names: daemon.names.clone() };
    if daemon.snapshots().contains_key(&claim.id) || daemon.snapshot_dir(&claim.id).exists() {
        return Err(taken);
    }
    Ok(claim)
}

/// Copies a snapshot, its profiles included: clones of different snapshots share no page cache.
#[utoipa::path(put, path = "/snapshots", tag = "snapshots",
    params(("from_snapshot" = String, Query), ("ssId" = Option<String>, Query,
        description = "The name of the copy; none: a new name"),
        ("mem_file_path" = Option<String>, Query,
        description = "Refused: snapshots are kept in the daemon's directory")),
    responses((status = 200, description = "The record of the copy", body = SnapshotRecord),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 507, body = FaultBody, description = "The disk is full")))]
pub(super) async fn copy_snapshot(State(daemon): State<Shared>, uri: Uri) -> Result<Reply<SnapshotRecord>, Fault> {
    let task = tokio::spawn(async move { copy(&daemon, &uri).await });
    task.await.unwrap_or_else(|_| Err(Fault::internal("The copy was given up."))).map(Reply)
}

async fn copy(daemon: &Arc<Daemon>, uri: &Uri) -> Result<SnapshotRecord, Fault> {
    let mut query = query(uri, &["from_snapshot", "ssId", "mem_file_path"])?;
    if query.contains_key("mem_file_path") {
        return Err(Fault::bad("Snapshots are kept in the daemon's directory: leave out `mem_file_path`."));
    }
    let from = query.remove("from_snapshot").ok_or_else(|| Fault::bad("The query needs `from_snapshot`."))?;
    let from = daemon.snapshot(&from)?;
    let mut claim = claim_name(daemon, query.remove("ssId"))?;
    claim.need(from.ss_id.clone());
    from.parent.iter().for_each(|parent| claim.need(parent.clone()));
    let copied = blocking({
        let daemon = daemon.clone();
        let from = from.ss_id.clone();
        let id = claim.id.clone();
        move || {
            let to = daemon.snapshot_dir(&id);
            let profiles = daemon.store.profiles_dir(&id);
            let copied = copy_dir(&daemon.snapshot_dir(&from), &to)
                .and_then(|()| copy_dir(&daemon.store.profiles_dir(&from), &profiles))
                // Opened as a restore does.
                .and_then(|()| Chain::open(&Location::Dir(to.clone())).map(drop));
            if copied.is_err() {
                // Best effort: files without a record are removed at the next start.
                let _ = fs::remove_dir_all(&profiles).and_then(|()| fs::remove_dir_all(&to));
            }
            copied
        }
    });
    copied.await?.map_err(|error| Fault::of(&error))?;
    let record = SnapshotRecord { ss_id: claim.id.clone(), copy_of: Some(from.ss_id.clone()), ..from };
    keep(daemon, record).await
}

/// Copies the files of a directory, holes and all, without its folders (whose files can be made again).
fn copy_dir(from: &FilePath, to: &FilePath) -> crate::snapshot::Result<()> {
    let io = |action: &'static str, path: &FilePath| {
        let path = path.to_owned();
        move |source| crate::snapshot::Error::Io { action, path, source }
    };
    let entries = match fs::read_dir(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io("list", from))?,
    };
    let beside = to.parent().unwrap_or(FilePath::new("."));
    let partial = PartialDir::create(beside)?;
    for entry in entries {
        let path = entry.map_err(io("list", from))?.path();
        let file = File::open(&path).map_err(io("open", &path))?;
        let metadata = file.metadata().map_err(io("stat", &path))?;
        let is_wanted = |name: &&OsStr| metadata.is_file() && !is_partial(name);
        let Some(name) = path.file_name().filter(is_wanted) else { continue };
        let (copy, _) = copy_drive(&file, metadata.len(), &partial.path().join(name))?;
        copy.sync_all().map_err(io("sync the copy of", &path))?;
    }
    partial.publish(to, Durability::Synced)
}

/// Brings a snapshot's files into the page cache, or drops them from it.
#[utoipa::path(patch, path = "/snapshots/{id}", tag = "snapshots", params(("id" = String, Path)),
    request_body = SnapshotPatch,
    responses((status = 200, description = "The cached part of the files after the change", body = CacheState),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The snapshot does not exist")))]
pub(super) async fn patch_snapshot(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    Body(patch): Body<SnapshotPatch>,
) -> Result<Reply<CacheState>, Fault> {
    daemon.snapshot(&id)?;
    if patch.dig_hole == Some(false) {
        return Err(Fault::bad("`dig_hole` cannot be false: in a snapshot every zero page is a hole."));
    }
    if patch.load_cache && patch.drop_cache {
        return Err(Fault::bad("`load_cache` and `drop_cache` contradict each other."));
    }
    let dir = daemon.snapshot_dir(&id);
    let changed = blocking(move || {
        if patch.drop_cache {
            working_set::drop_cached(&working_set::files_of(&dir)?)?;
        }
        if patch.load_cache {
            working_set::load_cached(&working_set::files_of(&dir)?)?;
        }
        working_set::cache_state(&working_set::files_of(&dir)?)
    });
    changed.await?.map(Reply).map_err(|error| Fault::of(&error))
}

/// Deletes a snapshot and its profiles.
#[utoipa::path(delete, path = "/snapshots/{id}", tag = "snapshots", params(("id" = String, Path)),
    responses((status = 200, description = "The record of the deleted snapshot", body = SnapshotRecord),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody,
        description = "A VM or another snapshot needs the snapshot")))]
pub(super) async fn delete_snapshot(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<SnapshotRecord>, Fault> {
    let record = daemon.snapshot(&id)?;
    // No other request runs between these checks and the removal from the list: there is no await.
    check_unneeded(&daemon, &id)?;
    // Removed from the list first, so that no VM is restored from half of it.
    daemon.snapshots().remove(&id);
    standby::end_unwanted(&daemon).await;
    let removed = blocking({
        let daemon = daemon.clone();
        move || {
            daemon.store.remove(Kind::Snapshots, &id)?;
            super::store::gone_is_fine(fs::remove_dir_all(daemon.store.profiles_dir(&id)))?;
            super::store::gone_is_fine(fs::remove_dir_all(daemon.snapshot_dir(&id)))
        }
    });
    removed.await?.map_err(|error| Fault::of(&error))?;
    Ok(Reply(record))
}

/// Refuses to delete a snapshot that another snapshot or a VM needs.
fn check_unneeded(daemon: &Daemon, id: &str) -> Result<(), Fault> {
    let refused = |why: String| Err(Fault::conflict(format!("Cannot delete snapshot `{id}`: {why}")));
    let child = daemon.snapshots().values().find(|other| other.parent.as_deref() == Some(id)).cloned();
    if let Some(child) = child {
        return refused(format!("snapshot `{}` builds on it. Delete that one first.", child.ss_id));
    }
    let names = daemon.names.lock().unwrap_or_else(PoisonError::into_inner);
    let made = names.iter().find(|(_, needed)| needed.iter().any(|needed| needed == id));
    if let Some((made, _)) = made {
        return refused(format!("snapshot `{made}`, which is being made, needs it."));
    }
    let asleep = daemon.vms.suspended.all();
    if let Some(vm) = asleep.iter().find(|vm| vm.record().ss_id.as_deref() == Some(id)) {
        return refused(format!("the suspended VM `{}` builds on it. Delete the VM first.", vm.record().vm_id));
    }
    // VMs that stand by end with their snapshot.
    for vm in daemon.vms.all().into_iter().filter(|vm| !vm.stands_by()) {
        if vm.ss_id.as_deref() == Some(id) {
            return refused(format!("VM `{}` runs from it. End the VM first.", vm.id));
        }
        if vm.diff_parent().as_deref() == Some(id) {
            return refused(format!(
                "the next diff of VM `{}` builds on it. End the VM, or take another snapshot of it first.",
                vm.id
            ));
        }
    }
    let waking = daemon.vms.suspended.woken_records().into_iter().find(|vm| vm.ss_id.as_deref() == Some(id));
    if let Some(vm) = waking {
        return refused(format!("VM `{}`, which is being woken, builds on it. Delete the VM first.", vm.vm_id));
    }
    Ok(())
}

/// Removes snapshots without a record (it was never written, or removed first), profiles of missing snapshots, and
/// files left by killed writers.
pub(super) fn sweep(daemon: &Daemon) -> io::Result<()> {
    snapshot::sweep(daemon.store.dir());
    snapshot::sweep(&daemon.store.snapshots_dir());
    sweep_snapshots(daemon)?;
    let kept = daemon.snapshots();
    for entry in fs::read_dir(daemon.store.profiles_root())? {
        let entry = entry?;
        let Some(ss_id) = entry.file_name().to_str().filter(|name| kept.contains_key(*name)).map(String::from) else {
            tracing::warn!(path = %entry.path().display(), "Profiles without a snapshot are removed");
            fs::remove_dir_all(entry.path())?;
            continue;
        };
        snapshot::sweep_own(&entry.path());
        snapshot::sweep_own(&derived(&daemon.snapshot_dir(&ss_id)));
    }
    Ok(())
}

fn sweep_snapshots(daemon: &Daemon) -> io::Result<()> {
    let kept = daemon.snapshots();
    for entry in fs::read_dir(daemon.store.snapshots_dir())? {
        let entry = entry?;
        // A temporary that is left now has a living writer, which removes or renames it.
        if snapshot::is_partial(&entry.file_name()) {
            continue;
        }
        if !entry.file_name().to_str().is_some_and(|name| kept.contains_key(name)) {
            tracing::warn!(path = %entry.path().display(), "A snapshot without a record is removed");
            super::store::gone_is_fine(fs::remove_dir_all(entry.path()))?;
        }
    }
    Ok(())
}
