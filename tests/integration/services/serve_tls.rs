//! TLS of `tvmm serve`, in builds with the feature `tls`. Its clients are curl(1) and openssl(1).

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::skip::skip;
use crate::support::service::{Service, metric, wait_until};
use crate::support::{TIMEOUT, refusal, run, scratch, signal, text};

/// Returns true if this build has TLS and the host has its clients; the calling test is skipped otherwise.
fn has_tls() -> bool {
    if !cfg!(feature = "tls") {
        skip!("tls", "this build has no TLS (--features tls)");
        return false;
    }
    let is_there = |tool: &str, version: &str| Command::new(tool).arg(version).output().is_ok();
    let has_tools = is_there("openssl", "version") && is_there("curl", "--version");
    if !has_tools {
        skip!("openssl", "there is no openssl or no curl");
    }
    has_tools
}

/// Certificates and their keys in a directory, `NAME.pem` and `NAME.key`.
struct Certificates<'a>(&'a Path);

impl<'a> Certificates<'a> {
    /// The authorities `ca` and `other`, and `server` by the first.
    fn of_two_authorities(dir: &'a Path) -> Certificates<'a> {
        let certificates = Certificates(dir);
        certificates.authority("ca");
        certificates.authority("other");
        certificates.server("server", "ca");
        certificates
    }

    fn pem(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.pem"))
    }

    fn key(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.key"))
    }

    fn make(&self, name: &str, signer: Option<&str>, extensions: &[&str]) {
        let config = self.0.join("openssl.cnf");
        std::fs::write(&config, "[req]\ndistinguished_name = dn\n[dn]\n").unwrap();
        let mut command = Command::new("openssl");
        command.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "9999",
        ]);
        command.args(["-config", text(&config), "-subj", &format!("/CN={name}")]);
        command.args(["-keyout", text(&self.key(name)), "-out", text(&self.pem(name))]);
        if let Some(signer) = signer {
            command.args(["-CA", text(&self.pem(signer)), "-CAkey", text(&self.key(signer))]);
        }
        for extension in extensions {
            command.args(["-addext", extension]);
        }
        let made = command.output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        std::fs::set_permissions(self.key(name), Permissions::from_mode(0o600)).unwrap();
    }

    fn authority(&self, name: &str) {
        self.make(name, None, &["basicConstraints=critical,CA:TRUE"]);
    }

    fn server(&self, name: &str, signer: &str) {
        let names = "subjectAltName=DNS:localhost,IP:127.0.0.1";
        self.make(name, Some(signer), &["basicConstraints=critical,CA:FALSE", names]);
    }

    fn client(&self, name: &str, signer: &str) {
        let extensions = ["basicConstraints=critical,CA:FALSE", "extendedKeyUsage=clientAuth"];
        self.make(name, Some(signer), &extensions);
    }

    /// The options of a service with this certificate.
    fn options(&self, name: &str) -> Vec<String> {
        let files = [("--tls-cert", self.pem(name)), ("--tls-key", self.key(name))];
        files.iter().flat_map(|(option, path)| [(*option).to_string(), text(path).to_string()]).collect()
    }
}

fn start(dir: &Path, listen: &str, more: &[String]) -> Service {
    let mut options = vec!["--listen", listen];
    options.extend(more.iter().map(String::as_str));
    Service::start(&dir.join("state"), &options)
}

fn port(service: &Service) -> &str {
    service.url.as_deref().unwrap().rsplit_once(':').unwrap().1
}

/// Asks by curl, which trusts `roots`.
fn curl(service: &Service, path: &str, roots: &Path, more: &[&str]) -> Output {
    let url = format!("https://localhost:{}{path}", port(service));
    let limit = TIMEOUT.as_secs().to_string();
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", &limit, "--noproxy", "*", "--cacert", text(roots)]);
    command.args(more).arg(url).output().unwrap()
}

