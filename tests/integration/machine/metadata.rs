//! Metadata that the host gives to a VM, and to each clone its own.

use serde_json::{Value, json};

use crate::support::{Vm, config, run_err, scratch, text};

fn metadata(vm: &mut Vm) -> Value {
    serde_json::from_str(vm.call("metadata").value("json")).unwrap()
}

#[test]
fn clones_are_told_apart_by_their_metadata() {
    let dir = scratch();
    let mut config = config(1, 64);
    config["tvmm"] = json!({ "metadata": { "name": "origin", "role": "web" } });
    let mut vm = Vm::boot(&config);
    assert_eq!(metadata(&mut vm), json!({ "name": "origin", "role": "web" }));
    let out = dir.path().join("snapshot");
    vm.snapshot(&out, &[]);
    let mut same = Vm::restore(&out, "firecracker");
    assert_eq!(metadata(&mut same), json!({ "name": "origin", "role": "web" }));
    let mut clone = Vm::restore_with(&out, "firecracker", &["--metadata", "name=clone", "--metadata", "port=80=x"]);
    assert_eq!(metadata(&mut clone), json!({ "name": "clone", "role": "web", "port": "80=x" }));
    let mut by_api = Vm::wait_for_api();
    let load = json!({ "snapshot_path": text(&out), "resume_vm": true, "tvmm": { "metadata": { "name": "api" } } });
    by_api.api_ok("PUT", "/snapshot/load", Some(load));
    assert_eq!(metadata(&mut by_api)["name"], "api");
    let again = dir.path().join("again");
    by_api.snapshot(&again, &[]);
    assert_eq!(metadata(&mut Vm::restore(&again, "eager"))["name"], "api", "they are part of the next snapshot");
}

#[test]
fn metadata_that_do_not_fit_or_have_no_key_are_refused() {
    let dir = scratch();
    let mut config = config(1, 64);
    config["tvmm"] = json!({ "metadata": { "name": "x".repeat(5000) } });
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let said = run_err(&["--config", text(&path)]);
    assert!(said.contains("4095 bytes"), "{said}");
    let out = dir.path().join("snapshot");
    Vm::boot(&crate::support::config(1, 64)).snapshot(&out, &[]);
    let said = run_err(&["restore", "--snapshot", text(&out), "--metadata", &format!("name={}", "x".repeat(5000))]);
    assert!(said.contains("4095 bytes"), "{said}");
}
