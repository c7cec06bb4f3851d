//! A VM under test: a tvmm process with its console and control socket at hand.

pub mod artefact;
pub mod cached;
pub mod cgroup;
pub mod cold;
pub mod collector;
pub mod network;
pub mod nobody;
pub mod pool;
pub mod service;
pub mod shell;
pub mod skip;
pub mod slow_file;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Generous: these are limits against hanging, not measurements, and the testbed emulates every instruction.
pub const TIMEOUT: Duration = Duration::from_secs(300);

/// The number of the next request, of all VMs together: a VM that was restored in the middle of a request answers that
/// one first, and must not be taken to answer another.
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// The name by which libtest knows the test `test` of `module` (`module_path!()`), for a test that starts another.
pub fn test_name(module: &str, test: &str) -> String {
    let (_crate_name, inside) = module.split_once("::").unwrap();
    format!("{inside}::{test}")
}

/// Returns true if this host is the testbed's, which emulates every instruction.
pub fn is_emulated() -> bool {
    std::env::var_os("TESTBED").is_some()
}

/// The number of times a test does what it usually does `full` times. The testbed asks for one in `TVMM_TEST_SHARE`.
pub fn rounds(full: usize) -> usize {
    let share = std::env::var("TVMM_TEST_SHARE").map_or(1, |text| text.parse().expect("TVMM_TEST_SHARE is a number"));
    (full / share).max(1)
}

/// The random moments that a test of VMs which give memory back tries: this share of 100, or of those that
/// `TVMM_MOMENTS` asks for (`make endure`).
pub fn moments(percent: usize) -> usize {
    let asked = std::env::var("TVMM_MOMENTS").map(|text| text.parse().expect("TVMM_MOMENTS is a number"));
    (asked.unwrap_or(rounds(100)) * percent).div_ceil(100)
}

/// The seed of these moments, which is printed: a new one, or `TVMM_MOMENTS_SEED`.
pub fn seed_of_moments() -> u64 {
    let asked = std::env::var("TVMM_MOMENTS_SEED").map(|text| text.parse().expect("TVMM_MOMENTS_SEED is a number"));
    // The generator does not take zero.
    let seed = asked.unwrap_or_else(|_| fastrand::u64(1..));
    println!("TVMM_MOMENTS_SEED={seed}");
    seed
}

/// The binary under test: the one cargo built, or `TVMM_BINARY` (the static release build, a VM of the testbed).
pub fn tvmm() -> Command {
    Command::new(std::env::var_os("TVMM_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_tvmm").into()))
}

/// Runs `tvmm` with `args` to its end.
pub fn run(args: &[&str]) -> Output {
    finish(tvmm().args(args))
}

/// Runs a command to its end, without input; a command that hangs is killed and fails the test.
pub fn finish(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let pid = child.id();
    let (sender, ended) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match ended.recv_timeout(TIMEOUT) {
        Ok(output) => output.expect("its output can be read"),
        Err(_) => {
            signal(pid, rustix::process::Signal::KILL);
            panic!("{command:?} hangs");
        }
    }
}

/// Sends a signal to a process this test started.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("the process can be signalled");
}

/// Stops a process, and waits until all its threads stand: on a busy host they may go on for a while after the signal.
pub fn stop(pid: u32) {
    signal(pid, rustix::process::Signal::STOP);
    service::wait_until("all threads stand", || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
        tasks.flatten().all(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        })
    });
}

