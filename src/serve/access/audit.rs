//! The audit log: a line of JSON for each request. It has no secrets, no queries and no bodies.
//!
//! A thread writes the lines, so that no request waits for the disk. While they cannot be written, the service answers
//! no requests.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant, SystemTime};

use axum::http::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use super::caller::{Caller, Peer};
use crate::serve::error::ServeError;
use crate::serve::fault::Fault;
use crate::snapshot::{Error, append_private};
use crate::sys::clock;
use crate::sys::worker::Worker;

/// Lines that may wait for the disk. While there are as many, no request is answered; those that are being answered
/// still add theirs.
const MAX_WAITING: usize = 1024;
/// Pause before another attempt to write to a file that could not be written.
const RETRY: Duration = Duration::from_secs(1);
/// Longest path in a line, and longest name of an object, characters.
const MAX_TEXT: usize = 256;

/// The objects that a request names by its path or its body, by the API's keys.
#[derive(Clone, Debug, Default)]
pub struct Objects(Arc<Mutex<BTreeMap<&'static str, String>>>);

/// The keys of all bodies that name objects.
#[derive(Deserialize)]
struct NamingBody {
    func_name: Option<String>,
    #[serde(rename = "vmId")]
    vm_id: Option<String>,
    #[serde(rename = "ssId")]
    ss_id: Option<String>,
    namespace: Option<String>,
}

impl Objects {
    /// The objects in a path.
    pub fn of_path(path: &str) -> Objects {
        let objects = Objects::default();
        let mut parts = path.split('/').skip(1);
        let key = match parts.next() {
            Some("functions") => "func_name",
            Some("vms") => "vmId",
            Some("snapshots") => "ssId",
            Some("net-ifaces") => "namespace",
            Some("traces") => "traceId",
            _ => return objects,
        };
        objects.add(key, parts.next().map(String::from));
        objects
    }

    /// Adds the objects in a body. A body that is no JSON names none.
    pub fn add_body(&self, bytes: &[u8]) {
        let Ok(body) = serde_json::from_slice::<NamingBody>(bytes) else { return };
        self.add("func_name", body.func_name);
        self.add("vmId", body.vm_id);
        self.add("ssId", body.ss_id);
        self.add("namespace", body.namespace);
    }

    fn add(&self, key: &'static str, name: Option<String>) {
        if let Some(name) = name.filter(|name| !name.is_empty()) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, shortened(&name));
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

/// A request, from its arrival on.
#[derive(Debug)]
pub struct Entry {
    time: SystemTime,
    begun: Instant,
    peer: Peer,
    method: Method,
    path: String,
    /// The client, once it is known.
    pub who: Option<String>,
    pub objects: Objects,
}

/// A line of the log.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    who: Option<&'a str>,
    peer: String,
    method: &'a str,
    path: &'a str,
    object: BTreeMap<&'static str, String>,
    status: Option<u16>,
    duration_us: u64,
}

impl Entry {
    pub fn begin(peer: Peer, method: &Method, path: &str) -> Entry {
        Entry {
            time: SystemTime::now(),
            begun: Instant::now(),
            peer,
            method: method.clone(),
            path: shortened(path),
            who: None,
            objects: Objects::of_path(path),
        }
    }

    pub fn by(&mut self, caller: &Caller) {
        self.who = caller.name();
    }

    fn line(&self, status: Option<StatusCode>) -> String {
        let line = Line {
            time: clock::utc_text(self.time),
            who: self.who.as_deref(),
            peer: self.peer.to_string(),
            method: self.method.as_str(),
            path: &self.path,
            object: self.objects.0.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            status: status.map(|status| status.as_u16()),
            duration_us: self.begun.elapsed().as_micros() as u64,
        };
        // Texts and numbers: nothing that JSON cannot hold.
        serde_json::to_string(&line).unwrap_or_default() + "\n"
    }
}

/// The state that requests share with the thread that writes.
#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<String>,
    /// The file to write to from now on.
    next_file: Option<File>,
    /// The reason why the last line could not be written.
    failure: Option<String>,
    has_ended: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The audit log of a service.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    shared: Arc<Shared>,
    worker: Worker,
}

