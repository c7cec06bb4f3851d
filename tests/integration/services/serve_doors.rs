//! Limits on clients of `tvmm serve` and of a VM's API: which files and addresses they may name, how much memory and
//! how many places they may take, and for how long.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::service::{Service, wait_until};
use crate::support::{TIMEOUT, Vm, exchange, refusal, run, scratch, text};

/// A client that asks again and again and takes no answer, until the server takes no more.
fn deaf(socket: &Path, request: &str) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let requests = request.repeat(64);
    while stream.write_all(requests.as_bytes()).is_ok() {}
    stream
}

/// Returns true if a new client is answered.
fn is_answered(socket: &Path, path: &str) -> bool {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    exchange(socket, request.as_bytes()).starts_with("HTTP/1.1 200 ")
}

#[test]
fn clients_of_the_service_that_do_not_read_lose_their_place() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-connections", "8"]);
    let deaf: Vec<UnixStream> =
        (0..8).map(|_| deaf(service.socket(), "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")).collect();
    // As many others get a place, so none of these has one any more.
    let others: Vec<UnixStream> = (0..8).map(|_| idle_client(service.socket(), "/functions")).collect();
    // The client gets the bytes that were on the way, and then the end.
    for mut stream in deaf {
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut answers = Vec::new();
        let _ = stream.read_to_end(&mut answers);
        assert!(answers.starts_with(b"HTTP/1.1 200 "));
    }
    drop(others);
}

#[test]
fn clients_of_a_vm_that_do_not_read_or_say_nothing_lose_their_place() {
    let vm = Vm::wait_for_api();
    let deaf: Vec<UnixStream> =
        (0..64).map(|_| deaf(vm.socket(), "GET /vm/config HTTP/1.1\r\nHost: x\r\n\r\n")).collect();
    wait_until("another client is answered", || is_answered(vm.socket(), "/version"));
    drop(deaf);
    let mut idle: Vec<UnixStream> = (0..64).map(|_| idle_client(vm.socket(), "/version")).collect();
    wait_until("another client is answered", || is_answered(vm.socket(), "/version"));
    // The others stay, as Firecracker's clients expect.
    assert!(asks(&mut idle.pop().unwrap(), "/version"));
}

/// Asks on a connection that stays; whether it is answered.
fn asks(stream: &mut UnixStream, path: &str) -> bool {
    let mut answer = [0; 4096];
    let asked = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
    asked.is_ok() && stream.read(&mut answer).is_ok() && answer.starts_with(b"HTTP/1.1 200 ")
}

