//! Pools: snapshots restored from memory that all VMs share, without their own memory files.

use serde_json::{Value, json};

use crate::support::artefact::content;
use crate::support::pool::{Pool, filled, take_memory_away};
use crate::support::{Vm, config, run_err, run_ok, scratch, text};

#[test]
fn every_policy_restores_from_a_pool_without_the_memory_file() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let out = dir.path().join("full");
    let profile = dir.path().join("p.profile");
    let digest = filled(&out, 6000, 7);
    let touch = "touch pages=3000 write=30 seed=5";
    run_ok(&["profile", "record", "--snapshot", text(&out), "--run", touch, "--out", text(&profile)]);
    let added = pool.json("add", &[text(&out), "--profile", text(&profile)]);
    assert!(added["nonzero_pages"].as_u64().unwrap() >= 6000, "{added}");
    take_memory_away(&out);
    for policy in ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv"] {
        let mut vm = pool.restore(&out, policy, &[]);
        assert_eq!(vm.call("check").digest, digest, "{policy}");
    }
    for policy in ["reap", "faasnap", "aquifer", "tiered"] {
        let mut vm = pool.restore(&out, policy, &["--profile", text(&profile)]);
        vm.call(touch);
        let mut again = pool.restore(&out, policy, &["--profile", text(&profile)]);
        assert_eq!(again.call("check").digest, digest, "{policy}: a VM wrote to the pool");
    }
    assert_eq!(pool.json("fsck", &[])["good"], true);
}

#[test]
fn a_chain_is_restored_from_its_tip_alone_and_snapshotted_again() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let [base, diff, again] = ["base", "diff", "again"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=5000 seed=3");
    vm.snapshot(&base, &[]);
    vm.call("touch pages=400 write=100 seed=9");
    let digest = vm.call("check").digest;
    vm.snapshot(&diff, &["--diff"]);
    let whole = content(&diff);
    pool.add(&base);
    let added = pool.add(&diff);
    assert!(added["shared_pages"].as_u64().unwrap() > 4000, "{added}");
    std::fs::remove_dir_all(&base).unwrap();
    take_memory_away(&diff);
    let restored = pool.restore(&diff, "trenv", &["--track-dirty-pages", "--paused"]);
    restored.wait_for_state("Paused");
    restored.capture(&again, "Full");
    // Only KVM has written since, and only to its clock.
    let mut back = Vm::restore(&again, "firecracker");
    assert_eq!(back.call("check").digest, digest);
    assert_ne!(whole, String::new());
}

#[test]
fn snapshots_of_functions_on_one_base_share_it() {
    let dir = scratch();
    let pool = Pool::create("0.5");
    let base = dir.path().join("base");
    filled(&base, 8000, 1);
    for function in 1..=10 {
        let out = dir.path().join(format!("f{function}"));
        let mut vm = Vm::restore(&base, "firecracker");
        vm.call(&format!("touch pages=800 write=100 seed={function}"));
        vm.snapshot(&out, &[]);
        pool.add(&out);
    }
    let shown = pool.json("show", &[]);
    let used = shown["used_pages"].as_u64().unwrap();
    let all = shown["nonzero_pages_of_all"].as_u64().unwrap();
    assert!(used * 100 <= all * 35, "{used} of {all} pages");
    for head in shown["snapshots"].as_array().unwrap() {
        let runs = head["runs"].as_u64().unwrap();
        let shredded = head["runs_if_all_shared"].as_u64().unwrap();
        assert!(runs <= shredded, "{head}");
    }
}

