//! Another VMM with Firecracker's command line and API, measured beside tvmm: the same guest kernel and requests, and a
//! snapshot of its own, restored from its memory file (`mem_backend` File) or by a page-fault handler (Uffd) in this
//! process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use super::flow::Backend;
use super::stage::{remove, write_kernel};
use super::store::Values;
use super::subject::Subject;
use crate::bench::guest::{Guest, TIMEOUT, guest_us, snapshot};
use crate::bench::page_fault_handler::Handler;
use crate::sys::api_client::Client;
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// Interval of the attempts at a socket that does not exist yet.
const POLL: Duration = Duration::from_micros(200);
/// Time for the VMM to serve its socket, and to answer a request that configures it.
const START: Duration = Duration::from_secs(30);

/// Returns whether a program listens at a socket, even if it does not accept. Never waits.
fn is_served(socket: &Path) -> Result<bool, BoxError> {
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(socket)?) {
        Ok(()) => Ok(true),
        Err(error) => Ok(error.kind() == std::io::ErrorKind::WouldBlock),
    }
}

/// The VMM, and its snapshot of a workload.
pub struct Foreign {
    vmm: PathBuf,
    state: PathBuf,
    memory: PathBuf,
    socket: PathBuf,
    /// The socket of its page-fault handler.
    faults: PathBuf,
}

impl Foreign {
    /// Finds the VMM's snapshot beside tvmm's, or makes it.
    pub fn new(vmm: &Path, subject: &Subject) -> Result<Foreign, BoxError> {
        let dir = subject.snapshot.with_file_name("firecracker");
        std::fs::create_dir_all(&dir).map_err(|error| format!("Cannot make {}: {error}", dir.display()))?;
        let state = dir.join("state");
        let memory = dir.join("memory");
        let foreign =
            Foreign { vmm: vmm.to_owned(), socket: dir.join("api.sock"), faults: dir.join("uffd.sock"), state, memory };
        let whole = dir.join("whole");
        if !whole.exists() {
            foreign.prepare(&dir, subject)?;
            std::fs::write(&whole, "")?;
        }
        Ok(foreign)
    }

    fn start(&self) -> Result<(Guest, Client), BoxError> {
        remove(&self.socket)?;
        let mut command = Command::new(&self.vmm);
        command.arg("--api-sock").arg(&self.socket);
        let mut guest = Guest::start(command)?;
        let vmm = self.vmm.display();
        let socket = self.socket.display();
        let mut wait = Wait::new(format!("{vmm} to serve {socket}"), START);
        while !is_served(&self.socket)? {
            if guest.has_ended()? {
                return refuse(format!("{vmm} has ended before it served {socket}"));
            }
            if wait.is_over() {
                return refuse(format!("{vmm} does not serve {socket} within {} s", START.as_secs()));
            }
            std::thread::sleep(POLL);
        }
        Ok((guest, Client::new(&self.socket)))
    }

    fn prepare(&self, dir: &Path, subject: &Subject) -> Result<(), BoxError> {
        let kernel = write_kernel(&std::env::current_exe()?, dir)?;
        let (mut guest, client) = self.start()?;
        let put = |path: &str, body: Value| client.request("PUT", path, Some(&body), START);
        put("/boot-source", json!({ "kernel_image_path": kernel, "boot_args": "" }))?;
        put("/machine-config", subject.workload.machine())?;
        put("/actions", json!({ "action_type": "InstanceStart" }))?;
        guest.wait_for("ready ")?;
        for request in subject.workload.prepare(subject.inputs) {
            guest.call(&request)?;
        }
        for path in [&self.state, &self.memory] {
            remove(path)?;
        }
        snapshot(&client, &json!({ "snapshot_path": self.state, "mem_file_path": self.memory }))?;
        // A written file lies in the page cache in small folios; one that was read back does not.
        self.evict()
    }

    fn evict(&self) -> Result<(), BoxError> {
        for path in [&self.state, &self.memory] {
            let file = std::fs::File::open(path).map_err(|error| format!("Cannot open {}: {error}", path.display()))?;
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
        }
        Ok(())
    }

    /// Restores and asks for a function. Returns the numbers, and the digest of the answer.
    pub fn restore(&self, asked: &str, backend: Backend, cached: bool) -> Result<(Values, String), BoxError> {
        if cached {
            drop(std::fs::read(&self.memory)?);
        } else {
            self.evict()?;
        }
        let Backend::Uffd(answer) = backend else { return self.measure(asked, "File", &self.memory) };
        remove(&self.faults)?;
        let handler = Handler::start(&self.faults, &self.memory, answer)?;
        let measured = self.measure(asked, "Uffd", &self.faults);
        // A failure of the handler is the reason why the VMM did not go on.
        let served = handler.finish()?;
        let (mut values, digest) = measured?;
        values.insert("handler_faults".to_string(), served.faults as f64);
        values.insert("handler_pages".to_string(), served.pages as f64);
        Ok((values, digest))
    }

    fn measure(&self, asked: &str, backend: &str, path: &Path) -> Result<(Values, String), BoxError> {
        let start = Instant::now();
        let (mut guest, client) = self.start()?;
        let backend = json!({ "backend_type": backend, "backend_path": path });
        let body = json!({ "snapshot_path": self.state, "mem_backend": backend, "resume_vm": true });
        client.request("PUT", "/snapshot/load", Some(&body), TIMEOUT)?;
        let loaded = start.elapsed();
        let answered = guest.call(asked)?;
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let mut values =
            Values::from([("answer_ms".to_string(), ms(answered.at - start)), ("load_ms".to_string(), ms(loaded))]);
        if let Some(us) = guest_us(&format!("ok id {}", answered.rest)) {
            values.insert("guest_ms".to_string(), us / 1000.0);
        }
        Ok((values, answered.digest().to_string()))
    }
}
