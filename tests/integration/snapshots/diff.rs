//! Diff snapshots: only what changed, and nothing forgotten.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::artefact::{content, inspect, pages};
use crate::support::{Vm, config, run_err, run_ok, scratch, text};

/// Pages are zeroed when they are freed: what a diff must record as zero.
fn zeroing_config(vcpus: u32, mib: u64) -> Value {
    let mut config = config(vcpus, mib);
    config["boot-source"] = json!({ "boot_args": "init_on_free=1" });
    config
}

#[test]
fn chain_of_five_diffs_restores_every_generation() {
    let dir = scratch();
    let mut vm = Vm::boot(&zeroing_config(1, 128));
    let mut chain: Vec<(PathBuf, String)> = Vec::new();
    for generation in 0..=5 {
        match generation {
            0 => drop(vm.call("fill pages=2000 seed=1")),
            // The lowest 500 of the 2000 pages are filled anew, the others have become zero.
            3 => {
                vm.call("free filled=1");
                vm.call("fill pages=500 seed=9");
            }
            _ => {
                vm.call(&format!("touch pages=300 write=50 seed={generation}"));
                vm.call(&format!("fill pages=50 seed={generation}"));
            }
        }
        let digest = vm.call("check").digest;
        let out = dir.path().join(format!("g{generation}"));
        vm.snapshot(&out, if generation == 0 { &[] } else { &["--diff"] });
        assert_eq!(vm.call("check").digest, digest);
        chain.push((out, digest));
    }
    let tip = &chain[5].0;
    assert_eq!(inspect(tip)["layers"].as_array().unwrap().len(), 6);
    let (_, zero) = pages(&chain[3].0);
    assert!(zero >= 1500, "{zero} pages recorded as zero, 1500 became zero");
    let merged = dir.path().join("merged");
    run_ok(&["snapshot", "merge", text(tip), "--out", text(&merged)]);
    assert_eq!(content(&merged), content(tip));
    chain.push((merged, chain[5].1.clone()));
    for (snapshot, digest) in &chain {
        for policy in ["eager", "firecracker"] {
            let mut restored = Vm::restore(snapshot, policy);
            assert_eq!(restored.call("check").digest, *digest, "{policy} {}", snapshot.display());
        }
    }
}

#[test]
fn merged_chain_is_page_by_page_the_full_snapshot_of_the_same_instant() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let mut vm = Vm::boot(&zeroing_config(2, 256));
    vm.call("fill pages=3000 seed=1");
    vm.snapshot(&path("base"), &[]);
    for seed in 1..=3 {
        vm.call(&format!("touch pages=500 write=80 seed={seed}"));
        vm.snapshot(&path(&format!("d{seed}")), &["--diff"]);
    }
    vm.call("free filled=1");
    vm.call("fill pages=700 seed=5 cpu=1");
    let digest = vm.call("check").digest;
    vm.pause();
    vm.capture(&path("diff"), "Diff");
    vm.capture(&path("full"), "Full");
    let dirs: Vec<PathBuf> = ["base", "d1", "d2", "d3", "diff"].map(path).into();
    let mut merge = vec!["snapshot", "merge"];
    merge.extend(dirs.iter().map(|dir| text(dir)));
    let merged = path("merged");
    merge.extend(["--out", text(&merged)]);
    run_ok(&merge);
    assert_eq!(content(&merged), content(&path("full")));
    assert_eq!(content(&path("diff")), content(&path("full")));
    assert_eq!(pages(&merged), pages(&path("full")));
    assert!(pages(&path("diff")).1 >= 2300, "{:?}", pages(&path("diff")));
    vm.resume();
    assert_eq!(vm.call("check").digest, digest);
    for policy in ["eager", "firecracker"] {
        assert_eq!(Vm::restore(&merged, policy).call("check").digest, digest, "{policy}");
    }
}

#[test]
fn diff_holds_what_was_written_and_little_else() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let mut vm = Vm::boot(&config(1, 256));
    vm.call("fill pages=10000 seed=1");
    vm.snapshot(&path("full"), &[]);
    vm.call("touch pages=10000 seed=2");
    vm.snapshot(&path("read"), &["--diff"]);
    vm.call("touch pages=1000 write=100 seed=3");
    vm.snapshot(&path("written"), &["--diff"]);
    let [(full, _), (read, _), (written, _)] = ["full", "read", "written"].map(|name| pages(&path(name)));
    // Stacks, counters, kvmclock: a few pages change with every request.
    assert!(full >= 10_000, "{full}");
    assert!(read < 64, "{read} pages in a diff of a guest that only read");
    assert!((1000..1064).contains(&written), "{written} pages in a diff of 1000 written ones");
}

