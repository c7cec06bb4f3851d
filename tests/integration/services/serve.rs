//! `tvmm serve`: functions, VMs, snapshots and invocations over HTTP, and FaaSnap's flows through FaaSnap's bodies.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::service::{Service, is_served, wait_until, wait_until_gone};
use crate::support::{exchange, run_ok, scratch, text};

fn digest(answer: &Value) -> String {
    answer["result"].as_str().unwrap().split(' ').next().unwrap().to_string()
}

fn touch(more: Value) -> Value {
    let mut body = json!({ "func_name": "touch", "params": "pages=256 stride=2 write=10" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn names(trace: &Value) -> Vec<String> {
    trace["spans"].as_array().unwrap().iter().map(|span| span["name"].as_str().unwrap().to_string()).collect()
}

#[test]
fn a_function_is_booted_snapshotted_and_restored_by_every_policy() {
    let dir = scratch();
    // Each VM has a restore of its own, with its slices.
    let service = Service::start(&dir.path().join("state"), &["--no-repurpose"]);
    let vm = service.snapshot_touch("base");
    assert_eq!(service.get(&format!("/vms/{vm}"))["state"], "running");
    let warm = service.invoke(touch(json!({ "vmId": vm })));
    assert_eq!((&warm["origin"], &warm["vmId"]), (&json!("vm"), &json!(vm)));
    assert!(warm["duration"].as_u64().unwrap() > 0);

    let message = service.refused(409, "POST", "/invocations", Some(touch(json!({ "policy": "tiered" }))));
    assert!(message.contains("needs a profile"), "{message}");
    let params = "pages=256 stride=2 write=10";
    let profile = service.ok("POST", "/snapshots/base/profile", Some(json!({ "params": params, "repeat": 2 })));
    assert_eq!((&profile["runs"], &profile["recorder"]), (&json!(2), &json!("merged")));
    assert!(profile["pages_read"].as_u64().unwrap() >= 200, "{profile}");
    assert_eq!(service.get("/snapshots/base/profile"), profile);

    for policy in service.get("/policies").as_array().unwrap() {
        let name = policy["name"].as_str().unwrap();
        let answer = service.invoke(touch(json!({ "ssId": "base", "policy": name, "keep": name == "eager" })));
        assert_eq!((digest(&answer), &answer["origin"]), (digest(&warm), &json!("snapshot")), "{name}");
        assert_eq!(answer["policy"], name);
        let trace = service.get(&format!("/traces/{}", answer["traceId"].as_str().unwrap()));
        assert_eq!((&trace["complete"], &trace["status"]), (&json!(true), &json!(200)), "{trace}");
        let spans = names(&trace);
        for span in ["invocation", "queue", "restore", "state_load", "map", "vm_create", "resume", "execute"] {
            assert!(spans.iter().any(|name| name == span), "{name}: no {span} in {spans:?}");
        }
        // The slices of the restore lie within its span: no wait of a shell for its turn is counted.
        let all = trace["spans"].as_array().unwrap();
        let restore = all.iter().find(|span| span["name"] == "restore").unwrap();
        let slices =
            all.iter().filter(|span| ["state_load", "map", "vm_create"].iter().any(|name| span["name"] == *name));
        let sum: f64 = slices.map(|span| span["length_us"].as_f64().unwrap()).sum();
        assert!(sum <= restore["length_us"].as_f64().unwrap() * 1.01, "{name}: {sum} {restore}");
        let plan = service.get(&format!("/snapshots/base/plan?policy={name}"));
        assert_eq!(plan["policy"], name, "{plan}");
    }
    let chrome = service.get(&format!("/traces/{}?format=chrome", warm["traceId"].as_str().unwrap()));
    assert_eq!(chrome["traceEvents"][0]["name"], "invocation");
    assert_eq!(service.get("/traces").as_array().unwrap()[0]["func_name"], "touch");

    // A VM that was kept can be invoked again, and ended; a VM that was not kept is over.
    let vms = service.get("/vms");
    let kept: Vec<&Value> = vms.as_array().unwrap().iter().filter(|vm| vm["policy"] == "eager").collect();
    assert_eq!((kept.len(), &kept[0]["state"]), (1, &json!("running")));
    let kept = kept[0]["vmId"].as_str().unwrap();
    service.invoke(touch(json!({ "vmId": kept })));
    let report = service.get(&format!("/vms/{kept}/report"));
    assert_eq!(report["restore"]["policy"], "eager");
    assert!(report["memory"]["guest_rss_kib"].as_u64().unwrap() > 0);
    assert_eq!(service.ok("DELETE", &format!("/vms/{kept}"), None)["state"], "ended");
    assert!(service.refused(409, "POST", "/invocations", Some(touch(json!({ "vmId": kept })))).contains("is over"));
    service.ok("DELETE", &format!("/vms/{kept}"), None);
    service.refused(404, "GET", &format!("/vms/{kept}"), None);

    let metrics = exchange(service.socket(), b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    for line in ["tvmm_invocations_total{status=\"200\"} 1", "tvmm_snapshots 1", "tvmm_functions 1", "le=\"+Inf\"}"] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[test]
fn a_snapshot_with_a_profile_is_restored_by_tiered_unless_another_policy_is_named() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let vm = service.snapshot_touch("base");
    let warm = digest(&service.invoke(touch(json!({ "vmId": vm }))));
    let restored = |more: Value| {
        let mut body = json!({ "ssId": "base" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = service.invoke(touch(body));
        assert_eq!(digest(&answer), warm);
        let report = service.get(&format!("/vms/{}/report", answer["vmId"].as_str().unwrap()));
        [answer["policy"].clone(), report["restore"]["policy"].clone(), report["restore"]["policy_reason"].clone()]
    };
    assert_eq!(restored(json!({})), ["firecracker", "firecracker", "no-profile"]);
    let params = "pages=256 stride=2 write=10";
    service.ok("POST", "/snapshots/base/profile", Some(json!({ "params": params })));
    assert_eq!(restored(json!({})), ["tiered", "tiered", "profile"]);
    assert_eq!(restored(json!({ "policy": "firecracker" })), ["firecracker", "firecracker", "requested"]);
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" })));
    assert_eq!(vm["policy"], "tiered", "{vm}");
}

#[test]
fn faasnaps_flows_run_through_faasnaps_bodies() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    // vanilla
    let vm = service.snapshot_touch("base");
    let warm = digest(&service.invoke(touch(json!({ "vmId": vm }))));
    service.ok("DELETE", &format!("/vms/{vm}"), None);
    let copy = service.ok("PUT", "/snapshots?from_snapshot=base&ssId=copy", None);
    assert_eq!((&copy["copy_of"], &copy["ssId"]), (&json!("base"), &json!("copy")));
    let cached = service.ok("PATCH", "/snapshots/base", Some(json!({ "load_cache": true })));
    let dropped = service.ok("PATCH", "/snapshots/base", Some(json!({ "drop_cache": true })));
    if let (Some(cached), Some(dropped)) = (cached["cached_pages"].as_u64(), dropped["cached_pages"].as_u64()) {
        assert!(dropped < cached || cached == 0, "{dropped} of {cached} pages are still cached");
    }
    let vanilla = service.invoke(touch(json!({ "ssId": "base", "use_mem_file": true })));
    assert_eq!((digest(&vanilla), &vanilla["policy"]), (warm.clone(), &json!("firecracker")));

    // reap: the first invocation records, the next ones replay.
    assert_eq!(service.get("/snapshots/copy/reap")["recorded"], false);
    let record = service.invoke(touch(json!({ "ssId": "copy", "enableReap": true, "wsFileDirectIo": true })));
    assert_eq!((digest(&record), &record["origin"]), (warm.clone(), &json!("recording")));
    let reap = service.get("/snapshots/copy/reap");
    assert_eq!(reap["recorded"], true);
    let cached = service.ok("PATCH", "/snapshots/copy/reap", Some(json!(true)));
    // Many at once leave a whole file.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| service.ok("PATCH", "/snapshots/copy/mincore", Some(json!({ "from_records_size": 32 }))));
            scope.spawn(|| service.put_touch());
        }
    });
    assert!(cached["disk_bytes"].as_u64().unwrap() >= 4096 * 200, "{cached}");
    service.ok("PATCH", "/snapshots/copy/reap", Some(json!(false)));
    let replay = service.invoke(touch(json!({ "ssId": "copy", "enableReap": true, "wsSingleRead": true })));
    assert_eq!((digest(&replay), &replay["policy"]), (warm.clone(), &json!("reap")));

    // emumincore: layers from the record; mincore: layers carried over, and the working-set file made of them.
    let layers = service.ok("PATCH", "/snapshots/copy/mincore", Some(json!({ "from_records_size": 64 })));
    let nlayers = layers["nlayers"].as_u64().unwrap();
    assert!(nlayers >= 4 && layers["n_ws_regions"].as_u64().unwrap() > 0, "{layers}");
    let carried = service.ok("PUT", "/snapshots/base/mincore?source=copy", None);
    assert_eq!(carried["nlayers"], nlayers);
    let patch = json!({ "trim_regions": true, "to_ws_file": true, "mincore_cache": [1, 2], "drop_ws_cache": true });
    let trimmed = service.ok("PATCH", "/snapshots/base/mincore", Some(patch));
    assert!(trimmed["ws_region_size"].as_u64().unwrap() >= 200, "{trimmed}");
    let all: Vec<u64> = (1..=trimmed["nlayers"].as_u64().unwrap()).collect();
    let body = json!({ "ssId": "base", "loadMincore": all, "overlay_regions": true, "use_ws_file": true });
    let faasnap = service.invoke(touch(body));
    assert_eq!((digest(&faasnap), &faasnap["policy"]), (warm.clone(), &json!("faasnap")));
    let body = json!({ "ssId": "base", "loadMincore": [99] });
    service.refused(400, "POST", "/invocations", Some(touch(body)));
    let added = service.ok("POST", "/snapshots/base/mincore", Some(json!({ "position": 0 })));
    assert!(added["nlayers"].as_u64().unwrap() > 0, "{added}");

    assert_eq!(service.ok("DELETE", "/snapshots/copy/reap", None)["removed"], true);
    assert_eq!(service.get("/snapshots/copy/reap")["recorded"], false);
    let message = service.refused(409, "DELETE", "/snapshots/base", None);
    assert!(message.contains("runs from"), "{message}");
    assert!(service.refused(409, "DELETE", "/snapshots/copy", None).contains("runs from"));
    service.ok("DELETE", &format!("/vms/{}", replay["vmId"].as_str().unwrap()), None);
    service.ok("DELETE", "/snapshots/copy", None);
    service.refused(404, "GET", "/snapshots/copy", None);
}

#[test]
fn a_diff_builds_on_its_parent_and_a_network_interface_is_kept() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1",
        "track_dirty_pages": true });
    service.ok("POST", "/functions", Some(function));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch" })))["vmId"].clone();
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "full" })));
    service.invoke(touch(json!({ "vmId": vm })));
    let diff = json!({ "vmId": vm, "ssId": "diff", "snapshot_type": "Diff" });
    assert_eq!(service.ok("POST", "/snapshots", Some(diff))["parent"], "full");
    assert!(service.refused(409, "DELETE", "/snapshots/full", None).contains("builds on"));
    let layer = json!({ "fromDiff": "diff" });
    assert_eq!(service.ok("POST", "/snapshots/diff/mincore", Some(layer))["nlayers"], 1);
    let warm = service.invoke(touch(json!({ "vmId": vm })));
    let cold = service.invoke(touch(json!({ "ssId": "diff", "keep": false })));
    assert_eq!(digest(&warm), digest(&cold));

    service.refused(400, "PUT", "/net-ifaces/fc1", Some(json!({ "host_dev_name": "t0", "guest_addr": "10.0.0.2" })));
    let network = json!({ "host_dev_name": "tvmm-none", "guest_mac": "06:00:00:00:00:01", "host_netns": true });
    service.ok("PUT", "/net-ifaces/fc1", Some(network));
    assert_eq!(service.get("/net-ifaces/fc1")["iface_id"], "eth0");
    let body = json!({ "func_name": "touch", "namespace": "fc1" });
    let message = service.refused(422, "POST", "/vms", Some(body));
    assert!(message.contains("tvmm-none"), "{message}");
    service.refused(404, "POST", "/vms", Some(json!({ "func_name": "touch", "namespace": "fc2" })));
    service.ok("DELETE", "/net-ifaces/fc1", None);
}

