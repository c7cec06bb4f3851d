//! The service of systemd that comes with tvmm: its command and its options.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::json;

use crate::skip::skip;
use crate::support::nobody::as_nobody;
use crate::support::service::Service;
use crate::support::{scratch, signal, text, tvmm};

fn resource(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/systemd").join(name)
}

/// The values of a key of the unit, in their order.
fn values(key: &str) -> Vec<String> {
    let unit = fs::read_to_string(resource("tvmm.service")).unwrap();
    let of = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_string);
    unit.lines().filter_map(of).collect()
}

#[test]
fn the_units_command_serves_without_any_right_of_root() {
    let dir = scratch();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    chown(&state, Some(65534), Some(65534)).unwrap();
    let command = values("ExecStart").remove(0);
    assert!(command.contains("/var/lib/tvmm/") && command.contains("/run/tvmm/"), "{command}");
    let command = command.replace("/var/lib/tvmm/", &format!("{}/", text(&state)));
    let command = command.replace("/run/tvmm/", &format!("{}/", text(&state)));
    let mut words = command.split(' ');
    assert_eq!(words.next(), Some("/usr/local/bin/tvmm"));
    let args: Vec<&str> = words.collect();
    let Some(command) = as_nobody(dir.path(), &args) else { return };
    let mut service = Service::of(command, state.join("serve.sock"), &args, Stdio::inherit());
    service.snapshot_touch("s");
    // Faults of this restore are served by a userfaultfd.
    let body = json!({ "func_name": "touch", "ssId": "s", "policy": "firecracker-uffd", "params": "pages=200" });
    service.invoke(body);
    signal(service.pid(), Signal::TERM);
    assert!(service.wait().success());
}

#[test]
fn systemd_knows_the_units_options() {
    let probe = Command::new("systemd-analyze").arg("--version").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        skip!("systemd", "there is no systemd-analyze");
        return;
    }
    let dir = scratch();
    // It looks for the program as well.
    let unit = fs::read_to_string(resource("tvmm.service")).unwrap();
    let program = tvmm().get_program().to_owned();
    let unit = unit.replace("/usr/local/bin/tvmm", program.to_str().unwrap());
    let path = dir.path().join("tvmm.service");
    fs::write(&path, unit).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let about_it: Vec<&str> = said.lines().filter(|line| line.contains("tvmm.service")).collect();
    assert!(about_it.is_empty(), "{said}");
}