fn is_answered(service: &Service, roots: &Path, more: &[&str]) -> bool {
    let output = curl(service, "/functions", roots, more);
    output.status.success() && output.stdout == b"[]"
}

#[cfg(not(feature = "tls"))]
#[test]
fn build_without_tls_says_so() {
    let dir = scratch();
    let state = dir.path().join("state");
    let args =
        ["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--tls-cert", "/c.pem", "--tls-key", "/c.key"];
    let said = refusal(&run(&args));
    assert!(said.contains("/c.pem") && said.contains("--features tls"), "{said}");
}

#[test]
fn clients_over_tcp_speak_tls_or_get_no_answer() {
    if !has_tls() {
        return;
    }
    let dir = scratch();
    let certificates = Certificates::of_two_authorities(dir.path());
    let service = start(dir.path(), "127.0.0.1:0", &certificates.options("server"));
    assert!(service.url.as_deref().unwrap().starts_with("https://127.0.0.1:"));
    let roots = certificates.pem("ca");
    assert!(is_answered(&service, &roots, &[]));
    assert!(is_answered(&service, &roots, &["--tls13-ciphers", "TLS_AES_128_GCM_SHA256"]));
    // Two requests on one connection, and a large answer.
    let url = format!("https://localhost:{}/openapi.json", port(&service));
    let twice = curl(&service, "/openapi.json", &roots, &[&url]);
    let document = service.get("/openapi.json");
    let answers = serde_json::Deserializer::from_slice(&twice.stdout).into_iter::<Value>();
    assert_eq!(answers.map(Result::unwrap).collect::<Vec<_>>(), [document.clone(), document]);
    let before = metric(&service, "tvmm_requests_refused_total{reason=\"handshake\"}");
    assert!(!is_answered(&service, &certificates.pem("other"), &[]));
    assert!(!is_answered(&service, &roots, &["--tls-max", "1.2"]));
    let mut plain = TcpStream::connect(format!("127.0.0.1:{}", port(&service))).unwrap();
    plain.set_read_timeout(Some(TIMEOUT)).unwrap();
    plain.write_all(b"GET /functions HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));
    wait_until("each is counted", || {
        metric(&service, "tvmm_requests_refused_total{reason=\"handshake\"}") == before + 3
    });
    // The Unix socket stays as it is.
    service.get("/functions");
    assert!(service.terminate().success());
}

#[test]
fn certificate_of_a_client_lets_it_in_and_is_recorded() {
    if !has_tls() {
        return;
    }
    let dir = scratch();
    let certificates = Certificates::of_two_authorities(dir.path());
    certificates.client("client", "ca");
    certificates.client("stranger", "other");
    let roots = certificates.pem("ca");
    let log = dir.path().join("audit");
    let more = ["--tls-client-ca", text(&roots), "--audit-log", text(&log)].map(String::from);
    // No tokens: the certificate is enough, also where other hosts can connect.
    let service = start(dir.path(), "0.0.0.0:0", &[certificates.options("server"), more.to_vec()].concat());
    let by = |name: &str| {
        ["--cert".into(), text(&certificates.pem(name)).into(), "--key".into(), text(&certificates.key(name)).into()]
    };
    let asks = |who: &[String]| is_answered(&service, &roots, &who.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!asks(&[]));
    assert!(!asks(&by("stranger")));
    assert!(asks(&by("client")));
    let der =
        Command::new("openssl").args(["x509", "-in", text(&certificates.pem("client")), "-outform", "DER"]).output();
    let der_file = dir.path().join("client.der");
    std::fs::write(&der_file, der.unwrap().stdout).unwrap();
    let summed = Command::new("sha256sum").arg(&der_file).output().unwrap();
    let digest = String::from_utf8(summed.stdout).unwrap();
    let expected = format!("certificate {}", digest.split(' ').next().unwrap());
    wait_until("it is recorded", || std::fs::read_to_string(&log).unwrap().contains(&expected));
    assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 1);
}

