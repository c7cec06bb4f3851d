//! Properties that all virtio devices share: the driver finds them, they live across snapshots, overrides are checked.

use std::collections::HashSet;

use serde_json::json;

use crate::support::{Vm, config, run_err, scratch, text};

fn with_entropy(vcpus: u32) -> serde_json::Value {
    let mut config = config(vcpus, 64);
    config["entropy"] = json!({});
    config
}

#[test]
fn entropy_reaches_the_guest_before_and_after_restores_and_no_two_clones_get_the_same() {
    let dir = scratch();
    let mut vm = Vm::boot(&with_entropy(2));
    let mut digests = HashSet::new();
    for request in ["rng bytes=1", "rng bytes=4097 irq=1", "rng bytes=300000"] {
        assert!(digests.insert(vm.call(request).digest), "{request}");
    }
    let out = dir.path().join("snapshot");
    vm.snapshot(&out, &[]);
    assert!(digests.insert(vm.call("rng bytes=64 irq=1").digest), "the VM goes on after its snapshot");
    for policy in ["eager", "firecracker", "firecracker-uffd"] {
        let mut clone = Vm::restore(&out, policy);
        for request in ["rng bytes=64", "rng bytes=70000 irq=1"] {
            assert!(digests.insert(clone.call(request).digest), "{policy}: {request}");
        }
        let config = clone.api_ok("GET", "/vm/config", None);
        assert_eq!(config["entropy"], json!({}), "{policy}");
        let again = dir.path().join(policy);
        clone.snapshot(&again, &["--diff"]);
        let mut second = Vm::restore(&again, "eager");
        assert!(digests.insert(second.call("rng bytes=64 irq=1").digest), "{policy}, second generation");
    }
}

#[test]
fn entropy_has_its_limit_after_a_restore() {
    let dir = scratch();
    let out = dir.path().join("snapshot");
    let mut config = with_entropy(1);
    config["entropy"] = json!({ "rate_limiter": { "bandwidth": { "size": 2000, "refill_time": 20 } } });
    let mut vm = Vm::boot(&config);
    vm.call("rng bytes=9000 irq=1");
    vm.snapshot(&out, &[]);
    let mut clone = Vm::restore(&out, "firecracker");
    clone.call("rng bytes=9000 irq=1");
    assert_eq!(clone.api_ok("GET", "/vm/config", None)["entropy"], config["entropy"]);
}

#[test]
fn snapshot_before_the_driver_has_found_the_device_restores_it_too() {
    let dir = scratch();
    let out = dir.path().join("snapshot");
    let mut vm = Vm::boot(&with_entropy(1));
    vm.snapshot(&out, &[]);
    vm.call("rng bytes=10");
    let mut clone = Vm::restore(&out, "firecracker");
    clone.call("rng bytes=10 irq=1");
}

#[test]
fn machine_without_devices_has_none() {
    let mut vm = Vm::boot(&config(1, 64));
    let line = vm.call_raw("rng bytes=10");
    assert!(line.contains("no virtio device"), "{line}");
}

#[test]
fn override_of_a_device_that_is_not_in_the_snapshot_is_refused() {
    let dir = scratch();
    let out = dir.path().join("snapshot");
    let vm = Vm::boot(&with_entropy(1));
    vm.snapshot(&out, &[]);
    drop(vm);
    let vm = Vm::wait_for_api();
    let load = json!({ "snapshot_path": text(&out),
    "tvmm": { "drive_overrides": [{ "drive_id": "a", "path_on_host": "/x" }] } });
    let said = vm.api_fault("PUT", "/snapshot/load", Some(load));
    assert!(said.contains("no drive `a`"), "{said}");
}

#[test]
fn more_devices_than_interrupt_lines_are_refused() {
    let drive = |id: u32| json!({ "drive_id": format!("d{id}"), "is_root_device": false, "path_on_host": "/x" });
    let mut config = config(1, 64);
    config["drives"] = (0..20).map(drive).collect();
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    let said = run_err(&["--config", text(&path)]);
    assert!(said.contains("20 devices") && said.contains("19"), "{said}");
}
