//! `tvmm serve`: VMs that stand by for invocations.

use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::service::{Service, wait_until, wait_until_gone};
use crate::support::{exchange, scratch, signal};

/// Makes `touch` have standby VMs, beside what `more` says.
fn put_touch(service: &Service, more: Value) {
    let mut function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1" });
    function.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    service.ok("POST", "/functions", Some(function));
}

fn touch(more: Value) -> Value {
    let mut body = json!({ "func_name": "touch", "params": "pages=200 write=100" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn first_word(answer: &Value) -> String {
    answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
}

/// A service whose function `touch` has a snapshot and no booted VM.
fn service(dir: &Path, more: &[&str]) -> Service {
    let service = Service::start(&dir.join("state"), more);
    let vm = service.snapshot_touch("base");
    service.ok("DELETE", &format!("/vms/{vm}"), None);
    service
}

fn state(service: &Service, key: &str) -> u64 {
    service.get("/functions/touch")["standby_state"][key].as_u64().unwrap()
}

fn wait_for_ready(service: &Service, ready: u64) {
    wait_until(&format!("{ready} VMs stand by"), || state(service, "ready") == ready);
}

/// Ids and processes of the VMs that stand by.
fn standing_by(service: &Service) -> Vec<(String, u32)> {
    let vms = service.get("/vms");
    let vms = vms.as_array().unwrap().iter().filter(|vm| vm["state"] == "standby");
    vms.map(|vm| (vm["vmId"].as_str().unwrap().to_string(), vm["pid"].as_u64().unwrap() as u32)).collect()
}

#[test]
fn an_invocation_takes_a_vm_that_stands_by_and_the_set_is_refilled() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    let fresh = service.invoke(touch(json!({ "keep": false })));
    assert_eq!(fresh["origin"], "snapshot");
    put_touch(&service, json!({ "standby": { "min": 2, "max": 3 } }));
    for round in 1..5 {
        wait_for_ready(&service, 2);
        let before = standing_by(&service);
        let answer = service.invoke(touch(json!({})));
        assert_eq!((&answer["origin"], &answer["policy"]), (&json!("standby"), &fresh["policy"]));
        assert_eq!(first_word(&answer), first_word(&fresh), "the guest is that of the snapshot");
        let id = answer["vmId"].as_str().unwrap();
        assert!(before.iter().any(|(known, _)| known == id), "the VM stood by");
        // `after` is `end`.
        wait_until("the VM is over", || service.get(&format!("/vms/{id}"))["state"] == "ended");
        assert_eq!(state(&service, "hits"), round);
    }
    wait_for_ready(&service, 2);
    assert_eq!((state(&service, "refills"), state(&service, "misses"), state(&service, "failed")), (6, 0, 0));
    // Another policy and other settings need a VM of their own; a VM is kept by request.
    for more in [json!({ "policy": "eager" }), json!({ "clock_realtime": false })] {
        assert_eq!(service.invoke(touch(more))["origin"], "snapshot");
    }
    let kept = service.invoke(touch(json!({ "keep": true })));
    assert_eq!(kept["origin"], "standby");
    assert_eq!(service.invoke(touch(json!({ "vmId": kept["vmId"] })))["origin"], "vm");
    let metrics = exchange(service.socket(), b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    for line in [
        "tvmm_standby_memory_bytes{function=\"touch\"} ",
        "tvmm_standby_ready{function=\"touch\"} ",
        "tvmm_standby_events_total{function=\"touch\",event=\"hit\"} 5",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[test]
fn a_rewound_vm_stands_by_again_and_holds_nothing_of_its_invocation() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "standby": { "min": 1, "max": 1 }, "after": "rewind" }));
    wait_for_ready(&service, 1);
    let (id, _) = standing_by(&service).remove(0);
    let mut results = Vec::new();
    for round in 1..6 {
        wait_for_ready(&service, 1);
        let answer = service.invoke(touch(json!({})));
        assert_eq!((&answer["origin"], &answer["vmId"]), (&json!("standby"), &json!(id)));
        results.push(first_word(&answer));
        assert_eq!(state(&service, "hits"), round);
    }
    results.dedup();
    assert_eq!(results.len(), 1, "each invocation meets the guest of the snapshot");
    wait_for_ready(&service, 1);
    let counts = ["rewinds", "refills", "failed", "lost"].map(|key| state(&service, key));
    assert_eq!(counts, [5, 1, 0, 0], "no VM is restored while one comes back");
}

#[test]
fn a_set_without_refills_lives_on_rewound_vms() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "standby": { "min": 0, "max": 1 }, "after": "rewind" }));
    let first = service.invoke(touch(json!({})));
    assert_eq!((&first["origin"], state(&service, "misses")), (&json!("snapshot"), 1));
    for round in 1..6 {
        wait_for_ready(&service, 1);
        let answer = service.invoke(touch(json!({})));
        assert_eq!((&answer["origin"], &answer["vmId"]), (&json!("standby"), &first["vmId"]));
        assert_eq!(first_word(&answer), first_word(&first));
        assert_eq!(state(&service, "hits"), round);
    }
    wait_for_ready(&service, 1);
    assert_eq!((state(&service, "rewinds"), state(&service, "refills")), (6, 0));
    // Clients cannot name a VM that stands by.
    let id = first["vmId"].as_str().unwrap();
    let refused = [("/invocations", touch(json!({ "vmId": id }))), ("/snapshots", json!({ "vmId": id }))];
    for (path, body) in refused {
        let message = service.refused(409, "POST", path, Some(body));
        assert!(message.contains("stands by for invocations of `touch`"), "{message}");
    }
}

