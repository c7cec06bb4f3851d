//! The vsock device: programs on the host and functions of the guest talk through it, across snapshots too.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Answer, TIMEOUT, Vm, answer_to_run, config, run, run_err, run_ok, scratch, text};

/// A VM with a vsock device at `v` in a directory of the test's.
struct Pair {
    vm: Vm,
    dir: TempDir,
}

/// A machine with a vsock device that programs reach at `path`.
pub fn with_vsock(path: &Path) -> Value {
    let mut config = config(1, 128);
    config["vsock"] = json!({ "guest_cid": 3, "uds_path": path });
    config
}

impl Pair {
    fn boot() -> Pair {
        let dir = scratch();
        let vm = Vm::boot(&with_vsock(&dir.path().join("v")));
        Pair { vm, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A program that takes one connection of the guest's to `port`.
    fn listen<T: Send + 'static>(
        &self,
        port: u32,
        work: impl FnOnce(UnixStream) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let listener = UnixListener::bind(self.path(&format!("v_{port}"))).unwrap();
        std::thread::spawn(move || work(listener.accept().unwrap().0))
    }

    /// A guest that answers requests on port 52.
    fn answering() -> Pair {
        let mut pair = Pair::boot();
        pair.vm.begin("vsock_serve port=52 lines=1");
        let stream = connect(&pair.path("v"), 52);
        assert!(ask(&stream, "run a hello").starts_with("ok a "));
        pair
    }
}

/// Sends everything back until the other end is done.
fn echo(stream: UnixStream) {
    std::io::copy(&mut &stream, &mut &stream).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Connects to a port of the guest; None: the guest refuses, or there is no machine yet.
fn try_connect(path: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(path).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // The VMM may refuse at once and close the connection: then the write fails.
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).ok()?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut byte) {
            Ok(1) => line.push(byte[0]),
            _ => return None,
        }
    }
    let line = String::from_utf8(line).unwrap();
    let port: u32 = line.strip_prefix("OK ").and_then(|rest| rest.trim_end().parse().ok()).expect("OK and a port");
    assert!(port >= 1 << 30);
    Some(stream)
}

/// Connects to a port where the guest will listen.
pub fn connect(path: &Path, port: u32) -> UnixStream {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(stream) = try_connect(path, port) {
            return stream;
        }
        assert!(Instant::now() < deadline, "the guest does not listen on port {port}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn ask(mut stream: &UnixStream, line: &str) -> String {
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| ((at.wrapping_mul(2_654_435_761) >> 13) ^ (seed * 7)) as u8).collect()
}

/// Sends from another thread and half-closes; what comes back.
fn through(mut stream: &UnixStream, sent: &[u8]) -> Vec<u8> {
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            stream.write_all(sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        stream.read_to_end(&mut back).unwrap();
    });
    back
}

#[test]
fn guest_reaches_a_program_and_gets_all_its_bytes_back() {
    let mut pair = Pair::boot();
    for (port, request) in [
        (5000, "bytes=0"),
        (5001, "bytes=1 irq=1"),
        (5002, "bytes=65537 seed=5"),
        (5003, "bytes=6000003 seed=9"),
        (5004, "bytes=600003 seed=9 irq=1 window=4"),
    ] {
        let program = pair.listen(port, echo);
        let answer = pair.vm.call(&format!("vsock_connect port={port} {request}"));
        assert_eq!(answer.value("sent"), answer.value("received"), "{request}");
        assert_eq!(answer.digest, answer.value("sent_digest"), "{request}");
        program.join().unwrap();
    }
    let line = pair.vm.call_raw("vsock_connect port=5999");
    assert!(line.starts_with("err ") && line.contains("connection refused"), "{line}");
}

