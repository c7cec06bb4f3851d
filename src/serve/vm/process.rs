//! Child processes: one thread spawns them, a pidfd reports their end, and their last output is kept.

use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

use crate::config::refusal::{FAULTS_VARIABLE, FaultBody, FaultCode};
use crate::sys::netns::Netns;
use crate::sys::{clock, pdeathsig, watched};

/// The end of standard error that is kept: a fault, with paths in it.
const SAID_BYTES: usize = 8 << 10;
/// The most bytes that a tool may print: more than the JSON of a plan of many extents.
const MAX_PRINTED: usize = 64 << 20;
/// Time for a child to end by itself.
pub const STOP_GRACE: Duration = Duration::from_secs(3);

/// A child to spawn.
pub enum Job {
    /// `tvmm` that waits for its API at the other end of a socket pair.
    Shell {
        /// Its id in answers.
        id: String,
        /// The network namespace it starts in; none: the daemon's.
        netns: Option<Netns>,
    },
    /// `tvmm` with these arguments, which does one thing and ends.
    Tool(Vec<OsString>),
}

/// A child just spawned, and the daemon's ends of its pipes.
pub struct NewChild {
    child: Child,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    stderr: OwnedFd,
    /// The API's connection, of a shell.
    pub api: Option<UnixStream>,
    /// Begin and end of the spawn, ns of CLOCK_MONOTONIC.
    pub spawned_ns: Range<u64>,
}

type Answer = oneshot::Sender<io::Result<NewChild>>;

/// Spawns on its own thread: fork is slow, and only one thread may have descriptors open that a child inherits.
/// Children that are tied to this thread end with it, that is with the daemon.
#[derive(Clone, Debug)]
pub struct Spawner {
    jobs: Sender<(Job, Answer)>,
    /// Arguments of every process that runs a VM.
    vm_args: Arc<[OsString]>,
}

impl Spawner {
    /// Starts the thread. `vm_args`: arguments of every process that runs a VM.
    pub fn start(vm_args: Vec<OsString>) -> io::Result<Spawner> {
        let (sender, jobs) = channel();
        let vm_args: Arc<[OsString]> = vm_args.into();
        let of_shells = vm_args.clone();
        std::thread::Builder::new().name("spawn".into()).spawn(move || spawn_all(&jobs, &of_shells))?;
        Ok(Spawner { jobs: sender, vm_args })
    }

    /// Arguments of every process that runs a VM.
    pub fn vm_args(&self) -> &[OsString] {
        &self.vm_args
    }

    pub async fn spawn(&self, job: Job) -> io::Result<NewChild> {
        let (answer, spawned) = oneshot::channel();
        let gone = || io::Error::other("the thread that spawns is gone");
        self.jobs.send((job, answer)).map_err(|_| gone())?;
        spawned.await.map_err(|_| gone())?
    }
}

fn spawn_all(jobs: &Receiver<(Job, Answer)>, vm_args: &[OsString]) {
    for (job, answer) in jobs {
        // The requester may have gone; the child then ends with the descriptors that are dropped here.
        if let Err(Ok(mut spawned)) = answer.send(spawn(job, vm_args)) {
            let _ = spawned.child.kill();
            let _ = spawned.child.wait();
        }
    }
}

