//! The client's errors, each against a server that provokes it.

use std::os::unix::net::UnixListener;

use super::*;

/// Serves one connection: reads the request, answers with `bytes`, closes.
fn one_answer(bytes: &'static [u8]) -> (tempfile::TempDir, Client, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]).unwrap();
        stream.write_all(bytes).unwrap();
    });
    (dir, Client::new(socket), thread)
}

fn error_for(bytes: &'static [u8]) -> ClientError {
    let (_dir, client, thread) = one_answer(bytes);
    let error = client.request("GET", "/", None, TIMEOUT).unwrap_err();
    thread.join().unwrap();
    error
}

#[test]
fn request_without_a_socket_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let client = Client::new(&socket);
    assert_eq!(client.socket_path(), socket);
    let error = client.request("GET", "/", None, TIMEOUT).unwrap_err();
    assert!(matches!(error, ClientError::NoSocket { .. }), "{error}");

    drop(UnixListener::bind(&socket).unwrap());
    let error = client.request("GET", "/", None, TIMEOUT).unwrap_err();
    assert!(matches!(error, ClientError::NotServed { .. }), "{error}");

    let error = Client::new("/x".repeat(200)).request("GET", "/", None, TIMEOUT).unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
}

#[test]
fn request_that_is_not_answered_in_time_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let error = Client::new(&socket).request("GET", "/version", None, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.to_string(), "GET /version was not answered within 20 ms.");
}

#[test]
fn answers_that_make_no_sense_are_told_apart() {
    assert!(matches!(error_for(b""), ClientError::NoAnswer { .. }));
    assert!(matches!(error_for(b"SSH-2.0-x\r\n"), ClientError::NoAnswer { .. }));
    assert!(matches!(error_for(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"), ClientError::NoAnswer { .. }));
    let error = error_for(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    assert_eq!(error.to_string(), "GET / was answered with status 200 and a body that is not JSON.");
    let error = error_for(b"HTTP/1.1 418 Teapot\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(error.to_string(), "GET / was answered with status 418.");
    let error = error_for(b"HTTP/1.1 400 Bad\r\nContent-Length: 24\r\n\r\n{\"fault_message\": \"No.\"}");
    assert!(matches!(error, ClientError::Fault { status: 400, message } if message == "No."));
}

#[test]
fn requests_that_cannot_be_http_are_refused_before_they_are_sent() {
    let client = Client::new("/nonexistent");
    for (method, path) in [("G T", "/"), ("GET", "/a b"), ("GET", "version"), ("GET", ""), ("GET", "http://x/")] {
        let error = client.request(method, path, None, TIMEOUT).unwrap_err();
        assert!(matches!(error, ClientError::BadRequest { .. }), "{method} {path}: {error}");
    }
}