/// A connection that has a place, and is idle.
fn idle_client(socket: &Path, path: &str) -> UnixStream {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        if asks(&mut stream, path) {
            return stream;
        }
        assert!(Instant::now() < deadline, "a client gets no place");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The status of a request over TCP with these headers.
fn status(service: &Service, request: &str, headers: &[&str]) -> u16 {
    let address = service.url.as_deref().unwrap().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    write!(stream, "{request} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split(' ').nth(1).unwrap_or_else(|| panic!("{answer:?}")).parse().unwrap()
}

#[test]
fn pages_of_other_sites_cannot_ask_through_a_browser() {
    let dir = scratch();
    let options = ["--listen", "127.0.0.1:0", "--host", "tvmm.example"];
    let service = Service::confined(&dir.path().join("state"), &options);
    let port = service.url.as_deref().unwrap().rsplit_once(':').unwrap().1.to_string();
    let own = format!("Host: localhost:{port}");
    let named = format!("Host: TVMM.example:{port}");
    let from_own = format!("Origin: http://localhost:{port}");
    let from_other = "Origin: http://localhost:1";
    for (expected, headers) in [
        (200, vec![own.as_str()]),
        (200, vec!["Host: 127.0.0.1"]),
        (200, vec!["Host: [::1]:80"]),
        (200, vec![&named]),
        // A name that has been made to mean this host.
        (403, vec!["Host: evil.example"]),
        (403, vec!["Host: localhost.evil.example"]),
        (403, vec!["Host: 192.0.2.1"]),
        (200, vec![&own, &from_own]),
        (200, vec![&own, "Origin: https://tvmm.example"]),
        (403, vec![&own, from_other]),
        (403, vec![&own, "Origin: null"]),
        (403, vec![&own, "Origin: http://evil.example"]),
    ] {
        assert_eq!(status(&service, "GET /functions", &headers), expected, "{headers:?}");
        assert_eq!(status(&service, "GET /ui", &headers), expected, "{headers:?}");
    }
    assert_eq!(status(&service, "GET http://evil.example/functions", &[&own]), 403);
    let bad = run(&["serve", "--dir", text(&dir.path().join("x")), "--listen", "127.0.0.1:0", "--host", "a:80"]);
    assert_eq!(bad.status.code(), Some(2));
}

#[test]
fn clients_name_only_files_that_they_may_name() {
    let dir = scratch();
    let state = dir.path().join("state");
    let allowed = dir.path().join("allowed");
    let outside = dir.path().join("outside");
    for made in [&allowed, &outside] {
        std::fs::create_dir(made).unwrap();
        std::fs::write(made.join("disk"), [7; 8192]).unwrap();
    }
    std::fs::write(outside.join("theirs.chunk"), "kept").unwrap();
    symlink(outside.join("disk"), allowed.join("link")).unwrap();
    symlink(allowed.join("disk"), allowed.join("swapped")).unwrap();
    let service = Service::confined(&state, &["--allow-path", text(&allowed), "--memory", "4096"]);
    let function = |key: &str, path: &Path| json!({ "func_name": "f", "mem_size": 64, key: path });
    for key in ["image", "kernel", "initrd"] {
        for path in ["/etc/passwd".into(), "/nonexistent".into(), outside.join("disk"), allowed.join("link")] {
            let said = service.refused(403, "POST", "/functions", Some(function(key, &path)));
            assert!(said.contains(key) && said.contains(text(&path)) && said.contains("--allow-path"), "{said}");
        }
        service.refused(403, "POST", "/functions", Some(function(key, &allowed.join("../outside/disk"))));
        service.ok("POST", "/functions", Some(function(key, &allowed.join("disk"))));
        service.ok("POST", "/functions", Some(function(key, &state.join("disk"))));
    }
    // A link that leads elsewhere by the time the VM starts.
    for read_only in [true, false] {
        let mut body = function("image", &allowed.join("swapped"));
        body["image_read_only"] = read_only.into();
        service.ok("POST", "/functions", Some(body));
        service.ok("POST", "/invocations", Some(json!({ "func_name": "f", "params": "" })));
        std::fs::remove_file(allowed.join("swapped")).unwrap();
        symlink(outside.join("disk"), allowed.join("swapped")).unwrap();
        service.refused(403, "POST", "/vms", Some(json!({ "func_name": "f" })));
        std::fs::remove_file(allowed.join("swapped")).unwrap();
        symlink(allowed.join("disk"), allowed.join("swapped")).unwrap();
    }
    service.snapshot_touch("base");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let tcp = format!("tcp:{}", listener.local_addr().unwrap());
    let cold = |cache: &Path| json!({ "cold_pools": [&allowed], "cold_cache": cache });
    for tvmm in [
        json!({ "pools": [&outside] }),
        json!({ "pools": ["numa:0"] }),
        json!({ "cold_pools": [&outside] }),
        json!({ "cold_pools": [format!("direct:{},depth=2", text(&outside))] }),
        json!({ "cold_pools": [tcp] }),
        json!({ "cold_pools": ["s3://bucket/pool"] }),
        cold(&outside),
        cold(&outside.join("made")),
        cold(&state.join("snapshots")),
        json!({ "plan": outside.join("plan") }),
        json!({ "costs": outside.join("costs") }),
        json!({ "drive_overrides": [{ "drive_id": "root", "path_on_host": outside.join("disk") }] }),
        json!({ "drive_overrides": [{ "drive_id": "root", "path_on_host": state.join("vms.json") }] }),
    ] {
        let body = json!({ "func_name": "touch", "ssId": "base", "tvmm": tvmm });
        for path in ["/invocations", "/vms"] {
            service.refused(403, "POST", path, Some(body.clone()));
        }
    }
    assert!(listener.accept().is_err(), "the service has connected to it");
    assert_eq!(std::fs::read_to_string(outside.join("theirs.chunk")).unwrap(), "kept");
    assert!(!outside.join("made").exists());
}

#[test]
fn directory_that_is_not_there_cannot_be_allowed() {
    let dir = scratch();
    let state = dir.path().join("x");
    let serve = ["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--allow-path", "/nonexistent/\u{7f}/.."];
    let said = refusal(&run(&serve));
    assert!(said.contains("/nonexistent"), "{said}");
}

#[test]
fn vms_have_no_more_memory_together_than_they_may() {
    let dir = scratch();
    let service = Service::confined(&dir.path().join("state"), &["--memory", "200"]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "huge", "mem_size": 262_144 })));
    for (path, body) in [("/vms", json!({ "func_name": "huge" })), ("/invocations", json!({ "func_name": "huge" }))] {
        let said = service.refused(507, "POST", path, Some(body));
        assert!(said.contains("262144 MiB") && said.contains("200 MiB") && said.contains("--memory"), "{said}");
    }
    service.put_touch();
    let start = || service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].clone();
    let first = start();
    start();
    let invoke = || service.invoke(json!({ "func_name": "touch", "params": "pages=1" }));
    let idle = invoke();
    assert_eq!(service.get("/ui/data")["load"]["memory_mib"], 192);
    // Only a VM that an invocation has left behind makes room.
    let next = invoke();
    wait_until("the idle VM is over", || {
        service.get(&format!("/vms/{}", idle["vmId"].as_str().unwrap()))["state"] == "ended"
    });
    service.ok("DELETE", &format!("/vms/{}", next["vmId"].as_str().unwrap()), None);
    wait_until("its place is free", || service.get("/ui/data")["load"]["memory_mib"] == 128);
    start();
    let said = service.refused(429, "POST", "/vms", Some(json!({ "func_name": "touch" })));
    assert!(said.contains("needs 64 MiB") && said.contains("3 VMs have 192 of the 200 MiB"), "{said}");
    service.ok("DELETE", &format!("/vms/{}", first.as_str().unwrap()), None);
    wait_until("its place is free", || service.get("/ui/data")["load"]["memory_mib"] == 128);
    start();
}

