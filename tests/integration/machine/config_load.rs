//! `snapshot-load` of a config: a file says which snapshot is restored, by which policy and from which tiers.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::cold::Scene;
use crate::support::pool::{Pool, filled, take_memory_away};
use crate::support::{Vm, run, run_err, run_ok, scratch, text};

/// A config that loads `snapshot`, with this `tvmm` in it.
fn written(dir: &Path, snapshot: &Path, tvmm: Value) -> PathBuf {
    let path = dir.join("vm.json");
    let load = json!({ "snapshot_path": snapshot, "resume_vm": true, "tvmm": tvmm });
    std::fs::write(&path, json!({ "snapshot-load": load }).to_string()).unwrap();
    path
}

fn report(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A snapshot without its memory, which a pool has; and the digest of what its guest filled.
fn pooled() -> (TempDir, PathBuf, Pool, String) {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let out = dir.path().join("full");
    let digest = filled(&out, 3000, 7);
    pool.add(&out);
    take_memory_away(&out);
    (dir, out, pool, digest)
}

#[test]
fn config_restores_from_a_pool() {
    let (dir, out, pool, digest) = pooled();
    let said = dir.path().join("report.json");
    let config = written(dir.path(), &out, json!({ "policy": "trenv", "pools": [pool.path()] }));
    let answer = run_ok(&["--config", text(&config), "--run", "check", "--report", text(&said)]);
    assert!(answer.contains(&digest), "{answer}");
    let report = report(&said);
    assert_eq!((&report["operation"], &report["restore"]["policy"]), (&json!("restore"), &json!("trenv")));
    assert_eq!(report["restore"]["pools"], json!([pool.path()]));
    assert!(report["memory"]["guest_in_place_kib"].as_u64().unwrap() >= 4 * 3000, "{report}");
}

#[test]
fn config_with_two_pools_restores_from_the_first_that_has_the_snapshot() {
    let (dir, out, pool, digest) = pooled();
    let empty = Pool::create("0.1");
    let said = dir.path().join("report.json");
    let config = written(dir.path(), &out, json!({ "policy": "trenv", "pools": [empty.path(), pool.path()] }));
    let answer = run_ok(&["--config", text(&config), "--run", "check", "--report", text(&said)]);
    assert!(answer.contains(&digest), "{answer}");
    assert_eq!(report(&said)["restore"]["pools"], json!([pool.path()]));
    let config = written(dir.path(), &out, json!({ "policy": "trenv", "pools": [empty.path()] }));
    let refused = run_err(&["--config", text(&config), "--run", "check"]);
    assert!(refused.contains("has no snapshot") && refused.contains(empty.path()), "{refused}");
}

#[test]
fn config_restores_from_a_cold_pool_and_the_vm_is_like_any_other() {
    let scene = Scene::make();
    let empty = Pool::create("0.1");
    let dir = scene.dir.path();
    let said = scene.dir.path().join("report.json");
    let cold = [text(&scene.pool)];
    // The pool lacks it, so the cold pool is used.
    let tvmm = json!({ "policy": "eager", "pools": [empty.path()], "cold_pools": cold });
    let config = written(dir, &scene.bare, tvmm);
    let answer = run_ok(&["--config", text(&config), "--run", "check", "--report", text(&said)]);
    assert!(answer.contains(&scene.digest), "{answer}");
    assert!(report(&said)["cold"]["places"][0]["bytes_pages"].as_u64().unwrap() >= 6000 * 4096);

    let path = dir.join("paused.json");
    let load = json!({ "snapshot_path": scene.bare, "track_dirty_pages": true, "tvmm": { "cold_pools": cold } });
    let metrics = json!({ "metrics_path": dir.join("metrics") });
    std::fs::write(&path, json!({ "snapshot-load": load, "metrics": metrics }).to_string()).unwrap();
    let mut vm = Vm::spawn(scratch(), &["--config", text(&path)]);
    vm.wait_for_socket();
    vm.wait_for_state("Paused");
    assert_eq!(vm.api_ok("GET", "/machine-config", None)["mem_size_mib"], 128);
    let again = json!({ "snapshot_path": scene.bare });
    assert!(vm.api_fault("PUT", "/snapshot/load", Some(again)).contains("after starting the microVM"));
    vm.resume();
    assert_eq!(vm.call("check").digest, scene.digest);
    vm.snapshot(&dir.join("diff"), &["--diff"]);
}

#[test]
fn config_that_cannot_be_loaded_is_refused_with_the_reason() {
    let (dir, out, pool, _) = pooled();
    let path = dir.path().join("vm.json");
    let refused = |config: Value, more: &[&str]| {
        std::fs::write(&path, config.to_string()).unwrap();
        run_err(&[&["--config", text(&path)], more].concat())
    };
    let load = |more: Value| {
        let mut load = json!({ "snapshot_path": out, "resume_vm": true });
        load.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "snapshot-load": load })
    };
    for (more, said) in [
        (json!({ "tvmm": { "pols": [] } }), "unknown field `pols`"),
        (json!({ "tvmm": { "pools": pool.path() } }), "snapshot-load.tvmm.pools"),
        (json!({ "tvmm": { "cold_cache": "x" } }), "needs tvmm.cold_pools"),
        (json!({ "tvmm": { "policy": "magic", "pools": [pool.path()] } }), "magic"),
        (json!({ "tvmm": { "policy": "tiered", "pools": [pool.path()] } }), "profile"),
        (json!({ "tvmm": { "pools": ["/nonexistent/pool"] } }), "/nonexistent/pool"),
        (json!({ "tvmm": { "cold_pools": ["/nonexistent/cold"] } }), "/nonexistent/cold"),
        (json!({ "snapshot_path": "/nonexistent/snapshot" }), "/nonexistent/snapshot"),
        (
            json!({ "tvmm": { "pools": [pool.path()] }, "mem_backend": { "backend_type": "Uffd",
            "backend_path": "/x" } }),
            "page-fault handler",
        ),
    ] {
        let refusal = refused(load(more.clone()), &[]);
        assert!(refusal.contains(said), "{more}: {refusal}");
    }
    let mut both = load(json!({}));
    both["machine-config"] = json!({ "vcpu_count": 1, "mem_size_mib": 64 });
    assert!(refused(both, &[]).contains("both snapshot-load and machine-config"));
    let paused = load(json!({ "resume_vm": false, "tvmm": { "pools": [pool.path()] } }));
    assert!(refused(paused.clone(), &[]).contains("resume_vm"));
    let sock = dir.path().join("api.sock");
    assert!(refused(paused, &["--api-sock", text(&sock), "--run", "hello"]).contains("resume_vm"));
}

