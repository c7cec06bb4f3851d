//! Tokens of `tvmm serve`: roles, refusals, limits, the token file and its changes, pages of other sites.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::service::{Service, wait_until};
use crate::support::{TIMEOUT, refusal, run, run_ok, scratch, signal, text};

/// A service with tokens, on TCP and on its Unix socket.
struct Guarded {
    service: Service,
    tokens: PathBuf,
    invoke: String,
    operate: String,
    admin: String,
}

/// Makes a token, and returns its secret.
fn token(file: &Path, name: &str, role: &str, more: &[&str]) -> String {
    let args = [&["token", "new", "--name", name, "--role", role, "--add", text(file)], more].concat();
    run_ok(&args).trim().to_string()
}

impl Guarded {
    fn start(dir: &Path, more: &[&str]) -> Guarded {
        let tokens = dir.join("tokens");
        let invoke = token(&tokens, "robot", "invoke", &[]);
        let operate = token(&tokens, "operator", "operate", &[]);
        let admin = token(&tokens, "owner", "admin", &[]);
        let options = [&["--listen", "127.0.0.1:0", "--tokens", text(&tokens)], more].concat();
        let service = Service::start(&dir.join("state"), &options);
        Guarded { service, tokens, invoke, operate, admin }
    }

    fn ask(&self, secret: &str, method: &str, path: &str, body: Option<Value>) -> Answer {
        ask(&self.service, method, path, &[&format!("Authorization: Bearer {secret}")], body)
    }

    fn status(&self, secret: &str, method: &str, path: &str) -> u16 {
        self.ask(secret, method, path, None).status
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Value,
}

impl Answer {
    fn message(&self) -> &str {
        self.body["message"].as_str().unwrap_or_else(|| panic!("no message: {} {}", self.head, self.body))
    }

