//! One VM: a separate `tvmm` process, controlled over the one connection that it serves, and asked over its serial line
//! or a vsock port.

pub(super) mod capacity;
pub(super) mod control;
pub(super) mod life;
pub(super) mod line;
pub(super) mod offloading;
pub(super) mod process;
pub(super) mod shape;
pub(super) mod shells;
pub(super) mod shrinking;
pub(super) mod spares;
pub(super) mod steps;
pub(super) mod table;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};
use utoipa::ToSchema;

use self::capacity::VmPermit;
use self::control::{Control, ControlError};
use self::life::{InUse, Life};
use self::line::{GuestAnswer, GuestRequest, LineError};
use self::offloading::Offloading;
use self::shape::{Need, Shape};
use self::shells::{Past, Shell};
use super::drives::{OwnDrive, OwnDrives, ROOT_DRIVE};
use super::fault::Fault;
use super::function::Function;
use super::network::Network;
use crate::config::bodies::{ActionBody, ActionType, VmBody, WantedState};
use crate::config::control::{Repurposed, Rewound};
use crate::config::request::RewindRequest;
use crate::config::restore::{DriveOverride, MacOverride};
use crate::config::{
    BootSource, CacheType, DriveConfig, IoEngine, LoadFields, MachineConfig, NetworkConfig, NetworkOverrideBody,
    RepurposeFields, VsockConfig, VsockOverrideBody,
};
use crate::tiering::idle::{Descended, Step};
use crate::tiering::window::{TrackingCost, Windows};

/// The state of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum VmState {
    /// It waits for requests.
    Running,
    /// It runs a request.
    Busy,
    /// It waits, paused, for an invocation of its function, or goes back to do so.
    Standby,
    /// It waits for requests; its vCPUs stand still.
    Parked,
    /// It is parked, and has given back local copies of pages that equal its snapshot.
    Trimmed,
    /// It is trimmed, and its written pages are in a file.
    Spilled,
    /// It is a snapshot on the disk. A request restores it.
    Suspended,
    /// It has ended.
    Ended,
    /// It was living when the previous daemon ended, and ended with it.
    Lost,
}

impl VmState {
    /// The name of the state of a VM that has not ended.
    pub(super) fn name(self) -> Option<&'static str> {
        match self {
            VmState::Running => Some("running"),
            VmState::Busy => Some("busy"),
            VmState::Standby => Some("standby"),
            VmState::Parked => Some("parked"),
            VmState::Trimmed => Some("trimmed"),
            VmState::Spilled => Some("spilled"),
            VmState::Suspended => Some("suspended"),
            VmState::Ended | VmState::Lost => None,
        }
    }
}

/// The record of a VM, booted or restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct VmRecord {
    #[serde(rename = "vmId")]
    pub(super) vm_id: String,
    pub(super) state: VmState,
    pub(super) func_name: String,
    /// The snapshot it was restored from; none if it was booted.
    #[serde(rename = "ssId")]
    pub(super) ss_id: Option<String>,
    /// The VM that it was forked from, if it was.
    #[serde(default)]
    pub(super) fork_of: Option<String>,
    /// The policy it was restored by.
    pub(super) policy: Option<String>,
    pub(super) namespace: Option<String>,
    #[serde(rename = "vmConf")]
    pub(super) vm_conf: VmConf,
    /// Its own images of drives, which end with it.
    #[serde(default)]
    pub(super) drives: Vec<OwnDrive>,
    /// The process on the host; 0 while it is suspended.
    pub(super) pid: u32,
    pub(super) created_unix_ms: u64,
    pub(super) invocations: u64,
    /// Rewinds to its snapshot.
    #[serde(default)]
    pub(super) rewinds: u64,
    /// True if it was restored in the process of a VM that had finished.
    #[serde(default)]
    pub(super) repurposed: bool,
    /// True if an invocation started it: such VMs are ended when room is needed, or after the idle time.
    pub(super) from_invocation: bool,
    /// Times that it was suspended.
    #[serde(default)]
    pub(super) suspensions: u64,
    /// Disk space of the snapshots from which it was or will be woken, bytes.
    #[serde(default)]
    pub(super) suspended_bytes: u64,
    /// The reason of its end.
    pub(super) reason: Option<String>,
}