/// Runs `tvmm`, which must succeed; its standard output.
pub fn run_ok(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "tvmm {args:?}: {:?}\n{stderr}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs `tvmm`, which must refuse what it is asked for; what it says.
pub fn run_err(args: &[&str]) -> String {
    refusal(&run(args))
}

/// Standard error without the lines that say what is waited for: on a busy host anything may take a second.
pub fn without_progress(stderr: &str) -> String {
    stderr.split_inclusive('\n').filter(|line| !line.starts_with("tvmm: warn: Waiting for ")).collect()
}

/// The one line in which tvmm says what it refuses: exit code 1, no panic, nothing else.
pub fn refusal(output: &Output) -> String {
    let stderr = without_progress(&String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "tvmm should refuse: {:?}\n{stderr}", output.status);
    assert!(stderr.starts_with("tvmm: ") && !stderr.contains("panicked"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A config with `vcpus` and `mib`, dirty tracking on.
pub fn config(vcpus: u32, mib: u64) -> Value {
    json!({ "machine-config": { "vcpu_count": vcpus, "mem_size_mib": mib, "track_dirty_pages": true } })
}

/// A directory for one test.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("tvmm-test-").tempdir().expect("a temporary directory")
}

/// xorshift64*: the same numbers in every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

/// A running tvmm process.
pub struct Vm {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Option<std::thread::JoinHandle<String>>,
    socket: PathBuf,
    _dir: TempDir,
}

impl Vm {
    /// Boots the built-in guest and waits until it is ready.
    pub fn boot(config: &Value) -> Vm {
        Vm::boot_with(config, &[])
    }

    /// The same with more arguments.
    pub fn boot_with(config: &Value, more: &[&str]) -> Vm {
        let dir = scratch();
        let path = dir.path().join("vm.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let mut vm = Vm::spawn(dir, &[&["--config", text(&path)], more].concat());
        vm.wait_line(|line| line.starts_with("ready "));
        vm
    }

    /// Restores a snapshot, and lets it run.
    pub fn restore(snapshot: &Path, policy: &str) -> Vm {
        Vm::restore_with(snapshot, policy, &["--track-dirty-pages"])
    }

    pub fn restore_with(snapshot: &Path, policy: &str, more: &[&str]) -> Vm {
        let mut args = vec!["restore", "--snapshot", text(snapshot), "--policy", policy];
        args.extend(more);
        Vm::spawn(scratch(), &args)
    }

    /// A process that waits for the API to tell it what to do.
    pub fn wait_for_api() -> Vm {
        let vm = Vm::spawn(scratch(), &[]);
        vm.wait_for_socket();
        vm
    }

    /// Starts `tvmm` with `args` and a control socket.
    pub fn spawn(dir: TempDir, args: &[&str]) -> Vm {
        Vm::spawn_of(tvmm(), dir, args)
    }

    /// The same with another copy of `tvmm`.
    pub fn spawn_of(mut command: Command, dir: TempDir, args: &[&str]) -> Vm {
        let socket = dir.path().join("api.sock");
        command.args(args).arg("--api-sock").arg(&socket);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("tvmm starts");
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut stderr = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    break;
                }
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        let stdin = child.stdin.take();
        Vm { child, stdin, lines, stderr: Some(stderr), socket, _dir: dir }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends bytes to the guest's serial line.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).expect("tvmm reads its standard input");
    }

    /// As [`send`](Self::send), to a VM that may have ended.
    pub fn send_if_alive(&mut self, bytes: &[u8]) {
        let _ = self.stdin.as_mut().unwrap().write_all(bytes);
    }

    /// Waits for a line of guest output for which `wanted` is true; panics with what came instead.
    pub fn wait_line(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + TIMEOUT;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if wanted(&line) => return line,
                Ok(line) => seen.push(line),
                Err(RecvTimeoutError::Timeout) => panic!("no such line in {TIMEOUT:?}; seen: {seen:#?}"),
                Err(RecvTimeoutError::Disconnected) => {
                    let stderr = self.stderr.take().map(|thread| thread.join().unwrap_or_default());
                    panic!("tvmm ended; seen: {seen:#?}; standard error: {stderr:?}");
                }
            }
        }
    }

    /// A line of guest output for which `wanted` is true, if one comes in time.
    pub fn try_line(&mut self, wanted: impl Fn(&str) -> bool, timeout: Duration) -> Option<String> {
        let deadline = Instant::now() + timeout;
        loop {
            let line = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()?;
            if wanted(&line) {
                return Some(line);
            }
        }
    }

    /// Runs a function of the guest; its answer, which must be `ok`.
    pub fn call(&mut self, function: &str) -> Answer {
        let line = self.call_raw(function);
        assert!(line.starts_with("ok "), "{function}: {line}");
        Answer::parse(&line)
    }

    /// Runs a function of the guest; the whole answer line.
    pub fn call_raw(&mut self, function: &str) -> String {
        let id = self.begin(function);
        self.finish(&id)
    }

    /// Sends a request without waiting for its answer; its id.
    pub fn begin(&mut self, function: &str) -> String {
        let id = format!("t{}", NEXT_ID.fetch_add(1, Ordering::Relaxed));
        self.send(format!("run {id} {function}\n").as_bytes());
        id
    }

    /// Waits for the answer to a request that was begun, here or before a snapshot.
    pub fn finish(&mut self, id: &str) -> String {
        self.wait_line(|line| line.split(' ').nth(1) == Some(id))
    }

    /// `tvmm snapshot`; the VM runs on.
    pub fn snapshot(&self, out: &Path, more: &[&str]) {
        let mut args = vec!["snapshot", "--api-sock", text(&self.socket), "--out", text(out), "--resume"];
        args.extend(more);
        run_ok(&args);
    }

    /// One HTTP request; status and body.
    pub fn api(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        http(&self.socket, method, path, &body.map(|body| body.to_string()).unwrap_or_default())
    }

    /// A request that must be answered well; its body.
    pub fn api_ok(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.api(method, path, body);
        assert!(status == 200 || status == 204, "{method} {path}: {status} {answer}");
        answer
    }

    /// A request that must be refused as the asker's fault; what tvmm says.
    pub fn api_fault(&self, method: &str, path: &str, body: Option<Value>) -> String {
        let (status, answer) = self.api(method, path, body);
        assert_eq!(status, 400, "{method} {path}: {answer}");
        answer["fault_message"].as_str().expect("a fault_message").to_string()
    }

    /// The machine's state by `GET /`.
    pub fn state(&self) -> String {
        self.api_ok("GET", "/", None)["state"].as_str().expect("a state").to_string()
    }

    pub fn pause(&self) {
        self.api_ok("PATCH", "/vm", Some(json!({ "state": "Paused" })));
    }

    pub fn resume(&self) {
        self.api_ok("PATCH", "/vm", Some(json!({ "state": "Resumed" })));
    }

    /// Waits until the control socket answers.
    pub fn wait_for_socket(&self) {
        let deadline = Instant::now() + TIMEOUT;
        while UnixStream::connect(&self.socket).is_err() {
            assert!(Instant::now() < deadline, "the socket {} does not answer", self.socket.display());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends tvmm by SIGTERM; what it wrote to standard error.
    pub fn terminate(mut self) -> (ExitStatus, String) {
        signal(self.child.id(), rustix::process::Signal::TERM);
        self.wait()
    }

    /// Waits for tvmm to end by itself.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let stderr = self.stderr.take().map(|thread| thread.join().unwrap_or_default());
                return (status, stderr.unwrap_or_default());
            }
            assert!(Instant::now() < deadline, "tvmm does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `ok <id> <digest> <µs> <key=value…>`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub digest: String,
    pub values: std::collections::BTreeMap<String, String>,
}

impl Answer {
    pub fn parse(line: &str) -> Answer {
        let words: Vec<&str> = line.trim_end().split(' ').collect();
        assert!(words.len() >= 4, "{line}");
        let pair = |word: &&str| word.split_once('=').map(|(key, value)| (key.to_string(), value.to_string()));
        Answer { digest: words[2].to_string(), values: words[4..].iter().filter_map(pair).collect() }
    }

    pub fn value(&self, key: &str) -> &str {
        self.values.get(key).unwrap_or_else(|| panic!("no {key}= in {self:?}"))
    }

    pub fn number(&self, key: &str) -> u64 {
        self.value(key).parse().unwrap_or_else(|_| panic!("{key} is no number in {self:?}"))
    }
}

/// The answer to `--run`, which is the last in a process's output.
pub fn answer_to_run(output: &str) -> Answer {
    let line = output.lines().rfind(|line| line.starts_with("ok run-"));
    Answer::parse(line.unwrap_or_else(|| panic!("no answer in {output}")))
}

/// One HTTP/1.1 exchange on a Unix socket, by hand, so that it can be malformed too.
pub fn http(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    let head = if body.is_empty() {
        format!("{head}\r\n")
    } else {
        format!("{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len())
    };
    let answer = exchange(socket, format!("{head}{body}").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

/// Sends `bytes` and reads until the server closes.
pub fn exchange(socket: &Path, bytes: &[u8]) -> String {
    exchange_over(UnixStream::connect(socket).expect("the control socket answers"), bytes)
}

/// The same over a connection that exists, whose server may be killed at any time.
pub fn exchange_over(mut stream: UnixStream, bytes: &[u8]) -> String {
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // A server that refuses early may close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}