#[test]
fn certificates_are_read_again_and_bad_ones_change_nothing() {
    if !has_tls() {
        return;
    }
    let dir = scratch();
    let certificates = Certificates::of_two_authorities(dir.path());
    let service = start(dir.path(), "127.0.0.1:0", &certificates.options("server"));
    assert!(is_answered(&service, &certificates.pem("ca"), &[]));
    certificates.server("server", "other");
    assert!(is_answered(&service, &certificates.pem("ca"), &[]));
    signal(service.pid(), Signal::HUP);
    wait_until("it has the new certificate", || is_answered(&service, &certificates.pem("other"), &[]));
    std::fs::write(certificates.pem("server"), "no certificate").unwrap();
    signal(service.pid(), Signal::HUP);
    wait_until("it is counted", || metric(&service, "tvmm_reloads_failed_total ") == 1);
    assert!(is_answered(&service, &certificates.pem("other"), &[]));
}

#[test]
fn files_that_are_no_certificate_and_its_private_key_are_refused() {
    if !has_tls() {
        return;
    }
    let dir = scratch();
    let certificates = Certificates(dir.path());
    certificates.authority("ca");
    certificates.server("server", "ca");
    certificates.server("second", "ca");
    let state = dir.path().join("state");
    let pem = certificates.pem("server");
    let key = certificates.key("server");
    let serve = |cert: &Path, key: &Path| {
        let args = ["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--tls-cert", text(cert)];
        refusal(&run(&[&args[..], &["--tls-key", text(key)]].concat()))
    };
    let said = serve(&pem, &certificates.key("second"));
    assert!(said.starts_with("tvmm: Cannot use ") && said.contains(text(&pem)), "{said}");
    assert!(serve(&key, &key).contains("no certificate"));
    std::fs::set_permissions(&pem, Permissions::from_mode(0o600)).unwrap();
    assert!(serve(&pem, &pem).contains("Give the private key in PEM form"));
    assert!(serve(&dir.path().join("missing"), &key).contains("missing"));
    std::fs::set_permissions(&key, Permissions::from_mode(0o640)).unwrap();
    let said = serve(&pem, &key);
    assert!(said.contains("640") && said.contains("chmod 600") && said.contains(text(&key)), "{said}");
    let alone = run(&["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--tls-cert", text(&pem)]);
    assert_eq!(alone.status.code(), Some(2));
}

#[test]
fn clients_that_say_nothing_or_do_not_read_lose_their_place() {
    if !has_tls() {
        return;
    }
    let dir = scratch();
    let certificates = Certificates(dir.path());
    certificates.authority("ca");
    certificates.server("server", "ca");
    let mut options = certificates.options("server");
    options.extend(["--max-connections", "1"].map(String::from));
    let service = start(dir.path(), "127.0.0.1:0", &options);
    let address = format!("127.0.0.1:{}", port(&service));
    // No handshake.
    let mut silent = TcpStream::connect(&address).unwrap();
    silent.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(silent.read_to_end(&mut Vec::new()).unwrap(), 0);
    // A client that has begun to read, so that it has the only place, and then does not read on.
    let mut deaf = Command::new("openssl");
    deaf.args(["s_client", "-quiet", "-no_ign_eof", "-connect", &address, "-CAfile", text(&certificates.pem("ca"))]);
    let deaf = deaf.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut deaf = deaf.unwrap();
    let requests = "GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(400);
    deaf.stdin.as_mut().unwrap().write_all(requests.as_bytes()).unwrap();
    let mut begun = [0; 12];
    deaf.stdout.as_mut().unwrap().read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"HTTP/1.1 200");
    wait_until("another client has its place", || is_answered(&service, &certificates.pem("ca"), &[]));
    assert!(deaf.try_wait().unwrap().is_none(), "the client has ended by itself");
    deaf.kill().unwrap();
    deaf.wait().unwrap();
}
