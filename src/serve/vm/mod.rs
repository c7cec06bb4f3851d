//! One VM: a separate `tvmm` process, controlled over the one connection that it serves, and asked over its serial line
//! or a vsock port.

pub(super) mod control;
pub(super) mod line;
pub(super) mod process;
pub(super) mod shells;
pub(super) mod table;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::Mutex as AsyncMutex;
use utoipa::ToSchema;

use self::control::{Control, ControlError};
use self::line::{Console, GuestAnswer, GuestRequest, LineError};
use self::process::Process;
use self::shells::Shell;
use super::drives::{OwnDrive, OwnDrives, ROOT_DRIVE};
use super::fault::Fault;
use super::function::Function;
use super::network::Network;
use crate::config::bodies::{ActionBody, ActionType, VmBody, WantedState};
use crate::config::control::Rewound;
use crate::config::request::RewindRequest;
use crate::config::restore::{DriveOverride, MacOverride};
use crate::config::{
    BootSource, CacheType, DriveConfig, IoEngine, LoadFields, MachineConfig, NetworkConfig, NetworkOverrideBody,
    VsockConfig, VsockOverrideBody,
};

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
    /// It has ended.
    Ended,
    /// It was living when the previous daemon ended, and ended with it.
    Lost,
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
    /// The process on the host.
    pub(super) pid: u32,
    pub(super) created_unix_ms: u64,
    pub(super) invocations: u64,
    /// Rewinds to its snapshot.
    #[serde(default)]
    pub(super) rewinds: u64,
    /// True if an invocation started it: such VMs are ended when room is needed, or after the idle time.
    pub(super) from_invocation: bool,
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
}

/// The parameters of a VM's restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RestoreSpec {
    pub(super) origin: RestoreOrigin,
    /// The body of the VM's `/snapshot/load`, without the VM's own drives, tap and socket.
    pub(super) load: LoadFields,
    /// True if the snapshot contains copies of drives.
    pub(super) has_drive_copies: bool,
}

/// The snapshot that a VM is restored from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RestoreOrigin {
    /// A stored snapshot, by its name.
    Snapshot(String),
    /// The fork point of this VM.
    Fork(String),
}

impl RestoreSpec {
    fn ss_id(&self) -> Option<String> {
        match &self.origin {
            RestoreOrigin::Snapshot(id) => Some(id.clone()),
            RestoreOrigin::Fork(_) => None,
        }
    }

    fn fork_of(&self) -> Option<String> {
        match &self.origin {
            RestoreOrigin::Snapshot(_) => None,
            RestoreOrigin::Fork(vm) => Some(vm.clone()),
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
    pub(super) process: Process,
    pub(super) control: Control,
    /// One request at a time.
    console: AsyncMutex<Console>,
    vsock: Option<PathBuf>,
    drives: OwnDrives,
    next_request: AtomicU64,
    usage: Mutex<Usage>,
    /// The snapshot that the VM's next diff builds on: the last one taken of it, or the one it was restored from.
    diff_parent: Mutex<Option<String>>,
}

/// The use of a VM.
#[derive(Debug)]
struct Usage {
    duty: Duty,
    requests: usize,
    invocations: u64,
    rewinds: u64,
    since: Instant,
}

/// The context id of a guest that has a vsock device: the lowest that a guest may have.
const GUEST_CID: u32 = 3;
/// Requests that may wait for one VM.
const MAX_WAITING: usize = 16;

/// A request to a VM, from the wait for its turn on.
pub(super) struct RequestGuard<'a>(&'a Vm);

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        let mut usage = self.0.lock();
        usage.requests -= 1;
        usage.since = Instant::now();
    }
}