/// The shape of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct VmConf {
    pub(super) vcpu: u8,
    /// MiB
    pub(super) mem_size: u64,
}

/// The parameters of a VM's start.
#[derive(Clone, Debug)]
pub(super) struct StartSpec {
    pub(super) function: Function,
    pub(super) network: Option<Network>,
    /// Restore this instead of booting.
    pub(super) restore: Option<RestoreSpec>,
    pub(super) purpose: Purpose,
}

impl StartSpec {
    /// The shape of the machine, if a process may serve other VMs before and after it. A booted VM keeps its process to
    /// itself, and so do a VM in a network namespace and one that was restored from anything but a stored snapshot.
    fn shape(&self) -> Option<Shape> {
        let restore = self.restore.as_ref()?;
        // A child of a fork, and a VM that was suspended, use files that end with them.
        if self.network.is_some() || !matches!(restore.origin, RestoreOrigin::Snapshot(_)) {
            return None;
        }
        Some(Shape {
            vcpus: self.function.vcpu,
            memory_mib: self.function.mem_size,
            track_dirty_pages: restore.load.track_dirty_pages,
            has_drive: self.function.image.is_some(),
            has_vsock: self.function.port.is_some(),
        })
    }

    /// The place that the VM needs.
    pub(super) fn need(&self) -> Need<'_> {
        let Function { func_name, mem_size, .. } = &self.function;
        Need { func_name, memory_mib: *mem_size, shape: self.shape() }
    }
}

/// The purpose of a VM's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A client asked for it; it lives until it is deleted.
    Client,
    /// An invocation will run in it.
    Invocation,
    /// It will stand by: it is restored, and stays paused.
    Standby,
}

/// The duty of a VM at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    /// Clients may use it.
    Serves,
    /// It stands by.
    StandsBy,
    /// It begins or ceases to stand by.
    Changes,
    /// It goes back to its snapshot, to stand by.
    Returns,
    /// It is saved, and its process ends. A request wakes it.
    Suspends,
    /// It has finished: its process ends, or serves another VM.
    Over,
}

/// The parameters of a VM's restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RestoreSpec {
    pub(super) origin: RestoreOrigin,
    /// The body of the VM's `/snapshot/load`, without the VM's own drives, tap and socket.
    pub(super) load: LoadFields,
    /// True if the snapshot contains copies of drives.
    pub(super) has_drive_copies: bool,
}

/// The snapshot that a VM is restored from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum RestoreOrigin {
    /// A stored snapshot, by its name.
    Snapshot(String),
    /// The fork point of this VM.
    Fork(String),
    /// The last suspension of the VM itself.
    Suspension(Box<FormerLife>),
}

/// A VM before it was suspended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FormerLife {
    /// Its record, as it was suspended.
    pub(super) record: VmRecord,
    /// The restore that made it first; none: it was booted.
    pub(super) restore: Option<Box<RestoreSpec>>,
}

impl RestoreSpec {
    fn ss_id(&self) -> Option<String> {
        match &self.origin {
            RestoreOrigin::Snapshot(id) => Some(id.clone()),
            RestoreOrigin::Fork(_) => None,
            RestoreOrigin::Suspension(former) => former.record.ss_id.clone(),
        }
    }

    fn fork_of(&self) -> Option<String> {
        match &self.origin {
            RestoreOrigin::Snapshot(_) => None,
            RestoreOrigin::Fork(vm) => Some(vm.clone()),
            RestoreOrigin::Suspension(former) => former.record.fork_of.clone(),
        }
    }

    /// The VM before it was suspended, if this wakes it.
    pub(super) fn former_life(&self) -> Option<&FormerLife> {
        match &self.origin {
            RestoreOrigin::Suspension(former) => Some(former),
            RestoreOrigin::Snapshot(_) | RestoreOrigin::Fork(_) => None,
        }
    }

