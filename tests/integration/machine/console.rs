//! The serial line's other end: input in floods and fragments, readers that are gone, terminals, signals.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use crate::support::{TIMEOUT, Vm, config, finish, http, rounds, run_ok, scratch, signal, text, tvmm};

/// Ends a process that should end at once.
const PROMPT: Duration = Duration::from_secs(20);

/// A booted tvmm whose standard input and output are the test's business.
struct Bare {
    child: Child,
    dir: TempDir,
}

impl Bare {
    fn boot(stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Bare {
        let dir = scratch();
        let path = dir.path().join("vm.json");
        let mut config = config(1, 64);
        config["metrics"] = json!({ "metrics_path": dir.path().join("metrics") });
        std::fs::write(&path, config.to_string()).unwrap();
        let mut command = tvmm();
        command.arg("--config").arg(&path).arg("--api-sock").arg(dir.path().join("s"));
        let child = command.stdin(stdin).stdout(stdout).stderr(Stdio::null()).spawn().unwrap();
        let bare = Bare { child, dir };
        let deadline = Instant::now() + TIMEOUT;
        while !bare.socket().exists() {
            assert!(Instant::now() < deadline, "tvmm does not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        bare
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn api(&self, method: &str, path: &str, body: &str) -> serde_json::Value {
        let (status, answer) = http(&self.socket(), method, path, body);
        assert!(status < 300, "{method} {path}: {status} {answer}");
        answer
    }

    fn state(&self) -> String {
        self.api("GET", "/", "")["state"].as_str().unwrap().to_string()
    }

    /// The digest of all filled pages, as a snapshot of this machine remembers it.
    fn digest_by_snapshot(&self) -> String {
        let out = self.dir.path().join("snapshot");
        run_ok(&["snapshot", "--api-sock", text(&self.socket()), "--out", text(&out), "--resume"]);
        let mut restored = Vm::restore(&out, "eager");
        // Half a line may have been on its way.
        restored.send(b"\n");
        restored.call("check").digest
    }

    /// Bytes of output that the VMM dropped because its reader does not read.
    fn dropped(&self) -> u64 {
        let path = self.dir.path().join("metrics");
        self.api("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#);
        let lines = std::fs::read_to_string(path).unwrap();
        let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        last["uart"]["dropped_count"].as_u64().unwrap()
    }

    /// Has the guest write until all that can hold output is full.
    fn flood(&self, stdin: &mut impl Write) {
        stdin.write_all("run a info\n".repeat(2000).as_bytes()).unwrap();
        let deadline = Instant::now() + TIMEOUT;
        while self.dropped() == 0 {
            assert!(Instant::now() < deadline, "nothing is dropped: who reads it all?");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the process has ended by itself, which must be soon.
    fn ends(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PROMPT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "tvmm does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn terminate(mut self) {
        signal(self.child.id(), Signal::TERM);
        assert!(self.ends().success());
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn bytes_appear_while_the_guest_computes() {
    for vcpus in [1, 2] {
        let vm = Vm::boot(&config(vcpus, 64));
        let dir = scratch();
        let full = dir.path().join("full");
        vm.snapshot(&full, &[]);
        drop(vm);
        // Output, byte by byte: no line ends while the guest computes.
        let mut command = tvmm();
        command.args(["restore", "--snapshot", text(&full), "--run", "murmur times=3 ms=4000"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 64];
        let mut first = None;
        loop {
            let count = stdout.read(&mut buffer).unwrap();
            if count == 0 {
                break;
            }
            seen.extend_from_slice(&buffer[..count]);
            if first.is_none() && seen.contains(&b'~') {
                first = Some(Instant::now());
                assert!(!seen.ends_with(b"\n"), "the first byte comes alone: {}", String::from_utf8_lossy(&seen));
            }
        }
        let computed = first.expect("the guest murmurs").elapsed();
        assert!(child.wait().unwrap().success());
        let said = String::from_utf8(seen).unwrap();
        assert!(said.contains("~~~\nok run-"), "order is kept: {said}");
        // The guest computes 12 s after its first byte.
        assert!(computed > Duration::from_secs(4), "{vcpus} vCPUs: the byte came {computed:?} before the answer");
    }
}

/// The digest of a guest that filled 100 pages.
fn digest_of_fill() -> String {
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=100 seed=4");
    vm.call("check").digest
}

#[test]
fn garbage_on_the_serial_line_is_answered_with_errors_and_never_hangs() {
    let mut vm = Vm::boot(&config(1, 64));
    let mut state = 1_u32;
    let garbage: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(30_000)
    .collect();
    vm.send(&garbage);
    vm.send(&[b'x'; 5000]);
    vm.send(b"\nrun\nrun a\nrun a nope\nrun a fill pages=99999999999999999999\n\x01x\x00\n");
    vm.call("hello");
    assert!(vm.call_raw("nope").starts_with("err "));
    assert!(vm.call_raw("fill pages=100000000").starts_with("err "));
    vm.call("hello");
}

#[test]
fn input_of_100_kb_at_once_is_all_delivered_in_order() {
    let mut vm = Vm::boot(&config(1, 64));
    let count = rounds(100_000) / "run n00000 hello\n".len();
    let input: String = (0..count).map(|i| format!("run n{i:05} hello\n")).collect();
    vm.send(input.as_bytes());
    for i in 0..count {
        let line = vm.wait_line(|line| line.contains(" n"));
        assert!(line.starts_with(&format!("ok n{i:05} ")), "{line}");
    }
}

#[test]
fn input_larger_than_one_read_is_delivered_while_the_pipe_stays_open() {
    let mut vm = Vm::boot(&config(1, 64));
    for size in [4096, 4097, 6000, 8191, 8192] {
        let padding = "\n".repeat(size - "run last hello\n".len());
        vm.send(format!("{padding}run last hello\n").as_bytes());
        vm.finish("last");
    }
}

#[test]
fn input_that_comes_while_the_machine_is_paused_is_delivered_later() {
    let mut vm = Vm::boot(&config(1, 64));
    vm.pause();
    let ids: Vec<String> = (0..200).map(|_| vm.begin("hello")).collect();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(vm.state(), "Paused");
    vm.resume();
    ids.iter().for_each(|id| assert!(vm.finish(id).starts_with("ok ")));
}

#[test]
fn guest_that_resets_ends_tvmm_with_code_0() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, json!({ "boot-source": { "boot_args": "pt=banana" } }).to_string()).unwrap();
    let output = run_ok(&["--config", text(&path)]);
    assert!(output.starts_with("panic boot parameter pt=banana"), "{output}");
}

#[test]
fn guest_that_resets_before_it_answered_is_an_error_of_run() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, json!({ "boot-source": { "boot_args": "pt=banana" } }).to_string()).unwrap();
    let said = crate::support::run_err(&["--config", text(&path), "--run", "hello"]);
    assert!(said.contains("The guest ended before it answered: Reset"), "{said}");
}

#[test]
fn reader_of_stdout_that_went_away_does_not_disturb_the_guest() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut bare = Bare::boot(Stdio::piped(), writer);
    bare.child.stdin.as_mut().unwrap().write_all(b"run a fill pages=100 seed=4\nrun b hello\n").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(bare.state(), "Running");
    assert_eq!(bare.digest_by_snapshot(), digest_of_fill());
    bare.terminate();
}

#[test]
fn stdout_that_nobody_reads_does_not_block_anything() {
    let (_reader, writer) = std::io::pipe().unwrap();
    let mut bare = Bare::boot(Stdio::piped(), writer);
    let mut stdin = bare.child.stdin.take().unwrap();
    stdin.write_all(b"run z fill pages=100 seed=4\n").unwrap();
    bare.flood(&mut stdin);
    assert_eq!(bare.state(), "Running");
    assert_eq!(bare.digest_by_snapshot(), digest_of_fill());
    bare.terminate();
}

#[test]
fn stdin_stdout_and_stderr_that_are_closed_from_the_start_do_no_harm() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config(1, 64).to_string()).unwrap();
    let report = dir.path().join("report");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"]).arg(tvmm().get_program());
    command.arg("--config").arg(&path).args(["--run", "hello", "--report"]).arg(&report);
    assert_eq!(finish(&mut command).status.code(), Some(0));
    assert!(std::fs::read_to_string(&report).unwrap().contains(" a0ac0ed9675fab36"));
}

#[test]
fn signals_end_tvmm_promptly_with_code_0() {
    for number in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut vm = Vm::boot(&config(2, 64));
        vm.begin("spin ms=60000 cpus=all");
        let start = Instant::now();
        signal(vm.pid(), number);
        let (status, stderr) = vm.wait();
        assert!(status.success() && stderr.is_empty(), "{number:?}: {status} {stderr}");
        assert!(start.elapsed() < PROMPT, "{number:?} took {:?}", start.elapsed());
    }
    let vm = Vm::wait_for_api();
    assert!(vm.terminate().0.success(), "before there is a machine");
    let vm = Vm::boot(&config(1, 64));
    vm.pause();
    assert!(vm.terminate().0.success(), "while it is paused");
}

#[test]
fn stdin_from_dev_null_leaves_the_guest_running() {
    let bare = Bare::boot(File::open("/dev/null").unwrap(), Stdio::null());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(bare.state(), "Running");
    bare.terminate();
}

#[test]
fn stdin_from_a_regular_file_is_delivered_whole() {
    let dir = scratch();
    let path = dir.path().join("input");
    let count = 2000;
    let input: String = (0..count).map(|i| format!("run n{i} hello\n")).collect();
    std::fs::write(&path, input).unwrap();
    let mut bare = Bare::boot(File::open(&path).unwrap(), Stdio::piped());
    let mut output = std::io::BufReader::new(bare.child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with(&format!("ok n{} ", count - 1)) {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut output, &mut line).unwrap(), 0, "tvmm ended");
    }
    assert_eq!(bare.state(), "Running", "the end of its input is not the end of the guest");
    bare.terminate();
}

/// A terminal: its own end, and the end that programs see.
struct Pty {
    master: File,
    slave: OwnedFd,
}

impl Pty {
    fn new() -> Pty {
        let mut master = -1;
        let mut slave = -1;
        let null = std::ptr::null_mut();
        // SAFETY: both integers are valid to write to; name, mode and size are not asked for.
        let result = unsafe { libc::openpty(&mut master, &mut slave, null, null.cast(), null.cast()) };
        assert_eq!(result, 0, "openpty: {}", std::io::Error::last_os_error());
        for fd in [master, slave] {
            // SAFETY: both were just opened by openpty, which cannot set close-on-exec itself.
            unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        // SAFETY: openpty gave us both descriptors, and nothing else owns them.
        unsafe { Pty { master: File::from_raw_fd(master), slave: OwnedFd::from_raw_fd(slave) } }
    }

    fn end(&self) -> OwnedFd {
        self.slave.try_clone().unwrap()
    }

    /// Input, output, control and local modes.
    fn mode(&self) -> [u32; 4] {
        // SAFETY: termios is plain data, and tcgetattr overwrites it.
        let mut mode: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `mode` is valid to write to, and the descriptor is open.
        assert_eq!(unsafe { libc::tcgetattr(self.slave.as_raw_fd(), &mut mode) }, 0);
        [mode.c_iflag, mode.c_oflag, mode.c_cflag, mode.c_lflag]
    }

    fn read_until(&mut self, wanted: &str) {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(wanted) {
            let mut buffer = [0; 4096];
            let count = self.master.read(&mut buffer).unwrap();
            seen.extend_from_slice(&buffer[..count]);
        }
    }
}

#[test]
fn ctrl_a_x_on_a_terminal_ends_with_code_0_and_restores_its_mode() {
    for quit in [&b"\x01x"[..], b"\x01X", b"run a hello\n\x01x"] {
        let mut pty = Pty::new();
        let before = pty.mode();
        let mut bare = Bare::boot(pty.end(), pty.end());
        pty.read_until("ready ");
        assert_ne!(pty.mode(), before, "raw while the machine runs");
        pty.master.write_all(b"run q hello\n").unwrap();
        pty.read_until("ok q ");
        pty.master.write_all(quit).unwrap();
        assert!(bare.ends().success());
        assert_eq!(pty.mode(), before);
    }
}

#[test]
fn terminal_mode_is_restored_after_sigterm_too() {
    let mut pty = Pty::new();
    let before = pty.mode();
    let bare = Bare::boot(pty.end(), pty.end());
    pty.read_until("ready ");
    bare.terminate();
    assert_eq!(pty.mode(), before);
}

#[test]
fn ctrl_a_x_ends_a_machine_whose_guest_takes_no_input() {
    let mut pty = Pty::new();
    let mut bare = Bare::boot(pty.end(), pty.end());
    pty.read_until("ready ");
    bare.api("PATCH", "/vm", r#"{"state": "Paused"}"#);
    // More than the UART's FIFO holds.
    for _ in 0..10 {
        pty.master.write_all(&[b'x'; 50]).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    pty.master.write_all(b"\x01x").unwrap();
    assert!(bare.ends().success());
}

#[test]
fn terminal_that_goes_away_leaves_the_guest_running() {
    let mut pty = Pty::new();
    let bare = Bare::boot(pty.end(), pty.end());
    pty.read_until("ready ");
    drop(pty);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(bare.state(), "Running");
    bare.terminate();
}

/// A terminal takes a few bytes whenever its reader took a few: a write of more would wait for the reader.
#[test]
fn terminal_that_is_read_in_drops_does_not_block_the_machine() {
    let mut pty = Pty::new();
    let mut bare = Bare::boot(Stdio::piped(), pty.end());
    pty.read_until("ready ");
    let mut stdin = bare.child.stdin.take().unwrap();
    bare.flood(&mut stdin);
    for size in [100, 700, 3000, 4500].repeat(5) {
        pty.master.read_exact(&mut vec![0; size]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(bare.state(), "Running");
    }
    bare.terminate();
}
