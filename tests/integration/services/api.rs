//! The HTTP API of a real machine: its whole life, what is refused when, and clients that misbehave.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{TIMEOUT, Vm, config, exchange, http, run, run_err, run_ok, scratch, signal, text};

const BEFORE_START: &str = "The requested operation is not supported before starting the microVM.";
const AFTER_START: &str = "The requested operation is not supported after starting the microVM.";

fn start() -> Option<Value> {
    Some(json!({ "action_type": "InstanceStart" }))
}

fn create(path: &Path) -> Option<Value> {
    Some(json!({ "snapshot_path": path }))
}

fn create_files(dir: &Path, name: &str, kind: &str) -> Option<Value> {
    Some(json!({
        "snapshot_path": dir.join(format!("{name}.state")),
        "mem_file_path": dir.join(format!("{name}.mem")),
        "snapshot_type": kind,
    }))
}

fn load_files(dir: &Path, name: &str, resume: bool) -> Option<Value> {
    Some(json!({
        "snapshot_path": dir.join(format!("{name}.state")),
        "mem_backend": { "backend_type": "File", "backend_path": dir.join(format!("{name}.mem")) },
        "track_dirty_pages": true,
        "resume_vm": resume,
    }))
}

#[test]
fn machine_configured_and_started_by_the_api_alone_runs() {
    let mut vm = Vm::wait_for_api();
    assert_eq!(vm.state(), "Not started");
    let shape = json!({ "vcpu_count": 2, "mem_size_mib": 64, "track_dirty_pages": true });
    vm.api_ok("PUT", "/machine-config", Some(shape));
    vm.api_ok("PATCH", "/machine-config", Some(json!({ "mem_size_mib": 96 })));
    vm.api_ok("PUT", "/boot-source", Some(json!({ "boot_args": "pt=4k" })));
    assert_eq!(vm.api_ok("GET", "/machine-config", None)["mem_size_mib"], 96);
    vm.api_ok("PUT", "/actions", start());
    assert_eq!(vm.wait_line(|line| line.starts_with("ready ")).trim_end(), "ready 0.1.0 mem=96 vcpus=2");
    assert_eq!(vm.call("info").value("pt"), "4k");
    assert_eq!(vm.state(), "Running");
    let config = vm.api_ok("GET", "/vm/config", None);
    assert_eq!(config["machine-config"]["vcpu_count"], 2);
    assert_eq!(config["boot-source"]["boot_args"], "pt=4k");
    assert_eq!(config["drives"], json!([]));
}

#[test]
fn state_is_told_through_the_whole_life() {
    let dir = scratch();
    let mut vm = Vm::wait_for_api();
    assert_eq!(vm.state(), "Not started");
    vm.api_ok("PUT", "/actions", start());
    vm.wait_line(|line| line.starts_with("ready "));
    assert_eq!(vm.state(), "Running");
    vm.pause();
    assert_eq!(vm.state(), "Paused");
    vm.pause();
    assert_eq!(vm.state(), "Paused", "pausing what is paused is no error");
    vm.api_ok("PUT", "/snapshot/create", create(&dir.path().join("s")));
    assert_eq!(vm.state(), "Paused");
    vm.resume();
    vm.resume();
    assert_eq!(vm.state(), "Running");
    vm.call("hello");

    let load = json!({ "snapshot_path": dir.path().join("s"), "resume_vm": false });
    let mut restored = Vm::wait_for_api();
    restored.api_ok("PUT", "/snapshot/load", Some(load));
    assert_eq!(restored.state(), "Paused");
    restored.resume();
    assert_eq!(restored.state(), "Running");
    restored.call("hello");
}

#[test]
fn verbs_that_need_a_machine_are_refused_before_start() {
    let dir = scratch();
    let vm = Vm::wait_for_api();
    for (method, path, body) in [
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PATCH", "/vm", json!({ "state": "Resumed" })),
        ("PUT", "/actions", json!({ "action_type": "FlushMetrics" })),
        ("PUT", "/actions", json!({ "action_type": "SendCtrlAltDel" })),
        ("PUT", "/snapshot/create", json!({ "snapshot_path": dir.path().join("s") })),
    ] {
        assert_eq!(vm.api_fault(method, path, Some(body)), BEFORE_START, "{method} {path}");
    }
    assert_eq!(vm.state(), "Not started");
    assert!(!dir.path().join("s").exists());
}