    /// The value of a header.
    fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(": "));
        headers.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Sends bytes over TCP, and reads until the service closes.
fn exchange(service: &Service, bytes: &[u8]) -> String {
    let address = service.url.as_deref().unwrap().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // A service that refuses early may close before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// A request over TCP with these headers.
fn ask(service: &Service, method: &str, path: &str, headers: &[&str], body: Option<Value>) -> Answer {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|header| header.starts_with("Host:")) {
        head += "Host: localhost\r\n";
    }
    headers.iter().for_each(|header| head += &format!("{header}\r\n"));
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    if !body.is_empty() {
        head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    let answer = exchange(service, format!("{head}\r\n{body}").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Answer { status, head: head.to_string(), body: serde_json::from_str(body).unwrap_or(Value::Null) }
}

/// The count of a reason in the metrics.
fn refused(service: &Service, reason: &str) -> u64 {
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let metrics = crate::support::exchange(service.socket(), request);
    let name = format!("tvmm_requests_refused_total{{reason=\"{reason}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
}

#[test]
fn every_path_but_a_few_needs_a_token() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    let document = guarded.service.get("/openapi.json");
    assert_eq!(document["components"]["securitySchemes"]["token"]["scheme"], "bearer");
    let mut asked = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let security = operation["security"].as_array().expect("each operation has its security");
            let filled = path.replace("{id}", "x").replace("{name}", "x").replace("{namespace}", "x");
            let answer = ask(&guarded.service, &method.to_uppercase(), &filled, &["Forwarded: for=x"], None);
            if security.is_empty() {
                assert!(["/health", "/ui"].contains(&path.as_str()), "{path} is open");
                assert_eq!(answer.status, 200, "{path}");
                continue;
            }
            asked += 1;
            // From the twenty-first on, the address is told to wait.
            let expected = if asked <= 20 { 401 } else { 429 };
            assert_eq!(answer.status, expected, "{method} {path}: {}", answer.body);
            let has_header = if expected == 401 { "www-authenticate" } else { "retry-after" };
            assert!(answer.header(has_header).is_some(), "{}", answer.head);
        }
    }
    assert!(asked > 30, "{asked}");
    assert_eq!(refused(&guarded.service, "token"), 20);
    assert_eq!(refused(&guarded.service, "throttled"), asked - 20);
    // A valid token is answered also from there, and the Unix socket needs none.
    assert_eq!(guarded.status(&guarded.invoke, "GET", "/functions"), 200);
    guarded.service.get("/functions");
}

#[test]
fn wrong_credentials_are_refused() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    let secret = &guarded.admin;
    for header in [
        format!("Authorization: Bearer {secret}x"),
        format!("Authorization: Bearer {}", &secret[..secret.len() - 1]),
        format!("Authorization: Bearer {}", secret.to_uppercase()),
        format!("Authorization: Basic {secret}"),
        format!("Authorization: {secret}"),
        "Authorization: Bearer".to_string(),
        format!("X-Token: {secret}"),
    ] {
        let answer = ask(&guarded.service, "GET", "/functions", &[&header], None);
        assert_eq!(answer.status, 401, "{header}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert!(answer.message().starts_with("Cannot answer this request: "), "{}", answer.message());
        assert!(!answer.message().contains(secret), "{}", answer.message());
    }
    let lower = format!("authorization: bearer {secret}");
    assert_eq!(ask(&guarded.service, "GET", "/functions", &[&lower], None).status, 200);
}

#[test]
fn each_role_has_its_rights_and_no_more() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    guarded.service.snapshot_touch("base");
    let function = json!({ "func_name": "other", "mem_size": 64 });
    let invocation = json!({ "func_name": "touch", "params": "pages=1", "keep": false });
    let with_options =
        json!({ "func_name": "touch", "ssId": "base", "params": "pages=1", "tvmm": { "dram_mib": 1 }, "keep": false });
    let recorded = json!({ "func_name": "touch", "ssId": "base", "params": "pages=1", "record": "pagemap" });
    let network = json!({ "host_dev_name": "tap9", "host_netns": true });
    // The statuses are those for invoke, operate and admin.
    for (method, path, body, statuses) in [
        ("GET", "/functions", None, [200, 200, 200]),
        ("GET", "/functions/touch", None, [200, 200, 200]),
        ("GET", "/traces", None, [200, 200, 200]),
        ("GET", "/openapi.json", None, [200, 200, 200]),
        ("POST", "/invocations", Some(invocation), [200, 200, 200]),
        ("POST", "/invocations", Some(with_options), [403, 200, 200]),
        ("POST", "/invocations", Some(recorded), [403, 200, 200]),
        ("POST", "/functions", Some(function), [403, 200, 200]),
        ("GET", "/vms", None, [403, 200, 200]),
        ("GET", "/snapshots", None, [403, 200, 200]),
        ("GET", "/ui/data", None, [403, 200, 200]),
        ("GET", "/net-ifaces", None, [403, 200, 200]),
        ("DELETE", "/functions/unknown", None, [403, 404, 404]),
        ("POST", "/vms/unknown/rewind", None, [403, 404, 404]),
        ("PUT", "/net-ifaces/a", Some(network), [403, 403, 200]),
        ("DELETE", "/net-ifaces/a", None, [403, 403, 200]),
        ("GET", "/unknown", None, [403, 403, 404]),
    ] {
        let secrets = [&guarded.invoke, &guarded.operate, &guarded.admin];
        for ((secret, expected), role) in secrets.into_iter().zip(statuses).zip(["invoke", "operate", "admin"]) {
            let answer = guarded.ask(secret, method, path, body.clone());
            assert_eq!(answer.status, expected, "{method} {path} by {role}: {}", answer.body);
            if expected == 403 {
                let needed = if statuses[1] == 403 { "`admin`" } else { "`operate`" };
                assert!(answer.message().contains(needed), "{}", answer.message());
            }
        }
    }
    assert!(refused(&guarded.service, "role") > 10);
}

