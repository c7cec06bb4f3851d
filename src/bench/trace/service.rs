//! A `tvmm serve` of a replay: one process for each policy, all on the same directory of functions and snapshots.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::policy::Processes;
use crate::bench::child;
use crate::sys::api_client::{Client, ClientError};
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::pdeathsig;

/// Time limit of an invocation in the service.
const INVOCATION: Duration = Duration::from_secs(60);
/// Time limit of any request to the service, longer than that of an invocation.
const ANSWER: Duration = Duration::from_secs(120);
/// Idle time of VMs of functions without a policy. None reaches it.
const LONG: Duration = Duration::from_secs(86_400);
/// Time for the service to end its VMs and itself.
const END: Duration = Duration::from_secs(60);

/// The limits of a service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Guest memory of all VMs together, MiB.
    pub(super) memory_mib: u64,
    pub(super) max_vms: usize,
    /// Invocations that run at once.
    pub(super) max_running: usize,
}

/// A service that runs. It ends when this is dropped.
pub(super) struct Service {
    child: Child,
    client: Client,
    log: PathBuf,
}

impl Service {
    /// Starts a service on the directory `dir`. Its socket and its log are beside it.
    ///
    /// # Errors
    /// It does not listen; the error has the end of its log.
    pub(super) fn start(dir: &Path, limits: Limits, processes: Processes) -> Result<Service, BoxError> {
        let socket = dir.with_extension("sock");
        let log = dir.with_extension("log");
        let file = File::create(&log).map_err(|error| format!("Cannot make {}: {error}", log.display()))?;
        let exe = std::env::current_exe()?;
        let mut command = Command::new(&exe);
        command.arg("serve").arg("--dir").arg(dir).arg("--listen-unix").arg(&socket);
        for (name, number) in [
            ("--memory", limits.memory_mib),
            ("--max-vms", limits.max_vms as u64),
            ("--max-running", limits.max_running as u64),
            ("--idle-timeout", LONG.as_secs()),
            ("--timeout", INVOCATION.as_secs()),
        ] {
            command.arg(name).arg(number.to_string());
        }
        if processes == Processes::End {
            command.arg("--no-repurpose");
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        pdeathsig::to_parent(&mut command);
        let spawned = command.spawn();
        let mut child = spawned.map_err(|error| format!("Cannot start {} serve: {error}", exe.display()))?;
        let mut line = String::new();
        let listens = match child.stdout.take() {
            Some(stdout) => BufReader::new(stdout).read_line(&mut line).unwrap_or_default() > 0,
            None => false,
        };
        let service = Service { child, client: Client::new(socket), log };
        if listens { Ok(service) } else { refuse(format!("Cannot start tvmm serve: {}", service.last_words())) }
    }

    fn last_words(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().last().unwrap_or("it has ended without a message").to_string()
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request; an error says how it was answered.
    pub(super) fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let (_, answer) = self.client.request(method, path, body, ANSWER)?;
        Ok(answer.unwrap_or_default())
    }

    /// Sends a request that must succeed.
    pub(super) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, BoxError> {
        let failed = |error| format!("Cannot make ready for the trace: {method} {path}: {error}");
        Ok(self.send(method, path, body).map_err(failed)?)
    }

    /// Ends the service and all its VMs.
    ///
    /// # Errors
    /// It does not end in time, or has ended by itself.
    pub(super) fn end(mut self) -> Result<(), BoxError> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return refuse(format!("tvmm serve has ended during the replay ({status}): {}", self.last_words()));
        }
        self.stop()
    }

    fn stop(&mut self) -> Result<(), BoxError> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let mut wait = Wait::new("the end of tvmm serve", END);
        while self.child.try_wait()?.is_none() {
            if wait.is_over() {
                return refuse("tvmm serve does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) && self.stop().is_err() {
            child::end(&mut self.child);
        }
    }
}
