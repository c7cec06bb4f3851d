//! Firecracker's page-fault handler protocol (`mem_backend: Uffd`): a handler outside serves the guest's memory.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use userfaultfd::{Event, Uffd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::{TIMEOUT, Vm, config, exchange, finish, scratch, stop, test_name, text, tvmm};

const PAGE: u64 = 4096;

/// Not a test: the handler, as a process of its own. Serves the memory file page by page; after some faults it ends, or
/// lives on and does not answer.
#[test]
#[ignore = "the handler process that the tests below start"]
fn handler_process() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let memory = File::open(variable("HANDLER_MEMORY")).unwrap();
    let faults_max: u64 = variable("HANDLER_FAULTS").parse().unwrap();
    let listener = UnixListener::bind(variable("HANDLER_SOCKET")).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut message = vec![0; 4096];
    let (count, fd) = stream.recv_with_fd(&mut message).unwrap();
    let mappings: Value = serde_json::from_slice(&message[..count]).unwrap();
    // SAFETY: the descriptor came with the message, and nothing else owns it.
    let uffd = unsafe { Uffd::from_raw_fd(fd.expect("a userfaultfd comes with the message").into_raw_fd()) };
    let mut removed: Vec<std::ops::Range<u64>> = Vec::new();
    for _ in 0..faults_max {
        let event = loop {
            match uffd.read_event() {
                Ok(Some(event)) => break event,
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        };
        if let Event::Remove { start, end } = event {
            removed.push(start as u64..end as u64);
        }
        if let Event::Pagefault { addr, .. } = event {
            let address = addr as u64 / PAGE * PAGE;
            let number = |mapping: &Value, key: &str| mapping[key].as_u64().unwrap();
            let mapping = mappings
                .as_array()
                .unwrap()
                .iter()
                .find(|m| {
                    (number(m, "base_host_virt_addr")..).contains(&address)
                        && address < number(m, "base_host_virt_addr") + number(m, "size")
                })
                .unwrap();
            let mut page = [0; PAGE as usize];
            let offset = number(mapping, "offset") + address - number(mapping, "base_host_virt_addr");
            if !removed.iter().any(|range| range.contains(&address)) {
                memory.read_exact_at(&mut page, offset).unwrap();
            }
            // SAFETY: the kernel copies from `page` into the VMM's registered range.
            unsafe { uffd.copy(page.as_ptr().cast(), address as *mut _, PAGE as usize, true) }.unwrap();
        }
    }
    match variable("HANDLER_THEN").as_str() {
        "ends" => {
            drop(stream);
            std::process::exit(0)
        }
        "sleeps" => {}
        _ => while !matches!(uffd.read_event(), Ok(Some(_))) {},
    }
    loop {
        std::thread::park();
    }
}

/// A handler that answers `faults` faults and `then` ends, sleeps, or reads one more.
fn start_handler(socket: &Path, memory: &Path, faults: u64, then: &str) -> Child {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &test_name(module_path!(), "handler_process"), "--ignored"])
        .env("HANDLER_SOCKET", socket)
        .env("HANDLER_MEMORY", memory)
        .env("HANDLER_FAULTS", faults.to_string())
        .env("HANDLER_THEN", then)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "the handler does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

fn load(vm: &Vm, snapshot: &Path, socket: &Path) -> (u16, Value) {
    vm.wait_for_socket();
    let backend = json!({ "backend_type": "Uffd", "backend_path": socket });
    let body = json!({ "snapshot_path": snapshot, "mem_backend": backend, "resume_vm": true });
    vm.api("PUT", "/snapshot/load", Some(body))
}

#[test]
fn a_handler_serves_a_snapshot_of_either_form() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=500 seed=4");
    let before = vm.call("check").digest;
    let state = dir.path().join("state");
    let memory = dir.path().join("memory");
    let full = dir.path().join("full");
    vm.snapshot(&full, &[]);
    vm.api("PATCH", "/vm", Some(json!({ "state": "Paused" })));
    let body = json!({ "snapshot_path": state, "mem_file_path": memory, "snapshot_type": "Full" });
    assert_eq!(vm.api("PUT", "/snapshot/create", Some(body)).0, 204);
    for (name, snapshot, memory) in [("a", &state, memory.clone()), ("b", &full, full.join("memory"))] {
        let socket = dir.path().join(name);
        let mut handler = start_handler(&socket, &memory, u64::MAX, "ends");
        let mut restored = Vm::wait_for_api();
        assert_eq!(load(&restored, snapshot, &socket), (204, Value::Null));
        assert_eq!(restored.call("check").digest, before, "{}", text(snapshot));
        restored.terminate();
        handler.kill().unwrap();
        handler.wait().unwrap();
    }
}

/// A snapshot of a VM with a balloon and filled pages, and what `check` says of them.
fn snapshot_with_balloon(dir: &Path) -> (PathBuf, String) {
    let mut config = config(1, 128);
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    let mut vm = Vm::boot(&config);
    vm.call("fill pages=500 seed=4");
    let full = dir.join("full");
    vm.snapshot(&full, &[]);
    (full, vm.call("check").digest)
}