#[test]
fn refusals_have_a_code_for_programs() {
    let vm = Vm::wait_for_api();
    let (status, answer) = vm.api("PATCH", "/vm", Some(json!({ "state": "Paused" })));
    assert_eq!((status, &answer["code"]), (400, &json!("bad_request")), "{answer}");
    // A fault of HTTP has its status alone.
    let (status, answer) = vm.api("GET", "/nowhere", None);
    assert_eq!((status, &answer["code"]), (400, &json!(null)), "{answer}");
}

#[test]
fn verbs_that_shape_the_machine_are_refused_after_start() {
    let vm = Vm::boot(&config(1, 64));
    let load = json!({ "snapshot_path": "/nonexistent" });
    for (method, path, body) in [
        ("PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("PATCH", "/machine-config", json!({ "mem_size_mib": 128 })),
        ("PUT", "/boot-source", json!({ "boot_args": "x" })),
        ("PUT", "/logger", json!({ "level": "Off" })),
        ("PUT", "/metrics", json!({ "metrics_path": "/nonexistent/x" })),
        ("PUT", "/actions", json!({ "action_type": "InstanceStart" })),
        ("PUT", "/snapshot/load", load),
    ] {
        assert_eq!(vm.api_fault(method, path, Some(body)), AFTER_START, "{method} {path}");
    }
    assert_eq!(vm.state(), "Running");
    assert_eq!(vm.api_ok("GET", "/machine-config", None)["mem_size_mib"], 64);
}

#[test]
fn snapshot_of_a_running_machine_is_refused() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 64));
    let said = vm.api_fault("PUT", "/snapshot/create", create(&dir.path().join("s")));
    assert!(said.contains("pause it first"), "{said}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    vm.call("hello");
}

#[test]
fn snapshot_load_after_configuring_is_refused() {
    let vm = Vm::wait_for_api();
    vm.api_ok("PUT", "/machine-config", Some(json!({ "vcpu_count": 1, "mem_size_mib": 64 })));
    let said = vm.api_fault("PUT", "/snapshot/load", Some(json!({ "snapshot_path": "/nonexistent" })));
    assert_eq!(said, "Loading a microVM snapshot not allowed after configuring boot-specific resources.");
}

#[test]
fn failed_start_and_failed_load_leave_a_process_that_can_be_told_better() {
    let mut vm = Vm::wait_for_api();
    let said = vm.api_fault("PUT", "/snapshot/load", Some(json!({ "snapshot_path": "/nonexistent" })));
    assert_eq!(said, "Cannot open /nonexistent/manifest.json: No such file or directory (os error 2)");
    vm.api_ok("PUT", "/boot-source", Some(json!({ "kernel_image_path": "/nonexistent/vmlinux" })));
    let said = vm.api_fault("PUT", "/actions", start());
    assert!(said.contains("/nonexistent/vmlinux: No such file"), "{said}");
    assert_eq!(vm.state(), "Not started");
    vm.api_ok("PUT", "/boot-source", Some(json!({})));
    vm.api_ok("PUT", "/actions", start());
    vm.wait_line(|line| line.starts_with("ready "));
    vm.call("hello");
}

#[test]
fn second_snapshot_while_one_is_sealed_is_refused_and_the_first_is_good() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 160));
    vm.call("fill pages=30000 seed=5");
    let digest = vm.call("check").digest;
    vm.pause();
    let first = dir.path().join("first");
    let second = dir.path().join("second");
    std::thread::scope(|scope| {
        let socket = vm.socket();
        let body = create(&first).unwrap().to_string();
        let taking = scope.spawn(move || http(socket, "PUT", "/snapshot/create", &body));
        // The first is under way when its work directory is there.
        let deadline = Instant::now() + TIMEOUT;
        while std::fs::read_dir(dir.path()).unwrap().count() == 0 {
            assert!(Instant::now() < deadline);
        }
        let said = vm.api_fault("PUT", "/snapshot/create", create(&second));
        assert_eq!(said, "Another snapshot of this VM is still being sealed");
        assert_eq!(vm.state(), "Paused", "the machine answers while a snapshot is sealed");
        let (status, taken) = taking.join().unwrap();
        assert_eq!(status, 200, "{taken}");
    });
    assert!(!second.exists());
    vm.api_ok("PUT", "/snapshot/create", create(&second));
    for snapshot in [first, second] {
        assert_eq!(Vm::restore(&snapshot, "eager").call("check").digest, digest);
    }
}

#[test]
fn snapshot_over_an_existing_one_is_refused_and_leaves_it_alone() {
    let dir = scratch();
    let out = dir.path().join("s");
    let mut vm = Vm::boot(&config(1, 64));
    vm.snapshot(&out, &[]);
    let id = |path: &Path| std::fs::read_to_string(path.join("manifest.json")).unwrap();
    let before = id(&out);
    let said = run_err(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out), "--resume"]);
    assert!(said.contains("already exists"), "{said}");
    assert_eq!(id(&out), before);
    assert_eq!(vm.state(), "Running", "a machine that ran goes on running");
    vm.call("hello");
}

