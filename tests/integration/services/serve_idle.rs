//! `tvmm serve`: VMs that wait for requests, and give their memory back until the next one.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::service::{Service, metric, wait_until, wait_until_gone};
use crate::support::{exchange, scratch};

/// Makes `touch` have this policy for its idle VMs.
pub(super) fn put_touch(service: &Service, idle: Value) {
    let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1", "idle": idle });
    service.ok("POST", "/functions", Some(function));
}

/// A service whose function `touch` has a snapshot `base` and no booted VM, and functions that change and check memory.
pub(super) fn service(dir: &Path, more: &[&str]) -> Service {
    let service = Service::start(&dir.join("state"), more);
    let vm = service.snapshot_touch("base");
    service.ok("DELETE", &format!("/vms/{vm}"), None);
    for name in ["fill", "check", "spin"] {
        service.ok("POST", "/functions", Some(json!({ "func_name": name, "mem_size": 64 })));
    }
    service
}

fn touch(service: &Service) -> Value {
    service.invoke(json!({ "func_name": "touch", "params": "pages=100 write=30" }))
}

pub(super) fn id_of(answer: &Value) -> String {
    answer["vmId"].as_str().unwrap().to_string()
}

/// The digest of the memory that the guest of a VM has filled.
pub(super) fn check(service: &Service, vm: &str) -> String {
    let answer = service.invoke(json!({ "func_name": "check", "vmId": vm }));
    answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
}

pub(super) fn fill(service: &Service, vm: &str, params: &str) {
    service.invoke(json!({ "func_name": "fill", "params": params, "vmId": vm }));
}

pub(super) fn record(service: &Service, vm: &str) -> Value {
    service.get(&format!("/vms/{vm}"))
}

pub(super) fn wait_for_state(service: &Service, vm: &str, state: &str) {
    wait_until(&format!("the VM is {state}"), || record(service, vm)["state"] == state);
}

fn pid_of(service: &Service, vm: &str) -> u32 {
    record(service, vm)["pid"].as_u64().unwrap() as u32
}

/// A count of a step of `touch`.
pub(super) fn count(service: &Service, step: &str, key: &str) -> u64 {
    service.get("/functions/touch")["idle_state"][step][key].as_u64().unwrap()
}

