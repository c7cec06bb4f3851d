//! Clients that misbehave, crowds of clients, and a VMM that ends.

use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc;
use std::time::Instant;

use serde_json::json;

use super::*;
use crate::api::ApiError;
use crate::api::connection::{MAX_CONNECTIONS, TIMES, Times};
use crate::api::routes::MAX_BODY_BYTES;
use crate::sys::unix_socket::SocketError;

fn put(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("PUT {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

#[test]
fn malformed_http_is_answered_with_400_and_the_server_lives() {
    let fixture = Fixture::new();
    for bytes in [
        &b"\0\0\0\0\r\n\r\n"[..],
        b"hello\r\n\r\n",
        b"GET /version\r\n\r\n",
        b"GET /version HTTP/9.9\r\n\r\n",
        b"GET /version HTTP/1.1\r\nno colon\r\n\r\n",
        b"PUT /actions HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"PUT /actions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"PUT /actions HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        b"PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n",
    ] {
        let answer = fixture.raw(bytes);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{:?}: {answer:?}", String::from_utf8_lossy(bytes));
    }
    let head = format!("GET /version HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20));
    assert!(fixture.raw(head.as_bytes()).starts_with("HTTP/1.1 431 "));
    assert_eq!(fixture.seen(), []);
    fixture.assert_alive();
}

#[test]
fn bodies_that_are_not_json_are_refused() {
    let fixture = Fixture::new();
    for body in ["not json", "{", "\u{1F980}", "{\"action_type\": \"InstanceStart\"} x", &"[".repeat(5000)] {
        let answer = fixture.raw(&put("/actions", body));
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body}: {answer}");
        assert!(answer.contains("An error occurred when deserializing the json body of a request: "), "{answer}");
    }
    let mut not_utf8 = put("/actions", "xx");
    let end = not_utf8.len();
    not_utf8[end - 2..].copy_from_slice(&[0xff, 0xfe]);
    assert!(fixture.raw(&not_utf8).starts_with("HTTP/1.1 400 "));
    assert_eq!(fixture.seen(), []);
}

#[test]
fn body_over_the_limit_is_answered_with_413() {
    let fixture = Fixture::new();
    let fits = format!("{{\"log_path\":\"{}\"}}", "x".repeat(MAX_BODY_BYTES - 15));
    assert_eq!(fits.len(), MAX_BODY_BYTES);
    assert!(fixture.raw(&put("/logger", &fits)).starts_with("HTTP/1.1 204 "));
    for length in [MAX_BODY_BYTES + 1, 4 << 20] {
        let answer = fixture.raw(&put("/logger", &"x".repeat(length)));
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(answer.ends_with(r#"{"fault_message":"Request body is larger than 51200 bytes."}"#), "{answer}");
    }
    let chunk = format!("{:x}\r\n{}\r\n", 40_000, "x".repeat(40_000));
    let chunked =
        format!("PUT /logger HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}{chunk}0\r\n\r\n");
    assert!(fixture.raw(chunked.as_bytes()).starts_with("HTTP/1.1 413 "));
    assert_eq!(fixture.seen().len(), 1);
    fixture.assert_alive();
}

#[test]
fn clients_that_leave_midway_do_no_harm() {
    let fixture = Fixture::new();
    for bytes in [
        &b""[..],
        b"GET /ver",
        b"PUT /actions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{\"action",
        b"PUT /actions HTTP/1.1\r\nHost: a\r\nContent-Length: 31\r\n\r\n{\"action_type\": \"InstanceStart\"}",
    ] {
        fixture.connect().write_all(bytes).unwrap();
    }
    fixture.assert_alive();
}

#[test]
fn a_slow_client_does_not_hold_up_others() {
    let fixture = Fixture::new();
    let mut slow = fixture.connect();
    slow.write_all(b"GET /version HTTP/1.1\r\nHo").unwrap();
    let mut slow_body = fixture.connect();
    slow_body.write_all(b"PUT /vm HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n{").unwrap();
    fixture.assert_alive();
    slow.write_all(b"st: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn a_head_that_takes_too_long_is_cut_off_but_an_idle_connection_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (sender, receiver) = control::channel().unwrap();
    let head_timeout = Duration::from_millis(50);
    let server = crate::api::serve_with(&socket, sender, "test", Times { head: head_timeout, ..TIMES }).unwrap();
    drop(receiver);

    let mut late = UnixStream::connect(&socket).unwrap();
    let mut idle = UnixStream::connect(&socket).unwrap();
    late.set_read_timeout(Some(TIMEOUT)).unwrap();
    idle.set_read_timeout(Some(TIMEOUT)).unwrap();
    let request = b"GET /foo HTTP/1.1\r\nHost: a\r\n\r\n";
    idle.write_all(request).unwrap();
    let mut answer = [0; 4096];
    assert_ne!(idle.read(&mut answer).unwrap(), 0);

    late.write_all(&request[..10]).unwrap();
    assert_eq!(late.read(&mut answer).unwrap(), 0, "closed without an answer");
    thread::sleep(2 * head_timeout);
    idle.write_all(request).unwrap();
    assert_ne!(idle.read(&mut answer).unwrap(), 0);
    server.shutdown();
}

#[test]
fn two_clients_at_once_get_their_own_answers() {
    let fixture = Fixture::new();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert_eq!(fixture.request("GET", "/vm/config", None).unwrap(), (200, Some(vm_config_json())));
                    let body = Some(json!({"state": "Paused"}));
                    assert_eq!(fixture.request("PATCH", "/vm", body).unwrap(), (204, None));
                }
            });
        }
    });
    assert_eq!(fixture.seen().len(), 200);
}

