//! `tvmm serve`: the process of a VM that has finished becomes a VM of another function.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::serve_faults::write_kernel;
use crate::support::service::{Service, wait_until, wait_until_gone};
use crate::support::{exchange, rounds, scratch, signal, stop};

/// A function whose answer is the digest of what its snapshot was filled with, beside what `more` says.
fn put(service: &Service, name: &str, more: Value) {
    let pages = 100 + 10 * u64::from(name.as_bytes()[0]);
    let mut function = json!({ "func_name": name, "call": "check", "mem_size": 64,
        "prepare": format!("fill pages={pages} seed={pages}") });
    function.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    service.ok("POST", "/functions", Some(function));
}

/// Adds a function with a snapshot of its name. Returns its answer.
fn add(service: &Service, name: &str, more: Value) -> String {
    put(service, name, more);
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": name })));
    let id = vm["vmId"].as_str().unwrap();
    let digest = digest(&service.invoke(json!({ "func_name": name, "vmId": id })));
    service.ok("POST", "/snapshots", Some(json!({ "vmId": id, "ssId": name })));
    service.ok("DELETE", &format!("/vms/{id}"), None);
    digest
}

fn digest(answer: &Value) -> String {
    answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
}

fn invoke(service: &Service, name: &str) -> (String, String) {
    let answer = service.invoke(json!({ "func_name": name }));
    (digest(&answer), answer["vmId"].as_str().unwrap().to_string())
}

fn pid(service: &Service, vm: &str) -> u32 {
    service.get(&format!("/vms/{vm}"))["pid"].as_u64().unwrap() as u32
}

/// Returns the processes of finished VMs that were there for a VM of this function, by the outcome.
fn repurposes(service: &Service, function: &str) -> [u64; 4] {
    let state = service.get(&format!("/functions/{function}"));
    ["done", "unfit", "refused", "failed"].map(|end| state["repurposes"][end].as_u64().unwrap())
}