#[test]
fn a_set_keeps_within_its_memory_and_the_hosts() {
    let dir = scratch();
    let limited = service(&dir.path().join("limited"), &[]);
    put_touch(&limited, json!({ "standby": { "min": 2, "max": 2 } }));
    wait_for_ready(&limited, 2);
    let memory_kib = state(&limited, "memory_kib");
    assert!(memory_kib > 100, "two processes have {memory_kib} KiB");
    // No VM fits into no memory: one is tried, and ended.
    put_touch(&limited, json!({ "standby": { "min": 2, "max": 3, "dram_mib": 0 } }));
    wait_until("a VM is given up", || state(&limited, "evicted") > 0);
    put_touch(&limited, json!({ "standby": { "min": 0, "max": 2, "dram_mib": 0 }, "after": "rewind" }));
    let before = state(&limited, "evicted");
    let answer = limited.invoke(touch(json!({})));
    wait_until_gone(limited_pid(&limited, &answer));
    wait_until("the rewound VM is given up", || state(&limited, "evicted") > before);
    // A host with little memory.
    let short = service(&dir.path().join("short"), &["--memory-reserve", "1000000000"]);
    put_touch(&short, json!({ "standby": { "min": 1, "max": 1 } }));
    wait_until("the reason is shown", || {
        short.get("/functions/touch")["standby_state"]["held_back"]
            .as_str()
            .is_some_and(|why| why.contains("--memory-reserve"))
    });
    assert_eq!(short.invoke(touch(json!({})))["origin"], "snapshot");
    assert_eq!((state(&short, "ready"), state(&short, "misses")), (0, 1));
}

/// The process of the VM that answered.
fn limited_pid(service: &Service, answer: &Value) -> u32 {
    let vms = service.get("/vms");
    let vm = vms.as_array().unwrap().iter().find(|vm| vm["vmId"] == answer["vmId"]).cloned();
    vm.and_then(|vm| vm["pid"].as_u64()).map_or(u32::MAX, |pid| pid as u32)
}

#[test]
fn a_vm_can_be_kept_after_its_answer() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "standby": { "min": 1, "max": 1 }, "after": "keep" }));
    wait_for_ready(&service, 1);
    let answer = service.invoke(touch(json!({})));
    assert_eq!(answer["origin"], "standby");
    assert_eq!(service.invoke(touch(json!({ "vmId": answer["vmId"] })))["origin"], "vm");
    wait_for_ready(&service, 1);
}

#[test]
fn a_vm_that_dies_is_replaced_and_counted() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "standby": { "min": 1, "max": 1 } }));
    wait_for_ready(&service, 1);
    let (id, pid) = standing_by(&service).remove(0);
    signal(pid, Signal::KILL);
    wait_until("another VM stands by", || {
        standing_by(&service).first().is_some_and(|(now, _)| *now != id) && state(&service, "lost") == 1
    });
    assert_eq!(service.invoke(touch(json!({})))["origin"], "standby");
}

#[test]
fn standby_vms_end_with_their_function_their_snapshot_and_the_service() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    let standby = json!({ "standby": { "min": 2, "max": 2 } });
    put_touch(&service, standby.clone());
    wait_for_ready(&service, 2);
    let former = standing_by(&service);
    service.ok("DELETE", "/functions/touch", None);
    former.iter().for_each(|(_, pid)| wait_until_gone(*pid));
    put_touch(&service, standby.clone());
    wait_for_ready(&service, 2);
    let former = standing_by(&service);
    service.ok("DELETE", "/snapshots/base", None);
    former.iter().for_each(|(_, pid)| wait_until_gone(*pid));
    assert_eq!((state(&service, "ready"), state(&service, "lost")), (0, 0));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].clone();
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "next" })));
    wait_for_ready(&service, 2);
    let former = standing_by(&service);
    assert!(service.terminate().success());
    former.iter().for_each(|(_, pid)| wait_until_gone(*pid));
}

#[test]
fn a_killed_service_leaves_no_vm_that_stands_by() {
    let dir = scratch();
    let mut service = service(dir.path(), &[]);
    put_touch(&service, json!({ "standby": { "min": 3, "max": 3 } }));
    wait_for_ready(&service, 3);
    let former = standing_by(&service);
    assert_eq!(former.len(), 3);
    service.kill();
    former.iter().for_each(|(_, pid)| wait_until_gone(*pid));
}

#[test]
fn a_vm_that_stands_by_makes_room_for_one_that_is_asked_for() {
    let dir = scratch();
    let service = service(dir.path(), &["--max-vms", "2"]);
    put_touch(&service, json!({ "standby": { "min": 2, "max": 2 } }));
    wait_for_ready(&service, 2);
    service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })));
    assert_eq!((state(&service, "ready"), state(&service, "evicted")), (1, 1));
    // The place that is left still serves.
    assert_eq!(service.invoke(touch(json!({})))["origin"], "standby");
    wait_for_ready(&service, 1);
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    for (more, said) in [
        (json!({ "standby": { "min": 2, "max": 1 } }), "not more than it"),
        (json!({ "standby": { "min": 0, "max": 0 } }), "must be 1 to"),
        (json!({ "standby": { "min": 1 } }), "max"),
        (json!({ "after": "rewind" }), "needs `standby`"),
        (json!({ "standby": { "min": 1, "max": 1 }, "after": "later" }), "unknown variant `later`"),
        (
            json!({ "standby": { "min": 1, "max": 1 }, "after": "rewind", "image": "/i", "image_read_only": false }),
            "`image_read_only` false",
        ),
    ] {
        let mut function = json!({ "func_name": "touch", "mem_size": 64 });
        function.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let message = service.refused(400, "POST", "/functions", Some(function));
        assert!(message.contains(said), "{message}");
    }
}
