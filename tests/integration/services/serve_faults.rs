//! `tvmm serve` when things go wrong: guests that hang, flood or die, the daemon killed, disks full, too much at once.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::service::{Service, is_served, wait_until, wait_until_gone};
use crate::support::{TIMEOUT, refusal, rounds, run, scratch, signal, text, tvmm};

/// A kernel that does nothing but this, at 2 MiB in long mode.
pub(super) fn write_kernel(path: &Path, code: &[u8]) {
    const AT: u64 = 2 << 20;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    elf.extend(AT.to_le_bytes()); // entry
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend(0_u64.to_le_bytes());
    elf.extend(0_u32.to_le_bytes());
    for size in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(size.to_le_bytes());
    }
    elf.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes())); // PT_LOAD, readable, executable
    let len = code.len() as u64;
    elf.extend([0x1000, AT, AT, len, len, 0x1000].iter().flat_map(|word: &u64| word.to_le_bytes()));
    elf.resize(0x1000, 0);
    elf.extend(code);
    std::fs::write(path, elf).unwrap();
}

fn spin(more: Value) -> Value {
    let mut body = json!({ "func_name": "spin", "params": "ms=600000" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The recorder is a process of its own: its code says that the guest did not answer, whatever its message says.
#[test]
fn recorded_run_that_does_not_end_is_a_timeout_and_one_that_fails_is_not() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "spin" })))["vmId"].clone();
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "base" })));
    // Three runs may take three times as long, and the first ends them.
    let record = |params: &str| json!({ "params": params, "timeout_ms": 2000, "repeat": 3 });
    let slow = service.refused(504, "POST", "/snapshots/base/profile", Some(record("ms=600000")));
    assert!(slow.contains("did not"), "{slow}");
    let failed = service.refused(422, "POST", "/snapshots/base/profile", Some(record("nonsense=1")));
    assert!(failed.contains("The run cannot be recorded"), "{failed}");
}

#[test]
fn guest_that_never_answers_is_ended_and_its_place_is_free_again() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1", "--shells", "0"]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    let message = service.refused(504, "POST", "/invocations", Some(spin(json!({ "timeout_ms": 1500 }))));
    assert!(message.contains("1500 ms"), "{message}");
    wait_until("the VM is over", || service.children().is_empty());
    let vms = service.get("/vms");
    assert_eq!((vms.as_array().unwrap().len(), &vms[0]["state"]), (1, &json!("ended")));
    assert_eq!(service.get("/traces")[0]["status"], 504);
    let answer = service.invoke(json!({ "func_name": "spin", "params": "ms=1" }));
    assert_eq!(answer["origin"], "boot");
    // The only place is taken by what the invocation left behind: it makes room.
    let second = service.invoke(json!({ "func_name": "spin", "params": "ms=1" }));
    assert_ne!(answer["vmId"], second["vmId"]);
    // A VM that a client asked for does not.
    service.ok("DELETE", &format!("/vms/{}", second["vmId"].as_str().unwrap()), None);
    wait_until("its place is free", || service.children().is_empty());
    service.ok("POST", "/vms", Some(json!({ "func_name": "spin" })));
    service.refused(429, "POST", "/vms", Some(json!({ "func_name": "spin" })));
}

#[test]
fn vm_that_dies_during_an_invocation_is_a_bad_gateway() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "spin" })));
    let id = vm["vmId"].as_str().unwrap();
    let pid = vm["pid"].as_u64().unwrap() as u32;
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| service.refused(502, "POST", "/invocations", Some(spin(json!({ "vmId": id })))));
        wait_until("it is busy", || service.get(&format!("/vms/{id}"))["state"] == "busy");
        signal(pid, Signal::KILL);
        let message = asked.join().unwrap();
        assert!(message.contains("before it answered"), "{message}");
    });
    assert_eq!(service.get(&format!("/vms/{id}"))["state"], "ended");
}

