//! The control vocabulary: what can be asked of a running tvmm, and how a question reaches the thread that owns
//! the machine.
//!
//! Whoever asks (the HTTP API, a test) holds a [`ControlSender`]; the machine's main loop holds the
//! [`ControlReceiver`], waits on its eventfd beside its other events, and answers every [`Request`] once. A request
//! that is dropped unanswered tells its sender that the VMM is gone.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::cold::ColdPools;
use super::config::{
    BootSource, ConfigError, CpuConfig, DeviceConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig,
    VmConfig,
};
pub use super::devices::{
    AmountPatch, BalloonPatch, BalloonQuestion, DevicePatch, DrivePatch, IntervalPatch, NetworkOverride, NetworkPatch,
    Overrides, PmemPatch, StartHintingPatch,
};

/// What `app_name` says.
pub const APP_NAME: &str = "tvmm";
/// The restore policy when none is asked for.
pub const DEFAULT_POLICY: &str = "firecracker";
/// Requests that may wait for the machine. Senders wait for their answer before they ask again, so this bounds the
/// number of askers that are served at once.
const QUEUE_LENGTH: usize = 64;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Who are you and what do you do? → [`Reply::InstanceInfo`]
    InstanceInfo,
    /// → [`Reply::Version`]
    Version,
    /// → [`Reply::MachineConfig`]
    GetMachineConfig,
    /// → [`Reply::VmConfig`]
    GetVmConfig,
    /// Replace what the guest boots. Already validated.
    PutBootSource(BootSource),
    /// Replace the shape of the machine. Already validated.
    PutMachineConfig(MachineConfig),
    /// Change the shape of the machine: see [`MachineConfig::patched`].
    PatchMachineConfig(MachineConfigPatch),
    /// Add a device to the machine that will boot, or replace the one with its id. Validated as part of the whole.
    PutDevice(DeviceConfig),
    /// Change a device of the machine that runs.
    PatchDevice(DevicePatch),
    /// Replace the CPU template.
    PutCpuConfig(CpuConfig),
    /// → [`Reply::Balloon`]
    AskBalloon(BalloonQuestion),
    /// What the machine costs and where its time went. → [`Reply::Report`]
    Report,
    /// Set up logging.
    PutLogger(LoggerConfig),
    /// Set up metrics.
    PutMetrics(MetricsConfig),
    /// Build the machine and let it run.
    InstanceStart,
    /// Press Ctrl+Alt+Del in the guest.
    SendCtrlAltDel,
    /// Write metrics now.
    FlushMetrics,
    /// Stop all vCPUs. Answered when they have stopped.
    Pause,
    /// Let all vCPUs run again.
    Resume,
    /// Save a paused machine. → [`Reply::Snapshot`]
    CreateSnapshot(CreateSnapshot),
    /// Become the machine of a snapshot.
    LoadSnapshot(Box<LoadSnapshot>),
}

/// Where a snapshot is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotPaths {
    /// The snapshot directory, or, if `memory` is given, the file of the VM state.
    pub snapshot: PathBuf,
    /// The file of guest memory in Firecracker's two-file form; absent for a snapshot directory.
    pub memory: Option<PathBuf>,
}

/// Which pages a snapshot holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All pages that are not zero.
    #[default]
    Full,
    /// The pages changed since the snapshot before.
    Diff,
}

/// How to save a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSnapshot {
    /// Where to.
    pub location: SnapshotPaths,
    /// Which pages.
    pub kind: SnapshotKind,
    /// Whether the machine runs on afterwards; if not it stays paused.
    pub resume: bool,
    /// Whether the snapshot takes copies of the drives that the guest can write.
    pub copy_drives: bool,
    /// Whether the answer waits until the memory was read back from the disk and compared.
    pub verify: bool,
}

/// How pages that are to lie in place are mapped where the tier leaves the choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InPlaceMapping {
    /// The kernel copies pages that are written.
    #[default]
    Private,
    /// Read-only, as a tier without copy-on-write (device DAX) must be mapped: the VMM copies pages that are written.
    Shared,
}

impl std::str::FromStr for InPlaceMapping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "private" => Ok(InPlaceMapping::Private),
            "shared" => Ok(InPlaceMapping::Shared),
            _ => Err("it is neither `private` nor `shared`".to_owned()),
        }
    }
}

/// When the memory that a machine is restored from is compared with the checksums of its snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Never.
    Off,
    /// A few chunks, before the guest runs.
    Sample,
    /// A few chunks before the guest runs, and the rest once it has settled.
    #[default]
    Background,
    /// All of it, before the guest runs.
    Full,
}

impl std::str::FromStr for Verify {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Verify::Off),
            "sample" => Ok(Verify::Sample),
            "background" => Ok(Verify::Background),
            "full" => Ok(Verify::Full),
            _ => Err("it is not one of `off`, `sample`, `background` and `full`".to_owned()),
        }
    }
}

