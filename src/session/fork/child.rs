//! One child of a fork, as its parent sees it.

use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::line::ParentEnd;
use crate::config::ChildSpec;
use crate::config::control::ForkedChild;
use crate::session::Error;
use crate::snapshot::PRIVATE;
use crate::sys::bounded_wait::Wait;
use crate::sys::unix_socket::remove_stale;
use crate::sys::{clock, inherit, seccomp};

/// Time between two looks whether a child has ended.
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
    /// Readable from the end of the process on.
    end: OwnedFd,
    /// Its standard error, unless that is a file.
    messages: Option<PipeReader>,
}

impl Child {
    /// Starts `tvmm` with `config`, in a session of its own. It waits for the orders that come by `line`.
    pub fn spawn(
        spec: &ChildSpec,
        id: String,
        config: &Path,
        fault_timeout: Duration,
        line: &ParentEnd,
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
        command.args(seccomp::args_of_this_process());
        command.args(["--start-time-us", &(clock::monotonic_ns() / 1000).to_string()]);
        command.stdin(line.child_stdin()?);
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
        let mut process = command.spawn()?;
        match pidfd_open(Pid::from_child(&process), PidfdFlags::empty()) {
            Ok(end) => Ok(Child { spec: spec.clone(), id, process, end, messages }),
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                // A process that was killed leaves its socket.
                remove_stale(&spec.socket);
                Err(error.into())
            }
        }
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

    /// The id of the process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Readable from the end of the process on.
    pub fn end(&self) -> &OwnedFd {
        &self.end
    }

    /// The reason why the child does not start: its last words, if it has ended.
    pub fn failure(&mut self) -> Error {
        let why = match self.process.try_wait() {
            Ok(Some(status)) => self.last_words().unwrap_or_else(|| format!("its process has ended ({status})")),
            _ => "it has not restored the fork point in time".to_owned(),
        };
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

/// Ends children that shall not live, by SIGTERM, and if that takes long by force. Their sockets are removed.
pub fn end_all(mut children: Vec<Child>) {
    for child in &mut children {
        // The number of a child that has been waited for may be another process's.
        if matches!(child.process.try_wait(), Ok(None)) {
            let _ = Pid::from_raw(child.process.id() as i32).map(|pid| kill_process(pid, Signal::TERM));
        }
    }
    let mut wait = Wait::new("the children of a failed fork to end", END_GRACE);
    for child in &mut children {
        while matches!(child.process.try_wait(), Ok(None)) && !wait.is_over() {
            std::thread::sleep(LOOK);
        }
        // Errors mean that it has ended by now.
        let _ = child.process.kill();
        let _ = child.process.wait();
        // A child that was killed, by this process or another, has left them.
        let vsock = child.spec.load.vsock_override.as_ref().map(|vsock| vsock.uds_path.as_path());
        [Some(child.spec.socket.as_path()), vsock].into_iter().flatten().for_each(remove_stale);
    }
}