#[test]
fn restart_finds_functions_and_snapshots_and_tells_what_became_of_vms() {
    let dir = scratch();
    let state = dir.path().join("state");
    let mut service = Service::start(&state, &[]);
    let vm = service.snapshot_touch("base");
    let pid = service.get(&format!("/vms/{vm}"))["pid"].as_u64().unwrap() as u32;
    let written = || std::fs::read_to_string(state.join("vms.json")).is_ok_and(|text| text.contains(&vm));
    wait_until("the VM is written down", written);
    let second = crate::support::run(&["serve", "--dir", text(&state), "--listen-unix", "/tmp/x.sock"]);
    assert!(crate::support::refusal(&second).contains("served by another tvmm"));
    let functions = service.get("/functions");
    service.kill();
    wait_until_gone(pid);

    // The daemon clears away files that a writer left midway.
    std::fs::write(state.join("functions/x.json.1.partial"), "{").unwrap();
    std::fs::create_dir(state.join("snapshots/half")).unwrap();
    let service = Service::start(&state, &[]);
    assert!(!state.join("functions/x.json.1.partial").exists() && !state.join("snapshots/half").exists());
    assert_eq!(service.get("/functions"), functions);
    assert_eq!(service.get("/snapshots").as_array().unwrap().len(), 1);
    let lost = service.get(&format!("/vms/{vm}"));
    assert_eq!(lost["state"], "lost");
    assert!(service.refused(409, "POST", "/invocations", Some(touch(json!({ "vmId": vm })))).contains("daemon ended"));
    service.invoke(touch(json!({})));
    let socket = service.socket().to_owned();
    assert!(service.terminate().success());
    assert!(!is_served(&socket) && !socket.exists());

    let damaged = state.join("functions/touch.json");
    std::fs::write(&damaged, "{").unwrap();
    let said = crate::support::run_err(&["serve", "--dir", text(&state), "--listen", "127.0.0.1:0"]);
    assert!(said.contains("touch.json"), "{said}");
}

