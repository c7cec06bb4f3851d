//! The control channel: the requests to a running tvmm, and their way to the thread that owns the machine.
//!
//! A client (the HTTP API, a test) holds a [`ControlSender`]. The machine's main loop holds the [`ControlReceiver`],
//! waits on its eventfd beside its other events, and answers every [`Request`] once. A request that is dropped
//! unanswered tells its sender that the VMM has ended.

use crate::config::refusal::Refused;
use crate::config::request::Command;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use crate::config::overrides::{NetworkOverride, Overrides};
pub use crate::config::patch::{
    AmountPatch, BalloonPatch, BalloonQuestion, DevicePatch, DrivePatch, IntervalPatch, NetworkPatch, PmemPatch,
    StartHintingPatch,
};
use crate::config::{MachineConfig, VmConfig};
use crate::snapshot::{BucketPages, ByBucket};
use crate::sys::clock;

/// The value of `app_name`.
pub const APP_NAME: &str = "tvmm";

/// Requests that may wait for the machine. A sender waits for its answer before it asks again, so this bounds the
/// number of clients that are served at once.
const QUEUE_LENGTH: usize = 64;

/// The state of a machine.
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

/// Identity and state of a tvmm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InstanceInfo {
    /// The id given at start.
    pub id: String,
    /// The state of the machine.
    pub state: VmState,
    /// The version of tvmm.
    pub vmm_version: String,
    /// Always [`APP_NAME`].
    pub app_name: String,
}

impl InstanceInfo {
    /// The info of this build of tvmm.
    pub fn new(id: impl Into<String>, state: VmState) -> Self {
        let vmm_version = env!("CARGO_PKG_VERSION").to_owned();
        let app_name = APP_NAME.to_owned();
        Self { id: id.into(), state, vmm_version, app_name }
    }
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotTaken {
    /// The snapshot's id.
    pub id: String,
    /// The snapshot's directory.
    pub path: PathBuf,
    /// Bytes of guest memory in its own layer.
    pub memory_bytes: u64,
    /// Time for which the machine stood still, µs.
    pub capture_us: u64,
    /// The course of a live snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<LiveTaken>,
    /// The profile of the pages that the guest has used since its restore, if it was asked for and can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PathBuf>,
}

/// The course of a snapshot that was taken while the machine ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveTaken {
    /// Passes over the pages that were written meanwhile, without the one during the pause.
    pub passes: u32,
    /// Pages written to the snapshot while the machine ran; a page counts each time.
    pub pages_live: u64,
    /// Pages copied for the snapshot while the machine stood still.
    pub pages_paused: u64,
    /// True: the guest wrote memory faster than it could be saved, so more than a few pages were left for the pause.
    pub cut_short: bool,
    /// Time from the request to the pause, µs.
    pub window_us: u64,
}

/// A machine that went back to its snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Rewound {
    /// Pages copied over with the snapshot's bytes.
    pub pages_copied: u64,
    /// Zero pages cleared in place.
    pub pages_cleared: u64,
    /// Pages given back to the host.
    pub pages_dropped: u64,
    /// Pages that the guest had given to the balloon.
    pub pages_returned: u64,
    /// Time until all vCPUs stood and requests to devices were finished, µs.
    pub stop_us: u64,
    /// Time for devices (copies of their drives included, which are made while the guest runs), vCPUs and interrupt
    /// controllers, µs.
    pub state_us: u64,
    /// Time for guest memory, µs.
    pub memory_us: u64,
    /// Time from the request to the answer, without the comparison, µs.
    pub total_us: u64,
}

/// A machine that gave local memory back to the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demoted {
    /// Pages given back: zeros, their file or the fault service's page show again.
    pub pages_dropped: u64,
    /// Pages given back: a mapping of their file took the place of copies.
    pub pages_mapped: u64,
    /// Pages that went to the spill file. They differ from the snapshot, or nothing can show their source.
    #[serde(default)]
    pub pages_spilled: u64,
    /// The length of the spill file, bytes.
    #[serde(default)]
    pub spill_file_len: u64,
    /// The spill file had no room for some of the pages, because it may not be longer. They are among those kept.
    #[serde(default)]
    pub is_spill_full: bool,
    /// Pages kept, because they differ from the snapshot.
    pub pages_written: u64,
    /// Pages kept, because nothing can show their source in place of the copy.
    pub pages_kept: u64,
    /// Pages not looked at, because as many had been given back as were to be.
    #[serde(default)]
    pub pages_left: u64,
    /// Pages that a demotion of untouched pages has left alone: they were touched, are in other buckets, or are copies
    /// of a pool's pages.
    #[serde(default)]
    pub pages_skipped: u64,
    /// The number of steps. The guest runs in between.
    pub steps: u64,
    /// The longest time for which one step stopped the guest, µs; 0 if it was paused.
    pub longest_pause_us: u64,
    /// Time from the request to the answer, µs.
    pub total_us: u64,
}