fn spawn(job: Job, vm_args: &[OsString]) -> io::Result<NewChild> {
    let before = clock::monotonic_ns();
    // The file that this process runs from, even if another one has its name by now.
    let mut command = Command::new("/proc/self/exe");
    let mut api = None;
    let mut theirs = None;
    let mut entered = None;
    match job {
        Job::Shell { id, netns } => {
            let (ours, inherited) = UnixStream::pair()?;
            fcntl_setfd(&inherited, FdFlags::empty())?;
            let number = std::os::fd::AsRawFd::as_raw_fd(&inherited).to_string();
            command.args(["--api-fd", &number, "--id", &id, "--start-time-us", &(before / 1000).to_string()]);
            command.args(vm_args);
            (api, theirs) = (Some(ours), Some(inherited));
            if let Some(netns) = netns {
                entered = Some(netns.try_clone()?);
                netns.enter(&mut command);
            }
        }
        Job::Tool(args) => {
            command.args(args).env(FAULTS_VARIABLE, "json");
            pdeathsig::to_parent(&mut command);
        }
    }
    let (stdin, our_stdin) = std::io::pipe()?;
    let (our_stdout, stdout) = std::io::pipe()?;
    let (our_stderr, stderr) = std::io::pipe()?;
    // A group of its own: Ctrl-C at a terminal is for the daemon, which ends its VMs in order.
    command.process_group(0);
    // Its name in process lists.
    command.arg0("tvmm");
    let child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn();
    let child = child.map_err(|error| match entered.as_ref().and_then(|netns| netns.why(&error)) {
        Some(why) => io::Error::other(why),
        None => error,
    })?;
    drop(theirs);
    Ok(NewChild {
        child,
        stdin: our_stdin.into(),
        stdout: our_stdout.into(),
        stderr: our_stderr.into(),
        api,
        spawned_ns: before..clock::monotonic_ns(),
    })
}

/// The end of a child.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChildExit {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// The last line on standard error.
    pub said: String,
    /// The kind of failure that a tool names.
    pub fault: Option<FaultCode>,
}

impl ChildExit {
    /// Tools report their failure as a fault in JSON, other children in words.
    fn new(code: Option<i32>, line: &str) -> ChildExit {
        let said = line.trim_start_matches("tvmm: ");
        match serde_json::from_str(said) {
            Ok(FaultBody { fault_message, code: fault }) => ChildExit { code, said: fault_message, fault },
            Err(_) => ChildExit { code, said: said.to_string(), fault: None },
        }
    }

    /// The reason as a clause.
    pub fn why(&self) -> String {
        let said = self.said.trim_end_matches('.');
        match self.code {
            // The last line is a warning of its life, and has nothing to do with its end.
            Some(0) => "ended with exit code 0".to_owned(),
            Some(code) if said.is_empty() => format!("ended with exit code {code}"),
            Some(code) => format!("ended with exit code {code}: {said}"),
            None if said.is_empty() => "ended by a signal".to_owned(),
            None => format!("ended by a signal, and wrote last: {said}"),
        }
    }
}

/// A running child. It is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    ended: watch::Receiver<Option<ChildExit>>,
}