/// The VMs whose snapshots lie in the directory of suspended VMs.
fn on_disk(state: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(state.join("suspended")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_kept_vm_serves_the_next_invocation_and_ends_after_its_time() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    // Without a policy each invocation has a VM of its own.
    assert_ne!(touch(&service)["vmId"], touch(&service)["vmId"]);
    put_touch(&service, json!({ "policy": "keep", "keep_alive_ms": 600_000 }));
    let first = touch(&service);
    let second = touch(&service);
    assert_eq!((&second["vmId"], &second["origin"]), (&first["vmId"], &json!("vm")));
    // A request of another kind needs another VM, and one that says so ends its VM.
    let other = service.invoke(json!({ "func_name": "touch", "params": "pages=1", "policy": "eager" }));
    assert_ne!(other["vmId"], first["vmId"]);
    let last = service.invoke(json!({ "func_name": "touch", "params": "pages=1", "keep": false }));
    assert_eq!(last["vmId"], first["vmId"]);
    wait_for_state(&service, &id_of(&first), "ended");
    put_touch(&service, json!({ "policy": "keep", "keep_alive_ms": 50 }));
    let short = touch(&service);
    wait_for_state(&service, &id_of(&short), "ended");
    wait_for_state(&service, &id_of(&other), "ended");
    // The VM that was restored by another policy has a process of its own kind: its end is told, or that it was kept.
    let reason = record(&service, &id_of(&short))["reason"].as_str().unwrap().to_string();
    assert!(reason.contains("idle") || reason.contains("kept for another VM"), "{reason}");
    assert!(metric(&service, "tvmm_idle_ends_total{function=\"touch\",reason=\"idle\"}") >= 2);
    put_touch(&service, json!({ "policy": "end" }));
    let [one, other] = [touch(&service), touch(&service)].map(|answer| id_of(&answer));
    assert_ne!(one, other);
    [one, other].iter().for_each(|vm| wait_for_state(&service, vm, "ended"));
}

#[test]
fn a_suspended_vm_goes_on_where_it_was_as_often_as_it_is_woken() {
    let dir = scratch();
    let state = dir.path().join("state");
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    let vm = id_of(&touch(&service));
    // More often than snapshots are stacked: a full one is among them.
    for round in 1..8_u64 {
        let pid = pid_of(&service, &vm);
        wait_for_state(&service, &vm, "suspended");
        if pid > 0 {
            wait_until_gone(pid);
        }
        fill(&service, &vm, &format!("pages=1000 seed={round}"));
        let digest = check(&service, &vm);
        wait_for_state(&service, &vm, "suspended");
        let suspended = record(&service, &vm);
        assert_eq!((&suspended["pid"], &suspended["ssId"]), (&json!(0), &json!("base")));
        let bytes = suspended["suspended_bytes"].as_u64().unwrap();
        assert!(bytes >= 1000 * 4096, "{suspended}");
        assert_eq!(metric(&service, "tvmm_suspended_bytes"), bytes);
        let woken = service.invoke(json!({ "func_name": "check", "vmId": vm }));
        assert_eq!((&woken["origin"], &woken["vmId"]), (&json!("suspended"), &json!(vm)));
        assert!(woken["result"].as_str().unwrap().starts_with(&digest), "{woken}");
    }
    wait_for_state(&service, &vm, "suspended");
    assert!(record(&service, &vm)["suspensions"].as_u64().unwrap() >= 15);
    // Wakes bring the pages ahead that the VM has used; not every eighth, nor where few faults map them.
    let woken = count(&service, "suspended", "woken");
    let prefetched = count(&service, "suspended", "prefetched");
    assert!(prefetched >= 4 && prefetched < woken, "{prefetched} of {woken}");
    assert_eq!(metric(&service, "tvmm_idle_prefetches_total{function=\"touch\",step=\"suspended\"}"), prefetched);
    // An invocation without an id finds it too.
    let woken = touch(&service);
    assert_eq!((&woken["vmId"], &woken["origin"]), (&json!(vm), &json!("suspended")));
    wait_for_state(&service, &vm, "suspended");
    assert_eq!(metric(&service, "tvmm_vms{state=\"suspended\"}"), 1);
    let message = service.refused(409, "DELETE", "/snapshots/base", None);
    assert!(message.contains("suspended VM"), "{message}");
    assert_eq!(service.ok("DELETE", &format!("/vms/{vm}"), None)["state"], "ended");
    wait_until("its snapshots are removed", || on_disk(&state).is_empty());
    assert_eq!(metric(&service, "tvmm_suspended_bytes"), 0);
    assert!(
        service
            .refused(409, "POST", "/invocations", Some(json!({ "func_name": "check", "vmId": vm })))
            .contains("deleted while it was suspended")
    );
    service.ok("DELETE", "/snapshots/base", None);
    for step in ["refused", "failed", "wakes_failed"] {
        assert_eq!(count(&service, "suspended", step), 0, "{step}");
    }
    assert!(count(&service, "suspended", "freed_bytes") > 0);
}

#[test]
fn every_request_to_a_suspended_vm_wakes_it_and_clients_vms_are_never_ended() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    for body in [json!({ "func_name": "touch", "ssId": "base" }), json!({ "func_name": "touch" })] {
        let vm = id_of(&service.ok("POST", "/vms", Some(body)));
        fill(&service, &vm, "pages=200 seed=3");
        let digest = check(&service, &vm);
        wait_for_state(&service, &vm, "suspended");
        let diff = json!({ "vmId": vm, "snapshot_type": "Diff" });
        let snapshot = service.ok("POST", "/snapshots", Some(diff));
        assert_eq!((&snapshot["snapshot_type"], &snapshot["compacted"]), (&json!("Full"), &json!(true)));
        wait_for_state(&service, &vm, "suspended");
        let fork = service.ok("POST", &format!("/vms/{vm}/fork"), Some(json!({ "count": 1 })));
        let child = id_of(&fork["vms"][0]);
        assert_eq!(check(&service, &child), digest);
        // Children of forks are clients' VMs of the function, too.
        wait_for_state(&service, &child, "suspended");
        assert_eq!(check(&service, &child), digest);
        wait_for_state(&service, &vm, "suspended");
        service.ok("POST", &format!("/vms/{vm}/rewind"), Some(json!({ "verify": true })));
        assert_eq!(check(&service, &vm), digest);
        // An invocation of the function has no use for a client's VM.
        assert_ne!(touch(&service)["vmId"], json!(vm));
        let restored = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": snapshot["ssId"] })));
        assert_eq!(check(&service, &id_of(&restored)), digest);
    }
    // The policy of a client's VM is its function's alone.
    put_touch(&service, json!({ "policy": "end" }));
    let vm = id_of(&service.ok("POST", "/vms", Some(json!({ "func_name": "touch" }))));
    touch(&service);
    wait_until("VMs of invocations are ended", || {
        let vms = service.get("/vms");
        vms.as_array()
            .unwrap()
            .iter()
            .all(|vm| vm["from_invocation"] == false || vm["state"] == "ended" || vm["state"] == "suspended")
    });
    assert_eq!(record(&service, &vm)["state"], "running");
}