#[test]
fn metrics_are_for_this_host_unless_they_are_open() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    let forwarded = ["X-Forwarded-For: 192.0.2.1"];
    assert_eq!(ask(&guarded.service, "GET", "/metrics", &[], None).status, 200);
    assert_eq!(ask(&guarded.service, "GET", "/metrics", &forwarded, None).status, 401);
    assert_eq!(ask(&guarded.service, "GET", "/metrics", &["Authorization: Bearer x"], None).status, 401);
    assert_eq!(guarded.status(&guarded.invoke, "GET", "/metrics"), 200);
    drop(guarded);
    let dir = scratch();
    let open = Guarded::start(dir.path(), &["--open-metrics"]);
    assert_eq!(ask(&open.service, "GET", "/metrics", &forwarded, None).status, 200);
}

#[test]
fn token_makes_no_more_requests_a_second_than_it_may() {
    let dir = scratch();
    let tokens = dir.path().join("tokens");
    let secret = token(&tokens, "slow", "invoke", &["--max-requests", "1"]);
    let guarded = Guarded::start(dir.path(), &[]);
    let bearer = format!("Authorization: Bearer {secret}");
    // On a slow host a second may pass between two requests, but not between all of them.
    wait_until("a request is refused", || {
        let answer = ask(&guarded.service, "GET", "/functions", &[&bearer], None);
        assert!([200, 429].contains(&answer.status), "{}", answer.body);
        if answer.status == 429 {
            assert_eq!(answer.header("retry-after"), Some("1"));
            assert!(answer.message().contains("`slow`"), "{}", answer.message());
        }
        answer.status == 429
    });
    assert!(refused(&guarded.service, "rate") > 0);
    assert_eq!(guarded.status(&guarded.invoke, "GET", "/functions"), 200);
    wait_until("it is answered again", || ask(&guarded.service, "GET", "/functions", &[&bearer], None).status == 200);
}

#[test]
fn token_has_no_more_invocations_at_once_than_it_may() {
    let dir = scratch();
    let tokens = dir.path().join("tokens");
    let few = token(&tokens, "few", "operate", &["--max-running", "1"]);
    let guarded = Guarded::start(dir.path(), &["--max-running", "4"]);
    let service = &guarded.service;
    for function in ["spin", "hello"] {
        service.ok("POST", "/functions", Some(json!({ "func_name": function, "mem_size": 64 })));
    }
    let body = json!({ "func_name": "spin", "params": "ms=3000000", "timeout_ms": 3_600_000 }).to_string();
    let address = service.url.as_deref().unwrap().trim_start_matches("http://");
    let mut stream = TcpStream::connect(address).unwrap();
    let head = "POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    write!(stream, "{head}Authorization: Bearer {few}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    wait_until("the invocation runs", || {
        let vms = service.get("/vms");
        vms.as_array().unwrap().iter().any(|vm| vm["state"] == "busy" && vm["func_name"] == "spin")
    });
    let hello = || Some(json!({ "func_name": "hello", "keep": false }));
    let is_refused = || {
        let answer = guarded.ask(&few, "POST", "/invocations", hello());
        assert!([200, 429].contains(&answer.status), "{}", answer.body);
        if answer.status == 429 {
            assert!(
                answer.message().contains("`few`") && answer.header("retry-after").is_some(),
                "{}",
                answer.message()
            );
        }
        answer.status == 429
    };
    assert!(is_refused());
    assert_eq!(guarded.ask(&few, "POST", "/vms", Some(json!({ "func_name": "hello" }))).status, 429);
    assert_eq!(guarded.status(&few, "GET", "/functions"), 200);
    assert_eq!(guarded.ask(&guarded.invoke, "POST", "/invocations", hello()).status, 200);
    assert_eq!(refused(service, "running"), 2);
    // Neither a client that leaves nor a file that is read again makes room.
    drop(stream);
    let added = token(&tokens, "added", "invoke", &[]);
    signal(service.pid(), Signal::HUP);
    wait_until("the file was read again", || guarded.status(&added, "GET", "/functions") == 200);
    assert!(is_refused());
    let vms = service.get("/vms");
    let spinning = vms.as_array().unwrap().iter().find(|vm| vm["func_name"] == "spin").unwrap();
    service.ok("DELETE", &format!("/vms/{}", spinning["vmId"].as_str().unwrap()), None);
    wait_until("there is room", || !is_refused());
}