#[test]
fn guest_that_floods_its_line_or_says_only_garbage_is_ended() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-output", "64"]);
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp -3
    let endless = b"\x66\xba\xf8\x03\xb0x\xee\xeb\xfd";
    // The same with `ok - ` and newlines: lines that answer no request.
    let lines = b"\x66\xba\xf8\x03\xb0o\xee\xb0k\xee\xb0 \xee\xb0-\xee\xb0 \xee\xb0\n\xee\xeb\xec";
    for (name, code) in [("endless", &endless[..]), ("lines", &lines[..])] {
        let kernel = dir.path().join(name);
        write_kernel(&kernel, code);
        let function = json!({ "func_name": name, "kernel": kernel, "mem_size": 64 });
        service.ok("POST", "/functions", Some(function));
        let body = json!({ "func_name": name, "timeout_ms": 200_000 });
        let message = service.refused(502, "POST", "/invocations", Some(body));
        assert!(message.contains("without an answer"), "{message}");
    }
    let vms = service.get("/vms");
    assert!(vms.as_array().unwrap().iter().all(|vm| vm["state"] == "ended"), "{vms}");
    // jmp to itself: nothing at all.
    let kernel = dir.path().join("silent");
    write_kernel(&kernel, b"\xeb\xfe");
    service.ok("POST", "/functions", Some(json!({ "func_name": "silent", "kernel": kernel, "mem_size": 64 })));
    service.refused(504, "POST", "/invocations", Some(json!({ "func_name": "silent", "timeout_ms": 500 })));
    service.put_touch();
    service.invoke(json!({ "func_name": "touch", "params": "pages=1" }));
}

#[test]
fn daemon_that_is_killed_leaves_no_vm_and_no_file() {
    let dir = scratch();
    let state = dir.path().join("state");
    let mut service = Service::start(&state, &[]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    // With a port its VMs have a vsock device, whose socket is a file.
    service.ok("POST", "/functions", Some(json!({ "func_name": "port", "mem_size": 64, "port": 52 })));
    service.ok("POST", "/vms", Some(json!({ "func_name": "port" })));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "spin" })));
    let id = vm["vmId"].as_str().unwrap();
    let run_files = || std::fs::read_dir(state.join("run")).unwrap().count();
    assert_eq!(run_files(), 1);
    let children = std::thread::scope(|scope| {
        let socket = service.socket().to_owned();
        let body = spin(json!({ "vmId": id })).to_string();
        // Its answer never comes.
        let asked = scope.spawn(move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            let head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length:";
            write!(stream, "{head} {}\r\n\r\n{body}", body.len()).unwrap();
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer
        });
        wait_until("it is busy", || service.get(&format!("/vms/{id}"))["state"] == "busy");
        wait_until("shells are ready", || service.children().len() == 4);
        let children = service.children();
        service.kill();
        assert_eq!(asked.join().unwrap(), "");
        children
    });
    children.into_iter().for_each(wait_until_gone);
    assert_eq!(run_files(), 0, "sockets of VMs are left");
    // The daemon's own socket is stale, and taken over.
    assert!(service.socket().exists());
    Service::start(&state, &[]).get("/functions");
}

#[test]
fn service_that_is_told_to_stop_finishes_what_it_can_and_ends_the_rest() {
    let dir = scratch();
    let state = dir.path().join("state");
    for (params, status) in [("ms=700", 200), ("ms=600000", 502)] {
        let mut service = Service::start(&state, &["--grace", "3"]);
        service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
        let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "spin" })));
        let id = vm["vmId"].as_str().unwrap().to_string();
        let children = std::thread::scope(|scope| {
            let asked = scope
                .spawn(|| service.ask("POST", "/invocations", Some(spin(json!({ "vmId": id, "params": params })))));
            wait_until("it is busy", || service.get(&format!("/vms/{id}"))["state"] == "busy");
            let children = service.children();
            signal(service.pid(), Signal::TERM);
            let (answered, body) = asked.join().unwrap();
            assert_eq!(answered, status, "{body}");
            children
        });
        assert!(service.wait().success());
        children.into_iter().for_each(wait_until_gone);
        assert!(!is_served(service.socket()));
    }
}