#[test]
fn under_pressure_a_vm_goes_down_step_by_step_and_each_request_takes_it_back() {
    let dir = scratch();
    let service = service(dir.path(), &["--memory-reserve", "1000000000"]);
    let hour = 3_600_000;
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": hour, "cap_ms": hour }));
    let body = json!({ "func_name": "touch", "params": "pages=100", "policy": "eager" });
    let vm = id_of(&service.invoke(body.clone()));
    fill(&service, &vm, "pages=300 seed=9");
    let digest = check(&service, &vm);
    let mut origins = Vec::new();
    for step in ["parked", "trimmed", "spilled", "suspended"] {
        if step == "spilled" {
            // It waits for its time there: its pages would come back into memory.
            wait_for_state(&service, &vm, step);
            assert_eq!(count(&service, "suspended", "done"), 0);
        } else {
            if step == "suspended" {
                put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
            }
            // A slow host may not see the state, which lasts for a second.
            wait_until(&format!("it is {step}"), || count(&service, step, "done") > 0);
        }
        let answer = service.invoke(json!({ "func_name": "check", "vmId": vm }));
        origins.push(answer["origin"].as_str().unwrap().to_string());
        assert!(answer["result"].as_str().unwrap().starts_with(&digest), "{answer}");
    }
    assert_eq!(origins[2..], ["spilled", "suspended"], "{origins:?}");
    assert!(origins.iter().all(|origin| origin != "snapshot" && origin != "boot"), "{origins:?}");
    for step in ["parked", "trimmed", "spilled", "suspended"] {
        assert!(count(&service, step, "done") > 0, "{step}");
        assert_eq!((count(&service, step, "failed"), count(&service, step, "refused")), (0, 0), "{step}");
    }
    // `eager` has copied all of the snapshot, of which the guest has written a part.
    let freed = count(&service, "trimmed", "freed_bytes") + count(&service, "windows", "freed_bytes");
    assert!(freed >= 200 * 4096, "{freed}");
    assert!(count(&service, "spilled", "freed_bytes") >= 200 * 4096);
    assert!(count(&service, "suspended", "woken") > 0);
    let steps = "tvmm_idle_steps_total{function=\"touch\",step=\"parked\",end=\"done\"}";
    assert!(metric(&service, steps) > 0);
}

#[test]
fn a_serving_vm_of_a_ladder_gives_memory_back_when_memory_is_short() {
    let dir = scratch();
    let service = service(dir.path(), &["--memory-reserve", "1000000000"]);
    let hour = 3_600_000;
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": hour, "cap_ms": hour }));
    let vm = id_of(&service.invoke(json!({ "func_name": "touch", "params": "pages=100", "policy": "eager" })));
    wait_until("a window has ended", || {
        check(&service, &vm);
        count(&service, "windows", "done") > 0
    });
}

#[test]
fn a_serving_vm_gives_back_what_its_requests_do_not_touch() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    let hour = 3_600_000;
    let eager = json!({ "func_name": "touch", "params": "pages=50 write=100", "policy": "eager" });
    put_touch(&service, json!({ "policy": "keep", "keep_alive_ms": hour }));
    service.invoke(eager.clone());
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": hour, "cap_ms": hour }));
    let windows = |key: &str| count(&service, "windows", key);
    let vm = id_of(&service.invoke(eager.clone()));
    (0..9).for_each(|_| drop(check(&service, &vm)));
    service.ok("DELETE", &format!("/vms/{vm}"), None);
    assert_eq!((windows("done"), windows("refused")), (0, 0), "only a ladder has windows, and memory is not short");
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": hour, "cap_ms": hour, "give_back": "always" }));
    let vm = id_of(&service.invoke(eager));
    wait_until("the first request's window has ended", || windows("done") == 1);
    assert!(windows("freed_bytes") >= 200 * 4096, "{}", windows("freed_bytes"));
    let digest = check(&service, &vm);
    // The second window has two requests, or more until the end of the first one is less than 1 % of the VM's life.
    wait_until("the second window has ended", || {
        assert_eq!(check(&service, &vm), digest);
        windows("done") == 2
    });
    assert!(windows("recalled_bytes") >= 200 * 4096, "{}", windows("recalled_bytes"));
    // No more is to be had, and no window follows the third.
    wait_until("the third window has ended", || {
        assert_eq!(check(&service, &vm), digest);
        windows("done") == 3
    });
    (0..40).for_each(|_| assert_eq!(check(&service, &vm), digest));
    assert_eq!((windows("done"), windows("refused")), (3, 0));
    let put_off = windows("put_off");
    assert!(put_off <= 2, "once for each window: {put_off}");
    assert_eq!(record(&service, &vm)["state"], "running");
    assert_eq!(metric(&service, "tvmm_windows_total{function=\"touch\",end=\"done\"}"), 3);
    assert_eq!(metric(&service, "tvmm_windows_total{function=\"touch\",end=\"put_off\"}"), put_off);
    assert!(metric(&service, "tvmm_window_bytes_total{function=\"touch\",way=\"freed\"}") >= 200 * 4096);
    // A rewound VM begins anew.
    service.ok("POST", &format!("/vms/{vm}/rewind"), Some(json!({})));
    wait_until("a window has ended after the rewind", || {
        check(&service, &vm);
        windows("done") == 4
    });
}

