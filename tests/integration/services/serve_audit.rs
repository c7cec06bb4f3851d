//! The audit log of `tvmm serve`.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::process::{Pid, Resource, Rlimit, Signal};
use serde_json::{Value, json};

use crate::support::service::{Service, wait_until};
use crate::support::{TIMEOUT, refusal, run, run_ok, scratch, signal, text};

/// The lines of a log. One that is being written does not count yet.
fn lines(log: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(log).unwrap();
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"))).collect()
}

/// Waits for the line of a path; returns it.
fn line_of(log: &Path, path: &str) -> Value {
    let find = || lines(log).into_iter().rfind(|line| line["path"] == path);
    wait_until(&format!("{path} is in the log"), || find().is_some());
    find().unwrap()
}

/// A GET over TCP with these headers, answered or not.
fn get(service: &Service, path: &str, headers: &str) -> String {
    let address = service.url.as_deref().unwrap().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn each_request_has_a_line_without_secrets_and_bodies() {
    let dir = scratch();
    let log = dir.path().join("audit");
    let tokens = dir.path().join("tokens");
    let secret = run_ok(&["token", "new", "--name", "robot", "--role", "invoke", "--add", text(&tokens)]);
    let secret = secret.trim();
    let options = ["--listen", "127.0.0.1:0", "--tokens", text(&tokens), "--audit-log", text(&log)];
    let service = Service::start(&dir.path().join("state"), &options);
    assert_eq!(std::fs::metadata(&log).unwrap().permissions().mode() & 0o7777, 0o600);
    service.put_touch();
    service.invoke(json!({ "func_name": "touch", "params": "pages=1", "keep": false }));
    let me = rustix::process::geteuid().as_raw();
    let line = line_of(&log, "/invocations");
    for (key, value) in [
        ("who", json!(format!("uid {me}"))),
        ("peer", json!("unix")),
        ("method", json!("POST")),
        ("object", json!({ "func_name": "touch" })),
        ("status", json!(200)),
    ] {
        assert_eq!(line[key], value, "{line}");
    }
    assert!(line["duration_us"].as_u64().unwrap() > 0, "{line}");
    let time = line["time"].as_str().unwrap();
    assert!(time.len() == 24 && time.starts_with("20") && time.ends_with('Z'), "{time}");
    get(&service, "/functions/touch?key=hidden", &format!("Authorization: Bearer {secret}\r\n"));
    let line = line_of(&log, "/functions/touch");
    assert_eq!((&line["who"], &line["status"]), (&json!("robot"), &json!(200)), "{line}");
    assert_eq!(line["object"], json!({ "func_name": "touch" }));
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    // Refused requests are recorded, too, by the name of the token if it is known.
    get(&service, "/vms", &format!("Authorization: Bearer {secret}\r\n"));
    assert_eq!((&line_of(&log, "/vms")["who"], &line_of(&log, "/vms")["status"]), (&json!("robot"), &json!(403)));
    get(&service, "/snapshots/base", "Authorization: Bearer tvmm_wrong\r\n");
    let line = line_of(&log, "/snapshots/base");
    assert_eq!((&line["who"], &line["status"]), (&Value::Null, &json!(401)), "{line}");
    get(&service, "/traces", "Origin: http://evil.example\r\n");
    assert_eq!(line_of(&log, "/traces")["status"], 403);
    // A flood of unknown clients does not fill the disk.
    (0..40).for_each(|_| drop(get(&service, "/policies", "")));
    get(&service, "/openapi.json", &format!("Authorization: Bearer {secret}\r\n"));
    line_of(&log, "/openapi.json");
    let flood = lines(&log).into_iter().filter(|line| line["path"] == "/policies");
    let statuses: Vec<u64> = flood.map(|line| line["status"].as_u64().unwrap()).collect();
    // The wrong token and the foreign page have been counted before.
    assert_eq!(statuses, [vec![401; 18], vec![429]].concat());
    get(&service, "/health", "");
    assert!(service.terminate().success());
    let all = std::fs::read_to_string(&log).unwrap();
    for hidden in [secret, "tvmm_wrong", "hidden", "pages=1", "/health"] {
        assert!(!all.contains(hidden), "{hidden} is in {all}");
    }
}

#[test]
fn request_whose_client_leaves_has_a_line_without_a_status() {
    let dir = scratch();
    let log = dir.path().join("audit");
    let service = Service::start(&dir.path().join("state"), &["--audit-log", text(&log)]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    let body = json!({ "func_name": "spin", "params": "ms=600000", "timeout_ms": 600_000 }).to_string();
    let mut stream = std::os::unix::net::UnixStream::connect(service.socket()).unwrap();
    let head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    wait_until("the invocation runs", || service.get("/ui/data")["load"]["running"] == 1);
    drop(stream);
    let line = line_of(&log, "/invocations");
    assert_eq!((&line["status"], &line["object"]), (&Value::Null, &json!({ "func_name": "spin" })), "{line}");
}

#[test]
fn log_is_opened_again_for_its_rotation() {
    let dir = scratch();
    let log = dir.path().join("audit");
    let rotated = dir.path().join("audit.1");
    let service = Service::start(&dir.path().join("state"), &["--audit-log", text(&log)]);
    service.get("/functions");
    line_of(&log, "/functions");
    std::fs::rename(&log, &rotated).unwrap();
    service.get("/vms");
    line_of(&rotated, "/vms");
    signal(service.pid(), Signal::HUP);
    wait_until("there is a new log", || log.exists());
    service.get("/snapshots");
    line_of(&log, "/snapshots");
    assert_eq!(lines(&rotated).len(), 2);
    drop(service);
    // An existing log is appended to.
    let service = Service::start(&dir.path().join("state"), &["--audit-log", text(&log)]);
    service.get("/functions");
    line_of(&log, "/functions");
    assert_eq!(lines(&log).len(), 2);
}

#[test]
fn service_without_its_log_answers_nothing() {
    let dir = scratch();
    let state = dir.path().join("state");
    let socket = dir.path().join("s.sock");
    let log = dir.path().join("audit");
    let link = dir.path().join("link");
    symlink(&log, &link).unwrap();
    let missing = dir.path().join("missing/audit");
    for wrong in [missing.as_path(), link.as_path(), dir.path(), Path::new("/dev/full")] {
        let serve = ["serve", "--dir", text(&state), "--listen-unix", text(&socket), "--audit-log", text(wrong)];
        let said = refusal(&run(&serve));
        assert!(said.contains(text(wrong)), "{said}");
    }
    let service = Service::start(&state, &["--audit-log", text(&log)]);
    service.get("/functions");
    line_of(&log, "/functions");
    // The file cannot grow any more, as on a full disk.
    let pid = Pid::from_raw(service.pid() as i32);
    let limit = |bytes| Rlimit { current: bytes, maximum: None };
    let before = std::fs::metadata(&log).unwrap().len();
    rustix::process::prlimit(pid, Resource::Fsize, limit(Some(before + 20))).unwrap();
    service.get("/vms");
    wait_until("requests are refused", || service.ask("GET", "/functions", None).0 == 503);
    let said = service.refused(503, "GET", "/functions", None);
    assert!(said.starts_with("Cannot write the audit log: ") && said.contains("SIGHUP"), "{said}");
    service.get("/health");
    rustix::process::prlimit(pid, Resource::Fsize, limit(None)).unwrap();
    wait_until("requests are answered again", || service.ask("GET", "/snapshots", None).0 == 200);
    line_of(&log, "/snapshots");
    // The line that was cut is whole again, and no line is lost.
    assert_eq!(line_of(&log, "/vms")["status"], 200);
    assert!(service.terminate().success());
}