/// The monotonic clock of a guest, ns.
fn mono_ns(service: &Service, more: Value) -> u64 {
    let mut body = json!({ "func_name": "clock", "keep": false });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = service.invoke(body);
    let text = answer["result"].as_str().unwrap();
    let value = text.split(' ').find_map(|word| word.strip_prefix("mono_ns="));
    value.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
}

#[test]
fn clones_have_the_present_time_and_what_their_request_says() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    for name in ["clock", "metadata"] {
        service.ok("POST", "/functions", Some(json!({ "func_name": name, "mem_size": 64 })));
    }
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "clock" })))["vmId"].clone();
    let before = mono_ns(&service, json!({ "vmId": vm, "keep": true }));
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "base" })));
    std::thread::sleep(Duration::from_secs(10));
    let stood = mono_ns(&service, json!({ "ssId": "base", "clock_realtime": false }));
    let present = mono_ns(&service, json!({ "ssId": "base" }));
    assert!(present - before >= 10_000_000_000, "{present} after {before}");
    assert!(stood < present - 5_000_000_000, "{stood}, {present}");

    let metadata = |body: Value| {
        let mut asked = json!({ "func_name": "metadata", "ssId": "base" });
        asked.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let answer = service.invoke(asked);
        let text = answer["result"].as_str().unwrap();
        let json = text.split(' ').find_map(|word| word.strip_prefix("json=")).unwrap_or_else(|| panic!("{text}"));
        serde_json::from_str::<Value>(json).unwrap()
    };
    assert_eq!(metadata(json!({})), json!({}));
    assert_eq!(metadata(json!({ "metadata": { "name": "a" } })), json!({ "name": "a" }));
    assert_eq!(metadata(json!({ "tvmm": { "metadata": { "name": "b" } } })), json!({ "name": "b" }));
    let body = json!({ "func_name": "metadata", "ssId": "base", "metadata": { "role": "c" }, "clock_realtime": true,
        "track_dirty_pages": true, "tvmm": { "in_place_mapping": "shared" } });
    let clone = service.ok("POST", "/vms", Some(body))["vmId"].clone();
    let told = service.invoke(json!({ "func_name": "metadata", "vmId": clone }));
    assert!(told["result"].as_str().unwrap().contains("role"), "{told}");
    // Its dirty pages are tracked, as the request says and the function does not.
    let diff = json!({ "vmId": clone, "ssId": "diff", "snapshot_type": "Diff" });
    assert_eq!(service.ok("POST", "/snapshots", Some(diff))["parent"], "base");
    for (status, body, says) in [
        (422, json!({ "network_overrides": [{ "iface_id": "eth7", "host_dev_name": "tap7" }] }), "eth7"),
        (
            422,
            json!({ "tvmm": { "mac_overrides": [{ "iface_id": "eth7", "guest_mac": "06:00:00:00:00:01" }] } }),
            "eth7",
        ),
        (422, json!({ "tvmm": { "drive_overrides": [{ "drive_id": "disk7", "path_on_host": "/x" }] } }), "disk7"),
        (422, json!({ "tvmm": { "plan": "/nonexistent/plan" } }), "/nonexistent/plan"),
        (400, json!({ "tvmm": { "plan": "/p" }, "policy": "eager" }), "leave one out"),
        (400, json!({ "metadata": { "a": "b" }, "tvmm": { "metadata": { "a": "c" } } }), "leave one out"),
        (400, json!({ "metadata": { "a": "b" }, "record": "uffd" }), "leave out"),
        (400, json!({ "clock_realtime": "yes" }), "expected a boolean"),
        (400, json!({ "tvmm": { "in_place_mapping": "other" } }), "other"),
    ] {
        let mut asked = json!({ "func_name": "metadata", "ssId": "base" });
        asked.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let said = service.refused(status, "POST", "/invocations", Some(asked));
        assert!(said.contains(says), "{body}: {said}");
    }
    for more in [json!({ "clock_realtime": true }), json!({ "metadata": { "a": "b" } })] {
        let mut body = json!({ "func_name": "clock" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert!(service.refused(400, "POST", "/vms", Some(body)).contains("need `ssId`"));
    }
}