#[test]
fn a_ladder_goes_down_by_the_time_between_requests() {
    let dir = scratch();
    let service = service(dir.path(), &["--idle", "ladder"]);
    assert!(service.get("/functions/touch")["idle_state"]["reuse_p99_ms"].is_null());
    let vm = id_of(&touch(&service));
    for _ in 0..9 {
        assert_eq!(id_of(&touch(&service)), vm);
    }
    let state = service.get("/functions/touch")["idle_state"].clone();
    assert!(state["reuses"].as_u64().unwrap() >= 8 && state["reuse_p99_ms"].is_u64(), "{state}");
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": 20, "cap_ms": 60 }));
    wait_for_state(&service, &vm, "suspended");
    assert_eq!(touch(&service)["origin"], "suspended");
}

/// A count of pages of `touch`.
fn pages(service: &Service, fate: &str) -> u64 {
    service.get("/functions/touch")["idle_state"]["pages"][fate].as_u64().unwrap()
}

#[test]
fn a_semi_warm_vm_is_offloaded_bit_by_bit_until_a_request_takes_it_back() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    let hour = 3_600_000;
    // So slow that requests find it in the middle.
    let semi_warm = json!({ "policy": "faasmem", "keep_alive_ms": hour, "floor_ms": 20, "offload_ms": 10_000 });
    put_touch(&service, semi_warm.clone());
    let body = json!({ "func_name": "touch", "params": "pages=100 write=30", "policy": "eager" });
    let vm = id_of(&service.invoke(body.clone()));
    fill(&service, &vm, "pages=2000 seed=9");
    let digest = check(&service, &vm);
    let mut spilled_before = 0;
    for round in 0..3 {
        let before = pages(&service, "dropped") + pages(&service, "spilled");
        let bit = || pages(&service, "dropped") + pages(&service, "spilled") - before;
        wait_until("a part is offloaded", || bit() > 100);
        let answer = service.invoke(body.clone());
        assert_eq!((&answer["vmId"], &answer["origin"]), (&json!(vm), &json!("spilled")), "round {round}");
        assert_eq!(check(&service, &vm), digest, "round {round}");
        spilled_before = pages(&service, "spilled");
    }
    assert_eq!((count(&service, "spilled", "refused"), count(&service, "spilled", "failed")), (0, 0));
    assert!(count(&service, "spilled", "done") >= 3 && count(&service, "spilled", "woken") >= 3);
    // The guest has read all of its memory.
    wait_until("recalls are counted", || pages(&service, "recalled") > 0);
    assert!(pages(&service, "regretted") <= pages(&service, "recalled"));
    assert!(pages(&service, "recalled") <= pages(&service, "spilled"));
    let line = "tvmm_idle_pages_total{function=\"touch\",fate=\"spilled\"}";
    assert!(metric(&service, line) > 0);
    // All of it goes, and the VM stays.
    put_touch(&service, json!({ "policy": "faasmem", "keep_alive_ms": hour, "floor_ms": 20, "offload_ms": 1 }));
    wait_until("all is offloaded", || pages(&service, "spilled") - spilled_before >= 1800);
    assert_eq!(record(&service, &vm)["state"], "spilled");
    assert_eq!(check(&service, &vm), digest);
    // It is never suspended, and ends after its time.
    put_touch(&service, json!({ "policy": "faasmem", "keep_alive_ms": 60, "floor_ms": 20, "offload_ms": 10 }));
    wait_for_state(&service, &vm, "ended");
    assert_eq!(count(&service, "suspended", "done"), 0);
}