    /// The policy; none: a plan that the request names.
    fn policy(&self) -> Option<String> {
        self.load.tvmm.policy().map(|policy| policy.name().to_owned())
    }
}

/// A running VM.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) id: String,
    pub(super) function: Function,
    pub(super) ss_id: Option<String>,
    pub(super) policy: Option<String>,
    /// The restore that made it; none: it was booted.
    pub(super) restore: Option<RestoreSpec>,
    namespace: Option<String>,
    pub(super) from_invocation: bool,
    created_unix_ms: u64,
    /// The time at which it was booted, restored or woken.
    made: Instant,
    pub(super) life: Life,
    /// The shape of its machine, if its process may serve other VMs.
    pub(super) shape: Option<Shape>,
    /// The past of its process.
    past: Past,
    /// One request at a time.
    turn: AsyncMutex<()>,
    pub(super) vsock: Option<PathBuf>,
    drives: OwnDrives,
    next_request: AtomicU64,
    usage: Mutex<Usage>,
    /// Notified when no request uses the VM any more.
    unused: Notify,
    /// The snapshot that the VM's next diff builds on: the last one taken of it, or the one it was restored from.
    diff_parent: Mutex<Option<String>>,
    /// Held while the VM takes a step down, or up again.
    step_turn: AsyncMutex<()>,
    /// Becomes true when the VM's end was recorded, and its files are gone.
    settled: watch::Sender<bool>,
}

/// The use of a VM.
#[derive(Debug)]
struct Usage {
    duty: Duty,
    requests: usize,
    invocations: u64,
    rewinds: u64,
    since: Instant,
    /// The step down that it is at, and those that it has refused since its last request.
    descended: Descended,
    /// True while it takes a step down.
    is_stepping: bool,
    /// The space of its spill file.
    spill_bytes: u64,
    /// The progress of its offloading since its last request, if a part of it was offloaded.
    offloading: Option<Offloading>,
    /// Spilled pages that had come back when they were looked at last.
    pages_back: u64,
    /// The windows of requests after which it gives untouched memory back.
    windows: Windows,
    /// The time that the ends of these windows have taken.
    tracking: TrackingCost,
    /// True while it does so.
    is_shrinking: bool,
}

/// The context id of a guest that has a vsock device: the lowest that a guest may have.
const GUEST_CID: u32 = 3;
/// Requests that may wait for one VM.
const MAX_WAITING: usize = 16;

/// A request to a VM, from the wait for its turn on.
pub(super) struct RequestGuard(Arc<Vm>);

impl RequestGuard {
    pub(super) fn vm(&self) -> &Arc<Vm> {
        &self.0
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        let mut usage = self.0.lock();
        usage.requests -= 1;
        usage.since = Instant::now();
        usage.descended = usage.descended.step.into();
        if usage.requests == 0 {
            self.0.unused.notify_one();
        }
    }
}

/// The files of a VM, which are made before its machine.
#[derive(Debug)]
pub(super) struct VmFiles {
    /// The VM's id, after which they are named.
    pub(super) id: String,
    pub(super) drives: OwnDrives,
    /// The socket of its vsock device.
    pub(super) vsock: Option<PathBuf>,
}

/// Makes the machine of a VM in a shell that has had none. After an error the shell is of no further use.
pub(super) async fn make_machine(shell: &Shell, spec: &StartSpec, files: &VmFiles) -> Result<(), ControlError> {
    match &spec.restore {
        Some(restore) => shell.control.send("PUT", "/snapshot/load", &load_body(restore, spec, files)).await,
        None => boot(&shell.control, spec, files).await,
    }
}

