//! Access tracking: barriers tell which pages a guest has touched, and cold demotions leave those where they are.

use serde_json::{Value, json};

use super::demote::{anonymous_kib, assert_content_stays, count, with_free_page_reporting};
use super::rewind::restores;
use crate::support::pool::filled;
use crate::support::{Random, Vm, config, rounds, run, run_err, scratch, text};

fn barrier(vm: &Vm, body: Value) -> Value {
    vm.api_ok("PUT", "/tvmm/barrier", Some(body))
}

fn cold(vm: &Vm, more: Value) -> Value {
    let mut body = more;
    body["cold"] = json!(true);
    vm.api_ok("PUT", "/tvmm/demote", Some(body))
}

/// The sum of a count over all buckets.
fn all(answer: &Value, key: &str) -> u64 {
    ["runtime", "init", "execution"].iter().map(|bucket| count(&answer[bucket], key)).sum()
}

/// The number of pages that a demotion has given back.
fn given(answer: &Value) -> u64 {
    count(answer, "pages_dropped") + count(answer, "pages_mapped")
}

#[test]
fn a_tracked_guest_has_the_same_memory_whatever_placed_it() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let saved = filled(&snapshot, 2000, 1);
    for (way, mut vm) in restores(&snapshot) {
        assert_eq!(vm.call("check").digest, saved, "{way}");
        for round in 0..3 {
            barrier(&vm, json!({ "reads": round != 1, "writes": round != 2 }));
            vm.call(&format!("touch pages=300 write=50 seed={round}"));
            let digest = vm.call("check").digest;
            let demoted = cold(&vm, json!({}));
            assert_eq!(vm.state(), "Running", "{way}, round {round}: {demoted}");
            assert_eq!(vm.call("check").digest, digest, "{way}, round {round}: {demoted}");
            let at = barrier(&vm, json!({ "reads": true, "writes": true }));
            assert_eq!(vm.call("check").digest, digest, "{way}, round {round}: {at}");
            let demoted = cold(&vm, json!({ "to": "spilled", "spill_dir": dir.path() }));
            assert_eq!(vm.call("check").digest, digest, "{way}, round {round}: {demoted}");
        }
        assert_content_stays(&vm, dir.path(), &way, || {
            barrier(&vm, json!({ "reads": true, "writes": true }));
            cold(&vm, json!({ "to": "spilled", "spill_dir": dir.path() }));
        });
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        assert_eq!(vm.call("check").digest, saved, "{way}: a tracked VM goes back");
        let report = vm.api_ok("GET", "/tvmm/report", None);
        assert_eq!(report["restore"]["barriers"], 7, "{way}");
        let at = barrier(&vm, json!({}));
        assert_eq!(all(&at, "away"), 0, "{way}: a rewind begins anew: {at}");
    }
}

#[test]
fn reads_of_pages_of_files_are_seen() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 7000, 1);
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &[]);
    vm.call("check");
    let at = barrier(&vm, json!({ "reads": true }));
    // The host may have reclaimed pages of the file by itself.
    assert!(count(&at, "pages_unmapped") >= 3500 && count(&at, "steps") > 0, "{at}");
    vm.call("hello");
    let at = barrier(&vm, json!({}));
    assert!(all(&at, "read") < 1500, "a small request touches little: {at}");
    vm.call("check");
    let at = barrier(&vm, json!({}));
    assert!(count(&at["init"], "read") >= 2000, "the rest was read: {at}");
    vm.call("check");
    let at = barrier(&vm, json!({}));
    assert_eq!(all(&at, "read"), 0, "nothing was unmapped: {at}");
}

#[test]
fn all_writes_are_seen_while_kvm_logs_them() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    for policy in ["firecracker", "eager", "firecracker-uffd"] {
        let mut vm = Vm::restore_with(&snapshot, policy, &[]);
        let again = "touch pages=1000 write=100 seed=2";
        vm.call(again);
        barrier(&vm, json!({ "writes": true }));
        vm.call(again);
        let at = barrier(&vm, json!({ "writes": true }));
        assert!(all(&at, "written") >= 900, "{policy}: pages were written again: {at}");
        vm.call("hello");
        let at = barrier(&vm, json!({}));
        assert!(all(&at, "written") < 500, "{policy}: {at}");
        vm.call(again);
        let at = barrier(&vm, json!({}));
        assert!(all(&at, "written") < 500, "{policy}: no first writes, and no log: {at}");
    }
}