#[test]
fn a_vm_is_the_same_after_requests_at_random_moments_of_its_steps() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    for idle in
        [json!({ "policy": "suspend", "keep_alive_ms": 1 }), json!({ "policy": "ladder", "floor_ms": 1, "cap_ms": 20 })]
    {
        put_touch(&service, idle);
        let vm = id_of(&service.invoke(json!({ "func_name": "touch", "params": "pages=1", "policy": "eager" })));
        let mut pause = 1_u64;
        for round in 0..25 {
            // Pauses from 0 to 127 ms, in no order.
            pause = (pause * 73 + 41) % 128;
            std::thread::sleep(Duration::from_millis(pause));
            if round % 5 == 0 {
                wait_for_state(&service, &vm, "suspended");
            }
            fill(&service, &vm, &format!("pages=200 seed={round}"));
            let digest = check(&service, &vm);
            std::thread::sleep(Duration::from_millis(pause / 2));
            assert_eq!(check(&service, &vm), digest, "round {round}, {pause} ms");
        }
        service.ok("DELETE", &format!("/vms/{vm}"), None);
        assert_eq!((count(&service, "suspended", "failed"), count(&service, "suspended", "wakes_failed")), (0, 0));
    }
    assert!(count(&service, "suspended", "woken") > 0);
    // Requests at once wake it once.
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    let vm = id_of(&touch(&service));
    wait_for_state(&service, &vm, "suspended");
    let before = count(&service, "suspended", "woken");
    std::thread::scope(|scope| {
        let ask = || service.invoke(json!({ "func_name": "spin", "params": "ms=20", "vmId": vm }));
        let asked: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        asked.into_iter().for_each(|asked| assert_eq!(id_of(&asked.join().unwrap()), vm));
    });
    assert!(count(&service, "suspended", "woken") > before);
}

#[test]
fn invocations_at_once_take_a_vm_each() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-running", "8"]);
    for idle in
        [json!({ "policy": "keep", "keep_alive_ms": 600_000 }), json!({ "policy": "suspend", "keep_alive_ms": 50 })]
    {
        let name = idle["policy"].clone();
        let function = json!({ "func_name": name, "call": "spin", "mem_size": 64, "idle": idle });
        service.ok("POST", "/functions", Some(function));
        let idle_vm = id_of(&service.invoke(json!({ "func_name": name, "params": "ms=1" })));
        if name == "suspend" {
            wait_for_state(&service, &idle_vm, "suspended");
        }
        let ask = || id_of(&service.invoke(json!({ "func_name": name, "params": "ms=2000" })));
        let vms: std::collections::BTreeSet<String> = std::thread::scope(|scope| {
            let asked: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        assert_eq!(vms.len(), 3, "{vms:?}");
        assert!(vms.contains(&idle_vm), "{vms:?}, not {idle_vm}");
    }
}

#[test]
fn a_suspended_vm_that_cannot_be_woken_stays_and_the_invocation_has_another() {
    let dir = scratch();
    let state = dir.path().join("state");
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    let vm = id_of(&touch(&service));
    fill(&service, &vm, "pages=300 seed=4");
    let digest = check(&service, &vm);
    wait_for_state(&service, &vm, "suspended");
    let layers = state.join("suspended").join(&vm);
    let away = dir.path().join("away");
    std::fs::create_dir(&away).unwrap();
    let numbers: Vec<_> = std::fs::read_dir(&layers).unwrap().map(|entry| entry.unwrap()).collect();
    let numbers: Vec<_> = numbers.into_iter().filter(|entry| entry.file_type().unwrap().is_dir()).collect();
    assert!(!numbers.is_empty());
    numbers.iter().for_each(|layer| std::fs::rename(layer.path(), away.join(layer.file_name())).unwrap());
    let other = touch(&service);
    assert_eq!(other["origin"], "snapshot");
    assert_ne!(id_of(&other), vm);
    assert_eq!(count(&service, "suspended", "wakes_failed"), 1);
    assert_eq!(record(&service, &vm)["state"], "suspended");
    numbers.iter().for_each(|layer| std::fs::rename(away.join(layer.file_name()), layer.path()).unwrap());
    // A restart finds it, too.
    assert!(service.terminate().success());
    let service = Service::start(&state, &[]);
    assert_eq!(record(&service, &vm)["state"], "suspended");
    assert_eq!(check(&service, &vm), digest);
}

#[test]
fn a_suspended_vm_whose_profile_is_damaged_is_woken_without_it() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    let body = json!({ "func_name": "touch", "params": "pages=100 write=30", "policy": "firecracker" });
    let vm = id_of(&service.invoke(body));
    fill(&service, &vm, "pages=300 seed=5");
    wait_for_state(&service, &vm, "suspended");
    let layers = dir.path().join("state/suspended").join(&vm);
    let dirs = std::fs::read_dir(layers).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let last = dirs.max_by_key(|path| path.file_name().unwrap().to_str().unwrap().parse::<u64>().unwrap()).unwrap();
    let profile = last.join("plan/used.profile");
    let bytes = std::fs::read(&profile).unwrap();
    std::fs::write(&profile, &bytes[..bytes.len() / 2]).unwrap();
    let woken = service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": "pages=1" }));
    assert_eq!(woken["origin"], "suspended");
    assert_eq!((count(&service, "suspended", "woken") > 0, count(&service, "suspended", "wakes_failed")), (true, 0));
    assert_eq!(record(&service, &vm)["policy"], "firecracker");
}