#[test]
fn connections_over_the_limit_are_turned_away_until_one_ends() {
    let fixture = Fixture::new();
    let mut open: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| fixture.connect()).collect();
    let mut answer = String::new();
    fixture.connect().read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let body = answer.split("\r\n\r\n").nth(1).unwrap();
    assert_eq!(body, r#"{"fault_message":"Too many open connections."}"#);
    assert!(answer.contains(&format!("Content-Length: {}\r\n", body.len())));
    // A connection within the limit still works, idle or not.
    let mut last = open.pop().unwrap();
    last.write_all(b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    last.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("HTTP/1.1 200 "));
    let deadline = Instant::now() + TIMEOUT;
    while fixture.request("GET", "/version", None).is_err() {
        assert!(Instant::now() < deadline, "the freed connection is never given to another client");
    }
}

#[test]
fn vmm_gone_is_an_error_at_once() {
    let mut fixture = Fixture::new();
    fixture.end_vmm();
    assert_eq!(fixture.fault("GET", "/", None), (500, "The VMM is shutting down.".to_owned()));
    let body = Some(json!({"action_type": "InstanceStart"}));
    assert_eq!(fixture.fault("PUT", "/actions", body).0, 500);
}

#[test]
fn vmm_that_ends_while_a_client_waits_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (sender, receiver) = control::channel().unwrap();
    let server = serve(&socket, sender, "test").unwrap();
    thread::scope(|scope| {
        let client = scope.spawn(|| Client::new(&socket).request("GET", "/", None, TIMEOUT));
        let waiting = loop {
            let requests = receiver.drain();
            if !requests.is_empty() {
                break requests;
            }
            thread::yield_now();
        };
        drop(receiver);
        drop(waiting);
        let error = client.join().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "The VMM ended before it answered.");
    });
    server.shutdown();
}

#[test]
fn shutdown_flushes_answers_under_way_and_removes_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (sender, receiver) = control::channel().unwrap();
    let server = serve(&socket, sender, "test").unwrap();
    let idle = UnixStream::connect(&socket).unwrap();
    thread::scope(|scope| {
        let (is_asked, asked) = mpsc::channel();
        let client =
            scope.spawn(|| Client::new(&socket).request("PATCH", "/vm", Some(&json!({"state": "Paused"})), TIMEOUT));
        scope.spawn(move || {
            loop {
                if let Some(request) = receiver.drain().pop() {
                    is_asked.send(()).unwrap();
                    thread::sleep(Duration::from_millis(50));
                    return (request.respond)(Ok(Reply::Empty));
                }
                thread::yield_now();
            }
        });
        asked.recv().unwrap();
        server.shutdown();
        assert_eq!(client.join().unwrap().unwrap(), (204, None));
    });
    assert!(!socket.exists());
    drop(idle);
}

#[test]
fn shutdown_does_not_wait_for_a_vmm_that_never_answers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (sender, receiver) = control::channel().unwrap();
    let server = serve(&socket, sender, "test").unwrap();
    thread::scope(|scope| {
        let client = scope.spawn(|| Client::new(&socket).request("GET", "/", None, TIMEOUT));
        let waiting = loop {
            if let Some(request) = receiver.drain().pop() {
                break request;
            }
            thread::yield_now();
        };
        server.shutdown();
        assert!(matches!(client.join().unwrap(), Err(ClientError::NoAnswer { .. })));
        drop(waiting);
    });
}

#[test]
fn socket_is_for_its_owner_only_and_an_existing_path_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (sender, _receiver) = control::channel().unwrap();
    let server = serve(&socket, sender.clone(), "test").unwrap();
    assert_eq!(server.socket_path(), Some(socket.as_path()));
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

    let error = serve(&socket, sender.clone(), "test").unwrap_err();
    assert!(matches!(error, ApiError::Socket(SocketError::Exists { .. })));
    assert!(error.to_string().starts_with(&format!("API socket {} exists already.", socket.display())));
    assert!(socket.exists(), "the refused server leaves the socket alone");
    drop(server);
    assert!(!socket.exists());

    std::fs::write(&socket, "mine").unwrap();
    assert!(matches!(serve(&socket, sender.clone(), "test"), Err(ApiError::Socket(SocketError::Exists { .. }))));
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "mine");

    for path in [dir.path().join("missing/api.sock"), PathBuf::from("x".repeat(200)), PathBuf::new()] {
        assert!(
            matches!(serve(&path, sender.clone(), "test"), Err(ApiError::Socket(SocketError::Bind { .. }))),
            "{path:?}"
        );
    }
}

#[test]
fn shutdown_leaves_a_file_alone_that_took_the_sockets_place() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let (sender, _receiver) = control::channel().unwrap();
    let server = serve(&socket, sender, "test").unwrap();
    std::fs::remove_file(&socket).unwrap();
    std::fs::write(&socket, "another's").unwrap();
    server.shutdown();
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "another's");
}
