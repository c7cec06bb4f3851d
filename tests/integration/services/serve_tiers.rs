//! `tvmm serve` restores from pools and cold pools, as an invocation says or as the daemon was told.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::pool::Pool;
use crate::support::service::Service;
use crate::support::{refusal, run, run_ok, scratch, text};

fn touch(more: Value) -> Value {
    let mut body = json!({ "func_name": "touch", "ssId": "base", "policy": "trenv", "params": "pages=256 write=10" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Returns the report of the VM of the invocation with this answer.
fn report(service: &Service, answer: &Value) -> Value {
    service.get(&format!("/vms/{}/report", answer["vmId"].as_str().unwrap()))
}

fn in_place_kib(report: &Value) -> u64 {
    report["memory"]["guest_in_place_kib"].as_u64().unwrap()
}

#[test]
fn an_invocation_names_its_pools_and_its_memory_is_in_place() {
    let dir = scratch();
    let empty = Pool::create("0.1");
    let pool = Pool::create("0.25");
    let state = dir.path().join("state");
    let service = Service::start(&state, &[]);
    let vm = service.snapshot_touch("base");
    let warm = service.invoke(json!({ "func_name": "touch", "vmId": vm, "params": "pages=256 write=10" }));
    let snapshot = state.join("snapshots/base");
    pool.add(&snapshot);
    // Nothing but the pool has the memory.
    std::fs::rename(snapshot.join("memory"), dir.path().join("memory")).unwrap();
    let answer = service.invoke(touch(json!({ "tvmm": { "pools": [empty.path(), pool.path()] } })));
    assert_eq!(
        answer["result"].as_str().unwrap().split(' ').next(),
        warm["result"].as_str().unwrap().split(' ').next()
    );
    let said = report(&service, &answer);
    assert_eq!(said["restore"]["pools"], json!([pool.path()]));
    assert!(in_place_kib(&said) >= 4 * 256, "{said}");
    let shown = service.get("/ui/data");
    let shown = shown["vms"].as_array().unwrap().iter().find(|vm| vm["vmId"] == answer["vmId"]).unwrap().clone();
    assert!(in_place_kib(&shown) >= 4 * 256, "{shown}");

    let body = json!({ "func_name": "touch", "ssId": "base", "policy": "trenv", "tvmm": { "pools": [pool.path()] } });
    let vm = service.ok("POST", "/vms", Some(body));
    let said = report(&service, &vm);
    assert_eq!(said["restore"]["pools"], json!([pool.path()]));
    assert!(said["restore"]["engine"]["planned"]["in-place"].as_u64().unwrap() >= 256, "{said}");

    let without = service.refused(422, "POST", "/invocations", Some(touch(json!({}))));
    assert!(without.contains("memory"), "{without}");
    for (status, tvmm, said) in [
        (422, json!({ "pools": [empty.path()] }), "has no snapshot"),
        (422, json!({ "pools": ["/nonexistent/pool"] }), "/nonexistent/pool"),
        (422, json!({ "cold_pools": ["/nonexistent/cold"] }), "/nonexistent/cold"),
        (400, json!({ "pools": ["relative"] }), "absolute"),
        (400, json!({ "cold_cache": "/tmp/x" }), "needs `tvmm.cold_pools`"),
        (400, json!({ "pool": ["/x"] }), "unknown field `pool`"),
    ] {
        let refused = service.refused(status, "POST", "/invocations", Some(touch(json!({ "tvmm": tvmm }))));
        assert!(refused.contains(said), "{tvmm}: {refused}");
    }
    let both = touch(json!({ "dram_mib": 1, "tvmm": { "dram_mib": 2 } }));
    assert!(service.refused(400, "POST", "/invocations", Some(both)).contains("leave one out"));
    let running = json!({ "func_name": "touch", "vmId": vm["vmId"], "tvmm": {} });
    service.refused(400, "POST", "/invocations", Some(running));
    service.refused(400, "POST", "/invocations", Some(touch(json!({ "record": "uffd", "tvmm": {} }))));
    service.refused(400, "POST", "/vms", Some(json!({ "func_name": "touch", "tvmm": {} })));
}

/// A pool that is named as what it is not is told at the start, also one that is read past the page cache.
fn kinds_of_pools_are_told_apart(dir: &Path, pool: &str, cold: &str) {
    let state = dir.join("other");
    for (flag, named, said) in [
        ("--pool", cold.to_string(), "it is a pool of compressed chunks: name it by --cold"),
        ("--cold", pool.to_string(), "it is no pool of compressed chunks: name it by --pool"),
        ("--cold", format!("direct:{pool},depth=2"), "it is no pool of compressed chunks: name it by --pool"),
        ("--cold", "direct:/nonexistent/pool".into(), "Cannot restore from /nonexistent/pool: "),
    ] {
        let args = ["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", flag, &named];
        let refused = refusal(&run(&args));
        assert!(refused.contains(said), "{flag} {named}: {refused}");
    }
    let unclear = run(&["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--cold", "direct:/x,depth=0"]);
    assert_eq!(unclear.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unclear.stderr).contains("from 1 to 256"));
}

#[test]
fn the_daemons_pools_are_for_invocations_that_name_none() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let cold = scratch();
    let state = dir.path().join("state");
    let cold = cold.path().join("cold");
    run_ok(&["pool", "create", "--tier", "remote", "--at", text(&cold)]);
    let options = ["--pool", pool.path(), "--cold", text(&cold), "--dram", "64", "--dram-price", "5"];
    let service = Service::start(&state, &options);
    service.snapshot_touch("base");
    let snapshot = state.join("snapshots/base");
    // Neither has it: nothing is taken from elsewhere instead.
    service.refused(422, "POST", "/invocations", Some(touch(json!({}))));
    let own = service.invoke(touch(json!({ "tvmm": { "pools": [], "cold_pools": [] } })));
    assert_eq!(report(&service, &own)["restore"]["pools"], json!([]));
    run_ok(&["pool", "add", text(&cold), text(&snapshot)]);
    let from_cold = report(&service, &service.invoke(touch(json!({}))));
    assert!(from_cold["cold"]["places"][0]["bytes_pages"].as_u64().unwrap() >= 4096, "{from_cold}");
    pool.add(&snapshot);
    let pooled = report(&service, &service.invoke(touch(json!({}))));
    assert_eq!(pooled["restore"]["pools"], json!([pool.path()]));
    assert!(in_place_kib(&pooled) >= 4 * 256, "{pooled}");
    let plan = service.get("/snapshots/base/plan?policy=trenv");
    assert_eq!(plan["policy"], "trenv", "{plan}");
    kinds_of_pools_are_told_apart(dir.path(), pool.path(), text(&cold));

    let alone = run(&["serve", "--dir", text(&state), "--listen", "127.0.0.1:0", "--cold-cache", "/tmp/x"]);
    assert_eq!(alone.status.code(), Some(2), "it needs --cold");
    for flag in ["--pool", "--cold"] {
        let elsewhere = dir.path().join("other");
        let args = ["serve", "--dir", text(&elsewhere), "--listen", "127.0.0.1:0", flag, "/nonexistent/pool"];
        let said = refusal(&run(&args));
        assert!(said.contains("Cannot restore from /nonexistent/pool: "), "{said}");
    }
    let taken = refusal(&run(&["serve", "--dir", text(&state), "--listen", "127.0.0.1:0"]));
    assert!(taken.contains("served by another"), "{taken}");
}
