//! The API against a fake VMM: a thread that answers commands and remembers them.

mod abuse;
mod client;
mod endpoints;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::Value;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{ApiServer, serve};
use crate::config::control;
use crate::config::control::{ControlReceiver, InstanceInfo, Reply, SnapshotTaken, VmState};
use crate::config::refusal::Refused;
use crate::config::request::Command;
use crate::config::{MachineConfig, VmConfig};
use crate::sys::api_client::{Client, ClientError};

/// Long enough for a loaded host; a passing test does not wait for it.
const TIMEOUT: Duration = Duration::from_secs(20);

type Answer = fn(&Command) -> Result<Reply, Refused>;

/// A server, the fake VMM behind it, and the directory its socket is in.
struct Fixture {
    server: Option<ApiServer>,
    is_stopping: Arc<AtomicBool>,
    vmm: Option<JoinHandle<()>>,
    seen: Arc<Mutex<Vec<Command>>>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::answering(good_answer)
    }

    fn answering(answer: Answer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (sender, receiver) = control::channel().unwrap();
        let server = serve(&dir.path().join("api.sock"), sender, "test").unwrap();
        let is_stopping = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let vmm = {
            let is_stopping = is_stopping.clone();
            let seen = seen.clone();
            thread::spawn(move || fake_vmm(&receiver, answer, &is_stopping, &seen))
        };
        Self { server: Some(server), is_stopping, vmm: Some(vmm), seen, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::new(self.socket())
    }

    fn request(&self, method: &str, path: &str, body: Option<Value>) -> Result<(u16, Option<Value>), ClientError> {
        self.client().request(method, path, body.as_ref(), TIMEOUT)
    }

    /// The status and message of a request that must be refused.
    fn fault(&self, method: &str, path: &str, body: Option<Value>) -> (u16, String) {
        match self.request(method, path, body.clone()) {
            Err(ClientError::Fault { status, message }) => (status, message),
            other => panic!("{method} {path} {body:?}: {other:?}"),
        }
    }

    /// The commands that the VMM has seen since the last call.
    fn seen(&self) -> Vec<Command> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// A raw connection.
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    /// Sends bytes on a new connection and reads until the server closes it.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may close before it has read all; its earlier bytes can still be read.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    /// The VMM thread ends: its end of the control channel is dropped.
    fn end_vmm(&mut self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        if let Some(vmm) = self.vmm.take() {
            vmm.join().unwrap();
        }
    }

    fn assert_alive(&self) {
        assert_eq!(self.request("GET", "/version", None).unwrap().0, 200);
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.end_vmm();
        drop(self.server.take());
    }
}

fn fake_vmm(receiver: &ControlReceiver, answer: Answer, is_stopping: &AtomicBool, seen: &Mutex<Vec<Command>>) {
    let epoll = Epoll::new().unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(receiver.eventfd());
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).unwrap();
    let mut events = [EpollEvent::default()];
    while !is_stopping.load(Ordering::Relaxed) {
        epoll.wait(5, &mut events).unwrap();
        for request in receiver.drain() {
            let reply = answer(&request.command);
            seen.lock().unwrap().push(request.command);
            (request.respond)(reply);
        }
    }
}

fn good_answer(command: &Command) -> Result<Reply, Refused> {
    Ok(match command {
        Command::InstanceInfo => Reply::InstanceInfo(InstanceInfo::new("anonymous-instance", VmState::NotStarted)),
        Command::Version => Reply::Version("1.2.3".to_owned()),
        Command::GetMachineConfig => Reply::MachineConfig(MachineConfig::default()),
        Command::GetVmConfig => Reply::VmConfig(Box::default()),
        Command::CreateSnapshot(create) => Reply::Snapshot(SnapshotTaken {
            id: "abc".to_owned(),
            path: create.location.snapshot.clone(),
            memory_bytes: 4096,
            capture_us: 7,
            live: None,
            profile: None,
        }),
        _ => Reply::Empty,
    })
}

fn vm_config_json() -> Value {
    serde_json::to_value(VmConfig::default()).unwrap()
}
