//! The control vocabulary: what can be asked of a running tvmm, and how a question reaches the thread that owns
//! the machine.
//!
//! Whoever asks (the HTTP API, a test) holds a [`ControlSender`]; the machine's main loop holds the
//! [`ControlReceiver`], waits on its eventfd beside its other events, and answers every [`Request`] once. A request
//! that is dropped unanswered tells its sender that the VMM is gone.

use crate::config::refusal::Refused;
use crate::config::request::Command;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use crate::config::overrides::{NetworkOverride, Overrides};
pub use crate::config::patch::{
    AmountPatch, BalloonPatch, BalloonQuestion, DevicePatch, DrivePatch, IntervalPatch, NetworkPatch, PmemPatch,
    StartHintingPatch,
};
use crate::config::{MachineConfig, VmConfig};

/// What `app_name` says.
pub const APP_NAME: &str = "tvmm";

/// Requests that may wait for the machine. Senders wait for their answer before they ask again, so this bounds the
/// number of askers that are served at once.
const QUEUE_LENGTH: usize = 64;

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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}