/// Makes the machine of a VM in the process of a finished one. After an error the process is of no further use.
pub(super) async fn repurpose(
    shell: &Shell,
    restore: &RestoreSpec,
    spec: &StartSpec,
    files: &VmFiles,
) -> Result<Repurposed, ControlError> {
    // A guest may have answered a request before it has read it, and written more than was read of it.
    let body = RepurposeFields { load: load_body(restore, spec, files), discard_console: true };
    shell.control.send("PUT", "/tvmm/repurpose", &body).await
}

impl Vm {
    /// A VM whose machine was made in `shell`. The request for which it was made uses it already, so that no other one
    /// finds it idle before: see [`Table::add`](table::Table::add).
    pub(super) fn new(shell: Shell, permit: VmPermit, spec: &StartSpec, files: VmFiles) -> Vm {
        let VmFiles { id, drives, vsock } = files;
        let duty = if spec.purpose == Purpose::Standby { Duty::Changes } else { Duty::Serves };
        let former = spec.restore.as_ref().and_then(RestoreSpec::former_life).map(|former| &former.record);
        Vm {
            id,
            function: spec.function.clone(),
            ss_id: spec.restore.as_ref().and_then(RestoreSpec::ss_id),
            policy: spec.restore.as_ref().and_then(RestoreSpec::policy),
            restore: spec.restore.clone(),
            namespace: spec.network.as_ref().map(|network| network.namespace.clone()),
            from_invocation: spec.purpose != Purpose::Client,
            created_unix_ms: former.map_or_else(unix_ms, |record| record.created_unix_ms),
            made: Instant::now(),
            shape: spec.shape(),
            past: shell.past,
            life: Life::new(shell, permit),
            turn: AsyncMutex::new(()),
            vsock,
            drives,
            next_request: AtomicU64::new(1 + former.map_or(0, |record| record.invocations)),
            unused: Notify::new(),
            diff_parent: Mutex::new(spec.restore.as_ref().and_then(RestoreSpec::ss_id)),
            usage: Mutex::new(Usage {
                duty,
                requests: 1,
                invocations: former.map_or(0, |record| record.invocations),
                rewinds: former.map_or(0, |record| record.rewinds),
                since: Instant::now(),
                descended: Descended::default(),
                is_stepping: false,
                spill_bytes: 0,
                offloading: None,
                pages_back: 0,
                windows: Windows::default(),
                tracking: TrackingCost::default(),
                is_shrinking: false,
            }),
            step_turn: AsyncMutex::new(()),
            settled: watch::Sender::new(false),
        }
    }

    /// The process, for one request.
    fn shell(&self) -> Result<InUse, ControlError> {
        self.life.shell().ok_or_else(|| ControlError::Gone("the VM is over".into()))
    }

    /// Sends a request to the VM's API.
    pub(super) async fn send<A: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, ControlError> {
        self.shell()?.control.send(method, path, body).await
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshot that the VM's next diff builds on, if the VM can have one.
    pub(super) fn diff_parent(&self) -> Option<String> {
        if self.function.track_dirty_pages {
            return self.diff_parent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        }
        self.ss_id.clone()
    }

    /// Called when a snapshot was taken of the VM: its next diff builds on that.
    pub(super) fn was_snapshotted(&self, ss_id: &str) {
        *self.diff_parent.lock().unwrap_or_else(PoisonError::into_inner) = Some(ss_id.to_string());
    }

    /// Claims a place in the VM's queue. The VM may have to take steps up before it runs.
    pub(super) fn claim(self: &Arc<Self>) -> Result<RequestGuard, Fault> {
        self.check_serves()?;
        let mut usage = self.lock();
        if usage.requests > MAX_WAITING {
            return Err(Fault::busy(format!("Too many requests wait for VM `{}`.", self.id)));
        }
        usage.requests += 1;
        drop(usage);
        Ok(RequestGuard(self.clone()))
    }

    /// Claims the VM if clients may use it and no request does.
    pub(super) fn claim_idle(self: &Arc<Self>) -> Option<RequestGuard> {
        let mut usage = self.lock();
        if usage.requests > 0 || usage.duty != Duty::Serves || self.life.ended().is_some() {
            return None;
        }
        usage.requests = 1;
        drop(usage);
        Some(RequestGuard(self.clone()))
    }

    /// Refuses a VM that stands by, or is over, to requests that name it.
    pub(super) fn check_serves(&self) -> Result<(), Fault> {
        match self.lock().duty {
            Duty::Serves => Ok(()),
            Duty::Over => Err(Fault::conflict(format!("VM `{}` is over: it has finished.", self.id))),
            Duty::Suspends => Err(Fault::conflict(format!("VM `{}` is being suspended: try again.", self.id))),
            Duty::StandsBy | Duty::Changes | Duty::Returns => Err(Fault::conflict(format!(
                "VM `{}` stands by for invocations of `{}`: leave `vmId` out.",
                self.id, self.function.func_name
            ))),
        }
    }

    /// The time since which no request uses it; `None` while it is used or stands by.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        let usage = self.lock();
        (usage.requests == 0 && usage.duty == Duty::Serves).then(|| usage.since.elapsed())
    }

