//! Python handlers: a process per module, started with the agent, so that a snapshot finds it warm.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::functions::{Failure, failed};

const LOADER: &str = include_str!("loader.py");
/// Longest line a handler answers.
const LINE_MAX: u64 = 64 << 10;

/// A module, and its process while it lives.
pub struct Handler {
    path: PathBuf,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Handler {
    /// Starts Python on the module at `path`. If that fails, the first request tries again and returns the reason.
    pub fn start(path: PathBuf) -> Self {
        let worker = Worker::start(&path).ok();
        Handler { path, worker: Mutex::new(worker) }
    }

    /// Calls the module's `run`; returns the digest and the pairs of its answer. One call at a time.
    pub fn call(&self, pairs: &[&str]) -> Result<(u64, String), Failure> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let mut alive = match worker.take() {
            Some(worker) => worker,
            None => Worker::start(&self.path)?,
        };
        let answer = alive.call(pairs)?;
        *worker = Some(alive);
        match answer.split_once(' ').unwrap_or((&answer, "")) {
            ("ok", rest) => {
                let (digest, keys) = rest.split_once(' ').unwrap_or((rest, ""));
                match u64::from_str_radix(digest, 16) {
                    Ok(digest) => Ok((digest, keys.to_owned())),
                    Err(_) => failed("the handler's process answers without a digest"),
                }
            }
            ("err", message) => failed(message.to_owned()),
            _ => failed("the handler's process says something else than ok or err"),
        }
    }
}

impl Worker {
    fn start(path: &PathBuf) -> Result<Self, Failure> {
        let mut child = Command::new("python3")
            .args(["-c", LOADER])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start python3: {error}"))?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(Worker { child, input, output: BufReader::new(output) }),
            _ => failed("python3 has no pipes"),
        }
    }

    fn call(&mut self, pairs: &[&str]) -> Result<String, Failure> {
        // If the process has ended, the read below fails.
        let _ = self.input.write_all(format!("{}\n", pairs.join(" ")).as_bytes());
        let mut line = String::new();
        match self.output.by_ref().take(LINE_MAX).read_line(&mut line) {
            Ok(_) if line.ends_with('\n') => Ok(line.trim_end().to_owned()),
            Ok(0) => failed("the handler's process has ended; its standard error says why"),
            Ok(_) => failed("the handler's answer is too long"),
            Err(error) => failed(format!("the handler's process cannot be read: {error}")),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