/// KVM's log also has pages that were only read, if the host had made them writable to fill them.
#[test]
fn diff_after_a_restore_by_any_policy_holds_what_was_written_and_little_else() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let mut vm = Vm::boot(&config(1, 256));
    vm.call("fill pages=10000 seed=1");
    vm.snapshot(&path("full"), &[]);
    drop(vm);
    let full = path("full");
    let profile = path("profile");
    let touch = "touch pages=3000 seed=5";
    run_ok(&["profile", "record", "--snapshot", text(&full), "--run", touch, "--out", text(&profile)]);
    let without = ["firecracker", "trenv", "catalyzer", "eager", "firecracker-uffd"].map(|name| (name, None));
    let with = ["reap", "aquifer", "faasnap", "tiered"].map(|name| (name, Some(&profile)));
    for (policy, profile) in without.into_iter().chain(with) {
        let mut more = vec!["--track-dirty-pages"];
        more.extend(profile.into_iter().flat_map(|profile| ["--profile", text(profile)]));
        let mut vm = Vm::restore_with(&full, policy, &more);
        vm.call("touch pages=10000 seed=5");
        let [read, written, rewritten] = ["read", "written", "rewritten"].map(|name| path(&format!("{policy}-{name}")));
        vm.snapshot(&read, &["--diff"]);
        vm.call("touch pages=9000 seed=6");
        vm.call("touch pages=1000 write=100 seed=3");
        let digest = vm.call("check").digest;
        vm.snapshot(&written, &["--diff"]);
        vm.call("touch pages=300 write=100 seed=3");
        let last = vm.call("check").digest;
        vm.snapshot(&rewritten, &["--diff"]);
        drop(vm);
        let held = |snapshot: &PathBuf| pages(snapshot).0 + pages(snapshot).1;
        assert!(held(&read) < 64, "{policy}: {} pages in a diff of a guest that only read", held(&read));
        assert!((1000..1064).contains(&held(&written)), "{policy}: {} pages of 1000 written", held(&written));
        assert!(held(&rewritten) < 364, "{policy}: {} pages of 300 written", held(&rewritten));
        for (snapshot, digest) in [(&written, &digest), (&rewritten, &last)] {
            assert_eq!(Vm::restore(snapshot, policy_without_profile(policy)).call("check").digest, *digest, "{policy}");
        }
    }
}

/// A policy that restores what `policy` left, without a profile of it.
fn policy_without_profile(policy: &str) -> &str {
    if policy == "firecracker" { "eager" } else { "firecracker" }
}

#[test]
fn full_snapshot_in_between_is_the_parent_of_the_next_diff() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=1000 seed=1");
    vm.snapshot(&path("first"), &[]);
    vm.call("touch pages=400 write=100 seed=1");
    vm.snapshot(&path("second"), &[]);
    vm.call("touch pages=100 write=100 seed=2");
    vm.snapshot(&path("diff"), &["--diff"]);
    let digest = vm.call("check").digest;
    let manifest = inspect(&path("diff"))["manifest"].clone();
    assert_eq!(manifest["parent"]["id"], inspect(&path("second"))["manifest"]["id"]);
    assert!(pages(&path("diff")).0 < 164);
    assert_eq!(Vm::restore(&path("diff"), "firecracker").call("check").digest, digest);
}

#[test]
fn diff_that_could_not_be_taken_loses_no_page() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=1000 seed=1");
    vm.snapshot(&path("full"), &[]);
    vm.call("touch pages=200 write=100 seed=4");
    std::fs::create_dir(path("taken")).unwrap();
    let socket = text(vm.socket()).to_string();
    run_err(&["snapshot", "--api-sock", &socket, "--out", text(&path("taken")), "--resume", "--diff"]);
    vm.call("touch pages=100 write=100 seed=5");
    let digest = vm.call("check").digest;
    vm.snapshot(&path("diff"), &["--diff"]);
    for policy in ["eager", "firecracker"] {
        assert_eq!(Vm::restore(&path("diff"), policy).call("check").digest, digest, "{policy}");
    }
}

#[test]
fn diff_without_dirty_tracking_says_how_to_turn_it_on() {
    let dir = scratch();
    let out = dir.path().join("diff");
    let mut config = config(1, 128);
    config["machine-config"]["track_dirty_pages"] = json!(false);
    let mut vm = Vm::boot(&config);
    let socket = text(vm.socket()).to_string();
    let stderr = run_err(&["snapshot", "--api-sock", &socket, "--out", text(&out), "--diff", "--resume"]);
    assert!(stderr.contains("track_dirty_pages"), "{stderr}");
    vm.call("hello");
    assert!(!out.exists());
}
