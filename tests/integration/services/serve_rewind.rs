//! `tvmm serve`: VMs that go back to their snapshot in place.

use serde_json::{Value, json};

use crate::support::service::{Service, metric, wait_until};
use crate::support::{exchange, http, scratch};

fn touch(more: Value) -> Value {
    let mut body = json!({ "func_name": "touch", "params": "pages=200 write=100" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The digest of the memory that the guest has filled.
fn check(service: &Service, vm: &str) -> String {
    service.ok("POST", "/functions", Some(json!({ "func_name": "check", "mem_size": 64 })));
    let answer = service.invoke(json!({ "func_name": "check", "vmId": vm }));
    answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
}

#[test]
fn a_restored_vm_is_its_snapshot_again_between_two_invocations() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.snapshot_touch("base");
    for policy in ["firecracker", "eager", "firecracker-uffd"] {
        let answer = service.invoke(touch(json!({ "ssId": "base", "policy": policy })));
        let vm = answer["vmId"].as_str().unwrap();
        let path = format!("/vms/{vm}/rewind");
        service.ok("POST", &path, None);
        let digest = check(&service, vm);
        for round in 1..4 {
            service.invoke(touch(json!({ "vmId": vm })));
            assert_ne!(check(&service, vm), digest, "the invocation has written");
            let rewound = service.ok("POST", &path, Some(json!({ "verify": true })));
            let back = ["pages_copied", "pages_cleared", "pages_dropped"].map(|key| rewound[key].as_u64().unwrap());
            assert!(back.iter().sum::<u64>() >= 200, "{policy}: {rewound}");
            assert_eq!(check(&service, vm), digest, "{policy}");
            assert_eq!(service.get(&format!("/vms/{vm}"))["rewinds"], round + 1);
        }
        assert_eq!(service.get(&format!("/vms/{vm}/report"))["restore"]["rewinds"], 4);
    }
    assert_eq!(metric(&service, "tvmm_rewinds_total{end=\"done\"}"), 12);
    assert_eq!(metric(&service, "tvmm_rewinds_total{end=\"failed\"}"), 0);
}

#[test]
fn a_rewind_waits_for_the_requests_before_it() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.snapshot_touch("base");
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" })));
    let vm = vm["vmId"].as_str().unwrap();
    service.ok("POST", "/functions", Some(json!({ "func_name": "spin", "mem_size": 64 })));
    std::thread::scope(|scope| {
        let spin = json!({ "func_name": "spin", "params": "ms=300", "vmId": vm });
        let asked = scope.spawn(|| service.invoke(spin));
        wait_until("the VM is busy", || service.get(&format!("/vms/{vm}"))["state"] == "busy");
        service.ok("POST", &format!("/vms/{vm}/rewind"), Some(json!({})));
        asked.join().unwrap();
    });
}

#[test]
fn a_vm_that_cannot_go_back_says_why_and_runs_on() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let booted = service.snapshot_touch("base");
    let path = format!("/vms/{booted}/rewind");
    let message = service.refused(422, "POST", &path, None);
    assert!(message.starts_with("Cannot rewind a VM that was booted"), "{message}");
    service.invoke(touch(json!({ "vmId": booted })));
    assert_eq!(metric(&service, "tvmm_rewinds_total{end=\"refused\"}"), 1);
    assert!(service.refused(400, "POST", &path, Some(json!({ "verfy": true }))).contains("verfy"));
    // A client may name the type of a body that it does not send.
    let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    for more in ["Content-Type: application/json\r\n", "Content-Type: application/json\r\nContent-Length: 0\r\n"] {
        let answer = exchange(service.socket(), format!("{head}{more}\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 422") && answer.contains("was booted"), "{answer}");
    }
    service.refused(404, "POST", "/vms/none/rewind", None);
    service.ok("DELETE", &format!("/vms/{booted}"), None);
    assert!(service.refused(409, "POST", &path, None).contains("is over"));
    let (status, _) = http(service.socket(), "GET", &path, "");
    assert_eq!(status, 405);
}

#[test]
fn a_diff_of_a_rewound_vm_builds_on_its_snapshot() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1",
        "track_dirty_pages": true });
    service.ok("POST", "/functions", Some(function));
    let booted = service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].clone();
    service.ok("POST", "/snapshots", Some(json!({ "vmId": booted, "ssId": "base" })));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" })))["vmId"].clone();
    let diff = |id: &str| json!({ "vmId": vm, "ssId": id, "snapshot_type": "Diff" });
    service.invoke(touch(json!({ "vmId": vm })));
    assert_eq!(service.ok("POST", "/snapshots", Some(diff("between")))["parent"], "base");
    service.ok("POST", &format!("/vms/{}/rewind", vm.as_str().unwrap()), None);
    assert_eq!(service.ok("POST", "/snapshots", Some(diff("after")))["parent"], "base");
    // No snapshot and no VM needs the first diff any more.
    service.ok("DELETE", "/snapshots/between", None);
    let digest_of = |snapshot: &str| {
        let restored = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": snapshot })));
        check(&service, restored["vmId"].as_str().unwrap())
    };
    assert_eq!(digest_of("after"), digest_of("base"));
}