fn metrics(service: &Service) -> String {
    exchange(service.socket(), b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

/// The number of VMs with a process, of those that are being made, and of kept processes.
fn processes_of_vms(service: &Service) -> u64 {
    let metrics = metrics(service);
    let states = metrics.lines().filter_map(|line| line.strip_prefix("tvmm_vms{state=\"")?.split_once("\"} "));
    states.filter(|(state, _)| *state != "suspended").map(|(_, count)| count.parse::<u64>().unwrap()).sum()
}

/// The ids and processes of the VMs of a function that stand by.
fn standing_by(service: &Service, function: &str) -> Vec<(String, u32)> {
    let vms = service.get("/vms");
    let vms = vms.as_array().unwrap().iter();
    let vms = vms.filter(|vm| vm["state"] == "standby" && vm["func_name"] == function);
    vms.map(|vm| (vm["vmId"].as_str().unwrap().to_string(), vm["pid"].as_u64().unwrap() as u32)).collect()
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn one_process_serves_vms_of_several_functions_one_after_the_other() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let digests = ["a", "b", "c"].map(|name| add(&service, name, json!({})));
    let (_, first) = invoke(&service, "a");
    let process = pid(&service, &first);
    let mut former = vec![first];
    for round in 1..10 {
        let name = ["a", "b", "c"][round % 3];
        let (digest, vm) = invoke(&service, name);
        assert_eq!(digest, digests[round % 3], "round {round}");
        assert!(!former.contains(&vm), "each VM has an id of its own");
        let record = service.get(&format!("/vms/{vm}"));
        assert_eq!(record["pid"], process, "round {round}: {record}");
        assert_eq!((&record["func_name"], &record["repurposed"]), (&json!(name), &json!(true)));
        assert_eq!((&record["state"], &record["invocations"]), (&json!("running"), &json!(1)));
        assert_eq!(service.get(&format!("/vms/{vm}/report"))["restore"]["repurposed"], round);
        former.push(vm);
    }
    // Requests that name a VM of before reach no VM, and do not end the process.
    let last = former.pop().unwrap();
    for id in &former {
        let record = service.get(&format!("/vms/{id}"));
        assert_eq!(record["state"], "ended");
        assert!(record["reason"].as_str().unwrap().contains("kept for another VM"), "{record}");
        let message = service.refused(409, "POST", "/invocations", Some(json!({ "func_name": "a", "vmId": id })));
        assert!(message.contains("is over"), "{message}");
        service.refused(409, "POST", "/snapshots", Some(json!({ "vmId": id })));
        service.refused(409, "POST", &format!("/vms/{id}/rewind"), None);
        service.refused(409, "POST", &format!("/vms/{id}/fork"), Some(json!({ "count": 1 })));
        service.refused(409, "GET", &format!("/vms/{id}/report"), None);
        service.ok("DELETE", &format!("/vms/{id}"), None);
    }
    assert!(is_alive(process));
    assert_eq!(digest(&service.invoke(json!({ "func_name": "a", "vmId": last }))), digests[0]);
    let all = ["a", "b", "c"].map(|name| repurposes(&service, name)).map(|[done, rest @ ..]| (done, rest));
    assert_eq!(all, [(3, [0; 3]); 3]);
    let metrics = metrics(&service);
    assert!(metrics.contains("tvmm_repurposes_total{function=\"b\",end=\"done\"} 3"), "{metrics}");
    assert_eq!(service.get("/ui/data")["functions"][0]["repurposes"]["done"], 3);
    let answer = service.invoke(json!({ "func_name": "b" }));
    let last = answer["vmId"].as_str().unwrap();
    let trace = service.get(&format!("/traces/{}", answer["traceId"].as_str().unwrap()));
    let spans = trace["spans"].as_array().unwrap();
    let length = |name: &str| {
        let span = spans.iter().find(|span| span["name"] == name).unwrap_or_else(|| panic!("{name} in {trace}"));
        span["length_us"].as_f64().unwrap()
    };
    let steps: f64 = ["stop", "prepare", "release", "memory", "state"].map(length).iter().sum();
    assert!(steps > 0.0 && steps <= length("repurpose") * 1.01, "{trace}");
    service.ok("DELETE", &format!("/vms/{last}"), None);
    wait_until_gone(process);
}

#[test]
fn a_repurposed_vm_is_rewound_snapshotted_and_forked_as_its_functions() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    add(&service, "a", json!({}));
    let other = add(&service, "b", json!({}));
    invoke(&service, "a");
    let (_, vm) = invoke(&service, "b");
    assert_eq!(service.get(&format!("/vms/{vm}"))["repurposed"], true);
    service.ok("POST", "/functions", Some(json!({ "func_name": "fill", "mem_size": 64 })));
    service.invoke(json!({ "func_name": "fill", "params": "pages=50 seed=9", "vmId": vm }));
    let asked = || digest(&service.invoke(json!({ "func_name": "b", "vmId": vm })));
    assert_ne!(asked(), other);
    service.ok("POST", &format!("/vms/{vm}/rewind"), Some(json!({ "verify": true })));
    assert_eq!(asked(), other);
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "again" })));
    let answer = service.invoke(json!({ "func_name": "b", "ssId": "again" }));
    assert_eq!(digest(&answer), other);
    let fork = format!("/vms/{}/fork", answer["vmId"].as_str().unwrap());
    assert!(service.refused(429, "POST", &fork, Some(json!({ "count": 1 }))).contains("are 2 VMs"));
}

#[test]
fn each_vm_of_one_process_writes_to_images_of_its_own() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let image = dir.path().join("image");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let writable = json!({ "image": image, "image_read_only": false });
    let digests = ["a", "b"].map(|name| add(&service, name, writable.clone()));
    let mut former = None;
    for round in 0..6 {
        let (digest, vm) = invoke(&service, ["a", "b"][round % 2]);
        assert_eq!(digest, digests[round % 2], "round {round}");
        let record = service.get(&format!("/vms/{vm}"));
        assert_eq!(record["repurposed"], round > 0, "{record}");
        let own = record["drives"][0]["path_on_host"].as_str().unwrap().to_string();
        let pid = record["pid"].as_u64().unwrap();
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let open: Vec<_> = open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
        assert!(open.iter().any(|path| *path == Path::new(&own)), "{own} in {open:?}");
        if let Some(former) = former.replace(own) {
            assert!(!open.iter().any(|path| path.to_string_lossy().starts_with(&former)), "{former} in {open:?}");
            wait_until("the former images are removed", || !Path::new(&former).exists());
        }
    }
}