impl Vm {
    /// Makes a VM of a shell. If this is dropped midway, the shell is killed.
    pub(super) async fn start(
        id: String,
        shell: Shell,
        spec: &StartSpec,
        vsock: Option<PathBuf>,
        drives: OwnDrives,
    ) -> Result<Vm, ControlError> {
        match &spec.restore {
            Some(restore) => {
                let body = load_body(restore, spec, vsock.as_deref(), drives.all());
                shell.control.send::<()>("PUT", "/snapshot/load", &body).await?;
            }
            None => boot(&shell.control, spec, vsock.as_deref(), &drives).await?,
        }
        let duty = if spec.purpose == Purpose::Standby { Duty::Changes } else { Duty::Serves };
        let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(Vm {
            id,
            function: spec.function.clone(),
            ss_id: spec.restore.as_ref().and_then(RestoreSpec::ss_id),
            policy: spec.restore.as_ref().and_then(RestoreSpec::policy),
            restore: spec.restore.clone(),
            namespace: spec.network.as_ref().map(|network| network.namespace.clone()),
            from_invocation: spec.purpose != Purpose::Client,
            created_unix_ms: since_epoch.as_millis() as u64,
            process: shell.process,
            control: shell.control,
            console: AsyncMutex::new(shell.console),
            vsock,
            drives,
            next_request: AtomicU64::new(1),
            diff_parent: Mutex::new(spec.restore.as_ref().and_then(RestoreSpec::ss_id)),
            usage: Mutex::new(Usage { duty, requests: 0, invocations: 0, rewinds: 0, since: Instant::now() }),
        })
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

    /// Claims a place in the VM's queue.
    pub(super) fn claim(&self) -> Result<RequestGuard<'_>, Fault> {
        self.check_serves()?;
        let mut usage = self.lock();
        if usage.requests > MAX_WAITING {
            return Err(Fault::busy(format!("Too many requests wait for VM `{}`.", self.id)));
        }
        usage.requests += 1;
        Ok(RequestGuard(self))
    }

    /// Refuses a VM that stands by to requests that name it.
    pub(super) fn check_serves(&self) -> Result<(), Fault> {
        if self.lock().duty == Duty::Serves {
            return Ok(());
        }
        Err(Fault::conflict(format!(
            "VM `{}` stands by for invocations of `{}`: leave `vmId` out.",
            self.id, self.function.func_name
        )))
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
        self.lock().duty == Duty::StandsBy && self.process.ended().is_none()
    }

    pub(super) fn has_network(&self) -> bool {
        self.namespace.is_some()
    }

    fn change_duty(&self, from: Duty, to: Duty) -> bool {
        let mut usage = self.lock();
        let is_allowed = usage.duty == from && usage.requests == 0;
        if is_allowed {
            usage.duty = to;
            usage.since = Instant::now();
        }
        is_allowed
    }

    /// Takes the VM from clients, so that it can be rewound; false if a request uses it.
    pub(super) fn leave(&self) -> bool {
        self.change_duty(Duty::Serves, Duty::Returns)
    }

    /// Returns whether the VM runs a request, or goes back to its snapshot.
    pub(super) fn is_in_use(&self) -> bool {
        let usage = self.lock();
        usage.requests > 0 || matches!(usage.duty, Duty::Changes | Duty::Returns)
    }

    /// Takes the VM from those that stand by; false if it is none of them.
    pub(super) fn retire(&self) -> bool {
        self.change_duty(Duty::StandsBy, Duty::Changes)
    }

    /// Lets clients use the VM. Called after [`retire`](Self::retire).
    pub(super) fn serve(&self) {
        self.change_duty(Duty::Changes, Duty::Serves);
    }

    /// Adds the VM, paused at its snapshot, to those that stand by.
    pub(super) fn stand_by(&self) {
        let _ = self.change_duty(Duty::Changes, Duty::StandsBy) || self.change_duty(Duty::Returns, Duty::StandsBy);
    }

    /// Pauses or resumes the VM.
    pub(super) async fn set_state(&self, state: WantedState) -> Result<(), ControlError> {
        self.control.send("PATCH", "/vm", &VmBody { state }).await
    }