#[test]
fn diff_without_a_parent_or_without_tracking_is_refused_with_the_remedy() {
    let dir = scratch();
    let diff = || Some(json!({ "snapshot_path": dir.path().join("d"), "snapshot_type": "Diff" }));
    let vm = Vm::boot(&config(1, 64));
    vm.pause();
    assert!(vm.api_fault("PUT", "/snapshot/create", diff()).contains("take a full one first"));
    let untracked = Vm::boot(&json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 64 } }));
    untracked.pause();
    untracked.api_ok("PUT", "/snapshot/create", create(&dir.path().join("full")));
    assert!(untracked.api_fault("PUT", "/snapshot/create", diff()).contains("track_dirty_pages"));
    assert!(!dir.path().join("d").exists());
}

#[test]
fn unknown_fields_paths_and_methods_are_refused() {
    let vm = Vm::wait_for_api();
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 64, "colour": 1 })),
        ("/boot-source", json!({ "colour": 1 })),
        ("/snapshot/create", json!({ "snapshot_path": "/x", "colour": 1 })),
        ("/snapshot/load", json!({ "snapshot_path": "/x", "tvmm": { "colour": 1 } })),
        ("/actions", json!({ "action_type": "InstanceStart", "colour": 1 })),
        ("/logger", json!({ "colour": 1 })),
    ] {
        let said = vm.api_fault("PUT", path, Some(body));
        assert!(said.contains("unknown field `colour`"), "{path}: {said}");
    }
    for (method, path) in [("DELETE", "/"), ("PUT", "/"), ("GET", "/nope"), ("POST", "/actions")] {
        let said = vm.api_fault(method, path, Some(json!({})));
        assert!(said.contains("Invalid request method and/or path"), "{method} {path}: {said}");
    }
    assert!(vm.api_fault("PUT", "/drives/rootfs", Some(json!({}))).contains("missing field `drive_id`"));
    assert!(vm.api_fault("PUT", "/mmds/config", Some(json!({}))).contains("not supported yet"));
    assert!(vm.api_fault("PUT", "/snapshot/load", Some(json!({ "snapshot_path": "" }))).contains("is empty"));
    let said =
        vm.api_fault("PUT", "/snapshot/load", Some(json!({ "snapshot_path": "/x", "tvmm": { "policy": "no" } })));
    assert!(said.contains("no"), "{said}");
    assert_eq!(vm.state(), "Not started");
}

#[test]
fn malformed_http_and_huge_bodies_are_answered_and_the_machine_runs_on() {
    let mut vm = Vm::boot(&config(1, 64));
    for (bytes, status) in [
        (&b"\0\0\0\0\r\n\r\n"[..], "400"),
        (b"hello\r\n\r\n", "400"),
        (b"GET / HTTP/9.9\r\n\r\n", "400"),
        (b"PUT /vm HTTP/1.1\r\nContent-Length: many\r\n\r\n", "400"),
        (b"PUT /vm HTTP/1.1\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope", "400"),
        (b"PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n", "400"),
    ] {
        let answer = exchange(vm.socket(), bytes);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:?}: {answer:?}");
    }
    let body = format!("{{\"state\": \"{}\"}}", "x".repeat(8 << 20));
    assert_eq!(http(vm.socket(), "PATCH", "/vm", &body).0, 413);
    let endless = b"PATCH /vm HTTP/1.1\r\nContent-Length: 18446744073709551615\r\nConnection: close\r\n\r\n";
    assert!(exchange(vm.socket(), endless).starts_with("HTTP/1.1 4"));
    let head = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    assert!(exchange(vm.socket(), head.as_bytes()).starts_with("HTTP/1.1 431 "));
    vm.call("hello");
    assert_eq!(vm.state(), "Running");
}

#[test]
fn slow_clients_do_not_hold_up_others() {
    let vm = Vm::boot(&config(1, 64));
    let mut slow_head = UnixStream::connect(vm.socket()).unwrap();
    slow_head.write_all(b"GET / HTTP/1.1\r\nHo").unwrap();
    let mut slow_body = UnixStream::connect(vm.socket()).unwrap();
    slow_body.write_all(b"PATCH /vm HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n{").unwrap();
    let socket = vm.socket();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_eq!(http(socket, "GET", "/", "").1["state"], "Running");
                }
            });
        }
    });
    slow_head.write_all(b"st: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    slow_head.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("Running"), "{answer}");
}