#[test]
fn a_vm_that_stands_by_takes_over_the_process_of_one_that_has_finished() {
    let dir = scratch();
    // With room for a second VM the service would fill it while the first one is asked.
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let standby = json!({ "standby": { "min": 1, "max": 1 } });
    let expected = add(&service, "a", json!({}));
    put(&service, "a", standby);
    wait_until("a VM stands by", || standing_by(&service, "a").len() == 1);
    for _ in 0..3 {
        let (former, process) = standing_by(&service, "a").remove(0);
        let (digest, vm) = invoke(&service, "a");
        assert_eq!((&digest, &vm), (&expected, &former));
        wait_until("another VM stands by", || standing_by(&service, "a").iter().any(|(id, _)| *id != former));
        assert_eq!(standing_by(&service, "a")[0].1, process, "it has the process of the one before");
        service.refused(409, "POST", "/invocations", Some(json!({ "func_name": "a", "vmId": former })));
        service.ok("DELETE", &format!("/vms/{former}"), None);
        assert!(is_alive(process));
    }
    assert_eq!(repurposes(&service, "a"), [3, 0, 0, 0]);
}

#[test]
fn the_only_place_goes_to_and_fro_between_two_functions() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let digests = ["a", "b"].map(|name| add(&service, name, json!({})));
    put(&service, "a", json!({ "standby": { "min": 1, "max": 1 } }));
    wait_until("a VM stands by", || standing_by(&service, "a").len() == 1);
    let (_, process) = standing_by(&service, "a").remove(0);
    for round in 0..4 {
        // It takes the place of the VM that stands by, and leaves it to another one.
        let answer = service.invoke(json!({ "func_name": "b", "keep": false }));
        assert_eq!((digest(&answer), &answer["origin"]), (digests[1].clone(), &json!("snapshot")));
        wait_until("a VM stands by again", || standing_by(&service, "a").len() == 1);
        let (id, now) = standing_by(&service, "a").remove(0);
        assert_eq!(now, process, "round {round}");
        assert_eq!(invoke(&service, "a"), (digests[0].clone(), id), "round {round}");
        wait_until("and again", || standing_by(&service, "a").len() == 1);
    }
    assert_eq!(["a", "b"].map(|name| repurposes(&service, name)), [[8, 0, 0, 0], [4, 0, 0, 0]]);
}

#[test]
fn a_vm_that_makes_room_ends_also_if_the_request_is_given_up_meanwhile() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let digests = ["a", "b"].map(|name| add(&service, name, json!({})));
    let (_, vm) = invoke(&service, "a");
    let process = pid(&service, &vm);
    stop(process);
    let path = format!("/vms/{vm}/report");
    std::thread::scope(|scope| {
        // The process is not given to another VM while it owes this answer.
        let reporting = scope.spawn(|| service.ask("GET", &path, None).0);
        std::thread::sleep(Duration::from_millis(200));
        let body = json!({ "func_name": "b", "timeout_ms": 300 });
        let message = service.refused(504, "POST", "/invocations", Some(body));
        assert!(message.contains("not ready"), "{message}");
        wait_until("the VM is over", || service.get(&format!("/vms/{vm}"))["state"] == "ended");
        let status = reporting.join().unwrap();
        assert!(matches!(status, 409 | 502), "{status}");
    });
    wait_until_gone(process);
    assert_eq!(invoke(&service, "b").0, digests[1]);
}

#[test]
fn a_process_that_no_vm_needs_ends() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--shells", "0"]);
    add(&service, "a", json!({}));
    let answer = service.invoke(json!({ "func_name": "a", "keep": false }));
    let vm = answer["vmId"].as_str().unwrap();
    wait_until("the VM is over", || service.get(&format!("/vms/{vm}"))["state"] == "ended");
    wait_until("its process has ended, too", || service.children().is_empty());
    assert_eq!(processes_of_vms(&service), 0);
    // So does a kept one with the service.
    let answer = service.invoke(json!({ "func_name": "a", "keep": false }));
    let process = pid(&service, answer["vmId"].as_str().unwrap());
    assert!(service.terminate().success());
    wait_until_gone(process);
}