/// How to restore a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Where from.
    pub location: SnapshotPaths,
    /// The name of the restore policy.
    pub policy: String,
    /// The profile the policy works from.
    pub profile: Option<PathBuf>,
    /// A plan made before (`tvmm plan --out`), instead of a policy's.
    pub plan: Option<PathBuf>,
    /// Where plans and working-set images are kept, instead of beside the snapshot.
    pub plan_dir: Option<PathBuf>,
    /// What things cost on this host, instead of the last calibration or the built-in numbers.
    pub costs: Option<PathBuf>,
    /// The most local memory a plan may use, MiB.
    pub dram_mib: Option<u64>,
    /// The most memory of the CXL tier a plan may use, MiB.
    pub cxl_mib: Option<u64>,
    /// µs that a request may take longer to save a MiB of local memory; [`DRAM_PRICE_US`] if nobody says.
    ///
    /// [`DRAM_PRICE_US`]: crate::tiering::policy::DRAM_PRICE_US
    pub dram_price_us: Option<u64>,
    /// How pages in place are mapped.
    pub in_place_mapping: InPlaceMapping,
    /// When the memory is compared with the snapshot's checksums.
    pub verify: Verify,
    /// Cold pools that hold the snapshot's memory, nearest first: the memory files are not read then.
    pub cold: ColdPools,
    /// Pools to take guest memory from instead of the snapshot's files, in order of preference.
    pub pools: Vec<PathBuf>,
    /// The socket of a page-fault handler outside that serves guest memory instead of any policy.
    pub handler: Option<PathBuf>,
    /// What this clone's devices are to have on the host's side.
    pub overrides: Overrides,
    /// Whether KVM logs the pages the guest writes from now on.
    pub track_dirty_pages: bool,
    /// Whether the guest's clock goes on to the present; if not, no time has passed for it.
    pub clock_realtime: bool,
    /// Whether the machine runs afterwards; if not it is paused.
    pub resume: bool,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum VmState {
    /// Not built yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// vCPUs run.
    Running,
    /// vCPUs are stopped.
    Paused,
}

/// Who a tvmm is and what it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceInfo {
    /// The id given at start.
    pub id: String,
    /// What the machine is doing.
    pub state: VmState,
    /// The version of tvmm.
    pub vmm_version: String,
    /// Always [`APP_NAME`].
    pub app_name: String,
}

impl InstanceInfo {
    /// The info of this build of tvmm.
    pub fn new(id: impl Into<String>, state: VmState) -> Self {
        let (vmm_version, app_name) = (env!("CARGO_PKG_VERSION").to_owned(), APP_NAME.to_owned());
        Self { id: id.into(), state, vmm_version, app_name }
    }
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotTaken {
    /// The snapshot's id.
    pub id: String,
    /// Where it is.
    pub path: PathBuf,
    /// The bytes of guest memory it holds itself.
    pub memory_bytes: u64,
    /// How long the machine stood still for it, µs.
    pub capture_us: u64,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done, nothing to say.
    Empty,
    /// To [`Command::InstanceInfo`].
    InstanceInfo(InstanceInfo),
    /// To [`Command::Version`].
    Version(String),
    /// To [`Command::GetMachineConfig`].
    MachineConfig(MachineConfig),
    /// To [`Command::GetVmConfig`].
    VmConfig(Box<VmConfig>),
    /// To [`Command::AskBalloon`]: what the API says.
    Balloon(serde_json::Value),
    /// To [`Command::Report`]: as `--report` writes it.
    Report(serde_json::Value),
    /// To [`Command::CreateSnapshot`].
    Snapshot(SnapshotTaken),
}

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedKind {
    /// The asker's: what was asked cannot be done, or not now.
    BadRequest,
    /// Ours or the host's.
    Internal,
}

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// Whose fault it is.
    pub kind: RefusedKind,
    /// A whole sentence for a person.
    pub message: String,
}

impl Refused {
    /// The asker's fault.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::BadRequest, message: message.into() }
    }

    /// The asker's fault; the message is the whole chain of the error.
    pub fn bad_request_because(error: &(dyn Error + 'static)) -> Self {
        Self::bad_request(error_chain(error))
    }

    /// Our fault or the host's.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: RefusedKind::Internal, message: message.into() }
    }

    /// Our fault or the host's; the message is the whole chain of the error.
    pub fn internal_because(error: &(dyn Error + 'static)) -> Self {
        Self::internal(error_chain(error))
    }

    /// For commands that need a machine, before there is one. (Firecracker's sentence: clients match it.)
    pub fn before_start() -> Self {
        Self::bad_request("The requested operation is not supported before starting the microVM.")
    }

    /// For commands that shape the machine, once there is one. (Firecracker's sentence: clients match it.)
    pub fn after_start() -> Self {
        Self::bad_request("The requested operation is not supported after starting the microVM.")
    }
}