#[test]
fn a_handler_is_told_of_pages_that_the_guest_gives_back() {
    let dir = scratch();
    let (full, filled) = snapshot_with_balloon(dir.path());
    let socket = dir.path().join("handler");
    let mut handler = start_handler(&socket, &full.join("memory"), u64::MAX, "ends");
    let mut restored = Vm::wait_for_api();
    assert_eq!(load(&restored, &full, &socket), (204, Value::Null));
    assert_eq!(restored.call("check").digest, filled);
    restored.call("balloon op=report filled=1");
    let zeros = restored.call("check").digest;
    let mut expected = Vm::restore(&full, "eager");
    expected.call("balloon op=report filled=1");
    assert_eq!(zeros, expected.call("check").digest);
    assert_ne!(zeros, filled);
    restored.terminate();
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn a_handler_that_does_not_hear_of_pages_given_back_ends_the_vm_with_the_reason() {
    let dir = scratch();
    let (full, _) = snapshot_with_balloon(dir.path());
    let socket = dir.path().join("handler");
    let mut handler = start_handler(&socket, &full.join("memory"), u64::MAX, "ends");
    let mut restored = Vm::spawn(scratch(), &["--fault-timeout", "1"]);
    assert_eq!(load(&restored, &full, &socket), (204, Value::Null));
    restored.call("check");
    // All that the next request needs besides is there by then.
    restored.call("balloon op=report pages=1");
    stop(handler.id());
    restored.begin("balloon op=report filled=1");
    let (status, stderr) = restored.wait();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("Giving back") && stderr.contains("1 s (--fault-timeout)"), "{stderr}");
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn a_handler_that_ends_ends_the_vm_with_the_reason() {
    let dir = scratch();
    let full = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=500 seed=4");
    vm.snapshot(&full, &[]);
    let socket = dir.path().join("handler");
    let mut handler = start_handler(&socket, &full.join("memory"), 40, "ends");
    let mut restored = Vm::wait_for_api();
    // The guest may die of its handler before it has answered the load.
    let _ = load(&restored, &full, &socket);
    restored.begin("check");
    let (status, stderr) = restored.wait();
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("page-fault handler") && stderr.contains("has ended"), "{stderr}");
    handler.wait().unwrap();
}

/// A snapshot, and a waiting tvmm with this fault time-out.
fn waiting(dir: &Path, fault_timeout: &str) -> (PathBuf, Vm) {
    let full = dir.join("full");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=5000 seed=4");
    vm.snapshot(&full, &[]);
    let vm = Vm::spawn(scratch(), &["--fault-timeout", fault_timeout]);
    vm.wait_for_socket();
    (full, vm)
}

#[test]
fn a_handler_that_lives_and_does_not_answer_ends_the_vm_with_the_reason() {
    for (then, what) in
        [("sleeps", "has not read the fault on the page at guest-physical 0x"), ("reads", "not answered")]
    {
        {
            let faults = 200;
            let dir = scratch();
            let (full, mut vm) = waiting(dir.path(), "1");
            let socket = dir.path().join("handler");
            let mut handler = start_handler(&socket, &full.join("memory"), faults, then);
            assert!(try_load(&vm, &full, &socket));
            vm.begin("check");
            let (status, stderr) = vm.wait();
            assert_eq!(status.code(), Some(1), "{stderr}");
            for part in ["page-fault handler", text(&socket), what, "1 s (--fault-timeout)"] {
                assert!(stderr.contains(part), "{then} after {faults}: {stderr}");
            }
            assert!(handler.try_wait().unwrap().is_none(), "it lives");
            handler.kill().unwrap();
            handler.wait().unwrap();
        }
    }
}