#[test]
fn programs_reach_the_guest_several_at_a_time() {
    let mut pair = Pair::boot();
    let path = pair.path("v");
    let mut early = UnixStream::connect(&path).unwrap();
    early.write_all(b"CONNECT 52\n").unwrap();
    early.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(early.read(&mut [0; 8]).is_err(), "a guest without driver answers nothing");
    drop(early);
    let request = pair.vm.begin("vsock_serve port=52 closed=5");
    let streams: Vec<UnixStream> = (0..4).map(|_| connect(&path, 52)).collect();
    std::thread::scope(|scope| {
        for (index, stream) in streams.iter().enumerate() {
            scope.spawn(move || {
                let sent = bytes(1_000_000 + index, index);
                assert!(through(stream, &sent) == sent, "stream {index}");
            });
        }
    });
    drop(streams);
    let mut rude = connect(&path, 52);
    rude.write_all(&bytes(100_000, 1)).unwrap();
    drop(rude);
    let answer = Answer::parse(&pair.vm.finish(&request));
    assert_eq!((answer.number("accepted"), answer.number("closed")), (5, 5));
    assert!(answer.number("bytes") >= 4_000_006);
}

#[test]
fn as_many_connections_as_there_may_be_and_not_one_more() {
    const MOST: usize = 1023;
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(4096, |maximum| maximum.min(4096));
    setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }).unwrap();
    let mut pair = Pair::boot();
    let path = pair.path("v");
    let request = pair.vm.begin(&format!("vsock_serve port=52 window=4 closed={}", MOST + 1));
    let mut streams = vec![connect(&path, 52)];
    streams.extend((1..MOST).map(|index| try_connect(&path, 52).unwrap_or_else(|| panic!("connection {index}"))));
    assert!(try_connect(&path, 52).is_none(), "one more");
    for (index, stream) in streams.iter().enumerate() {
        let mut back = [0; 4];
        (&*stream).write_all(&(index as u32).to_le_bytes()).unwrap();
        (&*stream).read_exact(&mut back).unwrap();
        assert_eq!(u32::from_le_bytes(back), index as u32);
    }
    streams.pop();
    streams.push(connect(&path, 52));
    drop(streams);
    let answer = Answer::parse(&pair.vm.finish(&request));
    assert_eq!(answer.number("accepted"), MOST as u64 + 1);
}

#[test]
fn program_that_does_not_read_stops_the_guest_and_loses_nothing() {
    let mut pair = Pair::boot();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let program = pair.listen(5000, move |stream| {
        wait.recv().unwrap();
        echo(stream);
    });
    let request = pair.vm.begin("vsock_connect port=5000 bytes=3000000 irq=1");
    std::thread::sleep(Duration::from_millis(200));
    go.send(()).unwrap();
    let answer = Answer::parse(&pair.vm.finish(&request));
    assert_eq!((answer.number("received"), &answer.digest), (3_000_000, &answer.value("sent_digest").to_string()));
    program.join().unwrap();
}

#[test]
fn guest_that_is_busy_gets_what_was_sent_meanwhile() {
    let pair = Pair::answering();
    let stream = connect(&pair.path("v"), 52);
    let mut input = b"run a spin ms=300\n".to_vec();
    // More than the queue, the guest's window and the sockets hold together.
    input.extend(vec![b'\n'; 3_000_000]);
    input.extend(b"run b hello\n");
    std::thread::scope(|scope| {
        scope.spawn(|| (&stream).write_all(&input).unwrap());
        let mut lines = BufReader::new(&stream).lines().map(Result::unwrap);
        assert!(lines.next().unwrap().starts_with("ok a "));
        assert!(lines.next().unwrap().starts_with("ok b "));
    });
}

