//! Another VMM with Firecracker's command line and API, measured beside tvmm: the same guest kernel and requests, and a
//! snapshot of its own, restored from its memory file (`mem_backend` File) or by a page-fault handler (Uffd) in this
//! process.

use std::io::{self, Read};
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
use super::waiting::values_since;
use crate::bench::cache::Cache;
use crate::bench::child;
use crate::bench::guest::{Guest, TIMEOUT, snapshot};
use crate::bench::page_fault_handler::Handler;
use crate::sys::api_client::Client;
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// Interval of the attempts at a socket that does not exist yet.
pub const POLL: Duration = Duration::from_micros(200);

/// Waits between two attempts, for a VMM that starts alone.
fn sleep() {
    std::thread::sleep(POLL);
}

/// Time for the VMM to serve its socket, and to answer a request that configures it.
const START: Duration = Duration::from_secs(30);

/// Length of a read: as long as the largest that a device is asked for, so that the page cache gets large folios.
const PIECE: usize = 16 << 20;

/// Reads a file to its end.
fn read_through(path: &Path) -> io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let mut piece = vec![0; PIECE];
    while file.read(&mut piece)? > 0 {}
    Ok(())
}

/// Returns whether a program listens at a socket, even if it does not accept. Never waits.
fn is_served(socket: &Path) -> Result<bool, BoxError> {
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    match probe.connect(&SockAddr::unix(socket)?) {
        Ok(()) => Ok(true),
        Err(error) => Ok(error.kind() == std::io::ErrorKind::WouldBlock),
    }
}

/// The arguments by which a VMM logs errors only. Firecracker's log goes to the console of the guest, where its lines
/// cut those of the guest in two.
fn quiet_arguments(vmm: &Path) -> Result<&'static [&'static str], BoxError> {
    let help = child::output(Command::new(vmm).arg("--help"), START)?;
    let has_level = String::from_utf8_lossy(&help.stdout).contains("--level");
    Ok(if has_level { &["--level", "Error"] } else { &[] })
}

/// The VMM, and its snapshot of a workload.
pub struct Foreign {
    vmm: PathBuf,
    quiet: &'static [&'static str],
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
        let foreign = Foreign {
            vmm: vmm.to_owned(),
            quiet: quiet_arguments(vmm)?,
            socket: dir.join("api.sock"),
            faults: dir.join("uffd.sock"),
            state,
            memory,
        };
        let whole = dir.join("whole");
        if !whole.exists() {
            foreign.prepare(&dir, subject)?;
            std::fs::write(&whole, "")?;
        }
        Ok(foreign)
    }

    /// Starts the VMM and waits until it serves `socket`, which must not exist. Calls `pause` before each attempt.
    fn start(&self, socket: &Path, mut pause: impl FnMut()) -> Result<(Guest, Client), BoxError> {
        let mut command = Command::new(&self.vmm);
        command.arg("--api-sock").arg(socket).args(self.quiet);
        let mut guest = Guest::start(command)?;
        let vmm = self.vmm.display();
        let shown = socket.display();
        let mut wait = Wait::new(format!("{vmm} to serve {shown}"), START);
        while !is_served(socket)? {
            if guest.has_ended()? {
                return refuse(format!("{vmm} has ended before it served {shown}: {}", guest.last_error()));
            }
            if wait.is_over() {
                return refuse(format!("{vmm} does not serve {shown} within {} s", START.as_secs()));
            }
            pause();
        }
        Ok((guest, Client::new(socket)))
    }

    /// Restores the VM of a new VMM; it runs. The VMM serves `socket`, which must not exist.
    pub fn load(&self, socket: &Path, memory: &Value, pause: impl FnMut()) -> Result<Guest, BoxError> {
        let (guest, client) = self.start(socket, pause)?;
        let body = json!({ "snapshot_path": self.state, "mem_backend": memory, "resume_vm": true });
        client.request("PUT", "/snapshot/load", Some(&body), TIMEOUT)?;
        Ok(guest)
    }

    /// Memory by the File back end, in the form of the API.
    pub fn file(&self) -> Value {
        json!({ "backend_type": "File", "backend_path": self.memory })
    }

    /// Brings the snapshot into the page cache, or drops it from there.
    pub fn set_cached(&self, cache: Cache) -> Result<(), BoxError> {
        if cache == Cache::Evicted {
            return self.evict();
        }
        read_through(&self.memory).map_err(|error| format!("Cannot read {}: {error}", self.memory.display()).into())
    }

    fn prepare(&self, dir: &Path, subject: &Subject) -> Result<(), BoxError> {
        let kernel = write_kernel(&std::env::current_exe()?, dir)?;
        remove(&self.socket)?;
        let (mut guest, client) = self.start(&self.socket, sleep)?;
        let put = |path: &str, body: Value| client.request("PUT", path, Some(&body), START);
        put("/boot-source", json!({ "kernel_image_path": kernel, "boot_args": "" }))?;
        put("/machine-config", subject.workload.machine())?;
        put("/actions", json!({ "action_type": "InstanceStart" }))?;
        guest.wait_for("ready ")?;
        for request in subject.workload.prepare(subject.inputs, subject.runtime_mib) {
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
    pub fn restore(&self, asked: &str, backend: Backend, cache: Cache) -> Result<(Values, String), BoxError> {
        self.set_cached(cache)?;
        let Backend::Uffd(answer) = backend else { return self.measure(asked, &self.file()) };
        remove(&self.faults)?;
        let handler = Handler::start(&self.faults, &self.memory, answer)?;
        let measured = self.measure(asked, &json!({ "backend_type": "Uffd", "backend_path": self.faults }));
        // A failure of the handler is the reason why the VMM did not go on.
        let served = handler.finish()?;
        let (mut values, digest) = measured?;
        values.insert("handler_faults".to_string(), served.faults as f64);
        values.insert("handler_pages".to_string(), served.pages as f64);
        Ok((values, digest))
    }

    fn measure(&self, asked: &str, memory: &Value) -> Result<(Values, String), BoxError> {
        remove(&self.socket)?;
        let start = Instant::now();
        let mut guest = self.load(&self.socket, memory, sleep)?;
        let loaded = start.elapsed();
        let answered = guest.call(asked)?;
        let mut values = values_since(start, &answered);
        values.insert("load_ms".to_string(), loaded.as_secs_f64() * 1000.0);
        Ok((values, answered.digest().to_string()))
    }
}