impl From<ConfigError> for Refused {
    fn from(error: ConfigError) -> Self {
        Self::bad_request_because(&error)
    }
}

/// An error and all its causes as one text, each sentence once.
pub(super) fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(if text.ends_with('.') { " " } else { ": " });
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A command on its way to the machine.
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// To be called once with the answer. Never blocks.
    pub respond: Box<dyn FnOnce(Result<Reply, Refused>) + Send>,
}

impl fmt::Debug for Request {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Request").field("command", &self.command).finish_non_exhaustive()
    }
}

/// Why a request did not reach the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The receiver was dropped.
    #[error("The VMM is shutting down.")]
    Gone,
    /// Too many requests wait already.
    #[error("The VMM has {QUEUE_LENGTH} requests waiting; try again later.")]
    Full,
}

/// The asking end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ControlSender {
    queue: SyncSender<Request>,
    wake: Arc<EventFd>,
}

impl ControlSender {
    /// Queues a request and wakes the machine's main loop. Never blocks.
    pub fn send(&self, request: Request) -> Result<(), SendError> {
        self.queue.try_send(request).map_err(|error| match error {
            TrySendError::Full(_) => SendError::Full,
            TrySendError::Disconnected(_) => SendError::Gone,
        })?;
        // It can only fail because the counter is full, and then the receiver is awake already.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// The answering end: belongs to the thread that owns the machine.
#[derive(Debug)]
pub struct ControlReceiver {
    queue: Receiver<Request>,
    wake: Arc<EventFd>,
}

impl ControlReceiver {
    /// Readable while requests may be waiting.
    pub fn eventfd(&self) -> &EventFd {
        &self.wake
    }

    /// Takes the requests that wait, oldest first. Never blocks.
    pub fn drain(&self) -> Vec<Request> {
        // First the eventfd, then the queue: what is queued in between is taken now or wakes us again. It fails
        // when nobody has written, which is no reason not to look.
        let _ = self.wake.read();
        self.queue.try_iter().take(QUEUE_LENGTH).collect()
    }
}

/// A queue of commands with an eventfd that wakes its reader.
pub fn channel() -> io::Result<(ControlSender, ControlReceiver)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, receiver) = sync_channel(QUEUE_LENGTH);
    Ok((ControlSender { queue: sender, wake: wake.clone() }, ControlReceiver { queue: receiver, wake }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(command: Command) -> Request {
        Request { command, respond: Box::new(drop) }
    }

    #[test]
    fn send_wakes_the_receiver_and_drain_takes_requests_in_order() {
        let (sender, receiver) = channel().unwrap();
        assert!(receiver.drain().is_empty());
        sender.send(request(Command::Pause)).unwrap();
        sender.clone().send(request(Command::Resume)).unwrap();
        assert_eq!(receiver.eventfd().read().unwrap(), 2);
        let commands: Vec<Command> = receiver.drain().into_iter().map(|request| request.command).collect();
        assert_eq!(commands, [Command::Pause, Command::Resume]);
        assert!(receiver.eventfd().read().is_err(), "drain leaves the eventfd unreadable");
    }

    #[test]
    fn send_to_a_dropped_receiver_says_the_vmm_is_gone() {
        let (sender, receiver) = channel().unwrap();
        drop(receiver);
        assert_eq!(sender.send(request(Command::Pause)), Err(SendError::Gone));
    }

    #[test]
    fn send_to_a_full_queue_is_refused_and_works_again_after_drain() {
        let (sender, receiver) = channel().unwrap();
        for _ in 0..QUEUE_LENGTH {
            sender.send(request(Command::Pause)).unwrap();
        }
        assert_eq!(sender.send(request(Command::Pause)), Err(SendError::Full));
        assert_eq!(receiver.drain().len(), QUEUE_LENGTH);
        sender.send(request(Command::Pause)).unwrap();
    }

    #[test]
    fn dropping_the_receiver_drops_waiting_requests() {
        let (sender, receiver) = channel().unwrap();
        let (called, dropped) = sync_channel(1);
        let respond = Box::new(move |_| called.send(()).unwrap());
        sender.send(Request { command: Command::Pause, respond }).unwrap();
        drop(receiver);
        assert!(dropped.recv().is_err(), "the responder was dropped, not called");
    }

    #[test]
    fn refused_because_tells_the_whole_chain() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        let refused = Refused::from(ConfigError::Read { path: "/x".into(), source });
        assert_eq!(refused.kind, RefusedKind::BadRequest);
        assert_eq!(refused.message, "Config file /x cannot be read. entity not found");
        let inner = std::fmt::Error;
        let error = crate::vmm::Error::Os { doing: "do it", source: io::Error::other(inner) };
        assert!(Refused::internal_because(&error).message.starts_with("Cannot do it: "));
    }
}