#[test]
fn the_openapi_document_is_the_one_that_is_checked_in() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/openapi.json");
    let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
    let made = run_ok(&["serve", "--openapi"]);
    assert!(checked_in == made, "resources/openapi.json is stale: tvmm serve --openapi > resources/openapi.json");
    let document: Value = serde_json::from_str(&made).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
    for path in ["/functions", "/vms/{id}", "/snapshots/{id}/mincore", "/snapshots/{id}/reap", "/invocations", "/ui"] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
}

#[test]
fn malformed_requests_are_refused_by_every_path() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let vm = service.snapshot_touch("base");
    let document = service.get("/openapi.json");
    let bodies =
        ["{", "null", "[]", "7", "\"x\"", "{\"unknown\":1}", "{\"func_name\":7}", "{\"func_name\":\"../x\"}", "\u{0}"];
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{id}", if path.starts_with("/vms") { &vm } else { "base" }).replace("{name}", "touch");
        let path = path.replace("{namespace}", "fc1");
        for (method, operation) in methods.as_object().unwrap() {
            let method = method.to_uppercase();
            if operation.get("requestBody").is_some() {
                for body in bodies {
                    // FaaSnap's reap takes a JSON bool; every other body is an object.
                    let request = format!(
                        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                         Content-Length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let answer = exchange(service.socket(), request.as_bytes());
                    assert!(answer.starts_with("HTTP/1.1 4"), "{method} {path} {body}: {answer}");
                    assert!(answer.contains("\"message\":"), "{method} {path} {body}: {answer}");
                }
                let plain = format!(
                    "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
                );
                assert!(exchange(service.socket(), plain.as_bytes()).starts_with("HTTP/1.1 415"), "{method} {path}");
                let large = format!(
                    "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                     Content-Length: 100000\r\n\r\n{}",
                    " ".repeat(100_000)
                );
                assert!(exchange(service.socket(), large.as_bytes()).starts_with("HTTP/1.1 413"), "{method} {path}");
            } else if method != "DELETE" && operation["parameters"].to_string().contains("\"query\"") {
                service.refused(400, &method, &format!("{path}?nonsense=1"), None);
            }
        }
    }
}