#[test]
fn port_or_socket_in_use_is_refused() {
    let dir = scratch();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let said = refusal(&run(&["serve", "--dir", text(&dir.path().join("a")), "--listen", &address]));
    assert!(said.contains(&address) && said.contains("in use"), "{said}");
    let service = Service::start(&dir.path().join("state"), &[]);
    let other = text(service.socket());
    let said = refusal(&run(&["serve", "--dir", text(&dir.path().join("b")), "--listen-unix", other]));
    assert!(said.contains("exists already"), "{said}");
    let said = refusal(&run(&["serve", "--dir", text(&dir.path().join("c"))]));
    assert!(said.contains("Nowhere to listen"), "{said}");
    service.get("/functions");
}

#[test]
fn full_disk_is_told_and_leaves_what_was_there() {
    let dir = scratch();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let options = Some(c"size=6m");
    if let Err(error) = rustix::mount::mount("tvmm-test", &small, "tmpfs", MountFlags::empty(), options) {
        skip!("mount", "a small file system cannot be mounted: {error}");
        return;
    }
    let told = std::panic::catch_unwind(|| {
        let service = Service::start(&small.join("state"), &[]);
        service.put_touch();
        let before = service.get("/functions");
        let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].clone();
        service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" }));
        let filler = small.join("filler");
        let mut file = std::fs::File::create(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        let message = service.refused(507, "POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "s" })));
        assert!(message.contains("No space left"), "{message}");
        let function = json!({ "func_name": "touch", "mem_size": 128 });
        service.refused(507, "POST", "/functions", Some(function));
        assert_eq!(service.get("/functions"), before);
        assert_eq!(service.get("/snapshots"), json!([]));
        // The VM has lived on, and so has the service.
        service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" }));
        drop(file);
        std::fs::remove_file(&filler).unwrap();
        service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "s" })));
        service.terminate();
    });
    rustix::mount::unmount(&small, UnmountFlags::DETACH).unwrap();
    told.unwrap();
}

#[test]
fn ten_thousand_requests_at_once_are_answered_or_turned_away() {
    let dir = scratch();
    let limits = ["--max-running", "2", "--max-queue", "200", "--max-connections", "600", "--max-vms", "4"];
    let service = Service::start(&dir.path().join("state"), &limits);
    let vm = service.snapshot_touch("base");
    let body = json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" }).to_string();
    let request = format!(
        "POST /invocations HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let total = rounds(10_000);
    let good = AtomicUsize::new(0);
    let busy = AtomicUsize::new(0);
    let begun = AtomicUsize::new(0);
    // As many at a time as this test may have descriptors open.
    std::thread::scope(|scope| {
        for _ in 0..800 {
            scope.spawn(|| {
                while begun.fetch_add(1, Ordering::Relaxed) < total {
                    let status = ask_patiently(service.socket(), request.as_bytes());
                    match status.as_deref() {
                        Some("200") => good.fetch_add(1, Ordering::Relaxed),
                        Some("429") => busy.fetch_add(1, Ordering::Relaxed),
                        other => panic!("neither answered nor turned away: {other:?}"),
                    };
                }
            });
        }
    });
    let good = good.into_inner();
    let busy = busy.into_inner();
    println!("{good} answered, {busy} turned away");
    assert_eq!(good + busy, total);
    assert!(good >= 1 && busy >= 1, "{good} answered, {busy} turned away");
    service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" }));
    let rss = std::fs::read_to_string(format!("/proc/{}/status", service.pid())).unwrap();
    let kib = rss.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    println!("the service's resident set afterwards: {} KiB", kib.unwrap());
    assert!(kib.unwrap() < 200 << 10, "the service has grown to {kib:?} KiB");
}

/// The status of one exchange. The kernel's own queue of a Unix socket may be full for a moment.
fn ask_patiently(socket: &Path, request: &[u8]) -> Option<String> {
    let deadline = Instant::now() + TIMEOUT;
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).split(' ').nth(1).map(str::to_owned)
}

#[test]
fn an_inherited_descriptor_must_be_a_connected_socket() {
    for fd in ["0", "2", "77"] {
        let output = tvmm().args(["--api-fd", fd]).stdin(Stdio::null()).output().unwrap();
        assert!(refusal(&output).contains("descriptor"), "{fd}");
    }
}

