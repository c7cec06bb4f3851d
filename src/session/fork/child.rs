//! One child of a fork, from its start to its first answer.

use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::config::ChildSpec;
use crate::config::bodies::{VmBody, WantedState};
use crate::config::control::ForkedChild;
use crate::session::Error;
use crate::snapshot::PRIVATE;
use crate::sys::api_client::{Client, ClientError};
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::chain;
use crate::sys::{clock, inherit};

/// Time for a child to be restored, or to answer.
const START_LIMIT: Duration = Duration::from_secs(120);
/// Time between two looks for a socket that a child has not made yet.
const LOOK: Duration = Duration::from_millis(1);
/// Time for a child to end by itself.
const END_GRACE: Duration = Duration::from_secs(3);
/// The most of a child's messages that are read to tell why it ended.
const MESSAGES_MAX: u64 = 64 << 10;

/// A child that was started.
pub struct Child {
    spec: ChildSpec,
    id: String,
    process: process::Child,
    /// Its standard error, unless that is a file.
    messages: Option<PipeReader>,
}

impl Child {
    /// Starts `tvmm` with `config`, in a session of its own. It ends if `parent` ends without a byte for it.
    pub fn spawn(
        spec: &ChildSpec,
        id: String,
        config: &Path,
        fault_timeout: Duration,
        parent: &PipeReader,
    ) -> io::Result<Child> {
        // The file that this process runs from, even if another one has its name by now.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("tvmm").arg("--config").arg(config).arg("--api-sock").arg(&spec.socket);
        command.args(["--own-session", "--await-parent"]).args([
            "--id",
            &id,
            "--fault-timeout",
            &fault_timeout.as_secs().to_string(),
        ]);
        command.args(["--start-time-us", &(clock::monotonic_ns() / 1000).to_string()]);
        command.stdin(parent.try_clone()?);
        let mut messages = None;
        match &spec.log {
            Some(path) => {
                let log = OpenOptions::new().append(true).create(true).mode(PRIVATE).open(path)?;
                command.stdout(log.try_clone()?).stderr(log);
            }
            None => {
                let (reader, writer) = io::pipe()?;
                command.stdout(Stdio::null()).stderr(writer);
                messages = Some(reader);
            }
        }
        inherit::keep_all()?;
        let process = command.spawn()?;
        Ok(Child { spec: spec.clone(), id, process, messages })
    }

    /// Waits until the child has restored the fork point.
    pub fn wait_until_restored(&mut self) -> Result<(), Error> {
        let mut wait = Wait::new(format!("the child for {}", self.spec.socket.display()), START_LIMIT);
        loop {
            let error = match self.client().request("GET", "/", None, START_LIMIT) {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            let is_early = matches!(error, ClientError::NoSocket { .. } | ClientError::NotServed { .. });
            let has_ended = self.process.try_wait().map_err(Error::os("ask for the end of a child"))?.is_some();
            if !is_early || has_ended || wait.is_over() {
                return Err(self.failure(&error));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Lets the restored child run.
    pub fn resume(&mut self) -> Result<(), Error> {
        let body = json!(VmBody { state: WantedState::Resumed });
        let resumed = self.client().request("PATCH", "/vm", Some(&body), START_LIMIT);
        resumed.map(drop).map_err(|error| self.failure(&error))
    }

    pub fn number(&self) -> u32 {
        self.spec.number
    }

    pub fn answer(&self) -> ForkedChild {
        ForkedChild { id: self.id.clone(), socket: self.spec.socket.clone(), pid: self.process.id() }
    }

    pub fn into_process(self) -> process::Child {
        self.process
    }

    fn client(&self) -> Client {
        Client::new(&self.spec.socket)
    }

    /// The reason of a failure: the child's last words if it ends now, the client's error otherwise.
    fn failure(&mut self, error: &ClientError) -> Error {
        let mut wait = Wait::new(format!("the end of the child for {}", self.spec.socket.display()), END_GRACE);
        while matches!(self.process.try_wait(), Ok(None)) && !wait.is_over() {
            std::thread::sleep(LOOK);
        }
        let why = match self.process.try_wait() {
            Ok(Some(_)) => self.last_words(),
            _ => None,
        };
        let why = why.unwrap_or_else(|| chain(error));
        Error::Child { socket: self.spec.socket.clone(), why: why.trim_end_matches('.').to_owned() }
    }

    /// The last line that the child, which has ended, wrote to standard error.
    fn last_words(&mut self) -> Option<String> {
        let mut text = Vec::new();
        match (&mut self.messages, &self.spec.log) {
            (Some(pipe), _) => pipe.take(MESSAGES_MAX).read_to_end(&mut text).ok()?,
            (None, Some(log)) => File::open(log).ok()?.read_to_end(&mut text).ok()?,
            (None, None) => return None,
        };
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
        Some(line.trim_start_matches("tvmm: ").to_owned())
    }
}

/// Ends children that shall not live: by SIGTERM, so that they remove their sockets, and if that takes long by force.
pub fn end_all(mut children: Vec<Child>) {
    for child in &children {
        // This process has not waited for the child, so the number is still its own.
        let _ = Pid::from_raw(child.process.id() as i32).map(|pid| kill_process(pid, Signal::TERM));
    }
    let mut wait = Wait::new("the children of a failed fork to end", END_GRACE);
    for child in &mut children {
        while matches!(child.process.try_wait(), Ok(None)) && !wait.is_over() {
            std::thread::sleep(LOOK);
        }
        if matches!(child.process.try_wait(), Ok(Some(_))) {
            continue;
        }
        // Errors mean that it has ended by now.
        let _ = child.process.kill();
        let _ = child.process.wait();
        let _ = std::fs::remove_file(&child.spec.socket);
    }
}