#[test]
fn written_pages_are_seen_although_a_live_snapshot_reads_the_log() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &[]);
    let again = "touch pages=1000 write=100 seed=2";
    vm.call(again);
    barrier(&vm, json!({ "writes": true }));
    vm.call(again);
    let out = dir.path().join("live");
    let body = json!({ "snapshot_path": out, "tvmm": { "live": true } });
    vm.api_ok("PUT", "/snapshot/create", Some(body));
    let at = barrier(&vm, json!({ "writes": true }));
    assert!(all(&at, "written") >= 900, "{at}");
    vm.call(again);
    let at = barrier(&vm, json!({}));
    assert!(all(&at, "written") >= 900, "the log goes on after the live snapshot: {at}");
    let digest = vm.call("check").digest;
    vm.pause();
    let paused = dir.path().join("paused");
    vm.capture(&paused, "Full");
    drop(vm);
    let mut restored = Vm::restore(&paused, "firecracker");
    assert_eq!(restored.call("check").digest, digest);
}

#[test]
fn untouched_copies_go_and_touched_ones_stay() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 7000, 1);
    // Served by faults: each touch is seen.
    let mut vm = Vm::restore_with(&snapshot, "firecracker-uffd", &[]);
    let digest = vm.call("check").digest;
    let demoted = cold(&vm, json!({}));
    assert!(given(&demoted) < 500 && count(&demoted, "pages_skipped") >= 6500, "all was touched: {demoted}");
    let kept = barrier(&vm, json!({ "keep": true }));
    assert!(all(&kept, "read") >= 6500, "{kept}");
    assert!(all(&barrier(&vm, json!({})), "read") >= all(&kept, "read"), "the touches were kept: {kept}");
    let before = anonymous_kib(&vm);
    let demoted = cold(&vm, json!({ "buckets": ["init"] }));
    assert!(given(&demoted) >= 6500, "nothing was touched since: {demoted}");
    assert!(anonymous_kib(&vm) + 6500 * 4 <= before, "{demoted}");
    let at = barrier(&vm, json!({}));
    assert!(count(&at["init"], "away") >= 6500, "{at}");
    assert_eq!(vm.call("check").digest, digest);
    let at = barrier(&vm, json!({}));
    assert!(count(&at["init"], "recalled") >= 6500 && count(&at["init"], "away") < 500, "{at}");
    // Copied ahead: a copy leaves, and its file shows the touch.
    let mut vm = Vm::restore_with(&snapshot, "eager", &[]);
    vm.call("hello");
    let demoted = cold(&vm, json!({ "buckets": ["runtime"] }));
    assert_eq!(given(&demoted), 0, "a full snapshot has no layer below its own: {demoted}");
    let demoted = cold(&vm, json!({ "buckets": ["init"] }));
    assert!(given(&demoted) >= 6500, "{demoted}");
    let local = count(&barrier(&vm, json!({}))["init"], "local");
    assert_eq!(vm.call("check").digest, digest);
    let at = barrier(&vm, json!({}));
    assert!(count(&at["init"], "recalled") >= 3500, "{at}");
    assert!(count(&at["init"], "local") <= local, "reads make no copies: {at}");
}

#[test]
fn pages_are_in_the_bucket_of_their_layer_until_they_are_written() {
    let dir = scratch();
    let base = dir.path().join("base");
    let tip = dir.path().join("tip");
    filled(&base, 4000, 1);
    let mut vm = Vm::restore(&base, "firecracker");
    vm.call("fill pages=1500 seed=2");
    vm.snapshot(&tip, &["--diff"]);
    drop(vm);
    let mut vm = Vm::restore_with(&tip, "eager", &[]);
    let digest = vm.call("check").digest;
    let at = barrier(&vm, json!({}));
    let runtime = count(&at["runtime"], "local");
    let init = count(&at["init"], "local");
    assert!(runtime >= 2000 && init >= 1000, "{at}");
    let demoted = cold(&vm, json!({ "buckets": ["runtime"] }));
    assert!(given(&demoted) >= 1500 && given(&demoted) <= runtime, "{demoted}");
    assert!(count(&demoted, "pages_skipped") >= init, "{demoted}");
    assert_eq!(vm.call("check").digest, digest);
    vm.call("touch pages=500 write=100 seed=3");
    let digest = vm.call("check").digest;
    cold(&vm, json!({ "buckets": ["init"] }));
    let at = barrier(&vm, json!({}));
    assert!(count(&at["execution"], "local") >= 500, "{at}");
    let spilled = cold(&vm, json!({ "to": "spilled", "spill_dir": dir.path(), "buckets": ["execution"] }));
    assert!(count(&spilled, "pages_spilled") >= 400, "{spilled}");
    assert_eq!(vm.call("check").digest, digest);
}