impl AuditLog {
    /// Opens the log to append to it.
    pub fn open(path: &Path) -> Result<AuditLog, ServeError> {
        let file = append_private(path)?;
        let shared = Arc::new(Shared::default());
        let writer = shared.clone();
        let ender = shared.clone();
        let end = move || {
            ender.lock().has_ended = true;
            ender.changed.notify_all();
        };
        let worker = Worker::start(Builder::new().name("audit".into()), end, move || write_lines(&writer, file));
        let worker = worker.map_err(ServeError::os("start the thread that writes the audit log"))?;
        Ok(AuditLog { path: path.to_owned(), shared, worker })
    }

    /// Opens the file at the log's path again, which a rotation has renamed. Blocks for the disk.
    pub fn reopen(&self) -> Result<(), Error> {
        self.shared.lock().next_file = Some(append_private(&self.path)?);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Refuses a request whose line could not be written.
    pub fn check(&self) -> Result<(), Fault> {
        let state = self.shared.lock();
        let why = match &state.failure {
            Some(error) => error.clone(),
            None if state.waiting.len() >= MAX_WAITING => format!("{MAX_WAITING} lines wait for the disk"),
            None => return Ok(()),
        };
        let message = format!(
            "Cannot write the audit log: {why}. The service answers no requests until it can: free its disk, or give \
             it another file and send SIGHUP."
        );
        Err(Fault { retry_after_s: Some(1), ..Fault::new(StatusCode::SERVICE_UNAVAILABLE, message) })
    }

    /// Adds the line of a request. `status`: that of its answer; none: its client has left before.
    pub fn put(&self, entry: &Entry, status: Option<StatusCode>) {
        self.shared.lock().waiting.push_back(entry.line(status));
        self.shared.changed.notify_all();
    }

    /// Waits until all lines are written, or `deadline`. Blocks for the disk.
    pub fn finish(&self, deadline: Instant) -> bool {
        self.worker.finish(deadline) && self.shared.lock().waiting.is_empty()
    }
}

/// Writes lines until the log ends, and those that wait then.
fn write_lines(shared: &Shared, mut file: File) {
    // Bytes of the first line that are in the file.
    let mut written = 0;
    loop {
        let mut state = shared.lock();
        while state.waiting.is_empty() && state.next_file.is_none() && !state.has_ended {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(next) = state.next_file.take() {
            file = next;
            written = 0;
        }
        let Some(line) = state.waiting.front().cloned() else {
            if state.has_ended {
                return;
            }
            continue;
        };
        drop(state);
        let result = write_rest(&mut file, line.as_bytes(), &mut written);
        let mut state = shared.lock();
        let Err(error) = result else {
            state.waiting.pop_front();
            written = 0;
            if state.failure.take().is_some() {
                tracing::warn!("The audit log can be written again");
            }
            continue;
        };
        if state.failure.is_none() {
            tracing::error!(%error, "Cannot write the audit log: no requests are answered until it can be written");
        }
        state.failure = Some(error.to_string());
        if state.has_ended {
            return;
        }
        drop(shared.changed.wait_timeout_while(state, RETRY, |state| state.next_file.is_none() && !state.has_ended));
    }
}

fn write_rest(file: &mut File, line: &[u8], written: &mut usize) -> std::io::Result<()> {
    while *written < line.len() {
        match file.write(&line[*written..]) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(count) => *written += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_those_of_path_and_body() {
        let objects = Objects::of_path("/snapshots/base/profile");
        objects.add_body(br#"{"func_name":"touch","params":"secret=1","vmId":null}"#);
        objects.add_body(b"not JSON");
        let found = objects.0.lock().unwrap().clone();
        assert_eq!(found, BTreeMap::from([("func_name", "touch".to_string()), ("ssId", "base".to_string())]));
        assert!(Objects::of_path("/metrics").0.lock().unwrap().is_empty());
    }
}