/// Returns true if the load was answered: tvmm may end before.
fn try_load(vm: &Vm, snapshot: &Path, socket: &Path) -> bool {
    let backend = json!({ "backend_type": "Uffd", "backend_path": socket });
    let body = json!({ "snapshot_path": snapshot, "mem_backend": backend, "resume_vm": true }).to_string();
    let request = format!(
        "PUT /snapshot/load HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    exchange(vm.socket(), request.as_bytes()).starts_with("HTTP/1.1 204")
}

#[test]
fn pause_and_signal_do_not_hang_on_a_handler_that_does_not_answer() {
    let dir = scratch();
    let (full, mut vm) = waiting(dir.path(), "600");
    let socket = dir.path().join("handler");
    let mut handler = start_handler(&socket, &full.join("memory"), 200, "sleeps");
    assert!(try_load(&vm, &full, &socket));
    vm.begin("check");
    std::thread::sleep(Duration::from_millis(500));
    // Some kernels let go of a vCPU that waits for a handler, others do not.
    let (status, answer) = vm.api("PATCH", "/vm", Some(json!({ "state": "Paused" })));
    match status {
        204 => vm.resume(),
        _ => assert!(answer["fault_message"].as_str().unwrap().contains("does not answer"), "{answer}"),
    }
    assert_eq!(vm.state(), "Running");
    let (ended, stderr) = vm.terminate();
    match status {
        204 => assert_eq!(ended.code(), Some(0), "{stderr}"),
        _ => assert!(ended.code() == Some(1) && stderr.contains("vCPU 0 did not stop in time"), "{stderr}"),
    }
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn snapshot_of_a_vm_whose_handler_does_not_answer_fails() {
    let dir = scratch();
    let (full, mut vm) = waiting(dir.path(), "1");
    let socket = dir.path().join("handler");
    let mut handler = start_handler(&socket, &full.join("memory"), 200, "reads");
    assert!(try_load(&vm, &full, &socket));
    let mut snapshot = tvmm();
    let out = dir.path().join("second");
    snapshot.args(["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out)]);
    assert_eq!(finish(&mut snapshot).status.code(), Some(1));
    let (status, stderr) = vm.wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("page-fault handler") && stderr.contains("not answered"), "{stderr}");
    assert!(!out.exists());
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn a_guest_that_needs_no_page_is_not_ended() {
    let dir = scratch();
    let (full, mut vm) = waiting(dir.path(), "1");
    let socket = dir.path().join("handler");
    let mut handler = start_handler(&socket, &full.join("memory"), u64::MAX, "ends");
    assert!(try_load(&vm, &full, &socket));
    std::thread::sleep(Duration::from_secs(2));
    vm.call("spin ms=2000");
    vm.call("check");
    vm.terminate();
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn a_handler_that_ends_while_the_snapshot_is_loaded_fails_the_load_not_the_vmm() {
    let dir = scratch();
    let full = dir.path().join("full");
    Vm::boot(&config(1, 128)).snapshot(&full, &[]);
    let mut restored = Vm::wait_for_api();
    let dying = dir.path().join("dying");
    let serving = dir.path().join("serving");
    let mut handler = start_handler(&dying, &full.join("memory"), 0, "ends");
    let (status, answer) = load(&restored, &full, &dying);
    let said = answer["fault_message"].as_str().unwrap_or_default();
    assert!(status == 400 && said.contains("has ended"), "{status}: {said}");
    handler.wait().unwrap();
    let mut handler = start_handler(&serving, &full.join("memory"), u64::MAX, "ends");
    assert_eq!(load(&restored, &full, &serving), (204, Value::Null));
    restored.call("hello");
    restored.terminate();
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn handler_that_does_not_answer_while_the_snapshot_is_loaded_fails_the_load_within_the_fault_timeout() {
    let dir = scratch();
    let (full, mut vm) = waiting(dir.path(), "1");
    let memory = full.join("memory");
    for (then, what) in [("sleeps", "has not read the fault on the page"), ("reads", "not answered")] {
        let socket = dir.path().join(then);
        let mut handler = start_handler(&socket, &memory, 0, then);
        let (status, answer) = load(&vm, &full, &socket);
        let said = answer["fault_message"].as_str().unwrap_or_default();
        assert!(status == 400 && said.contains(what) && said.contains("1 s (--fault-timeout)"), "{status}: {said}");
        handler.kill().unwrap();
        handler.wait().unwrap();
    }
    // The handler listens, and accepts no connection.
    let silent = dir.path().join("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    let (status, answer) = load(&vm, &full, &silent);
    let said = answer["fault_message"].as_str().unwrap_or_default();
    assert!(status == 400 && said.contains("has not read the fault"), "{status}: {said}");
    // Nor has its socket room for one more who waits.
    rustix::net::listen(&listener, 0).unwrap();
    let (status, answer) = load(&vm, &full, &silent);
    let said = answer["fault_message"].as_str().unwrap_or_default();
    assert!(status == 400 && said.contains("accepts no connection within 1 s"), "{status}: {said}");
    assert_eq!(vm.state(), "Not started");
    // The process stays as good as new.
    let serving = dir.path().join("serving");
    let mut handler = start_handler(&serving, &memory, u64::MAX, "ends");
    assert_eq!(load(&vm, &full, &serving), (204, Value::Null));
    vm.call("hello");
    vm.terminate();
    handler.kill().unwrap();
    handler.wait().unwrap();
}

#[test]
fn failed_load_leaves_no_trace_of_the_machine() {
    let dir = scratch();
    let (full, vm) = waiting(dir.path(), "1");
    let before = vm.api_ok("GET", "/vm/config", None);
    let silent = dir.path().join("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    assert_eq!(load(&vm, &full, &silent).0, 400);
    assert_eq!(vm.api_ok("GET", "/vm/config", None), before);
}

#[test]
fn a_handler_that_is_not_there_is_refused() {
    let dir = scratch();
    let full = dir.path().join("full");
    Vm::boot(&config(1, 128)).snapshot(&full, &[]);
    let waiting = Vm::wait_for_api();
    let (status, answer) = load(&waiting, &full, &dir.path().join("nobody"));
    assert_eq!(status, 400);
    let said = answer["fault_message"].as_str().unwrap();
    assert!(said.contains("page-fault handler") && said.contains("nobody"), "{said}");
    // A socket that no process listens on any more.
    let dead = dir.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    assert_eq!(load(&waiting, &full, &dead).0, 400);
}