#[test]
fn client_that_leaves_during_a_snapshot_does_not_stop_it() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 96));
    vm.call("fill pages=10000 seed=9");
    let digest = vm.call("check").digest;
    for (name, wait) in [("at-once", 0), ("later", 20)] {
        let out = dir.path().join(name);
        vm.pause();
        let body = create(&out).unwrap().to_string();
        let head = "PUT /snapshot/create HTTP/1.1\r\nHost: x\r\nContent-Length:";
        let mut client = UnixStream::connect(vm.socket()).unwrap();
        client.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        drop(client);
        // The VMM may ignore a request whose client left before it was read; a request that was begun is finished.
        let deadline = Instant::now() + if wait == 0 { Duration::from_secs(1) } else { TIMEOUT };
        while !out.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(out.exists() || wait == 0, "the snapshot was begun and is not there");
        if out.exists() {
            assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest);
        }
        assert_eq!(vm.state(), "Paused");
        vm.resume();
        // On a slow host the one that was begun may still be sealed.
        let next = dir.path().join(format!("{name}-next"));
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let again = run(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&next), "--resume"]);
            let said = String::from_utf8_lossy(&again.stderr).into_owned();
            if again.status.success() {
                break;
            }
            assert!(said.contains("still being sealed") && Instant::now() < deadline, "{said}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    assert_eq!(vm.call("check").digest, digest);
}