#[test]
fn requests_that_race_are_answered_by_a_vm_of_their_function_or_by_none() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "3", "--max-running", "4"]);
    let names = ["a", "b", "c"];
    let digests: BTreeMap<&str, String> = names.map(|name| (name, add(&service, name, json!({})))).into();
    put(&service, "c", json!({ "standby": { "min": 1, "max": 2 }, "after": "rewind" }));
    let busy = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let service = &service;
            let digests = &digests;
            let busy = &busy;
            scope.spawn(move || {
                let mut former: Vec<(&str, String)> = Vec::new();
                for round in 0..rounds(25) {
                    let name = names[(thread + round) % 3];
                    let mut body = json!({ "func_name": name });
                    if (thread + round) % 4 == 0 {
                        body["keep"] = json!(false);
                    }
                    let (status, answer) = service.ask("POST", "/invocations", Some(body));
                    match status {
                        200 => assert_eq!(digest(&answer), digests[name], "{name}: {answer}"),
                        // All VMs are in use.
                        429 => {
                            busy.fetch_add(1, Ordering::Relaxed);
                            continue;
                        }
                        _ => panic!("{status}: {answer}"),
                    }
                    former.push((name, answer["vmId"].as_str().unwrap().to_string()));
                    ask_former(service, digests, &former[former.len().saturating_sub(4)..]);
                }
            });
        }
    });
    let done: u64 = names.iter().map(|name| repurposes(&service, name)[0]).sum();
    assert!(done > 10, "{done} were repurposed, {busy:?} found no room");
    for name in names {
        let [_, unfit, refused, failed] = repurposes(&service, name);
        assert_eq!((unfit, refused, failed), (0, 0, 0), "{name}");
    }
    // Every place is free again in the end.
    for vm in service.get("/vms").as_array().unwrap() {
        service.ok("DELETE", &format!("/vms/{}", vm["vmId"].as_str().unwrap()), None);
    }
    put(&service, "c", json!({}));
    wait_until("no VM is left", || processes_of_vms(&service) == 0);
}

/// Names VMs of before in all ways. A VM that answers is one of the function.
fn ask_former(service: &Service, digests: &BTreeMap<&str, String>, former: &[(&str, String)]) {
    for (at, (name, id)) in former.iter().enumerate() {
        let (status, answer) = service.ask("POST", "/invocations", Some(json!({ "func_name": name, "vmId": id })));
        match status {
            200 => assert_eq!(digest(&answer), digests[name], "{name}: {answer}"),
            404 | 409 | 429 => {}
            _ => panic!("{status}: {answer}"),
        }
        let (method, path, body) = match at % 3 {
            0 => ("GET", format!("/vms/{id}/report"), None),
            // Another thread may use a VM that stood by.
            1 if *name != "c" => ("DELETE", format!("/vms/{id}"), None),
            _ => ("POST", format!("/vms/{id}/rewind"), Some(json!({ "verify": true }))),
        };
        let (status, answer) = service.ask(method, &path, body);
        // 502: the VM made room while it reported.
        let is_fine = matches!(status, 200 | 404 | 409 | 429) || method == "GET" && status == 502;
        assert!(is_fine, "{method} {path}: {status}: {answer}");
    }
}

#[test]
fn a_process_that_dies_costs_no_request() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let digests = ["a", "b"].map(|name| add(&service, name, json!({})));
    for round in 0..rounds(10) {
        let (_, vm) = invoke(&service, "a");
        signal(pid(&service, &vm), Signal::KILL);
        // The service may know of the end, or not yet.
        let (digest, _) = invoke(&service, "b");
        assert_eq!(digest, digests[1], "round {round}");
    }
}

