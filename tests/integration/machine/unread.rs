//! Output without a reader: log, standard output and metrics of tvmm go to pipes that are full, closed or broken, while
//! a hostile guest makes it say more. The machine, its API and its end must not depend on a reader.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{TIMEOUT, Vm, config, http, rounds, run_ok, scratch, signal, text, tvmm};

/// Ends a process that should end at once.
const PROMPT: Duration = Duration::from_secs(60);

/// A pipe whose reader does not read and that takes no byte more.
fn full_pipe() -> (io::PipeReader, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    fill(Path::new(&format!("/proc/self/fd/{}", writer.as_raw_fd())));
    (reader, writer)
}

/// Writes to a pipe until it is full, without making it non-blocking for others.
fn fill(path: &Path) {
    let mut other = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    while other.write(&[b'.'; 4096]).is_ok() {}
}

/// A named pipe in `dir` that is open for a reader that does not read, and full.
fn full_fifo(dir: &Path) -> (PathBuf, File) {
    let path = dir.join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    fill(&path);
    (path, reader)
}

/// A VM with an entropy device, whose guest writes to standard output and whose VMM complains to `stderr`.
struct Hostile {
    child: Child,
    dir: TempDir,
}

impl Hostile {
    fn boot(more: Value, stderr: impl Into<Stdio>) -> Hostile {
        let dir = scratch();
        let mut config = config(1, 64);
        config["entropy"] = json!({});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        if config["metrics"].is_null() {
            config["metrics"] = json!({ "metrics_path": dir.path().join("metrics") });
        }
        let path = dir.path().join("vm.json");
        std::fs::write(&path, config.to_string()).unwrap();
        let mut command = tvmm();
        command.arg("--config").arg(&path).arg("--api-sock").arg(dir.path().join("s"));
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let mut vm = Hostile { child, dir };
        vm.read_until("ready ");
        vm
    }