#[test]
fn snapshot_resets_the_clones_connections_and_leaves_its_listener_and_the_original_alone() {
    let mut pair = Pair::boot();
    let path = pair.path("v");
    let out = pair.path("snapshot");
    let request = pair.vm.begin("vsock_serve port=52 closed=2");
    let stream = connect(&path, 52);
    // Half of it is under way when the machine stops.
    let sent = bytes(2_000_000, 3);
    let (first, second) = sent.split_at(1_000_000);
    let back = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut back = Vec::new();
            (&stream).read_to_end(&mut back).unwrap();
            back
        });
        (&stream).write_all(first).unwrap();
        pair.vm.snapshot(&out, &[]);
        (&stream).write_all(second).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        reader.join().unwrap()
    });
    assert!(back == sent, "the original's connection is as it was");
    let said = run_err(&["restore", "--snapshot", text(&out), "--run", "hello"]);
    assert!(said.contains("the path is taken") && said.contains("--vsock"), "{said}");
    for (index, policy) in ["eager", "firecracker", "firecracker-uffd"].into_iter().enumerate() {
        let other = pair.path(&format!("w{index}"));
        let mut clone = Vm::restore_with(&out, policy, &["--vsock", text(&other)]);
        let sent = bytes(300_000, index);
        assert!(through(&connect(&other, 52), &sent) == sent, "{policy}");
        let answer = Answer::parse(&clone.finish(&request));
        let counts = ["accepted", "closed", "transport_resets"].map(|key| answer.number(key));
        assert_eq!(counts, [2, 2, 1], "{policy}");
        let config = clone.api_ok("GET", "/vm/config", None);
        assert_eq!(config["vsock"]["uds_path"], json!(other), "{policy}");
        clone.terminate();
        assert!(!other.exists(), "{policy}");
    }
}

#[test]
fn connection_of_the_guests_that_a_snapshot_cuts_is_reset() {
    let mut pair = Pair::boot();
    let out = pair.path("snapshot");
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (connected, is_connected) = std::sync::mpsc::channel::<()>();
    let program = pair.listen(5000, move |stream| {
        connected.send(()).unwrap();
        wait.recv().unwrap();
        echo(stream);
    });
    let request = pair.vm.begin("vsock_connect port=5000 bytes=3000000 irq=1");
    is_connected.recv_timeout(crate::support::TIMEOUT).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    pair.vm.snapshot(&out, &[]);
    let mut clone = Vm::restore_with(&out, "firecracker", &["--vsock", text(&pair.path("w"))]);
    let line = clone.finish(&request);
    assert!(line.starts_with("err ") && line.contains("transport reset"), "{line}");
    let listener = UnixListener::bind(pair.path("w_6000")).unwrap();
    let again = std::thread::spawn(move || echo(listener.accept().unwrap().0));
    let answer = clone.call("vsock_connect port=6000 bytes=100000");
    assert_eq!(answer.digest, answer.value("sent_digest"), "the clone makes new ones");
    again.join().unwrap();
    go.send(()).unwrap();
    let answer = Answer::parse(&pair.vm.finish(&request));
    assert_eq!(answer.digest, answer.value("sent_digest"), "the original's goes on");
    program.join().unwrap();
}