#[test]
fn suspended_vms_outlive_their_service_and_others_do_not() {
    let dir = scratch();
    let state = dir.path().join("state");
    let mut service = service(dir.path(), &[]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    let asleep = id_of(&service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" }))));
    fill(&service, &asleep, "pages=300 seed=5");
    let digest = check(&service, &asleep);
    wait_for_state(&service, &asleep, "suspended");
    let awake = id_of(&touch(&service));
    wait_for_state(&service, &awake, "suspended");
    let socket = service.socket().to_owned();
    std::thread::scope(|scope| {
        let spin = json!({ "func_name": "spin", "params": "ms=60000", "vmId": awake }).to_string();
        let head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
        let request = format!("{head}Content-Length: {}\r\n\r\n{spin}", spin.len());
        // It is never answered.
        scope.spawn(move || exchange(&socket, request.as_bytes()));
        wait_for_state(&service, &awake, "busy");
        crate::support::signal(service.pid(), rustix::process::Signal::KILL);
    });
    service.wait();
    // A layer that was being written.
    let half = state.join("suspended").join(&asleep).join("99");
    std::fs::create_dir(&half).unwrap();
    let service = Service::start(&state, &[]);
    assert_eq!(record(&service, &asleep)["state"], "suspended");
    assert_eq!(record(&service, &awake)["state"], "lost");
    assert_eq!(on_disk(&state), std::slice::from_ref(&asleep));
    assert!(!half.exists());
    let woken = service.invoke(json!({ "func_name": "check", "vmId": asleep }));
    assert_eq!(woken["origin"], "suspended");
    assert!(woken["result"].as_str().unwrap().starts_with(&digest), "{woken}");
    wait_for_state(&service, &asleep, "suspended");
    assert!(service.terminate().success());
    let service = Service::start(&state, &[]);
    assert_eq!(check(&service, &asleep), digest);
}

#[test]
fn suspended_vms_keep_within_the_disk_space_that_they_may_have() {
    let dir = scratch();
    let state = dir.path().join("state");
    let service = service(dir.path(), &["--suspend-disk", "28"]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 300 }));
    let grow = |vm: &str, seed: u64| fill(&service, vm, &format!("pages=4000 seed={seed}"));
    let first = id_of(&touch(&service));
    grow(&first, 1);
    wait_for_state(&service, &first, "suspended");
    let second = id_of(&service.invoke(json!({ "func_name": "touch", "params": "pages=1", "policy": "eager" })));
    assert_ne!(first, second);
    grow(&second, 2);
    wait_for_state(&service, &second, "suspended");
    let ended = record(&service, &first);
    assert_eq!(ended["state"], "ended");
    assert!(ended["reason"].as_str().unwrap().contains("--suspend-disk"), "{ended}");
    wait_until("its snapshots are removed", || on_disk(&state) == [second.clone()]);
    assert_eq!(service.get("/functions/touch")["idle_state"]["evicted"], 1);
    // A VM that is larger than all may be stays as it is.
    let large = id_of(&service.invoke(json!({ "func_name": "touch", "params": "pages=1", "policy": "firecracker" })));
    fill(&service, &large, "pages=9000 seed=3");
    wait_until("it is refused", || count(&service, "suspended", "refused") > 0);
    assert_eq!(record(&service, &large)["state"], "trimmed", "copies that equal the snapshot were not to need space");
    let digest = check(&service, &large);
    assert_eq!(check(&service, &large), digest);
    assert_eq!(record(&service, &second)["state"], "suspended");
}

