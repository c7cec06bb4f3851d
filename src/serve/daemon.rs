//! The state of the daemon, and the start of VMs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use serde_json::json;

use super::access::counts::AccessCounts;
use super::allowances::Allowances;
use super::blocking::blocking;
use super::counters::Counters;
use super::drives::{Copies, DriveSource, OwnDrives};
use super::error::ServeError;
use super::fault::Fault;
use super::function::Function;
use super::gate::Gate;
use super::idle_counts::IdleCounts;
use super::load::{RestoreSettings, contradiction};
use super::network::Network;
use super::options::Options;
use super::repurpose_counts::{RepurposeCounts, RepurposeEnd};
use super::snapshot_record::SnapshotRecord;
use super::standby_counts::StandbyCounts;
use super::store::{Kind, Store, gone_is_fine};
use super::suspended::Suspended;
use super::trace::{Recording, Traces};
use super::vm::capacity::{Capacity, Room};
use super::vm::control::ControlError;
use super::vm::process::Spawner;
use super::vm::shells::{Shell, Shells};
use super::vm::spares::Place;
use super::vm::table::{Counts, Table};
use super::vm::{
    Purpose, RequestGuard, RestoreOrigin, RestoreSpec, StartSpec, Vm, VmFiles, VmRecord, VmState, make_machine,
    repurpose,
};
use super::working_set::Slot;
use crate::config::LoadFields;
use crate::config::restore::{DriveOverride, RestoreOptions};
use crate::snapshot::{Policy, random_hex};
use crate::sys::clock;
use crate::sys::netns::Netns;
use crate::sys::pagemap_scan;
use crate::tiering::idle::IdleRule;

/// Time limit for booting or restoring a VM, unless an invocation sets a limit.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(120);

/// The state that handlers share.
pub(super) type Shared = Arc<Daemon>;

/// The state of the service.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) options: Options,
    pub(super) store: Store,
    pub(super) allowances: Arc<Allowances>,
    functions: Mutex<BTreeMap<String, Function>>,
    snapshots: Mutex<BTreeMap<String, SnapshotRecord>>,
    networks: Mutex<BTreeMap<String, Network>>,
    /// Names of snapshots being made, and the snapshots that each of them needs.
    pub(super) names: Arc<Mutex<BTreeMap<String, Vec<String>>>>,
    pub(super) vms: Arc<Table>,
    pub(super) standby: Arc<StandbyCounts>,
    pub(super) repurposes: Arc<RepurposeCounts>,
    pub(super) idle: IdleCounts,
    pub(super) shells: Arc<Shells>,
    pub(super) spawner: Spawner,
    pub(super) gate: Gate,
    pub(super) copies: Copies,
    pub(super) traces: Traces,
    pub(super) counters: Counters,
    pub(super) access: Arc<AccessCounts>,
    /// The kernel tells which pages a VM has used (PAGEMAP_SCAN, Linux 6.7).
    pub(super) finds_used_pages: bool,
}

impl Daemon {
    /// Loads the state that an earlier daemon has left.
    pub(super) fn open(options: Options) -> Result<Daemon, ServeError> {
        let store = Store::open(&options.dir)?;
        let functions = store.load_all(Kind::Functions)?;
        let networks = store.load_all(Kind::Networks)?;
        let snapshots = store.load_all(Kind::Snapshots)?;
        let former: Vec<VmRecord> = store.load_vms()?;
        let suspended = Suspended::open(store.suspended_dir())?;
        let spawner =
            Spawner::start(options.vm_args.clone()).map_err(ServeError::os("start the thread that spawns"))?;
        let allowances = Arc::new(Allowances::new(store.dir(), &options)?);
        let counts = Counts::default();
        let room = Room::new(Capacity { vms: options.limits.max_vms, memory_mib: options.limits.memory_mib });
        Ok(Daemon {
            store,
            allowances,
            functions: Mutex::new(functions),
            snapshots: Mutex::new(snapshots),
            networks: Mutex::new(networks),
            names: Arc::default(),
            vms: Arc::new(Table::new(room, options.reuse, former, suspended, counts.clone())),
            standby: counts.standby,
            repurposes: counts.repurposes,
            idle: IdleCounts::default(),
            shells: Arc::new(Shells::new(spawner.clone(), options.limits.shells)),
            spawner,
            gate: Gate::new(options.limits.max_running, options.limits.max_queue),
            copies: Copies::new(),
            traces: Traces::new(options.trace.as_deref(), options.otlp.as_deref())?,
            counters: Counters::default(),
            access: Arc::default(),
            finds_used_pages: pagemap_scan::is_supported().map_err(ServeError::os("scan /proc/self/pagemap"))?,
            options,
        })
    }