#[test]
fn flags_that_contradict_each_other_are_refused_by_the_rules_of_the_api() {
    let dir = scratch();
    let [snapshot, other] = ["snapshot", "other"].map(|name| text(&dir.path().join(name)).to_string());
    for (more, said) in [
        (vec!["--plan", &other, "--policy", "eager"], "--plan cannot be used with --policy"),
        (vec!["--plan", &other, "--policy", "firecracker"], "--plan cannot be used with --policy"),
        (vec!["--plan", &other, "--dram", "1"], "--plan cannot be used with --dram"),
        (vec!["--plan", &other, "--dram-price", "50"], "--plan cannot be used with --dram-price"),
        (vec!["--mem-file", &other, "--pool", &other], "a pool cannot be used with --mem-file"),
        (vec!["--mem-file", &other, "--cold", &other], "a pool cannot be used with --mem-file"),
        (vec!["--cold-cache", &other], "--cold-cache needs --cold"),
        (vec!["--cold", &other, "--cold-cache-size", "1"], "--cold-cache-size needs --cold-cache"),
        (
            vec!["--cold", &other, "--cold-cache", &other, "--cold-cache-size", "0"],
            "--cold-cache-size must be 1 or more",
        ),
    ] {
        let output = run(&[&["restore", "--snapshot", &snapshot][..], &more].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{more:?}: {stderr}");
        assert!(stderr.contains(said), "{more:?}: {stderr}");
    }
    // An unknown policy is refused like a missing snapshot.
    let said = run_err(&["restore", "--snapshot", &snapshot, "--policy", "magic"]);
    assert!(said.contains("There is no policy \"magic\""), "{said}");
}