#[test]
fn vms_that_are_suspended_at_once_keep_within_the_disk_space_together() {
    let dir = scratch();
    let service = service(dir.path(), &["--suspend-disk", "40", "--max-running", "8"]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 3_600_000 }));
    // VMs of clients are not evicted for others.
    let start = || id_of(&service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" }))));
    let vms: Vec<String> = (0..4).map(|_| start()).collect();
    vms.iter().zip(1..).for_each(|(vm, seed)| fill(&service, vm, &format!("pages=4000 seed={seed}")));
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 1 }));
    wait_until("each is suspended or refused", || {
        // Also while snapshots are being written.
        assert!(metric(&service, "tvmm_suspended_bytes") <= 40 << 20);
        count(&service, "suspended", "done") + count(&service, "suspended", "refused") >= 4
    });
    let suspended = vms.iter().filter(|vm| record(&service, vm)["state"] == "suspended").count();
    // One that needs less than it has reserved leaves the rest to others, which wait for it.
    assert_eq!(suspended, 2, "VMs of 16 MiB that are suspended in 40");
    assert!(metric(&service, "tvmm_suspended_bytes") <= 40 << 20);
}

#[test]
fn a_vm_that_makes_room_for_another_keeps_its_state_if_there_is_disk_for_it() {
    let dir = scratch();
    let hour = json!({ "policy": "suspend", "keep_alive_ms": 3_600_000 });
    for (name, disk, state) in [("kept", "4096", "suspended"), ("lost", "0", "ended")] {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let service = service(&dir, &["--max-vms", "1", "--suspend-disk", disk]);
        put_touch(&service, hour.clone());
        let vm = id_of(&touch(&service));
        fill(&service, &vm, "pages=300 seed=6");
        let digest = check(&service, &vm);
        let other = id_of(&service.invoke(json!({ "func_name": "spin", "params": "ms=1" })));
        assert_ne!(other, vm);
        wait_for_state(&service, &vm, state);
        let done = u64::from(state == "suspended");
        assert_eq!((count(&service, "suspended", "done"), count(&service, "suspended", "refused")), (done, 1 - done));
        if state == "suspended" {
            // A VM of a function without a policy ends to make room.
            assert_eq!(check(&service, &vm), digest);
            assert_eq!(record(&service, &other)["state"], "ended");
        } else {
            assert_eq!(record(&service, &vm)["reason"], "made room for another VM");
        }
    }
}

#[test]
fn steps_that_hang_hold_up_no_others() {
    let dir = scratch();
    let service = service(dir.path(), &[]);
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 3_600_000 }));
    let start = || id_of(&service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" }))));
    let hanging: Vec<String> = (0..4).map(|_| start()).collect();
    let pids: Vec<u32> = hanging.iter().map(|vm| pid_of(&service, vm)).collect();
    pids.iter().for_each(|pid| crate::support::signal(*pid, rustix::process::Signal::STOP));
    let vm = start();
    put_touch(&service, json!({ "policy": "suspend", "keep_alive_ms": 50 }));
    wait_for_state(&service, &vm, "suspended");
    // They have waited longest, so their steps have begun first. None is ended for it, if this is seen in time.
    assert_eq!(count(&service, "suspended", "slow"), 4);
    assert_eq!(metric(&service, "tvmm_idle_slow_steps_total{function=\"touch\",step=\"suspended\"}"), 4);
    pids.iter().for_each(|pid| crate::support::signal(*pid, rustix::process::Signal::CONT));
    wait_until("the others have an end", || {
        count(&service, "suspended", "done") + count(&service, "suspended", "failed") == 5
    });
}

#[test]
fn spill_files_keep_within_the_space_that_they_may_have() {
    let dir = scratch();
    let service = service(dir.path(), &["--memory-reserve", "1000000000", "--spill-disk", "8"]);
    let hour = 3_600_000;
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": hour, "cap_ms": hour }));
    let vms: Vec<String> = ["firecracker", "eager"]
        .map(|policy| {
            let body = json!({ "func_name": "touch", "params": "pages=1", "policy": policy });
            let vm = id_of(&service.invoke(body));
            // Each page holds bytes of its own, which no compression makes fewer.
            fill(&service, &vm, "pages=1500 seed=9");
            vm
        })
        .into();
    let digests: Vec<String> = vms.iter().map(|vm| check(&service, vm)).collect();
    wait_until("there is space for one of them", || {
        let without = count(&service, "spilled", "refused") + count(&service, "spilled", "partly");
        count(&service, "spilled", "done") > 0 && without > 0
    });
    let bytes = metric(&service, "tvmm_spilled_bytes");
    assert!((4 << 20..=8 << 20).contains(&bytes), "{bytes}");
    for (vm, digest) in vms.iter().zip(&digests) {
        assert_eq!(check(&service, vm), *digest);
    }
    for vm in &vms {
        service.ok("DELETE", &format!("/vms/{vm}"), None);
    }
    assert_eq!(metric(&service, "tvmm_spilled_bytes"), 0);
}

