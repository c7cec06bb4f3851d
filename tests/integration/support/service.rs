//! A `tvmm serve` under test.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{TIMEOUT, exchange, http, signal, text, tvmm};

/// The variable that all processes of a service inherit: its directory.
const SERVICE: &str = "TVMM_TEST_SERVICE";

pub struct Service {
    child: Child,
    socket: PathBuf,
    /// `http://…`, if it listens on TCP.
    pub url: Option<String>,
}

impl Service {
    /// Serves `dir` on a socket beside it, to clients that may name every file; returns when it listens.
    pub fn start(dir: &Path, more: &[&str]) -> Service {
        Service::confined(dir, &[&["--allow-path", "/", "--memory", "65536"], more].concat())
    }

    /// The same, with its messages in the file `log`, which is made anew.
    pub fn start_logging(dir: &Path, more: &[&str], log: &Path) -> Service {
        let log = std::fs::File::create(log).unwrap();
        Service::launch(dir, &[&["--allow-path", "/", "--memory", "65536"], more].concat(), log.into())
    }

    /// As [`start`](Self::start), to clients that may name what `more` lets them name.
    pub fn confined(dir: &Path, more: &[&str]) -> Service {
        Service::launch(dir, more, Stdio::inherit())
    }

    fn launch(dir: &Path, more: &[&str], stderr: Stdio) -> Service {
        let socket = dir.with_extension("sock");
        let mut command = tvmm();
        command.args(["serve", "--dir", text(dir), "--listen-unix", text(&socket)]).args(more).env(SERVICE, dir);
        Service::of(command, socket, more, stderr)
    }

    /// The service that `command` starts, which listens on `socket`.
    pub fn of(mut command: Command, socket: PathBuf, more: &[&str], stderr: Stdio) -> Service {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn().expect("tvmm starts");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut url = None;
        let wanted = 1 + usize::from(more.contains(&"--listen"));
        for _ in 0..wanted {
            let line = lines.next().expect("tvmm serve ended").unwrap();
            url = url.or(line.split_once("listening on http").map(|(_, rest)| format!("http{rest}")));
        }
        Service { child, socket, url }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        http(&self.socket, method, path, &body.map(|body| body.to_string()).unwrap_or_default())
    }

    /// Sends a request that must succeed; returns the answer.
    pub fn ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.ask(method, path, body);
        assert_eq!(status, 200, "{method} {path}: {answer}");
        answer
    }

    /// Sends a request that must be refused with this status; returns the reason.
    pub fn refused(&self, status: u16, method: &str, path: &str, body: Option<Value>) -> String {
        let (got, answer) = self.ask(method, path, body);
        assert_eq!(got, status, "{method} {path}: {answer}");
        answer["message"].as_str().expect("a message").to_string()
    }

    pub fn get(&self, path: &str) -> Value {
        self.ok("GET", path, None)
    }

    /// An invocation that must be answered well.
    pub fn invoke(&self, body: Value) -> Value {
        let answer = self.ok("POST", "/invocations", Some(body));
        assert_eq!(answer["ok"], true, "{answer}");
        answer
    }

    /// A function of the built-in guest that reads what was filled before.
    pub fn put_touch(&self) {
        let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1" });
        self.ok("POST", "/functions", Some(function));
    }

    /// A VM of `touch`, and a snapshot of it called `name`.
    pub fn snapshot_touch(&self, name: &str) -> String {
        self.put_touch();
        let vm = self.ok("POST", "/vms", Some(json!({ "func_name": "touch" })));
        let vm = vm["vmId"].as_str().unwrap().to_string();
        self.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": name })));
        vm
    }

    /// Processes this one has started and not yet waited for.
    pub fn children(&self) -> Vec<u32> {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        pids.filter(|pid| parent_of(*pid) == Some(self.pid())).collect()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends it by SIGTERM.
    pub fn terminate(mut self) -> ExitStatus {
        signal(self.pid(), Signal::TERM);
        self.wait()
    }

    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "tvmm serve does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The processes of services of `dir`: the services and all that they have started, orphans included.
pub fn processes_of(dir: &Path) -> Vec<u32> {
    let wanted = format!("{SERVICE}={}", text(dir));
    let has_it = |pid: &u32| {
        let variables = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        variables.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).filter(has_it).collect()
}

/// Waits until a process is gone.
pub fn wait_until_gone(pid: u32) {
    wait_until(&format!("process {pid} is gone"), || !Path::new(&format!("/proc/{pid}")).exists());
}

/// The value in the line of `/metrics` that begins so.
pub fn metric(service: &Service, line: &str) -> u64 {
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let metrics = exchange(service.socket(), request);
    let found = metrics.lines().find_map(|known| known.strip_prefix(line)?.trim().parse().ok());
    found.unwrap_or_else(|| panic!("{line} in {metrics}"))
}

/// Waits until something is so.
pub fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns whether a process listens at a socket.
pub fn is_served(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}
