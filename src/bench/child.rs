//! Child processes with a time limit; a wait of more than a second is logged.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// Time for a process to end after SIGKILL: one that waits in the kernel for a device ends only after that.
const KILLED: Duration = Duration::from_secs(10);

/// Runs a command without input to its end within `limit`, and returns its output. A slower one is killed.
///
/// # Errors
/// The command cannot be started, or took too long.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output, BoxError> {
    let program = command.get_program().display().to_string();
    let first = command.get_args().next().map(|arg| format!(" {}", arg.display())).unwrap_or_default();
    let name = format!("{program}{first}");
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|error| format!("Cannot start {program}: {error}"))?;
    let wait = Wait::new(format!("{name} (process {})", child.id()), limit);
    match said(&mut child, wait)? {
        Some(output) => Ok(output),
        None => {
            end(&mut child);
            refuse(format!("{name} did not end within {} s and was killed", limit.as_secs_f64()))
        }
    }
}

/// Reads a child's output until its end; `None` if that does not come in time.
fn said(child: &mut Child, mut wait: Wait) -> io::Result<Option<Output>> {
    let end = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let file = |stream: Option<OwnedFd>| stream.map(File::from);
    let mut streams = [file(child.stdout.take().map(OwnedFd::from)), file(child.stderr.take().map(OwnedFd::from))];
    let mut said = [Vec::new(), Vec::new()];
    loop {
        let open: Vec<usize> = (0..streams.len()).filter(|at| streams[*at].is_some()).collect();
        let mut fds: Vec<PollFd> = streams.iter().flatten().map(|file| PollFd::new(file, PollFlags::IN)).collect();
        if open.is_empty() {
            fds.push(PollFd::new(&end, PollFlags::IN));
        }
        let step = Timespec::try_from(wait.step()).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&step)) {
            Err(rustix::io::Errno::INTR) => {}
            polled => drop(polled?),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if open.is_empty() && ready == [true] {
            let status = child.wait()?;
            let [stdout, stderr] = said;
            return Ok(Some(Output { status, stdout, stderr }));
        }
        for at in open.iter().zip(&ready).filter(|(_, is_ready)| **is_ready).map(|(at, _)| *at) {
            let mut piece = [0; 4096];
            let read = streams[at].as_mut().map_or(Ok(0), |stream| stream.read(&mut piece))?;
            said[at].extend_from_slice(&piece[..read]);
            if read == 0 {
                streams[at] = None;
            }
        }
        if wait.is_over() {
            return Ok(None);
        }
    }
}

/// Kills a child and waits until it has ended, but not for ever.
pub fn end(child: &mut Child) {
    // It may have ended already.
    let _ = child.kill();
    let mut wait = Wait::new(format!("the end of process {}, which was killed", child.id()), KILLED);
    while matches!(child.try_wait(), Ok(None)) && !wait.is_over() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A process that another one has started. Killed when dropped.
pub struct Grandchild {
    pid: i32,
    process: OwnedFd,
}

impl Grandchild {
    /// The process `pid`, which has not ended.
    pub fn of(pid: i32) -> io::Result<Grandchild> {
        let known = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Grandchild { pid, process: pidfd_open(known, PidfdFlags::empty())? })
    }
}

impl Drop for Grandchild {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let mut wait = Wait::new(format!("the end of process {}, which was killed", self.pid), KILLED);
        while !wait.is_over() {
            let Ok(step) = Timespec::try_from(wait.step()) else { return };
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&step)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_that_does_not_end_is_killed_and_its_time_told() {
        let mut command = Command::new("sleep");
        let said = output(command.arg("1000"), Duration::from_millis(50)).unwrap_err().to_string();
        assert_eq!(said, "sleep 1000 did not end within 0.05 s and was killed");
        let mut echo = Command::new("sh");
        let said = output(echo.args(["-c", "echo hello; echo oops >&2; exit 3"]), Duration::from_secs(300)).unwrap();
        assert_eq!((said.stdout, said.stderr, said.status.code()), (b"hello\n".to_vec(), b"oops\n".to_vec(), Some(3)));
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        end(&mut child);
        assert!(child.try_wait().unwrap().is_some());
    }
}