/// A barrier that was set: the touches of memory since the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BarrierSet {
    #[serde(flatten)]
    pub buckets: ByBucket<BucketPages>,
    /// Pages of files that were unmapped, so that reads of them are seen.
    pub pages_unmapped: u64,
    /// The number of steps that stopped the guest. It runs in between.
    pub steps: u64,
    /// The longest time for which one step stopped the guest, µs; 0 if it was paused.
    pub longest_pause_us: u64,
    /// Time from the request to the answer, µs.
    pub total_us: u64,
}

/// A machine that became that of another snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repurposed {
    /// The snapshot's id.
    pub snapshot: String,
    /// Time until all vCPUs stood and requests to devices were finished, µs.
    pub stop_us: u64,
    /// Time to open the snapshot, choose a plan and make all checks, µs.
    pub prepare_us: u64,
    /// Time to end the former guest's devices and memory services, µs.
    pub release_us: u64,
    /// Time to map memory over the former guest's, and to fill it, µs.
    pub memory_us: u64,
    /// Time for devices, vCPUs and interrupt controllers, µs.
    pub state_us: u64,
    /// Time from the request to the answer, without the comparison, µs.
    pub total_us: u64,
}

/// A machine that was forked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forked {
    /// The directory of the fork point, which ends with its users.
    pub fork_point: PathBuf,
    /// Bytes of guest memory in the fork point.
    pub memory_bytes: u64,
    /// Bytes of guest memory that each child copied before it ran.
    #[serde(default)]
    pub copied_bytes: u64,
    /// Time for which the machine stood still, µs.
    pub stood_still_us: u64,
    /// Time from the request to the answer, µs.
    pub total_us: u64,
    /// The course of a live capture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<LiveTaken>,
    pub children: Vec<ForkedChild>,
}

/// A child of a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkedChild {
    /// Its name in answers of its API.
    pub id: String,
    pub socket: PathBuf,
    /// Its process.
    pub pid: u32,
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done; no data.
    Empty,
    /// To [`Command::InstanceInfo`].
    InstanceInfo(InstanceInfo),
    /// To [`Command::Version`].
    Version(String),
    /// To [`Command::GetMachineConfig`].
    MachineConfig(MachineConfig),
    /// To [`Command::GetVmConfig`].
    VmConfig(Box<VmConfig>),
    /// To [`Command::AskBalloon`]: the JSON of the API.
    Balloon(serde_json::Value),
    /// To [`Command::Report`]: as `--report` writes it.
    Report(serde_json::Value),
    /// To [`Command::CreateSnapshot`].
    Snapshot(SnapshotTaken),
    /// To [`Command::Rewind`].
    Rewound(Rewound),
    /// To [`Command::Fork`].
    Forked(Forked),
    /// To [`Command::Demote`].
    Demoted(Demoted),
    /// To [`Command::Barrier`].
    Barrier(BarrierSet),
    /// To [`Command::Repurpose`].
    Repurposed(Repurposed),
}

/// Takes the answer to a request. Never blocks.
pub type Respond = Box<dyn FnOnce(Result<Reply, Refused>) + Send>;

/// A command on its way to the machine.
pub struct Request {
    /// The command.
    pub command: Command,
    /// Called once with the answer. Never blocks.
    pub respond: Respond,
    /// The time at which the API had read it, in ns of CLOCK_MONOTONIC.
    pub read_ns: u64,
}

impl Request {
    /// A request that has just been read.
    pub fn new(command: Command, respond: Respond) -> Request {
        Request { command, respond, read_ns: clock::monotonic_ns() }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Request").field("command", &self.command).finish_non_exhaustive()
    }
}

/// The reason why a request did not reach the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The receiver was dropped.
    #[error("The VMM is shutting down.")]
    Gone,
    /// Too many requests wait already.
    #[error("The VMM has {QUEUE_LENGTH} requests waiting; try again later.")]
    Full,
}

/// The client's end. Cheap to clone.
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
        // The write fails only if the counter is full, and then the receiver is awake already.
        let _ = self.wake.write(1);
        Ok(())
    }
}

/// The machine's end: belongs to the thread that owns the machine.
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

    /// Takes the waiting requests, oldest first. Never blocks.
    pub fn drain(&self) -> Vec<Request> {
        // First the eventfd, then the queue: a request queued in between is taken now or wakes this thread again. The
        // read fails if there was no write; the queue is read all the same.
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
        Request::new(command, Box::new(drop))
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
        sender.send(Request::new(Command::Pause, respond)).unwrap();
        drop(receiver);
        assert!(dropped.recv().is_err(), "the responder was dropped, not called");
    }
}
