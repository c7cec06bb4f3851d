//! `tvmm serve`: VMs that are made of a running one.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::scratch;
use crate::support::service::{Service, wait_until, wait_until_gone};

/// The digest of the memory that the guest of a VM has filled.
fn check(service: &Service, vm: &str) -> String {
    let answer = service.invoke(json!({ "func_name": "check", "vmId": vm }));
    answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
}

/// Fills pages of a VM's memory.
fn fill(service: &Service, vm: &str, seed: u64) {
    service.invoke(json!({ "func_name": "fill", "params": format!("pages=300 seed={seed}"), "vmId": vm }));
}

/// A booted VM, and functions that change and check its memory.
fn booted(service: &Service) -> String {
    for name in ["fill", "check"] {
        service.ok("POST", "/functions", Some(json!({ "func_name": name, "mem_size": 64 })));
    }
    service.put_touch();
    service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].as_str().unwrap().to_string()
}

fn ids(fork: &Value) -> Vec<String> {
    fork["vms"].as_array().unwrap().iter().map(|vm| vm["vmId"].as_str().unwrap().to_string()).collect()
}

fn fork_points(state: &Path) -> usize {
    let names = std::fs::read_dir(state.join("run")).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_str().unwrap().ends_with(".fork")).count()
}

#[test]
fn vms_made_of_a_vm_have_its_memory_and_live_on_their_own() {
    let dir = scratch();
    let state = dir.path().join("state");
    let service = Service::start(&state, &[]);
    let vm = booted(&service);
    fill(&service, &vm, 1);
    let content = check(&service, &vm);
    let fork = service.ok("POST", &format!("/vms/{vm}/fork"), Some(json!({ "count": 3 })));
    assert!(fork["capture_us"].as_u64().unwrap() > 0);
    let vms = ids(&fork);
    assert_eq!(vms.len(), 3);
    assert!(vms.iter().all(|forked| check(&service, forked) == content));
    let record = service.get(&format!("/vms/{}", vms[0]));
    assert_eq!((&record["fork_of"], &record["ssId"]), (&json!(vm), &Value::Null));
    fill(&service, &vms[0], 2);
    fill(&service, &vm, 3);
    assert_ne!(check(&service, &vms[0]), content);
    assert_eq!(check(&service, &vms[1]), content);
    // A new VM goes back to the instant of the fork, and is forked again.
    service.ok("POST", &format!("/vms/{}/rewind", vms[0]), Some(json!({ "verify": true })));
    assert_eq!(check(&service, &vms[0]), content);
    fill(&service, &vms[0], 4);
    let changed = check(&service, &vms[0]);
    let again = ids(&service.ok("POST", &format!("/vms/{}/fork", vms[0]), Some(json!({ "count": 1, "live": true }))));
    assert_eq!(fork_points(&state), 2);
    for ended in [&vm, &vms[0], &vms[1], &vms[2]] {
        service.ok("DELETE", &format!("/vms/{ended}"), None);
    }
    wait_until("the fork point without VMs is removed", || fork_points(&state) == 1);
    assert_eq!(check(&service, &again[0]), changed);
    // The first snapshot of a new VM is a full one.
    let diff = json!({ "vmId": again[0], "ssId": "d", "snapshot_type": "Diff" });
    service.refused(422, "POST", "/snapshots", Some(diff));
    service.ok("POST", "/snapshots", Some(json!({ "vmId": again[0], "ssId": "full", "live": true })));
    let restored = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "full" })));
    assert_eq!(check(&service, restored["vmId"].as_str().unwrap()), changed);
    let pid = service.get(&format!("/vms/{}", again[0]))["pid"].as_u64().unwrap();
    service.terminate();
    wait_until_gone(pid as u32);
    assert!(!state.join("run").exists());
}

#[test]
fn a_vm_made_in_the_middle_of_a_request_answers_no_other_with_it() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let vm = booted(&service);
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    let content = check(&service, &vm);
    std::thread::scope(|scope| {
        scope.spawn(|| service.invoke(json!({ "func_name": "spin", "vmId": vm, "params": "ms=1500" })));
        // The request begins meanwhile.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let fork = service.ok("POST", &format!("/vms/{vm}/fork"), Some(json!({ "count": 1, "live": true })));
        assert_eq!(check(&service, &ids(&fork)[0]), content);
    });
}

#[test]
fn a_fork_that_cannot_be_leaves_nothing() {
    let dir = scratch();
    let state = dir.path().join("state");
    let service = Service::start(&state, &["--max-vms", "3"]);
    let vm = booted(&service);
    let path = format!("/vms/{vm}/fork");
    for count in [0, 257] {
        let message = service.refused(400, "POST", &path, Some(json!({ "count": count })));
        assert_eq!(message, format!("`count` is {count}, but must be from 1 to 256."));
    }
    let message = service.refused(400, "POST", &path, Some(json!({ "count": 1, "namespaces": ["a"] })));
    assert!(message.contains("needs 0"), "{message}");
    service.refused(404, "POST", "/vms/none/fork", Some(json!({ "count": 1 })));
    let message = service.refused(429, "POST", &path, Some(json!({ "count": 3 })));
    assert!(message.starts_with(&format!("Cannot fork VM `{vm}`: ")), "{message}");
    let living = || service.get("/vms").as_array().unwrap().iter().filter(|vm| vm["state"] == "running").count();
    wait_until("only the forked VM lives", || living() == 1);
    assert_eq!(fork_points(&state), 0);
    fill(&service, &vm, 1);
    service.ok("POST", &path, Some(json!({ "count": 2 })));
    service.ok("DELETE", &format!("/vms/{vm}"), None);
    assert!(service.refused(409, "POST", &path, Some(json!({ "count": 1 }))).contains("is over"));
}