    pub(super) fn functions(&self) -> MutexGuard<'_, BTreeMap<String, Function>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn snapshots(&self) -> MutexGuard<'_, BTreeMap<String, SnapshotRecord>> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn networks(&self) -> MutexGuard<'_, BTreeMap<String, Network>> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn function(&self, name: &str) -> Result<Function, Fault> {
        self.functions().get(name).cloned().ok_or_else(|| Fault::not_found("function", name))
    }

    pub(super) fn snapshot(&self, id: &str) -> Result<SnapshotRecord, Fault> {
        self.snapshots().get(id).cloned().ok_or_else(|| Fault::not_found("snapshot", id))
    }

    pub(super) fn network(&self, namespace: &str) -> Result<Network, Fault> {
        self.networks().get(namespace).cloned().ok_or_else(|| Fault::not_found("network interface", namespace))
    }

    /// The rule for idle VMs of a function; `None` if neither the function nor the daemon has one.
    pub(super) fn idle_rule(&self, func_name: &str) -> Option<IdleRule> {
        let limits = &self.options.limits;
        let own = self.functions().get(func_name).and_then(|function| function.idle);
        own.or(limits.idle).map(|idle| idle.rule(limits.idle_timeout))
    }

    /// Refuses the id of a VM that clients cannot use; a suspended one is used by waking it.
    pub(super) fn check_vm(&self, id: &str) -> Result<(), Fault> {
        let is_suspending = || self.vms.get(id).is_some_and(|vm| vm.is_suspending());
        // One that is being woken counts, too.
        if is_suspending() || self.vms.suspended.waking(id).is_some() { Ok(()) } else { self.vm(id).map(drop) }
    }

    /// A living VM that clients may use.
    pub(super) fn vm(&self, id: &str) -> Result<Arc<Vm>, Fault> {
        let vm = self.living_vm(id)?;
        vm.check_serves()?;
        Ok(vm)
    }

    /// A living VM, even one that stands by.
    pub(super) fn living_vm(&self, id: &str) -> Result<Arc<Vm>, Fault> {
        let living = self.vms.get(id).filter(|vm| vm.life.ended().is_none());
        living.ok_or_else(|| match self.vms.record(id) {
            Some(record) if record.state == VmState::Suspended => {
                Fault::conflict(format!("VM `{id}` is suspended: a request to it wakes it."))
            }
            Some(record) => {
                let why = record.reason.unwrap_or_default();
                Fault::conflict(format!("VM `{id}` is over: {}.", why.trim_end_matches('.')))
            }
            None => Fault::not_found("VM", id),
        })
    }

    /// The restore of a snapshot: by `options` and the request's `settings` first, then by those of
    /// its function and of the daemon.
    pub(super) fn restore_spec(
        &self,
        snapshot: &SnapshotRecord,
        policy: Option<Policy>,
        options: RestoreOptions,
        settings: RestoreSettings,
    ) -> Result<RestoreSpec, Fault> {
        let options = RestoreOptions { policy, ..options };
        options.check().map_err(contradiction)?;
        let id = &snapshot.ss_id;
        let has_drive_copies = snapshot.has_drive_copies()?;
        let own = |drive: &DriveOverride| has_drive_copies && snapshot.drive_copies.contains(&drive.drive_id);
        if let Some(drive) = options.drive_overrides.iter().find(|drive| own(drive)) {
            let message =
                format!("Drive `{}` is copied for each VM: leave it out of `drive_overrides`.", drive.drive_id);
            return Err(Fault::bad(message));
        }
        let profiles = self.store.profiles_dir(id);
        let profile = match policy {
            Some(policy) if policy.needs_profile() => Some(Slot::for_policy(policy, &profiles)?),
            None if options.plan.is_none() => Slot::any(&profiles),
            _ => None,
        };
        let of_function = RestoreOptions { dram_mib: snapshot.function.dram_mib, ..RestoreOptions::default() };
        let options = options.or(&of_function).or(&self.options.load);
        // A request can contradict the daemon's options too.
        options.check().map_err(contradiction)?;
        let load = LoadFields {
            snapshot_path: self.snapshot_dir(id),
            resume_vm: true,
            track_dirty_pages: settings.track_dirty_pages.unwrap_or(snapshot.function.track_dirty_pages),
            clock_realtime: settings.clock_realtime.unwrap_or(true),
            network_overrides: settings.network_overrides,
            tvmm: RestoreOptions { profile, ..options },
            ..LoadFields::default()
        };
        Ok(RestoreSpec { origin: RestoreOrigin::Snapshot(id.clone()), load, has_drive_copies })
    }

    /// Makes a VM, within the limits, for one request. Also returns the index of its span in `recording`.
    pub(super) async fn start_vm(
        &self,
        spec: &StartSpec,
        recording: &mut Recording,
    ) -> Result<(RequestGuard, usize), Fault> {
        // The function may be older than the present allowances, and the file at a path may have changed.
        let spec = &self.confined_spec(spec).await?;
        let Place { permit, used } = match spec.purpose {
            Purpose::Standby => self.vms.reserve_free(&spec.need())?,
            Purpose::Client | Purpose::Invocation => self.vms.reserve(&spec.need()).await?,
        };
        let mut files = self.files(spec, recording).await?;
        if let Some(former) = spec.restore.as_ref().and_then(RestoreSpec::former_life) {
            let vms = self.vms.clone();
            let id = former.record.vm_id.clone();
            blocking(move || vms.suspended.runs_on(&id)).await?.map_err(|error| Fault::of(&error))?;
        }
        let repurposed = match used.zip(spec.restore.as_ref()) {
            Some((shell, restore)) => {
                let repurposed = self.repurposed(shell, restore, spec, &files, recording).await;
                if repurposed.is_none() {
                    // The machine may have written to its drives before it failed.
                    files = self.files(spec, recording).await?;
                }
                repurposed
            }
            None => None,
        };
        let (shell, span) = match repurposed {
            Some(made) => made,
            None => self.made(spec, &files, recording).await?,
        };
        let vm = Vm::new(shell, permit, spec, files);
        recording.trace.vm_id = Some(vm.id.clone());
        Counters::count(&self.counters.vms_started);
        let using = self.vms.add(vm);
        let vm = using.vm();
        if let (None, Some(prepare)) = (&spec.restore, &spec.function.prepare) {
            let prepare_ns = clock::monotonic_ns();
            // A VM whose start is given up midway is killed.
            let mut unprepared = KillGuard(Some(vm.clone()));
            let answer = vm.ask(prepare, self.options.limits.max_output_bytes).await;
            unprepared.0 = None;
            recording.lap("prepare", 0, prepare_ns);
            let why = match answer {
                Ok(answer) if answer.ok => None,
                Ok(answer) => Some(format!("it answered err {}", answer.text)),
                Err(error) => Some(error.to_string()),
            };
            if let Some(why) = why {
                vm.life.stop_because(&format!("could not be prepared: {why}")).await;
                return Err(Fault::bad_gateway(format!("Cannot prepare the VM by `{prepare}`: {why}.")));
            }
        }
        Ok((using, span))
    }

    /// Makes the files of a VM.
    async fn files(&self, spec: &StartSpec, recording: &mut Recording) -> Result<VmFiles, Fault> {
        let former = spec.restore.as_ref().and_then(RestoreSpec::former_life).map(|former| &former.record);
        let id = former.map_or_else(|| random_hex(8), |former| former.vm_id.clone());
        // The files of the same VM before it was suspended may still be about to be removed.
        let name = former.map_or_else(|| id.clone(), |former| format!("{id}.{}", former.suspensions));
        let drives = self.own_drives(&name, spec, recording).await?;
        let vsock = spec.function.port.map(|_| self.store.vsock_path(&name));
        Ok(VmFiles { id, drives, vsock })
    }

    /// Makes a machine in a process of its own. Also returns the index of its span.
    async fn made(
        &self,
        spec: &StartSpec,
        files: &VmFiles,
        recording: &mut Recording,
    ) -> Result<(Shell, usize), Fault> {
        let asked_ns = clock::monotonic_ns();
        let shell = self.shell(spec.network.as_ref()).await?;
        // The shell was spawned ahead of time or just now.
        let spawned = &shell.spawned_ns;
        recording.span("spawn", 0, spawned.start.max(asked_ns), spawned.end.max(asked_ns));
        let start_ns = clock::monotonic_ns();
        let made = make_machine(&shell, spec, files).await;
        let what = if spec.restore.is_some() { "restore" } else { "boot" };
        let span = recording.lap(what, 0, start_ns);
        made.map_err(|error| refused(what, &error))?;
        Ok((shell, span))
    }

    /// Makes the machine in the process of a finished VM. If that fails, the process has ended.
    async fn repurposed(
        &self,
        shell: Shell,
        restore: &RestoreSpec,
        spec: &StartSpec,
        files: &VmFiles,
        recording: &mut Recording,
    ) -> Option<(Shell, usize)> {
        let func_name = &spec.function.func_name;
        let start_ns = clock::monotonic_ns();
        let made = repurpose(&shell, restore, spec, files).await;
        let span = recording.lap("repurpose", 0, start_ns);
        let error = match made {
            Ok(steps) => {
                self.repurposes.count(func_name, RepurposeEnd::Done);
                let mut begin_ns = start_ns;
                for (name, us) in [
                    ("stop", steps.stop_us),
                    ("prepare", steps.prepare_us),
                    ("release", steps.release_us),
                    ("memory", steps.memory_us),
                    ("state", steps.state_us),
                ] {
                    let end_ns = begin_ns + 1000 * us;
                    recording.span(name, span, begin_ns, end_ns);
                    begin_ns = end_ns;
                }
                return Some((shell, span));
            }
            Err(error) => error,
        };
        let end = if error.left_all_as_it_was() { RepurposeEnd::Refused } else { RepurposeEnd::Failed };
        self.repurposes.count(func_name, end);
        recording.note(span, "message", json!(error.to_string()));
        tracing::info!(%error, function = func_name, "A finished VM's process is ended, and a new one is used");
        shell.process.signal(rustix::process::Signal::KILL);
        shell.process.end().await;
        if let Some(error) = files.vsock.as_ref().and_then(|path| gone_is_fine(std::fs::remove_file(path)).err()) {
            tracing::warn!(%error, "Cannot remove the socket of a VM that was not made");
        }
        None
    }

    /// The start of a VM, with the function's file paths free of symbolic links.
    async fn confined_spec<'a>(&self, spec: &'a StartSpec) -> Result<Cow<'a, StartSpec>, Fault> {
        let Function { image, kernel, initrd, .. } = &spec.function;
        if image.is_none() && kernel.is_none() && initrd.is_none() {
            return Ok(Cow::Borrowed(spec));
        }
        let function = self.allowances.confined_function(spec.function.clone()).await?;
        Ok(Cow::Owned(StartSpec { function, ..spec.clone() }))
    }

    /// A process that becomes the VM, in the network namespace of its tap: a ready one, or a new one.
    async fn shell(&self, network: Option<&Network>) -> Result<Shell, Fault> {
        let Some(name) = network.and_then(|network| network.netns.as_deref()) else {
            return self.shells.take().await.map_err(|error| Fault::of(&error));
        };
        // The client's fault: the host lacks the network namespace that the interface was given.
        let refused =
            |error: &(dyn std::error::Error + 'static)| Fault::because(StatusCode::UNPROCESSABLE_ENTITY, error);
        let netns = Netns::open(name).map_err(|error| refused(&error))?;
        self.shells.take_in(netns).await.map_err(|error| refused(&error))
    }

    /// Copies the drives that the VM may write, if there are any.
    async fn own_drives(&self, name: &str, spec: &StartSpec, recording: &mut Recording) -> Result<OwnDrives, Fault> {
        let source = match (&spec.restore, &spec.function.image) {
            (Some(restore), _) if restore.has_drive_copies => DriveSource::Snapshot(restore.load.snapshot_path.clone()),
            (None, Some(image)) if spec.function.writes_image() => DriveSource::Image(image.clone()),
            _ => return Ok(OwnDrives::default()),
        };
        let begin_ns = clock::monotonic_ns();
        let dir = self.store.drives_dir(name);
        let own = self.copies.make(source, dir).await?;
        let span = recording.lap("drives", 0, begin_ns);
        let own = own.map_err(|error| {
            let fault = Fault::because(StatusCode::UNPROCESSABLE_ENTITY, &error);
            Fault { message: format!("Cannot copy the VM's drives: {}", fault.message), ..fault }
        })?;
        for drive in own.all() {
            self.counters.copied_drive(&drive.method);
        }
        recording.note(span, "copied", json!(own.all()));
        Ok(own)
    }

    /// The snapshot that a function's invocations are restored from: its last one.
    pub(super) fn latest_snapshot(&self, func_name: &str) -> Option<SnapshotRecord> {
        let snapshots = self.snapshots();
        let of_function = snapshots.values().filter(|snapshot| snapshot.function.func_name == func_name);
        of_function.max_by_key(|snapshot| snapshot.created_unix_ms).cloned()
    }

    /// The directory of the files that idle VMs are spilled to.
    pub(super) fn spill_dir(&self) -> &Path {
        self.options.spill_dir.as_deref().unwrap_or(self.store.dir())
    }

    /// The directory of a snapshot.
    pub(super) fn snapshot_dir(&self, id: &str) -> PathBuf {
        self.store.snapshot_dir(id)
    }
}

/// A VM that is killed unless it is taken out in time.
struct KillGuard(Option<Arc<Vm>>);

impl Drop for KillGuard {
    fn drop(&mut self) {
        if let Some(vm) = &self.0 {
            vm.life.signal(rustix::process::Signal::KILL);
        }
    }
}

fn refused(what: &str, error: &ControlError) -> Fault {
    let text = format!("Cannot {what} the VM: {}.", error.to_string().trim_end_matches('.'));
    error.fault(text)
}