#[test]
fn token_file_is_read_again_and_a_bad_one_changes_nothing() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    assert_eq!(guarded.status(&guarded.operate, "GET", "/vms"), 200);
    let added = token(&guarded.tokens, "new", "invoke", &[]);
    assert_eq!(guarded.status(&added, "GET", "/functions"), 401);
    signal(guarded.service.pid(), Signal::HUP);
    wait_until("the new token is known", || guarded.status(&added, "GET", "/functions") == 200);
    // A token that is removed ends at once, on open connections, too.
    let lines = std::fs::read_to_string(&guarded.tokens).unwrap();
    let kept: String = lines.lines().filter(|line| !line.contains("\"new\"")).map(|line| format!("{line}\n")).collect();
    std::fs::write(&guarded.tokens, &kept).unwrap();
    signal(guarded.service.pid(), Signal::HUP);
    wait_until("the token is gone", || [401, 429].contains(&guarded.status(&added, "GET", "/functions")));
    let failed = || {
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let metrics = crate::support::exchange(guarded.service.socket(), request);
        metrics.lines().find_map(|line| line.strip_prefix("tvmm_reloads_failed_total ")?.parse::<u64>().ok())
    };
    std::fs::write(&guarded.tokens, format!("{kept}nonsense\n")).unwrap();
    signal(guarded.service.pid(), Signal::HUP);
    wait_until("the bad line is counted", || failed() == Some(1));
    std::fs::write(&guarded.tokens, "").unwrap();
    std::fs::set_permissions(&guarded.tokens, Permissions::from_mode(0o644)).unwrap();
    signal(guarded.service.pid(), Signal::HUP);
    wait_until("the bad mode is counted", || failed() == Some(2));
    assert_eq!(guarded.status(&guarded.operate, "GET", "/vms"), 200);
    // An empty file is none of these faults: no token is valid any more.
    std::fs::set_permissions(&guarded.tokens, Permissions::from_mode(0o600)).unwrap();
    signal(guarded.service.pid(), Signal::HUP);
    wait_until("no token is left", || [401, 429].contains(&guarded.status(&guarded.operate, "GET", "/vms")));
    assert!(guarded.service.terminate().success());
}

#[test]
fn service_starts_with_no_token_file_that_others_may_read_or_that_is_wrong() {
    let dir = scratch();
    let file = dir.path().join("tokens");
    let state = dir.path().join("state");
    let serve = || {
        let args = ["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--tokens", text(&file)];
        refusal(&run(&args))
    };
    assert!(serve().contains("tokens"), "it does not exist");
    token(&file, "a", "invoke", &[]);
    let line = std::fs::read_to_string(&file).unwrap();
    for mode in [0o604, 0o640, 0o620, 0o644, 0o666] {
        std::fs::set_permissions(&file, Permissions::from_mode(mode)).unwrap();
        let said = serve();
        assert!(said.contains(&format!("{mode:o}")) && said.contains("chmod 600"), "{said}");
    }
    std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&file, format!("# Tokens\n{line}{line}")).unwrap();
    let said = serve();
    assert!(said.contains("line 3") && said.contains("`a`"), "{said}");
    std::fs::write(&file, line.replace("invoke", "root")).unwrap();
    let said = serve();
    assert!(said.contains("line 1") && said.contains("root") && said.contains("invoke"), "{said}");
}