#[test]
fn idle_vms_of_invocations_are_ended_after_the_idle_time() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--idle-timeout", "1", "--shells", "0"]);
    service.put_touch();
    let asked = service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })));
    let left = service.invoke(json!({ "func_name": "touch", "params": "pages=1" }));
    let left = left["vmId"].as_str().unwrap();
    wait_until("the idle VM is ended", || service.get(&format!("/vms/{left}"))["state"] == "ended");
    assert_eq!(service.get(&format!("/vms/{}", asked["vmId"].as_str().unwrap()))["state"], "running");
}

#[test]
fn the_record_of_a_vm_that_the_service_has_ended_says_why() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--no-repurpose"]);
    service.put_touch();
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    let vm = || service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].as_str().unwrap().to_string();
    let reason = |vm: &str| service.get(&format!("/vms/{vm}"))["reason"].as_str().unwrap().to_string();
    let deleted = vm();
    assert_eq!(service.ok("DELETE", &format!("/vms/{deleted}"), None)["reason"], "deleted");
    let slow = vm();
    let body = json!({ "func_name": "spin", "params": "ms=60000", "vmId": slow, "timeout_ms": 100 });
    service.refused(504, "POST", "/invocations", Some(body));
    assert!(reason(&slow).starts_with("The guest did not answer within 100 ms"), "{}", reason(&slow));
    let finished = service.invoke(json!({ "func_name": "touch", "params": "pages=1", "keep": false }));
    let finished = finished["vmId"].as_str().unwrap();
    wait_until("the VM is over", || service.get(&format!("/vms/{finished}"))["state"] == "ended");
    assert_eq!(reason(finished), "finished");
    // Its own end has its own reason.
    let killed = vm();
    let pid = service.get(&format!("/vms/{killed}"))["pid"].as_u64().unwrap() as u32;
    crate::support::signal(pid, rustix::process::Signal::KILL);
    wait_until("the VM is over", || service.get(&format!("/vms/{killed}"))["state"] == "ended");
    assert!(reason(&killed).starts_with("ended by a signal"), "{}", reason(&killed));
}

/// All paths under a directory.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

#[test]
fn directory_of_another_program_is_refused_and_left_as_it_is() {
    let dir = scratch();
    let theirs = dir.path().join("theirs");
    for file in ["run/database.pid", "snapshots/2025/data", "lock"] {
        let path = theirs.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "").unwrap();
    }
    let before = tree(&theirs);
    let socket = dir.path().join("socket");
    let serve = |dir: &Path, socket: &Path| run(&["serve", "--dir", text(dir), "--listen-unix", text(socket)]);
    let said = refusal(&serve(&theirs, &socket));
    assert!(said.contains(text(&theirs)) && said.contains("not a directory of tvmm serve"), "{said}");
    assert!(said.contains("by --dir"), "{said}");
    assert_eq!(tree(&theirs), before);

    // A file that a slip puts in the place of the socket stays too.
    let file = dir.path().join("file");
    std::fs::write(&file, "kept").unwrap();
    refusal(&serve(&dir.path().join("state"), &file));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
}

#[test]
fn directory_of_an_older_daemon_is_recognised_and_marked() {
    let dir = scratch();
    let state = dir.path().join("state");
    for folder in ["functions", "snapshot-records", "net-ifaces", "snapshots/half", "profiles", "run"] {
        std::fs::create_dir_all(state.join(folder)).unwrap();
    }
    let function = json!({ "func_name": "old", "vcpu": 1, "mem_size": 64, "image_read_only": true });
    for (file, content) in [("lock", ""), ("functions/old.json", &function.to_string()), ("run/x.vsock", "")] {
        std::fs::write(state.join(file), content).unwrap();
    }
    let mut service = Service::start(&state, &[]);
    assert_eq!(service.get("/functions")[0]["func_name"], "old");
    assert!(!state.join("run/x.vsock").exists() && !state.join("snapshots/half").exists());
    let mark = std::fs::read_to_string(state.join("tvmm-serve")).unwrap();
    assert!(mark.contains("belongs to tvmm serve"), "{mark}");
    service.kill();
    // The mark alone is enough, whatever else is there.
    std::fs::remove_dir_all(state.join("profiles")).unwrap();
    std::fs::write(state.join("notes"), "mine").unwrap();
    Service::start(&state, &[]).get("/functions");
    assert!(state.join("notes").exists());
}