    fn send(&mut self, line: &str) {
        self.child.stdin.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn read_until(&mut self, wanted: &str) -> String {
        let stdout = self.child.stdout.as_mut().unwrap();
        let mut seen = String::new();
        let mut byte = [0];
        while !(seen.contains(wanted) && seen.ends_with('\n')) {
            assert_eq!(stdout.read(&mut byte).unwrap(), 1, "tvmm ended; seen: {seen}");
            seen.push(char::from(byte[0]));
        }
        seen
    }

    fn api(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        http(&self.dir.path().join("s"), method, path, body)
    }

    fn flush_metrics(&self) -> (u16, Value) {
        self.api("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#)
    }

    /// The counts of the log in the metrics file.
    fn log_counts(&self) -> Value {
        assert_eq!(self.flush_metrics().0, 204);
        let lines = std::fs::read_to_string(self.dir.path().join("metrics")).unwrap();
        serde_json::from_str::<Value>(lines.lines().last().unwrap()).unwrap()["log"].clone()
    }

    /// Has the guest break its device many times, while the API must answer; the guest gets through.
    fn breaks_its_device(&mut self) -> u64 {
        let count = rounds(2000);
        self.send(&format!("run b rng_break rounds={count}"));
        for _ in 0..20 {
            assert_eq!(self.api("GET", "/", "").1["state"], "Running");
            std::thread::sleep(Duration::from_millis(10));
        }
        let answer = self.read_until("ok b ");
        assert!(answer.contains(&format!("broken={count}")), "{answer}");
        count as u64
    }

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

    fn terminate(&mut self) {
        signal(self.child.id(), Signal::TERM);
        let status = self.ends();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn guest_that_breaks_a_device_in_a_loop_cannot_freeze_its_vmm_by_a_standard_error_that_is_not_read() {
    let (mut reader, writer) = full_pipe();
    let mut vm = Hostile::boot(json!({}), writer);
    let count = vm.breaks_its_device();
    let log = vm.log_counts();
    let left_out = log["left_out_count"].as_u64().unwrap();
    assert!(left_out > 0 && left_out < count, "a few messages are logged, the others counted: {log}");
    vm.terminate();
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(!said.contains("A device stopped"), "there was no room");
}

#[test]
fn what_is_logged_before_the_end_reaches_a_reader_that_reads() {
    let (mut reader, writer) = full_pipe();
    let mut vm = Hostile::boot(json!({}), writer);
    let count = vm.breaks_its_device();
    signal(vm.child.id(), Signal::TERM);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    assert!(vm.ends().success());
    let lines: Vec<&str> = said.trim_start_matches('.').lines().collect();
    let left_out = |line: &&str| line.rsplit_once("left_out=").map_or(0, |(_, count)| count.parse::<u64>().unwrap());
    let all = lines.iter().filter(|line| line.contains("A device stopped")).count() as u64;
    let left_out: u64 = lines.iter().map(left_out).sum();
    assert_eq!(all + left_out, count, "each message is written or counted: {lines:#?}");
    assert!(lines.iter().all(|line| line.starts_with("tvmm: ")), "no line is torn: {lines:#?}");
    assert!(all < count / 4, "a guest does not fill the log: {all} lines");
}

#[test]
fn log_and_metrics_to_pipes_that_are_full_block_neither_guest_nor_api_nor_end() {
    let dir = scratch();
    let (path, _reader) = full_fifo(dir.path());
    let mut vm = Hostile::boot(json!({ "logger": { "log_path": path, "level": "Debug" } }), Stdio::null());
    vm.breaks_its_device();
    vm.terminate();
    let mut vm = Hostile::boot(json!({ "metrics": { "metrics_path": path } }), Stdio::null());
    for _ in 0..3 {
        let (status, answer) = vm.flush_metrics();
        assert_eq!(status, 500, "{answer}");
        let said = answer["fault_message"].as_str().unwrap();
        assert!(said.contains(text(&path)) && said.contains("its reader does not read"), "{said}");
        assert_eq!(vm.api("GET", "/", "").1["state"], "Running");
    }
    vm.terminate();
}

/// `tvmm ARGS` with these for standard output and error; exit code and, if it can be read, what it says.
fn code(args: &[&str], stdout: Stdio, stderr: Stdio) -> (Option<i32>, String) {
    let mut child = tvmm().args(args).stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
    let mut said = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut said).unwrap();
    }
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return (status.code(), said);
        }
        assert!(Instant::now() < deadline, "tvmm {args:?} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn closed_pipe() -> Stdio {
    io::pipe().unwrap().1.into()
}

fn full_device() -> Stdio {
    OpenOptions::new().write(true).open("/dev/full").unwrap().into()
}

#[test]
fn answer_that_cannot_be_written_is_said_so_and_not_taken_for_a_guest_that_did_not_answer() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config(1, 64).to_string()).unwrap();
    let report = dir.path().join("report");
    let args = ["--config", text(&path), "--run", "hello", "--run-timeout", "20", "--report", text(&report)];
    let (_reader, full) = full_pipe();
    let cases =
        [(closed_pipe(), "Broken pipe"), (full_device(), "No space left"), (full.into(), "its reader does not read")];
    for (stdout, why) in cases {
        let (code, said) = code(&args, stdout, Stdio::piped());
        assert_eq!(code, Some(1), "{why}: {said}");
        assert!(said.starts_with("tvmm: Cannot write the guest's output to standard output: "), "{why}: {said}");
        assert!(said.contains(why) && said.lines().count() == 1, "{why}: {said}");
        let report = std::fs::read_to_string(&report).unwrap();
        assert!(report.contains(" a0ac0ed9675fab36"), "the guest has answered: {report}");
    }
}

#[test]
fn result_that_cannot_be_printed_is_an_error_and_no_panic() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    Vm::boot(&config(1, 64)).snapshot(&snapshot, &[]);
    let profile = dir.path().join("profile");
    let record = ["profile", "record", "--snapshot", text(&snapshot), "--run", "hello", "--out", text(&profile)];
    let inspect = ["inspect", text(&snapshot)];
    let plan = ["plan", "--snapshot", text(&snapshot), "--policy", "eager"];
    run_ok(&record);
    for args in [&[&record[..], &["--json"]].concat()[..], &inspect, &plan, &["profile", "show", text(&profile)]] {
        let (code, said) = code(args, full_device(), Stdio::piped());
        assert_eq!(code, Some(1), "{args:?}: {said}");
        let last = said.lines().last().unwrap();
        assert!(last.starts_with("tvmm: Cannot write to standard output: No space left"), "{args:?}: {said}");
    }
}

#[test]
fn standard_error_that_takes_nothing_changes_no_exit_code() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    Vm::boot(&config(1, 64)).snapshot(&snapshot, &[]);
    let profile = dir.path().join("profile");
    let record = ["profile", "record", "--snapshot", text(&snapshot), "--run", "hello", "--out", text(&profile)];
    let refused = ["restore", "--snapshot", "/nowhere", "--run", "hello"];
    let (_reader, full) = full_pipe();
    for stderr in [closed_pipe(), full_device(), full.into()] {
        assert_eq!(code(&refused, Stdio::null(), stderr).0, Some(1));
    }
    for stderr in [closed_pipe(), full_device()] {
        assert_eq!(code(&record, Stdio::null(), stderr).0, Some(0));
    }
}