    /// The time since which it stands by, if it does.
    pub(super) fn standing_by_for(&self) -> Option<Duration> {
        let usage = self.lock();
        (usage.duty == Duty::StandsBy).then(|| usage.since.elapsed())
    }

    pub(super) fn stands_by(&self) -> bool {
        self.lock().duty == Duty::StandsBy && self.life.ended().is_none()
    }

    pub(super) fn has_network(&self) -> bool {
        self.namespace.is_some()
    }

    fn change_duty(&self, from: &[Duty], to: Duty) -> bool {
        let mut usage = self.lock();
        let is_allowed = from.contains(&usage.duty) && usage.requests == 0;
        if is_allowed {
            usage.duty = to;
            usage.since = Instant::now();
        }
        is_allowed
    }

    /// Takes the VM from clients, so that it can be rewound; false if a request uses it, or it takes a step down.
    pub(super) fn leave(&self) -> bool {
        !self.lock().is_stepping && self.change_duty(&[Duty::Serves], Duty::Returns)
    }

    /// Returns whether the VM runs a request, or goes back to its snapshot.
    pub(super) fn is_in_use(&self) -> bool {
        let usage = self.lock();
        usage.requests > 0 || matches!(usage.duty, Duty::Changes | Duty::Returns)
    }

    /// Takes the VM from those that stand by; false if it is none of them.
    pub(super) fn retire(&self) -> bool {
        self.change_duty(&[Duty::StandsBy], Duty::Changes)
    }

    /// Lets clients use the VM. Called after [`retire`](Self::retire).
    pub(super) fn serve(&self) {
        self.change_duty(&[Duty::Changes], Duty::Serves);
    }

    /// Adds the VM, paused at its snapshot, to those that stand by.
    pub(super) fn stand_by(&self) {
        self.change_duty(&[Duty::Changes, Duty::Returns], Duty::StandsBy);
    }

    /// Takes the VM from clients and from those that stand by, for good; false if a request uses it.
    pub(super) fn finish(&self) -> bool {
        self.change_duty(&[Duty::Serves, Duty::StandsBy, Duty::Changes, Duty::Returns], Duty::Over)
    }

    /// Takes the VM from clients for good. Requests that use it already are answered.
    pub(super) fn refuse_requests(&self) {
        self.lock().duty = Duty::Over;
    }

    /// Waits until no request uses the VM. Called after [`refuse_requests`](Self::refuse_requests).
    pub(super) async fn answered(&self) {
        while self.lock().requests > 0 {
            self.unused.notified().await;
        }
    }

    /// Returns whether the VM has finished, and still has its process.
    pub(super) fn is_finishing(&self) -> bool {
        let usage = self.lock();
        usage.duty == Duty::Over && usage.requests == 0 && self.life.ended().is_none()
    }

    /// Pauses or resumes the VM.
    pub(super) async fn set_state(&self, state: WantedState) -> Result<(), ControlError> {
        self.send("PATCH", "/vm", &VmBody { state }).await
    }

