//! A VM in a separate process, driven over its console, as users drive it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::child;
use crate::sys::api_client::Client;
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// Time limit for any action of a guest.
pub const TIMEOUT: Duration = Duration::from_secs(300);

/// A VMM and its guest. Ended when dropped.
pub struct Guest {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<Line>,
    /// The VMM's standard error.
    errors: File,
    /// The VMM's program.
    program: String,
    asked: u32,
}

/// A line of a guest, and the time at which it was complete.
struct Line {
    text: String,
    at: Instant,
}

/// An answer, and the time at which it was complete.
pub struct GuestAnswer {
    /// Without `ok` and the id: the digest, the guest's own µs, and more.
    pub rest: String,
    pub at: Instant,
}

impl GuestAnswer {
    /// The digest of the function's result.
    pub fn digest(&self) -> &str {
        self.rest.split(' ').next().unwrap_or_default()
    }

    /// The time of the function by the guest's clock, ms.
    pub fn guest_ms(&self) -> Option<f64> {
        let us: f64 = self.rest.split(' ').nth(1)?.parse().ok()?;
        Some(us / 1000.0)
    }
}

impl Guest {
    /// Starts a VMM whose guest's console is its standard input and output.
    pub fn start(mut command: Command) -> Result<Self, BoxError> {
        let program = command.get_program().display().to_string();
        let failed = |error: io::Error| format!("Cannot keep the messages of {program}: {error}");
        let errors = File::from(memfd_create("stderr", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?);
        let written = Stdio::from(errors.try_clone().map_err(failed)?);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(written).spawn();
        let mut child = spawned.map_err(|error| format!("Cannot start {program}: {error}"))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return refuse("Cannot reach the guest's console: the VMM was started without pipes");
        };
        let (sender, lines) = channel();
        // Made first, so that its drop ends the VMM if the reader thread cannot be started.
        let guest = Guest { child, stdin, lines, errors, program, asked: 0 };
        let reads = move || forward(stdout, |text| sender.send(Line { text, at: Instant::now() }).is_ok());
        let reading = std::thread::Builder::new().name("console".into()).spawn(reads);
        reading.map_err(|error| format!("Cannot start the thread that reads the guest's console: {error}"))?;
        Ok(guest)
    }

    /// Boots the machine of a configuration with tvmm, and waits until the guest takes requests.
    pub fn boot(exe: &Path, config: &Path, socket: &Path) -> Result<Self, BoxError> {
        let mut command = Command::new(exe);
        command.arg("--config").arg(config).arg("--api-sock").arg(socket);
        Self::boot_by(command)
    }

    /// Starts a VMM that boots a machine, and waits until the guest takes requests.
    pub fn boot_by(command: Command) -> Result<Self, BoxError> {
        let guest = Self::start(command)?;
        guest.wait_for("ready ")?;
        Ok(guest)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns whether its VMM has ended.
    pub fn has_ended(&mut self) -> Result<bool, BoxError> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Runs a function of the guest.
    ///
    /// # Errors
    /// If the guest refuses it, ends, or does not answer in time.
    pub fn call(&mut self, function: &str) -> Result<GuestAnswer, BoxError> {
        let id = self.ask(function)?;
        self.answer(&id)
    }

    /// Sends a request; returns its id.
    pub fn ask(&mut self, function: &str) -> Result<String, BoxError> {
        self.asked += 1;
        let id = format!("b{}", self.asked);
        let sent = writeln!(self.stdin, "run {id} {function}");
        sent.map_err(|error| format!("Cannot ask the guest for {function:?}: {error}"))?;
        Ok(id)
    }

    /// Waits for the answer to a request.
    pub fn answer(&self, id: &str) -> Result<GuestAnswer, BoxError> {
        let (line, at) = self.wait_for(&format!("ok {id} "))?;
        Ok(GuestAnswer { rest: line.splitn(3, ' ').nth(2).unwrap_or_default().to_string(), at })
    }

    /// Waits for a line that begins with `wanted`; returns it, and the time at which it was complete.
    pub fn wait_for(&self, wanted: &str) -> Result<(String, Instant), BoxError> {
        let mut wait = Wait::new(format!("the guest of {} to say {wanted:?}", self.program), TIMEOUT);
        let mut last = String::new();
        loop {
            match self.lines.recv_timeout(wait.step()) {
                Ok(line) if line.text.starts_with(wanted) => return Ok((line.text, line.at)),
                Ok(Line { text, .. }) if text.starts_with("err ") || text.starts_with("panic ") => {
                    return refuse(format!("The guest says: {text}"));
                }
                Ok(line) if !wait.is_over() => last = line.text,
                Err(RecvTimeoutError::Timeout) if !wait.is_over() => {}
                Ok(_) | Err(RecvTimeoutError::Timeout) => {
                    return refuse(format!("The guest did not say {wanted:?} within {TIMEOUT:?}; last: {last:?}"));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let said = self.last_error();
                    return refuse(format!(
                        "The VMM ended before the guest said {wanted:?}; last: {last:?}; its message: {said:?}"
                    ));
                }
            }
        }
    }

    /// The last line that the VMM has written to its standard error.
    pub fn last_error(&self) -> String {
        let length = self.errors.metadata().map_or(0, |metadata| metadata.len());
        let mut end = vec![0; length.min(MESSAGE) as usize];
        // The line is told beside another error: without it that error is told alone.
        let read = self.errors.read_at(&mut end, length.saturating_sub(MESSAGE)).unwrap_or_default();
        String::from_utf8_lossy(&end[..read]).lines().last().unwrap_or_default().to_string()
    }
}

/// Most bytes of a VMM's last message.
const MESSAGE: u64 = 4096;

fn forward(stdout: ChildStdout, mut send: impl FnMut(String) -> bool) {
    for line in BufReader::new(stdout).lines() {
        match line {
            Ok(line) if send(line.trim_end().to_string()) => {}
            _ => return,
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        child::end(&mut self.child);
    }
}

/// The digest in an answer line `ok ID DIGEST US …`.
pub fn digest_of(answer: &str) -> Option<&str> {
    answer.split(' ').nth(2)
}

/// The time of the function by the guest's clock, µs, in an answer line `ok ID DIGEST US …`.
pub fn guest_us(answer: &str) -> Option<f64> {
    answer.split_whitespace().nth(3)?.parse().ok()
}

/// Pauses the VM behind `client` and snapshots it, with the body that `PUT /snapshot/create` takes.
pub fn snapshot(client: &Client, body: &Value) -> Result<(), BoxError> {
    client.request("PATCH", "/vm", Some(&json!({ "state": "Paused" })), TIMEOUT)?;
    client.request("PUT", "/snapshot/create", Some(body), TIMEOUT)?;
    Ok(())
}

/// Pauses the tvmm behind `client` and snapshots it to the directory `dir`. Afterwards the memory file lies in the page
/// cache in large folios, as after a VM that is not killed.
pub fn snapshot_to(client: &Client, dir: &Path) -> Result<(), BoxError> {
    snapshot(client, &json!({ "snapshot_path": dir, "tvmm": { "verify": true } }))
}
