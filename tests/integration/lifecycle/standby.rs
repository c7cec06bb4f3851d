//! Standby: a VM that is restored but for the guest's first instruction, and runs when a request comes.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::answering_on_vsock;
use crate::devices::vsock::{ask, connect};
use crate::support::pool::filled;
use crate::support::{Vm, run, scratch, text};

/// A time in which a guest that runs would have used its vCPU.
const A_WHILE: Duration = Duration::from_millis(200);

/// The time that vCPU 0 has run, in clock ticks.
fn vcpu_ticks(vm: &Vm) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap();
    let vcpu = tasks
        .map(|task| task.unwrap().path())
        .find(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "vcpu0"));
    let stat = std::fs::read_to_string(vcpu.expect("a thread of vCPU 0").join("stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// The request that ended the VM's wait, from its report. The guest must have answered since.
fn woken(vm: &Vm) -> Value {
    let woken = vm.api_ok("GET", "/tvmm/report", None)["woken"].clone();
    let [asked, entered, exit] = ["asked_us", "entered_us", "first_exit_us"].map(|key| woken[key].as_f64().unwrap());
    assert!(asked > 0.0 && entered > 0.0 && entered <= exit, "{woken}");
    woken
}

#[test]
fn a_request_on_the_serial_line_starts_a_vm_that_stands_by() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 500, 1);
    for policy in ["firecracker", "eager", "firecracker-uffd"] {
        let mut vm = Vm::restore_with(&snapshot, policy, &["--standby"]);
        vm.wait_for_socket();
        vm.wait_for_state("Paused");
        std::thread::sleep(A_WHILE);
        assert_eq!(vm.state(), "Paused");
        assert!(vcpu_ticks(&vm) < 5, "the guest has not run");
        let report = vm.api_ok("GET", "/tvmm/report", None);
        assert_eq!((&report["woken"], &report["first_exit_us"]), (&Value::Null, &Value::Null), "{policy}");
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        assert_eq!(vm.state(), "Running");
        let first = woken(&vm);
        assert_eq!(first["by"], "console", "{policy}");
        // The wait belongs to no slice of the restore.
        let report = vm.api_ok("GET", "/tvmm/report", None);
        let slices = report["slices"].as_array().unwrap();
        let resume = slices.iter().find(|slice| slice["slice"] == "resume").unwrap();
        assert!(resume["start_us"].as_f64() >= first["asked_us"].as_f64(), "{report:#}");
        // From now on it is a VM like any other: a pause lasts until the API ends it.
        vm.pause();
        vm.begin("hello");
        std::thread::sleep(A_WHILE);
        assert_eq!(vm.state(), "Paused");
        vm.resume();
        vm.call("hello");
        assert_eq!(woken(&vm), first, "the guest has run, so it did not wait for its first request");
        // A rewound VM that is paused waits again.
        vm.pause();
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({})));
        assert_eq!(vm.api_ok("GET", "/tvmm/report", None)["woken"], Value::Null);
        vm.resume();
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        assert_eq!(woken(&vm)["by"], "api", "{policy}");
        // The guest of a VM that runs on after a rewind has not waited.
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({})));
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        assert_eq!(vm.api_ok("GET", "/tvmm/report", None)["woken"], Value::Null);
    }
}

#[test]
fn a_connection_or_the_api_starts_it_too_and_it_may_be_rewound_before() {
    let dir = scratch();
    let (snapshot, path) = answering_on_vsock(dir.path());
    let vm = Vm::restore_with(&snapshot, "firecracker", &["--standby"]);
    vm.wait_for_state("Paused");
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
    assert_eq!(vm.state(), "Paused", "it still stands by");
    assert!(ask(&connect(&path, 52), "run a hello").starts_with("ok a "));
    assert_eq!(vm.state(), "Running");
    assert_eq!(woken(&vm)["by"], "vsock");
    drop(vm);
    std::fs::remove_file(&path).unwrap();
    let vm = Vm::wait_for_api();
    vm.wait_for_socket();
    let load =
        |resume_vm: bool| json!({ "snapshot_path": snapshot, "resume_vm": resume_vm, "tvmm": { "standby": true } });
    let fault = vm.api_fault("PUT", "/snapshot/load", Some(load(true)));
    assert!(fault.contains("both resume_vm and tvmm.standby"), "{fault}");
    vm.api_ok("PUT", "/snapshot/load", Some(load(false)));
    assert_eq!(vm.state(), "Paused");
    // A pause by the API lasts until the API ends it, whatever comes.
    vm.pause();
    let mut program = UnixStream::connect(&path).unwrap();
    program.write_all(b"CONNECT 52\n").unwrap();
    std::thread::sleep(A_WHILE);
    assert_eq!(vm.state(), "Paused");
    // The guest serves one connection at a time.
    drop(program);
    vm.resume();
    assert!(ask(&connect(&path, 52), "run a hello").starts_with("ok a "));
    assert_eq!(woken(&vm)["by"], "api");
}

#[test]
fn a_vm_that_no_request_can_reach_does_not_stand_by() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 1);
    // Standard input is empty here.
    let output = run(&["restore", "--snapshot", text(&snapshot), "--standby"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("Cannot stand by: no request can come") && stderr.contains("--api-sock"), "{stderr}");
}

#[test]
fn standby_excludes_a_pause_and_a_scripted_request() {
    for other in [&["--paused", "--api-sock", "s"][..], &["--run", "hello"]] {
        let args = [&["restore", "--snapshot", "x", "--standby"][..], other].concat();
        let output = run(&args);
        assert_eq!(output.status.code(), Some(2));
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("cannot be used with"), "{stderr}");
    }
}