    /// Asks the guest, when it is this request's turn.
    pub(super) async fn ask(&self, function: &str, budget: u64) -> Result<GuestAnswer, LineError> {
        let console = self.console.lock().await;
        self.lock().invocations += 1;
        let id = format!("i{}", self.next_request.fetch_add(1, Ordering::Relaxed));
        let request = GuestRequest { id: &id, function };
        line::drain(&*console);
        match (self.function.port, &self.vsock) {
            (Some(port), Some(socket)) => line::ask_port(socket, port, request, budget).await,
            _ => line::ask(&*console, request, budget).await,
        }
    }

    /// Waits until no request runs, and keeps new ones waiting while the guard lives.
    pub(super) async fn quiet(&self) -> impl Sized + '_ {
        self.console.lock().await
    }

    /// Takes the VM back to the snapshot that it was restored from, between its requests.
    pub(super) async fn rewind(&self, request: RewindRequest) -> Result<Rewound, ControlError> {
        let _quiet = self.quiet().await;
        let rewound = self.control.send("PUT", "/tvmm/rewind", &request).await?;
        self.lock().rewinds += 1;
        // Its next diff builds on that snapshot again.
        (*self.diff_parent.lock().unwrap_or_else(PoisonError::into_inner)).clone_from(&self.ss_id);
        Ok(rewound)
    }

    /// The VM's `GET /tvmm/report`: the place of its memory, and its time slices.
    pub(super) async fn report(&self) -> Result<Value, ControlError> {
        const PATIENCE: Duration = Duration::from_secs(5);
        let asked = tokio::time::timeout(PATIENCE, self.control.get("/tvmm/report")).await;
        asked.unwrap_or_else(|_| Err(ControlError::Gone("it does not answer".into())))
    }

    pub(super) fn record(&self) -> VmRecord {
        let ended = self.process.ended();
        let usage = self.lock();
        VmRecord {
            vm_id: self.id.clone(),
            state: match (&ended, usage.duty) {
                (Some(_), _) => VmState::Ended,
                (None, Duty::StandsBy | Duty::Changes | Duty::Returns) => VmState::Standby,
                (None, Duty::Serves) if usage.requests == 0 => VmState::Running,
                (None, Duty::Serves) => VmState::Busy,
            },
            func_name: self.function.func_name.clone(),
            ss_id: self.ss_id.clone(),
            fork_of: self.restore.as_ref().and_then(RestoreSpec::fork_of),
            policy: self.policy.clone(),
            namespace: self.namespace.clone(),
            vm_conf: VmConf { vcpu: self.function.vcpu, mem_size: self.function.mem_size },
            drives: self.drives.all().to_vec(),
            pid: self.process.pid(),
            created_unix_ms: self.created_unix_ms,
            invocations: usage.invocations,
            rewinds: usage.rewinds,
            from_invocation: self.from_invocation,
            reason: ended.map(|ended| ended.why()),
        }
    }
}

/// The body of the VM's `/snapshot/load`.
fn load_body(restore: &RestoreSpec, spec: &StartSpec, vsock: Option<&Path>, drives: &[OwnDrive]) -> LoadFields {
    let mut body = restore.load.clone();
    body.resume_vm = spec.purpose != Purpose::Standby;
    let own = drives
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
    body.vsock_override = vsock.map(|path| VsockOverrideBody { uds_path: path.to_owned() });
    body
}

/// Configures and starts a machine.
async fn boot(
    control: &Control,
    spec: &StartSpec,
    vsock: Option<&Path>,
    drives: &OwnDrives,
) -> Result<(), ControlError> {
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
            path_on_host: drives.path(ROOT_DRIVE).unwrap_or(image).to_owned(),
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
    if let Some(path) = vsock {
        let vsock = VsockConfig { guest_cid: GUEST_CID, uds_path: path.to_owned(), vsock_id: None };
        control.send::<()>("PUT", "/vsock", &vsock).await?;
    }
    control.send("PUT", "/actions", &ActionBody { action_type: ActionType::InstanceStart }).await
}