#[test]
fn requests_that_cannot_be_are_refused_with_their_status() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let vm = service.snapshot_touch("base");
    for (status, method, path, body) in [
        (404, "GET", "/nothing", None),
        (405, "DELETE", "/functions", None),
        (404, "GET", "/functions/x", None),
        (404, "GET", "/vms/x", None),
        (404, "GET", "/snapshots/%2e%2e", None),
        (404, "GET", "/traces/x", None),
        (400, "POST", "/vmms", None),
        (404, "POST", "/invocations", Some(json!({ "func_name": "nobody" }))),
        (400, "POST", "/invocations", Some(json!({ "func_name": "touch", "policy": "magic" }))),
        (400, "POST", "/invocations", Some(json!({ "func_name": "touch", "params": "a\nrun x" }))),
        (400, "POST", "/invocations", Some(json!({ "func_name": "touch", "policy": "reap", "use_mem_file": true }))),
        (400, "POST", "/invocations", Some(json!({ "func_name": "touch", "mincore": 3 }))),
        (400, "POST", "/invocations", Some(json!({ "func_name": "touch", "timeout_ms": 0 }))),
        (400, "POST", "/snapshots", Some(json!({ "vmId": vm, "snapshot_path": "/tmp/x" }))),
        (400, "POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "../x" }))),
        (409, "POST", "/snapshots", Some(json!({ "vmId": vm, "ssId": "base" }))),
        (422, "POST", "/snapshots", Some(json!({ "vmId": vm, "snapshot_type": "Diff" }))),
        (400, "GET", "/snapshots/base/plan?policy=magic", None),
        (400, "PUT", "/snapshots?from_snapshot=base&mem_file_path=/x", None),
        (400, "PATCH", "/snapshots/base/mincore", Some(json!({ "zero_ws": true }))),
        (409, "PATCH", "/snapshots/base/mincore", Some(json!({ "to_ws_file": true }))),
        (409, "PATCH", "/snapshots/base/reap", Some(json!(true))),
        (400, "POST", "/functions", Some(json!({ "func_name": "x", "vcpu": 0 }))),
        (400, "POST", "/functions", Some(json!({ "func_name": "x", "kernel": "relative" }))),
    ] {
        service.refused(status, method, path, body);
    }
    let kernel = json!({ "func_name": "bad", "kernel": "/nonexistent/vmlinux" });
    service.ok("POST", "/functions", Some(kernel));
    let message = service.refused(422, "POST", "/invocations", Some(json!({ "func_name": "bad" })));
    assert!(message.contains("/nonexistent/vmlinux"), "{message}");
    // A function that refuses its arguments has answered.
    let answer =
        service.ok("POST", "/invocations", Some(json!({ "func_name": "touch", "params": "nonsense=1", "vmId": vm })));
    assert_eq!(answer["ok"], false, "{answer}");
    service.invoke(json!({ "func_name": "touch", "params": "pages=1", "vmId": vm }));
}