#[test]
fn a_vm_that_does_not_fit_into_its_spill_file_is_spilled_in_part() {
    let dir = scratch();
    let service = service(dir.path(), &["--memory-reserve", "1000000000", "--spill-disk", "4"]);
    let hour = 3_600_000;
    put_touch(&service, json!({ "policy": "ladder", "floor_ms": hour, "cap_ms": hour }));
    let vm = id_of(&touch(&service));
    fill(&service, &vm, "pages=3000 seed=9");
    let digest = check(&service, &vm);
    wait_for_state(&service, &vm, "spilled");
    let ends = ["done", "partly", "refused", "failed"].map(|end| count(&service, "spilled", end));
    assert_eq!(ends, [0, 1, 0, 0]);
    assert_eq!(metric(&service, "tvmm_idle_steps_total{function=\"touch\",step=\"spilled\",end=\"partly\"}"), 1);
    let bytes = metric(&service, "tvmm_spilled_bytes");
    assert!((2 << 20..=4 << 20).contains(&bytes), "{bytes}");
    let spilled = pages(&service, "spilled");
    assert!((500..2000).contains(&spilled), "what left is counted, and nothing else: {spilled} pages");
    let answer = service.invoke(json!({ "func_name": "check", "vmId": vm }));
    assert_eq!(answer["origin"], "spilled");
    assert!(answer["result"].as_str().unwrap().starts_with(&digest), "{answer}");
}

#[test]
fn a_suspended_vm_keeps_its_own_image() {
    let dir = scratch();
    let image = dir.path().join("disk.img");
    std::fs::write(&image, vec![0x5a; 4 << 20]).unwrap();
    let service = Service::start(&dir.path().join("state"), &[]);
    let function = json!({ "func_name": "disk", "call": "blk", "mem_size": 64, "image": image,
        "image_read_only": false, "idle": { "policy": "suspend", "keep_alive_ms": 50 } });
    service.ok("POST", "/functions", Some(function));
    let vm = id_of(&service.ok("POST", "/vms", Some(json!({ "func_name": "disk" }))));
    let disk = |params: &str| service.invoke(json!({ "func_name": "disk", "vmId": vm, "params": params }));
    for seed in 1..4 {
        disk(&format!("op=write sectors=64 seed={seed}"));
        wait_for_state(&service, &vm, "suspended");
        let checked = disk(&format!("op=check sectors=64 seed={seed}"));
        assert!(checked["result"].as_str().unwrap().contains("bad=0"), "{checked}");
    }
    assert_eq!(std::fs::read(&image).unwrap(), vec![0x5a; 4 << 20], "the function's image is as it was");
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    for (idle, said) in [
        (json!({ "policy": "later" }), "unknown variant `later`"),
        (json!({ "policy": "keep", "cap_ms": 1 }), "for the policy `ladder`"),
        (json!({ "policy": "ladder", "keep_alive_ms": 1 }), "leave it out of `ladder`"),
        (json!({ "policy": "ladder", "floor_ms": 5, "cap_ms": 4 }), "not less than it"),
        (json!({ "policy": "suspend", "give_back": "always" }), "leave it out of others"),
        (json!({ "policy": "suspend", "offload_ms": 4 }), "for the policy `faasmem`"),
        (json!({ "policy": "faasmem", "keep_alive_ms": 4 }), "not less than the floor"),
        (json!({ "keep_alive_ms": 5 }), "policy"),
    ] {
        let function = json!({ "func_name": "touch", "mem_size": 64, "idle": idle });
        let message = service.refused(400, "POST", "/functions", Some(function));
        assert!(message.contains(said), "{message}");
    }
    let tracked = json!({ "func_name": "touch", "track_dirty_pages": true, "idle": { "policy": "suspend" } });
    assert!(service.refused(400, "POST", "/functions", Some(tracked)).contains("track_dirty_pages"));
}