#[test]
fn request_over_vsock_is_answered_as_one_over_the_serial_line() {
    let pair = Pair::answering();
    let out = pair.path("snapshot");
    let other = pair.path("w");
    pair.vm.snapshot(&out, &[]);
    let restore = |more: &[&str]| {
        let mut args = vec!["restore", "--snapshot", text(&out), "--vsock", text(&other)];
        args.extend(more);
        run(&args)
    };
    for _ in 0..3 {
        let output = restore(&["--run", "hello", "--run-port", "52"]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(answer_to_run(&said).digest, "a0ac0ed9675fab36");
    }
    let output = restore(&["--run", "nonesuch", "--run-port", "52"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.code() == Some(1) && said.starts_with("err run-") && said.contains(" unknown function"),
        "{output:?}"
    );
    let output = restore(&["--run", "hello", "--run-port", "53", "--run-timeout", "1"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && said.contains("did not answer --run within 1 second"), "{output:?}");
    drop(pair.vm);
    // Its socket file is still there: it was killed.
    let refused = run_err(&["profile", "record", "--snapshot", text(&out), "--run", "hello", "--out", "/dev/null"]);
    assert!(refused.contains("the path is taken"), "{refused}");
    std::fs::remove_file(pair.dir.path().join("v")).unwrap();
    let profile = pair.dir.path().join("profile");
    let record = ["profile", "record", "--snapshot", text(&out), "--run", "hello", "--out", text(&profile)];
    run_ok(&[&record[..], &["--run-port", "52", "--repeat", "2"]].concat());
}

/// No timer has a part in it: the guest says by a kick that it has seen the reset, and that lets the request through.
#[test]
fn first_request_after_a_restore_waits_for_the_guest_and_for_nothing_else() {
    let pair = Pair::answering();
    let out = pair.path("snapshot");
    pair.vm.snapshot(&out, &[]);
    for round in 0..10 {
        let path = pair.path(&format!("w{round}"));
        let metrics = pair.path(&format!("metrics{round}"));
        let clone = Vm::wait_for_api();
        clone.api_ok("PUT", "/metrics", Some(json!({ "metrics_path": metrics })));
        let load = json!({ "snapshot_path": out, "vsock_override": { "uds_path": path }, "resume_vm": true });
        clone.api_ok("PUT", "/snapshot/load", Some(load));
        let stream = connect(&path, 52);
        assert!(ask(&stream, "run a hello").starts_with("ok a "));
        clone.api_ok("PUT", "/actions", Some(json!({ "action_type": "FlushMetrics" })));
        let lines = std::fs::read_to_string(&metrics).unwrap();
        let line: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        let counts = ["resets_seen", "resets_expired"].map(|name| line["devices"]["vsock"][name].clone());
        assert_eq!(counts, [1, 0], "round {round}: {line}");
    }
}

#[test]
fn request_over_vsock_needs_a_vsock_device() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config(1, 64).to_string()).unwrap();
    let said = run_err(&["--config", text(&path), "--run", "hello", "--run-port", "52"]);
    assert!(said.contains("has no vsock device"), "{said}");
}

#[test]
fn socket_path_that_cannot_be_had_is_refused_and_left_as_it_is() {
    let dir = scratch();
    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let long = dir.path().join("x".repeat(90));
    let missing = dir.path().join("no/such/dir/v");
    let path = dir.path().join("vm.json");
    for (uds_path, why) in [
        (&stale, "the path is taken"),
        (&file, "the path is taken"),
        (&long, "is too long"),
        (&missing, "No such file or directory"),
    ] {
        std::fs::write(&path, with_vsock(uds_path).to_string()).unwrap();
        let said = run_err(&["--config", text(&path), "--run", "hello"]);
        assert!(said.contains(why) && said.contains(text(uds_path)), "{said}");
    }
    assert!(stale.exists());
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    std::fs::write(&path, with_vsock(&dir.path().join("v")).to_string()).unwrap();
    run_ok(&["--config", text(&path), "--run", "hello"]);
    assert!(!dir.path().join("v").exists(), "it goes with its machine");
}

#[test]
fn api_makes_the_device_and_overrides_its_path() {
    let dir = scratch();
    let out = dir.path().join("snapshot");
    let path = dir.path().join("v");
    let vm = Vm::wait_for_api();
    assert!(vm.api_fault("PUT", "/vsock", Some(json!({ "guest_cid": 2, "uds_path": path }))).contains("guest_cid"));
    vm.api_ok("PUT", "/vsock", Some(json!({ "guest_cid": 5, "uds_path": path })));
    vm.api_ok("PUT", "/actions", Some(json!({ "action_type": "InstanceStart" })));
    assert!(path.exists());
    vm.snapshot(&out, &[]);
    let clone = Vm::wait_for_api();
    let load = |uds_path: &Path| json!({ "snapshot_path": text(&out), "vsock_override": { "uds_path": uds_path } });
    assert!(clone.api_fault("PUT", "/snapshot/load", Some(load(&path))).contains("the path is taken"));
    clone.api_ok("PUT", "/snapshot/load", Some(load(&dir.path().join("w"))));
    let config = clone.api_ok("GET", "/vm/config", None);
    assert_eq!(config["vsock"], json!({ "guest_cid": 5, "uds_path": dir.path().join("w") }));
}