#[test]
fn a_process_that_cannot_become_the_vm_is_ended_and_its_place_is_free() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1"]);
    let image = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        path
    };
    let kept = image("kept");
    let removed = image("removed");
    let good = add(&service, "a", json!({ "image": kept }));
    add(&service, "b", json!({ "image": removed }));
    add(&service, "c", json!({ "image": kept }));
    // Damage is found before anything changes.
    let state = dir.path().join("state/snapshots/c/vmstate");
    assert!(state.exists(), "{:?}", std::fs::read_dir(state.parent().unwrap()).unwrap().collect::<Vec<_>>());
    std::fs::write(&state, b"damaged").unwrap();
    let (_, vm) = invoke(&service, "a");
    let process = pid(&service, &vm);
    let message = service.refused(422, "POST", "/invocations", Some(json!({ "func_name": "c" })));
    assert!(message.starts_with("Cannot restore the VM"), "{message}");
    wait_until_gone(process);
    assert_eq!(repurposes(&service, "c"), [0, 0, 1, 0]);
    // So is a drive that is missing.
    std::fs::remove_file(&removed).unwrap();
    let (_, vm) = invoke(&service, "a");
    let process = pid(&service, &vm);
    service.refused(422, "POST", "/invocations", Some(json!({ "func_name": "b" })));
    wait_until_gone(process);
    assert_eq!(repurposes(&service, "b"), [0, 0, 1, 0]);
    for _ in 0..2 {
        assert_eq!(invoke(&service, "a").0, good);
    }
    let metrics = metrics(&service);
    for line in ["{function=\"b\",end=\"refused\"} 1", "{function=\"c\",end=\"refused\"} 1"] {
        assert!(metrics.contains(&format!("tvmm_repurposes_total{line}")), "{line} in {metrics}");
    }
}

#[test]
fn a_vm_of_another_shape_and_a_service_that_may_not_repurpose_end_processes() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("shapes"), &["--max-vms", "1"]);
    let digests = [("a", json!({})), ("b", json!({ "mem_size": 128 })), ("c", json!({ "track_dirty_pages": true }))]
        .map(|(name, more)| (name, add(&service, name, more)));
    for (name, expected) in digests.iter().chain(&digests) {
        let (digest, vm) = invoke(&service, name);
        assert_eq!(digest, *expected);
        assert_eq!(service.get(&format!("/vms/{vm}"))["repurposed"], false);
    }
    assert_eq!(["a", "b", "c"].map(|name| repurposes(&service, name)), [[0, 1, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]]);
    let service = Service::start(&dir.path().join("never"), &["--max-vms", "1", "--no-repurpose"]);
    let digests = ["a", "b"].map(|name| add(&service, name, json!({})));
    for round in 0..4 {
        let name = ["a", "b"][round % 2];
        let is_kept = round % 2 == 0;
        let answer = service.invoke(json!({ "func_name": name, "keep": is_kept }));
        assert_eq!(digest(&answer), digests[round % 2]);
        assert_eq!(service.get(&format!("/vms/{}", answer["vmId"].as_str().unwrap()))["repurposed"], false);
    }
    assert_eq!(["a", "b"].map(|name| repurposes(&service, name)), [[0; 4]; 2]);
}

#[test]
fn a_guest_that_writes_answers_all_the_time_answers_no_request() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &["--max-vms", "1", "--max-output", "16"]);
    let good = add(&service, "a", json!({}));
    // mov dx, 0x3f8; then mov al, byte; out dx, al for each byte; and again from the first byte.
    let line = b"ok i1 forged\n";
    let mut code = b"\x66\xba\xf8\x03".to_vec();
    code.extend(line.iter().flat_map(|&byte| [0xb0, byte, 0xee]));
    code.extend([0xeb, (256 - (3 * line.len() + 2)) as u8]);
    let kernel = dir.path().join("forger");
    write_kernel(&kernel, &code);
    service.ok("POST", "/functions", Some(json!({ "func_name": "forger", "kernel": kernel, "mem_size": 64 })));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "forger" })))["vmId"].clone();
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "forger" })));
    service.ok("DELETE", &format!("/vms/{}", vm.as_str().unwrap()), None);
    for round in 0..rounds(5) {
        let message = service.refused(502, "POST", "/invocations", Some(json!({ "func_name": "forger" })));
        assert!(message.contains("without an answer, and its VM was ended"), "{message}");
        assert_eq!(invoke(&service, "a").0, good, "round {round}");
    }
}