#[test]
fn copies_of_a_pool_stay() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 3000, 1);
    let pool = crate::support::pool::Pool::create("1");
    pool.add(&snapshot);
    for policy in ["eager", "trenv"] {
        let mut vm = pool.restore(&snapshot, policy, &[]);
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        barrier(&vm, json!({ "reads": true }));
        let demoted = cold(&vm, json!({}));
        assert!(given(&demoted) < 300, "{policy}: {demoted}");
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        let at = barrier(&vm, json!({}));
        if policy == "trenv" {
            assert!(count(&at["init"], "read") >= 1500, "{policy}: reads in place are seen: {at}");
        }
    }
}

#[test]
fn pages_given_to_the_balloon_between_barriers_are_zero() {
    let dir = scratch();
    let snapshot = with_free_page_reporting(dir.path());
    let emptied = |policy: &str, tracks: bool| {
        let mut vm = Vm::restore(&snapshot, policy);
        vm.wait_for_socket();
        let track = |vm: &Vm| {
            if tracks {
                barrier(vm, json!({ "reads": true, "writes": true }));
                cold(vm, json!({}));
            }
        };
        track(&vm);
        vm.call("balloon op=report filled=1");
        track(&vm);
        track(&vm);
        vm.call("check").digest
    };
    for policy in ["eager", "firecracker"] {
        assert_eq!(emptied(policy, true), emptied(policy, false), "{policy}");
    }
}

#[test]
fn barriers_at_random_moments_of_requests_lose_no_writes() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    for policy in ["eager", "firecracker", "firecracker-uffd"] {
        let mut twin = Vm::restore_with(&snapshot, policy, &[]);
        let mut vm = Vm::restore_with(&snapshot, policy, &[]);
        vm.call("hello");
        let mut random = Random(11);
        for round in 0..rounds(20) {
            let call = format!("touch pages=2000 write=60 seed={round}");
            let begun = vm.begin(&call);
            for _ in 0..random.below(4) {
                barrier(&vm, json!({ "reads": random.below(2) == 0, "writes": random.below(2) == 0 }));
                cold(&vm, json!({}));
            }
            vm.finish(&begun);
            twin.call(&call);
            if random.below(3) == 0 {
                assert_eq!(vm.call("check").digest, twin.call("check").digest, "{policy}, round {round}");
            }
        }
        assert_eq!(vm.call("check").digest, twin.call("check").digest, "{policy}");
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
    }
}

#[test]
fn barriers_that_cannot_be_are_refused_with_the_reason() {
    let vm = Vm::boot(&config(1, 64));
    vm.wait_for_socket();
    let stderr = run_err(&["barrier", "--api-sock", text(vm.socket())]);
    assert!(stderr.contains("Cannot set a barrier for a VM that was booted"), "{stderr}");
    let vm = Vm::wait_for_api();
    let fault = vm.api_fault("PUT", "/tvmm/barrier", Some(json!({})));
    assert!(fault.contains("not supported before starting the microVM"), "{fault}");
    let fault = vm.api_fault("PUT", "/tvmm/barrier", Some(json!({ "read": true })));
    assert!(fault.contains("read"), "{fault}");
    let fault = vm.api_fault("PUT", "/tvmm/barrier", Some(json!({ "keep": true, "reads": true })));
    assert!(fault.contains("leave out `keep`"), "{fault}");
    let fault = vm.api_fault("PUT", "/tvmm/demote", Some(json!({ "cold": true, "buckets": ["heap"] })));
    assert!(fault.contains("heap"), "{fault}");
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 1);
    let vm = Vm::restore(&snapshot, "firecracker");
    vm.wait_for_socket();
    let fault = vm.api_fault("PUT", "/tvmm/demote", Some(json!({ "buckets": ["init"] })));
    assert!(fault.contains("`buckets` is for"), "{fault}");
}

#[test]
fn the_commands_tell_the_buckets() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 500, 1);
    let mut vm = Vm::restore(&snapshot, "eager");
    vm.call("hello");
    let printed = |args: &[&str]| {
        let output = run(&[&[args[0], "--api-sock", text(vm.socket())], &args[1..]].concat());
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{printed}");
        printed
    };
    let told = printed(&["barrier", "--reads", "--writes"]);
    assert!(told.starts_with("runtime: 0 pages local;") && told.contains("\nset a barrier in "), "{told}");
    let output = run(&["barrier", "--api-sock", text(vm.socket()), "--keep", "--json"]);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(count(&told["init"], "local") > 0 && count(&told, "pages_unmapped") == 0, "{told}");
    let told = printed(&["demote", "--cold", "--buckets", "runtime,init"]);
    assert!(told.starts_with("gave ") && told.contains(" touched or of other buckets"), "{told}");
}