    /// Asks the guest, when it is this request's turn.
    pub(super) async fn ask(&self, function: &str, budget: u64) -> Result<GuestAnswer, LineError> {
        let _turn = self.turn.lock().await;
        let gone = || LineError::Closed(io::ErrorKind::BrokenPipe.into());
        let shell = self.life.shell().ok_or_else(gone)?;
        let console = &shell.console;
        self.lock().invocations += 1;
        // No other VM's request has this id: a VM that was saved in the middle of a request answers that one first.
        let id = format!("{}-{}", &self.id[..8], self.next_request.fetch_add(1, Ordering::Relaxed));
        let request = GuestRequest { id: &id, function };
        line::drain(console);
        match (self.function.port, &self.vsock) {
            (Some(port), Some(socket)) => line::ask_port(socket, port, request, budget).await,
            _ => line::ask(console, request, budget).await,
        }
    }

    /// Waits until no request runs, and keeps new ones waiting while the guard lives.
    pub(super) async fn quiet(&self) -> impl Sized + '_ {
        self.turn.lock().await
    }

    /// Takes the VM back to the snapshot that it was restored from, between its requests.
    pub(super) async fn rewind(&self, request: RewindRequest) -> Result<Rewound, ControlError> {
        let _quiet = self.quiet().await;
        let rewound = self.send("PUT", "/tvmm/rewind", &request).await?;
        let mut usage = self.lock();
        usage.rewinds += 1;
        usage.windows = Windows::default();
        drop(usage);
        // A rewind drops the file.
        self.note_spill(0);
        // Its next diff builds on that snapshot again.
        (*self.diff_parent.lock().unwrap_or_else(PoisonError::into_inner)).clone_from(&self.ss_id);
        Ok(rewound)
    }

    /// The VM's `GET /tvmm/report`: the place of its memory, and its time slices.
    pub(super) async fn report(&self) -> Result<Value, ControlError> {
        const PATIENCE: Duration = Duration::from_secs(5);
        let shell = self.shell()?;
        let asked = tokio::time::timeout(PATIENCE, shell.control.get("/tvmm/report")).await;
        asked.unwrap_or_else(|_| Err(ControlError::Gone("it does not answer".into())))
    }

    pub(super) fn record(&self) -> VmRecord {
        let ended = self.life.ended();
        let usage = self.lock();
        // Its process is about to end, or to be kept.
        let is_over = usage.duty == Duty::Over && usage.requests == 0;
        let going = || is_over.then(|| self.life.cause().unwrap_or_else(|| "finished".to_owned()));
        VmRecord {
            vm_id: self.id.clone(),
            state: match (&ended, usage.duty) {
                // It is shown as suspended when it can be woken.
                (_, Duty::Suspends) => state_at(usage.descended.step),
                (Some(_), _) => VmState::Ended,
                (None, Duty::Over) if is_over => VmState::Ended,
                (None, Duty::StandsBy | Duty::Changes | Duty::Returns) => VmState::Standby,
                (None, Duty::Serves) if usage.requests == 0 => state_at(usage.descended.step),
                (None, Duty::Serves | Duty::Over) => VmState::Busy,
            },
            func_name: self.function.func_name.clone(),
            ss_id: self.ss_id.clone(),
            fork_of: self.restore.as_ref().and_then(RestoreSpec::fork_of),
            policy: self.policy.clone(),
            namespace: self.namespace.clone(),
            vm_conf: VmConf { vcpu: self.function.vcpu, mem_size: self.function.mem_size },
            drives: self.drives.all().to_vec(),
            pid: self.life.pid(),
            created_unix_ms: self.created_unix_ms,
            invocations: usage.invocations,
            rewinds: usage.rewinds,
            repurposed: self.past == Past::Vm,
            from_invocation: self.from_invocation,
            suspensions: self.former_life().map_or(0, |former| former.record.suspensions),
            suspended_bytes: self.former_life().map_or(0, |former| former.record.suspended_bytes),
            reason: self.life.why().or_else(going),
        }
    }

    /// The VM before it was suspended, if it was.
    pub(super) fn former_life(&self) -> Option<&FormerLife> {
        self.restore.as_ref().and_then(RestoreSpec::former_life)
    }

    /// The restore that made the VM first, before it was ever suspended; none: it was booted.
    pub(super) fn first_restore(&self) -> Option<&RestoreSpec> {
        match self.former_life() {
            Some(former) => former.restore.as_deref(),
            None => self.restore.as_ref(),
        }
    }

    pub(super) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }
}