#[test]
fn vms_share_a_pool_and_it_says_where_their_memory_is() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let out = dir.path().join("full");
    let digest = filled(&out, 6000, 7);
    pool.add(&out);
    let mut vms: Vec<Vm> = (0..3).map(|_| pool.restore(&out, "trenv", &[])).collect();
    for (seed, vm) in vms.iter_mut().enumerate() {
        vm.call(&format!("touch pages=2000 write=50 seed={}", seed + 1));
    }
    let shown = pool.json("show", &[]);
    let listed = shown["vms"].as_array().unwrap();
    assert_eq!(listed.len(), 3, "{shown}");
    for vm in listed {
        assert!(vms.iter().any(|own| json!(own.pid()) == vm["pid"]));
        assert!(vm["planned_pages"]["in_place"].as_u64().unwrap() >= 6000, "{vm}");
        let resident = |key: &str| vm["resident"][key].as_u64().unwrap();
        assert!(resident("pool_kib") >= 4000 && resident("local_kib") >= 4000, "{vm}");
    }
    assert!(pool.ok("show", &[]).contains("in place now"));
    assert_eq!(pool.restore(&out, "trenv", &[]).call("check").digest, digest);
    drop(vms);
    assert_eq!(pool.json("show", &[])["vms"], json!([]));
}

#[test]
fn the_api_takes_pools_and_the_first_that_has_the_snapshot_serves_it() {
    let dir = scratch();
    let empty = Pool::create("0.1");
    let pool = Pool::create("0.25");
    let out = dir.path().join("full");
    let digest = filled(&out, 3000, 7);
    pool.add(&out);
    take_memory_away(&out);
    let tvmm = |pools: &[&str]| json!({ "policy": "trenv", "pools": pools });
    let load = |pools: &[&str]| json!({ "snapshot_path": out, "resume_vm": true, "tvmm": tvmm(pools) });
    let mut vm = Vm::wait_for_api();
    let said = vm.api_fault("PUT", "/snapshot/load", Some(load(&[empty.path()])));
    assert!(said.contains("has no snapshot"), "{said}");
    vm.api_ok("PUT", "/snapshot/load", Some(load(&[empty.path(), pool.path()])));
    assert_eq!(vm.call("check").digest, digest);
}

#[test]
fn no_more_is_in_place_than_the_budget_allows() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let out = dir.path().join("full");
    let profile = dir.path().join("p.profile");
    let report = dir.path().join("report");
    filled(&out, 8000, 7);
    let touch = "touch pages=6000 write=0";
    run_ok(&["profile", "record", "--snapshot", text(&out), "--run", touch, "--out", text(&profile)]);
    pool.json("add", &[text(&out), "--profile", text(&profile)]);
    let restore = |budget: &[&str]| {
        let args = ["restore", "--snapshot", text(&out), "--policy", "tiered", "--profile", text(&profile)];
        let run = ["--pool", pool.path(), "--run", touch, "--report", text(&report)];
        run_ok(&[&args[..], &run, budget].concat());
        let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
        let planned = report["restore"]["engine"]["planned"]["in-place"].as_u64().unwrap();
        (planned * 4, report["memory"]["guest_in_place_kib"].as_u64().unwrap())
    };
    let (planned, there) = restore(&["--dram", "8"]);
    assert!(planned > 15_000 && there > 4096, "{planned} {there}");
    let (planned, there) = restore(&["--dram", "8", "--cxl", "4"]);
    assert!(planned <= 4096 && there <= 4096, "{planned} {there}");
}

#[test]
fn a_plan_is_for_one_state_of_one_pool() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let other = Pool::create("0.25");
    let [out, between, plan] = ["full", "between", "plan"].map(|name| dir.path().join(name));
    let digest = filled(&out, 3000, 7);
    filled(&between, 3000, 8);
    pool.add(&out);
    other.add(&out);
    let make = ["plan", "--snapshot", text(&out), "--policy", "trenv", "--pool", pool.path(), "--out", text(&plan)];
    run_ok(&make);
    let base = ["restore", "--snapshot", text(&out), "--plan", text(&plan), "--run", "check"];
    let own = [&base[..], &["--pool", pool.path()]].concat();
    let others = [&base[..], &["--pool", other.path()]].concat();
    let answer = run_ok(&own);
    assert!(answer.contains(&digest), "{answer}");
    assert!(run_err(&base).contains("takes pages from pool"));
    assert!(run_err(&others).contains("takes pages from pool"));
    // Elsewhere in the same pool.
    pool.ok("rm", &["full"]);
    pool.ok("gc", &[]);
    pool.add(&between);
    pool.add(&out);
    assert!(run_err(&own).contains("was changed after the plan was made"));
}