#[test]
fn api_socket_is_for_its_owner_and_is_removed_at_the_end() {
    let mut vm = Vm::wait_for_api();
    assert_eq!(std::fs::metadata(vm.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    signal(vm.pid(), Signal::TERM);
    let (status, stderr) = vm.wait();
    assert!(status.success() && stderr.is_empty(), "{stderr}");
    assert!(!vm.socket().exists());
}

#[test]
fn api_socket_is_removed_when_the_guest_ends_and_when_boot_fails() {
    let dir = scratch();
    let socket = dir.path().join("s");
    let path = dir.path().join("vm.json");
    std::fs::write(&path, json!({ "boot-source": { "boot_args": "pt=banana" } }).to_string()).unwrap();
    run_ok(&["--config", text(&path), "--api-sock", text(&socket)]);
    assert!(!socket.exists());
    std::fs::write(&path, json!({ "boot-source": { "kernel_image_path": "/nonexistent" } }).to_string()).unwrap();
    run_err(&["--config", text(&path), "--api-sock", text(&socket)]);
    assert!(!socket.exists());
}

#[test]
fn api_socket_path_in_use_is_refused_and_its_owner_is_left_alone() {
    let vm = Vm::wait_for_api();
    let said = run_err(&["--api-sock", text(vm.socket())]);
    assert!(said.contains(text(vm.socket())) && said.contains("exists already"), "{said}");
    assert_eq!(vm.state(), "Not started");
    let dir = scratch();
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    run_err(&["--api-sock", text(&file)]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    run_err(&["--api-sock", text(&dir.path().join("missing/s"))]);
    run_err(&["--api-sock", &"x".repeat(200)]);
}

#[test]
fn snapshot_command_without_a_vm_is_refused() {
    let dir = scratch();
    let socket = dir.path().join("s");
    let take = || run_err(&["snapshot", "--api-sock", text(&socket), "--out", "/nonexistent/x"]);
    assert!(take().contains("does not exist"));
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(take().contains("is not served: its VMM has ended"));
}

#[test]
fn ctrl_alt_del_is_refused_because_there_is_no_keyboard() {
    let mut vm = Vm::boot(&config(1, 64));
    let said = vm.api_fault("PUT", "/actions", Some(json!({ "action_type": "SendCtrlAltDel" })));
    assert!(said.contains("no keyboard"), "{said}");
    vm.call("hello");
}

#[test]
fn metrics_are_written_as_lines_of_json() {
    let dir = scratch();
    let path = dir.path().join("metrics");
    let vm = Vm::wait_for_api();
    vm.api_ok("PUT", "/metrics", Some(json!({ "metrics_path": path })));
    let said = vm.api_fault("PUT", "/metrics", Some(json!({ "metrics_path": path })));
    assert!(said.contains("Reinitialization"), "{said}");
    vm.api_ok("PUT", "/actions", start());
    let flush = || vm.api_ok("PUT", "/actions", Some(json!({ "action_type": "FlushMetrics" })));
    flush();
    flush();
    let lines = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert!(lines[0]["utc_timestamp_ms"].as_u64().unwrap() > 1_700_000_000_000);
    assert!(lines[1]["vcpu"]["exit_io_out"]["count"].is_u64() && lines[1]["uart"]["write_count"].is_u64());
    let bad = Vm::wait_for_api();
    assert!(
        bad.api_fault("PUT", "/metrics", Some(json!({ "metrics_path": "/nonexistent/m" }))).contains("/nonexistent/m")
    );
}

#[test]
fn log_goes_to_the_file_with_the_level_asked_for() {
    let dir = scratch();
    let path = dir.path().join("log");
    let vm = Vm::wait_for_api();
    let logger = json!({ "log_path": path, "level": "Debug", "show_level": true, "show_log_origin": true });
    vm.api_ok("PUT", "/logger", Some(logger));
    vm.api("GET", "/nope", None);
    vm.state();
    let (status, stderr) = vm.terminate();
    assert!(status.success());
    let log = std::fs::read_to_string(&path).unwrap();
    assert!(log.contains("debug: ") && log.contains(".rs:"), "{log}");
    let refused = log.lines().find(|line| line.starts_with("tvmm: warn: ")).expect("a warning");
    assert!(refused.contains(": API request was refused. ") && refused.contains("GET nope"), "{refused}");
    assert!(!stderr.contains("refused"), "the log is in the file, not here: {stderr}");
    let vm = Vm::wait_for_api();
    let said = vm.api_fault("PUT", "/logger", Some(json!({ "log_path": "/nonexistent/log" })));
    assert!(said.contains("/nonexistent/log: No such file"), "{said}");
}

#[test]
fn two_file_snapshots_load_in_a_new_process_running_or_paused() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(2, 96));
    vm.call("fill pages=3000 seed=11");
    vm.pause();
    let answer = vm.api_ok("PUT", "/snapshot/create", create_files(dir.path(), "full", "Full"));
    assert_eq!(answer, Value::Null, "Firecracker's clients expect no body");
    vm.resume();
    let full = vm.call("check").digest;
    vm.call("touch pages=500 write=100 seed=2");
    let changed = vm.call("check").digest;
    assert_ne!(full, changed);
    vm.pause();
    vm.api_ok("PUT", "/snapshot/create", create_files(dir.path(), "diff", "Diff"));
    drop(vm);
    for (name, digest) in [("full", full), ("diff", changed)] {
        for resume in [true, false] {
            let mut restored = Vm::wait_for_api();
            restored.api_ok("PUT", "/snapshot/load", load_files(dir.path(), name, resume));
            assert_eq!(restored.state(), if resume { "Running" } else { "Paused" });
            if !resume {
                restored.resume();
            }
            assert_eq!(restored.call("check").digest, digest, "{name}, resume_vm {resume}");
            let config = restored.api_ok("GET", "/vm/config", None);
            assert_eq!(config["machine-config"]["vcpu_count"], 2);
            assert_eq!(config["machine-config"]["mem_size_mib"], 96);
            assert_eq!(config["machine-config"]["track_dirty_pages"], true);
            let said = restored.api_fault("PUT", "/snapshot/load", load_files(dir.path(), name, resume));
            assert_eq!(said, AFTER_START);
        }
    }
    let state = dir.path().join("diff.state");
    let memory = dir.path().join("diff.mem");
    run_ok(&["inspect", text(&state), "--mem-file", text(&memory)]);
}

#[test]
fn two_file_snapshot_with_a_file_missing_or_swapped_is_refused() {
    let dir = scratch();
    let vm = Vm::boot(&config(1, 64));
    vm.pause();
    vm.api_ok("PUT", "/snapshot/create", create_files(dir.path(), "a", "Full"));
    let fresh = Vm::wait_for_api();
    for (state, memory) in [("a.state", "none"), ("none", "a.mem"), ("a.mem", "a.state"), ("a.state", "a.state")] {
        let body = json!({
            "snapshot_path": dir.path().join(state),
            "mem_file_path": dir.path().join(memory),
        });
        let said = fresh.api_fault("PUT", "/snapshot/load", Some(body));
        assert!(said.contains(text(dir.path())), "{state} {memory}: {said}");
    }
    let both = dir.path().join("both");
    let body = json!({ "snapshot_path": both, "mem_file_path": both });
    assert!(vm.api_fault("PUT", "/snapshot/create", Some(body)).contains("both the snapshot and the memory"));
}

#[test]
fn command_line_that_is_not_understood_ends_with_code_2() {
    for args in [&["--nope"][..], &["restore"], &["inspect"], &["restore", "--snapshot", "/x", "--paused"]] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}