#[test]
fn traces_are_written_to_a_file_that_chrome_can_read() {
    let dir = scratch();
    let trace = dir.path().join("trace.json");
    let service = Service::start(&dir.path().join("state"), &["--trace", text(&trace)]);
    service.snapshot_touch("base");
    service.invoke(touch(json!({ "keep": false })));
    let written = || std::fs::read_to_string(&trace).is_ok_and(|text| text.contains("\"execute\""));
    wait_until("the trace is written", written);
    assert!(service.terminate().success());
    let all = std::fs::read_to_string(&trace).unwrap();
    // The format's array may end without its bracket, after a comma.
    let events: Value = serde_json::from_str(&format!("{}]", all.trim_end().trim_end_matches(','))).unwrap();
    let of = |name: &str| events.as_array().unwrap().iter().any(|event| event["name"] == name && event["ph"] == "X");
    assert!(of("invocation") && of("restore") && of("state_load"), "{events}");

    let alone = dir.path().join("alone.json");
    let base = dir.path().join("state/snapshots/base");
    run_ok(&["restore", "--snapshot", text(&base), "--run", "touch pages=1", "--trace", text(&alone)]);
    let events: Value = serde_json::from_slice(&std::fs::read(&alone).unwrap()).unwrap();
    let names: Vec<&Value> = events["traceEvents"].as_array().unwrap().iter().map(|event| &event["name"]).collect();
    assert!(names.contains(&&json!("execute")) && names.contains(&&json!("vm_create")), "{names:?}");
}