/// The present time, ms since 1970.
pub(super) fn unix_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// The state of a VM that waits for requests.
fn state_at(step: Option<Step>) -> VmState {
    match step {
        None => VmState::Running,
        Some(Step::Parked) => VmState::Parked,
        Some(Step::Trimmed) => VmState::Trimmed,
        Some(Step::Spilled) => VmState::Spilled,
        Some(Step::Suspended) => VmState::Suspended,
    }
}

/// The body of the VM's `/snapshot/load`.
fn load_body(restore: &RestoreSpec, spec: &StartSpec, files: &VmFiles) -> LoadFields {
    let mut body = restore.load.clone();
    body.resume_vm = spec.purpose != Purpose::Standby;
    let own = files
        .drives
        .all()
        .iter()
        .map(|drive| DriveOverride { drive_id: drive.drive_id.clone(), path_on_host: drive.path_on_host.clone() });
    body.tvmm.drive_overrides.extend(own);
    if let Some(network) = &spec.network {
        let iface_id = network.iface_id.clone();
        let host_dev_name = network.host_dev_name.clone();
        body.network_overrides.push(NetworkOverrideBody { iface_id, host_dev_name });
        let mac = network.guest_mac.clone();
        let mac = mac.map(|guest_mac| MacOverride { iface_id: network.iface_id.clone(), guest_mac });
        body.tvmm.mac_overrides.extend(mac);
    }
    body.vsock_override = files.vsock.clone().map(|uds_path| VsockOverrideBody { uds_path });
    body
}

/// Configures and starts a machine.
async fn boot(control: &Control, spec: &StartSpec, files: &VmFiles) -> Result<(), ControlError> {
    let function = &spec.function;
    let machine = MachineConfig {
        vcpu_count: function.vcpu,
        mem_size_mib: function.mem_size,
        track_dirty_pages: function.track_dirty_pages,
        ..MachineConfig::default()
    };
    control.send::<()>("PUT", "/machine-config", &machine).await?;
    let source = BootSource {
        kernel_image_path: function.kernel.clone(),
        initrd_path: function.initrd.clone(),
        boot_args: function.boot_args.clone(),
    };
    control.send::<()>("PUT", "/boot-source", &source).await?;
    if let Some(image) = &function.image {
        let drive = DriveConfig {
            drive_id: ROOT_DRIVE.to_owned(),
            is_root_device: true,
            path_on_host: files.drives.path(ROOT_DRIVE).unwrap_or(image).to_owned(),
            is_read_only: function.image_read_only,
            partuuid: None,
            cache_type: CacheType::default(),
            io_engine: IoEngine::default(),
            rate_limiter: None,
        };
        control.send::<()>("PUT", &format!("/drives/{ROOT_DRIVE}"), &drive).await?;
    }
    if let Some(network) = &spec.network {
        let iface = NetworkConfig {
            iface_id: network.iface_id.clone(),
            host_dev_name: network.host_dev_name.clone(),
            guest_mac: network.guest_mac.clone(),
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        };
        control.send::<()>("PUT", &format!("/network-interfaces/{}", network.iface_id), &iface).await?;
    }
    if let Some(path) = &files.vsock {
        let vsock = VsockConfig { guest_cid: GUEST_CID, uds_path: path.clone(), vsock_id: None };
        control.send::<()>("PUT", "/vsock", &vsock).await?;
    }
    control.send("PUT", "/actions", &ActionBody { action_type: ActionType::InstanceStart }).await
}