impl Process {
    /// Watches a child until it ends.
    fn watch(child: Child, stderr: OwnedFd) -> io::Result<Process> {
        let pid = child.id();
        let opened = Pid::from_raw(pid as i32).ok_or(rustix::io::Errno::SRCH);
        let pidfd = Arc::new(watched::readable(opened.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))?)?);
        let (sender, ended) = watch::channel(None);
        let said = tokio::spawn(last_line(pipe::Receiver::from_owned_fd(stderr)?));
        let handle = pidfd.clone();
        tokio::spawn(async move {
            let mut child = child;
            // An error here means that the descriptor is bad; then waiting blocks, which is right but slow.
            let _ = handle.readable().await.map(drop);
            let code = child.wait().ok().and_then(|status| status.code());
            let said = tokio::time::timeout(Duration::from_millis(500), said).await;
            // A failure means that no receiver is left.
            let _ = sender.send(Some(ChildExit::new(code, &said.ok().and_then(Result::ok).unwrap_or_default())));
        });
        Ok(Process { pid, pidfd, ended })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes its end when it has ended.
    pub fn exit(&self) -> watch::Receiver<Option<ChildExit>> {
        self.ended.clone()
    }

    /// Its end, if it has ended.
    pub fn ended(&self) -> Option<ChildExit> {
        self.ended.borrow().clone()
    }

    /// Waits for its end.
    pub async fn end(&self) -> ChildExit {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
        ended.ok().flatten().unwrap_or_default()
    }

    pub fn signal(&self, signal: Signal) {
        // It may have ended already; the pidfd keeps the number from meaning another process.
        let _ = pidfd_send_signal(self.pidfd.get_ref().as_fd(), signal);
    }

    /// Asks it to end, and ends it if it does not.
    pub async fn stop(&self) -> ChildExit {
        self.signal(Signal::TERM);
        match tokio::time::timeout(STOP_GRACE, self.end()).await {
            Ok(ended) => ended,
            Err(_) => {
                self.signal(Signal::KILL);
                self.end().await
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.borrow().is_none() {
            self.signal(Signal::KILL);
        }
    }
}

impl NewChild {
    /// Splits into the watched process and the daemon's ends.
    pub fn watch(self) -> io::Result<(Process, ChildPipes)> {
        let process = Process::watch(self.child, self.stderr)?;
        let ends = ChildPipes {
            stdin: pipe::Sender::from_owned_fd(self.stdin)?,
            stdout: pipe::Receiver::from_owned_fd(self.stdout)?,
            api: self.api,
        };
        Ok((process, ends))
    }
}

/// The daemon's ends of a child's pipes and of its API.
pub struct ChildPipes {
    pub stdin: pipe::Sender,
    pub stdout: pipe::Receiver,
    pub api: Option<UnixStream>,
}

/// Reads all of standard error, and keeps its last line.
async fn last_line(stderr: pipe::Receiver) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; SAID_BYTES];
    loop {
        match stderr.try_read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                kept.extend(&buffer[..count]);
                kept.drain(..kept.len().saturating_sub(SAID_BYTES));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stderr.readable().await.is_err() {
                    break;
                }
            }
            Err(_) => break,
        }
    }
    let text = String::from_utf8_lossy(&kept);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.to_string()
}

/// Runs `tvmm` with `args` to its end. Returns its output.
pub async fn run_tool(
    spawner: &Spawner,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    timeout: Duration,
) -> io::Result<(ChildExit, Vec<u8>)> {
    let args = args.into_iter().map(Into::into).collect();
    let (process, ends) = spawner.spawn(Job::Tool(args)).await?.watch()?;
    drop(ends.stdin);
    let read = async {
        let mut printed = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match ends.stdout.try_read(&mut buffer) {
                Ok(0) => return Ok(printed),
                Ok(count) if printed.len() + count > MAX_PRINTED => {
                    return Err(io::Error::other("it printed too much"));
                }
                Ok(count) => printed.extend(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ends.stdout.readable().await?,
                Err(error) => return Err(error),
            }
        }
    };
    match tokio::time::timeout(timeout, async { Ok((read.await?, process.end().await)) }).await {
        Ok(done) => done.map(|(printed, ended)| (ended, printed)),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long")),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;
    use crate::serve::fault::Fault;

    #[test]
    fn a_warning_is_no_reason_of_a_good_end() {
        let why = |code| ChildExit::new(code, "tvmm: A warning.").why();
        assert_eq!(why(Some(0)), "ended with exit code 0");
        assert_eq!(why(Some(1)), "ended with exit code 1: A warning");
        assert_eq!(why(None), "ended by a signal, and wrote last: A warning");
    }

    #[test]
    fn a_tools_fault_decides_by_its_code_and_never_by_its_words() {
        let status = |line: &str| {
            let ended = ChildExit::new(Some(1), line);
            let fault = Fault::coded(StatusCode::UNPROCESSABLE_ENTITY, ended.fault, ended.why());
            assert!(fault.message.ends_with("exit code 1: it did not answer (os error 28)"), "{}", fault.message);
            fault.status
        };
        let words = "tvmm: it did not answer (os error 28).";
        let said =
            |code: &str| format!(r#"tvmm: {{"fault_message":"it did not answer (os error 28).","code":"{code}"}}"#);
        assert_eq!(status(words), StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(status(&said("bad_request")), StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(status(&said("guest_timeout")), StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(status(&said("storage_full")), StatusCode::INSUFFICIENT_STORAGE);
    }
}