#[test]
fn service_that_other_hosts_can_reach_needs_tokens() {
    let dir = scratch();
    let state = dir.path().join("state");
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:8080", "[::ffff:192.0.2.1]:8080"] {
        let said = refusal(&run(&["serve", "--dir", text(&state), "--listen", address]));
        assert!(said.starts_with(&format!("tvmm: Cannot listen on {address}")), "{said}");
        assert!(said.contains("--tokens") && said.contains("tvmm token new"), "{said}");
    }
    assert!(!state.exists());
    let guarded = Guarded::start(dir.path(), &[]);
    drop(guarded);
    let tokens = dir.path().join("tokens");
    let options = ["--listen", "0.0.0.0:0", "--tokens", text(&tokens)];
    let service = Service::start(&dir.path().join("wide"), &options);
    let port = service.url.as_deref().unwrap().rsplit_once(':').unwrap().1;
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    stream.write_all(b"GET /functions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    // Options that would do nothing are refused.
    for alone in [vec!["--open-metrics"], vec!["--tokens", text(&tokens)], vec!["--cors-origin", "https://a.example"]] {
        let socket = dir.path().join("s.sock");
        let args = [vec!["serve", "--dir", text(&state), "--listen-unix", text(&socket)], alone].concat();
        assert_eq!(run(&args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn tokens_are_made_with_names_of_their_own_in_files_of_their_own() {
    let dir = scratch();
    let file = dir.path().join("tokens");
    let first = token(&file, "a", "invoke", &["--max-requests", "9"]);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
    let line: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let expected = json!({ "name": "a", "role": "invoke", "sha256": line["sha256"], "max_requests_per_s": 9 });
    assert_eq!(line, expected);
    // The file has the digest only, as sha256sum(1) makes it.
    assert!(!std::fs::read_to_string(&file).unwrap().contains(&first["tvmm_".len()..]));
    let secret_file = dir.path().join("secret");
    std::fs::write(&secret_file, &first).unwrap();
    let summed = std::process::Command::new("sha256sum").arg(&secret_file).output().unwrap();
    let summed = String::from_utf8(summed.stdout).unwrap();
    assert_eq!(summed.split(' ').next(), line["sha256"].as_str());
    let printed = run_ok(&["token", "new", "--name", "b", "--role", "admin"]);
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("tvmm_") && lines[0] != first, "{printed}");
    assert_eq!(serde_json::from_str::<Value>(lines[1]).unwrap()["role"], "admin");
    let new = |more: &[&str]| run(&[&["token", "new", "--role", "invoke"], more].concat());
    let said = refusal(&new(&["--name", "a", "--add", text(&file)]));
    assert!(said.contains("`a`") && said.contains("--name"), "{said}");
    assert!(refusal(&new(&["--name", "a b"])).contains("`a b` is no name"));
    std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    assert!(refusal(&new(&["--name", "c", "--add", text(&file)])).contains("chmod 600"));
    let link = dir.path().join("link");
    symlink(&file, &link).unwrap();
    assert!(refusal(&new(&["--name", "c", "--add", text(&link)])).contains("link"));
    assert_eq!(new(&["--name", "c", "--max-requests", "0"]).status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 1);
}

#[test]
fn only_pages_of_sites_that_are_let_in_read_answers() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &["--cors-origin", "https://app.example"]);
    let app = "Origin: https://app.example";
    let bearer = format!("Authorization: Bearer {}", guarded.invoke);
    let asks = "Access-Control-Request-Method: POST";
    let preflight = ask(&guarded.service, "OPTIONS", "/invocations", &[app, asks], None);
    assert_eq!(preflight.status, 204);
    assert_eq!(preflight.header("access-control-allow-origin"), Some("https://app.example"));
    let allowed = preflight.header("access-control-allow-headers").unwrap();
    assert!(allowed.contains("authorization") && allowed.contains("content-type"), "{allowed}");
    assert!(preflight.header("access-control-allow-credentials").is_none());
    let answer = ask(&guarded.service, "GET", "/functions", &[app, &bearer], None);
    assert_eq!(answer.status, 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"));
    assert_eq!(answer.header("vary"), Some("origin"));
    // The page can read the refusal, too.
    let answer = ask(&guarded.service, "GET", "/functions", &[app], None);
    assert_eq!(answer.status, 401);
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"));
    for origin in ["http://app.example", "https://app.example:444", "https://x.app.example", "null"] {
        let origin = format!("Origin: {origin}");
        let refused = ask(&guarded.service, "OPTIONS", "/invocations", &[&origin, asks], None);
        assert_eq!(refused.status, 403, "{origin}");
        assert!(refused.header("access-control-allow-origin").is_none());
        // A token does not let a page in.
        assert_eq!(ask(&guarded.service, "GET", "/functions", &[&origin, &bearer], None).status, 403, "{origin}");
    }
    let host = "Host: evil.example";
    assert_eq!(ask(&guarded.service, "GET", "/functions", &[host, &bearer], None).status, 403);
    assert_eq!(ask(&guarded.service, "GET", "/health", &[host], None).status, 403);
    assert_eq!(refused(&guarded.service, "host"), 2);
    assert_eq!(refused(&guarded.service, "origin"), 8);
    for wrong in ["*", "app.example", "https://app.example/", "https://App.example"] {
        let args = ["serve", "--dir", text(dir.path()), "--listen", "127.0.0.1:0", "--cors-origin", wrong];
        assert_eq!(run(&args).status.code(), Some(2), "{wrong}");
    }
}

#[test]
fn page_asks_for_a_token_and_has_no_data_of_its_own() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    let page = ask(&guarded.service, "GET", "/ui", &[], None);
    assert_eq!(page.status, 200);
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    // There is no cookie that another site's page could make a browser send.
    assert!(page.header("set-cookie").is_none());
    assert_eq!(ask(&guarded.service, "GET", "/ui/data", &[], None).status, 401);
    assert_eq!(guarded.status(&guarded.operate, "GET", "/ui/data"), 200);
}

#[test]
fn requests_that_are_too_large_or_do_not_end_are_refused() {
    let dir = scratch();
    let guarded = Guarded::start(dir.path(), &[]);
    let authorization =
        format!("Host: localhost\r\nAuthorization: Bearer {}\r\nConnection: close\r\n", guarded.operate);
    let answered = |request: String| exchange(&guarded.service, request.as_bytes()).split(' ').nth(1).map(String::from);
    let head = format!("GET /functions HTTP/1.1\r\n{authorization}X: {}\r\n\r\n", "x".repeat(128 << 10));
    assert_eq!(answered(head).as_deref(), Some("431"));
    let many = "X: y\r\n".repeat(200);
    assert_eq!(answered(format!("GET /functions HTTP/1.1\r\n{authorization}{many}\r\n")).as_deref(), Some("431"));
    let json = "Content-Type: application/json\r\n";
    let post = |rest: &str| format!("POST /functions HTTP/1.1\r\n{authorization}{rest}");
    let large = format!("{json}Content-Length: 100000\r\n\r\n{}", " ".repeat(100_000));
    assert_eq!(answered(post(&large)).as_deref(), Some("413"));
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"] {
        let simple = format!("Content-Type: {kind}\r\nContent-Length: 2\r\n\r\n{{}}");
        assert_eq!(answered(post(&simple)).as_deref(), Some("415"), "{kind}");
    }
    // A body that does not come, and a head that does not end.
    assert_eq!(answered(post(&format!("{json}Content-Length: 10\r\n\r\n{{"))).as_deref(), Some("408"));
    assert_eq!(answered(format!("GET /functions HTTP/1.1\r\n{authorization}X: ")), None);
}
