//! Demotion: a VM gives local memory back to the host, and its guest sees the same bytes.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::rewind::restores;
use crate::support::artefact::content;
use crate::support::pool::filled;
use crate::support::service::wait_until;
use crate::support::{Vm, config, http, rounds, run, run_err, scratch, text};

fn demote(vm: &Vm) -> Value {
    vm.api_ok("PUT", "/tvmm/demote", Some(json!({})))
}

pub(super) fn count(answer: &Value, key: &str) -> u64 {
    answer[key].as_u64().unwrap_or_else(|| panic!("no {key} in {answer}"))
}

/// KiB of anonymous memory that the process has.
pub(super) fn anonymous_kib(vm: &Vm) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid())).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Anonymous:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Pauses a VM, checks that `change` leaves it paused and its memory as it was, by a full snapshot and a diff, and
/// resumes it.
pub(super) fn assert_content_stays(vm: &Vm, dir: &Path, way: &str, change: impl FnOnce()) {
    vm.pause();
    let [before, after, diff] = ["before", "after", "diff"].map(|name| dir.join(name));
    vm.capture(&before, "Full");
    change();
    assert_eq!(vm.state(), "Paused");
    vm.capture(&after, "Full");
    vm.capture(&diff, "Diff");
    assert_eq!(content(&before), content(&after), "{way}");
    assert_eq!(content(&before), content(&diff), "{way}");
    [before, after, diff].iter().for_each(|dir| std::fs::remove_dir_all(dir).unwrap());
    vm.resume();
}

#[test]
fn a_demoted_guest_has_the_same_memory_whatever_placed_it() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let saved = filled(&snapshot, 2000, 1);
    for (way, mut vm) in restores(&snapshot) {
        assert_eq!(vm.call("check").digest, saved, "{way}");
        vm.call("fill pages=700 seed=5");
        let digest = vm.call("check").digest;
        for round in 0..2 {
            let demoted = demote(&vm);
            let written = count(&demoted, "pages_written") + count(&demoted, "pages_kept");
            assert!(written >= 700, "{way}, round {round}: {demoted}");
            assert_eq!(vm.state(), "Running");
            assert_eq!(vm.call("check").digest, digest, "{way}, round {round}");
        }
        assert_content_stays(&vm, dir.path(), &way, || drop(demote(&vm)));
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        assert_eq!(vm.call("check").digest, saved, "{way}: a demoted VM goes back");
        let report = vm.api_ok("GET", "/tvmm/report", None);
        assert_eq!(report["restore"]["demotions"], 3);
    }
}

#[test]
fn copies_that_equal_the_snapshot_leave_local_memory() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 7000, 1);
    // Copied ahead, as one run with written pages in it.
    let mut vm = Vm::restore(&snapshot, "eager");
    assert_eq!(vm.call("check").digest, digest);
    let before = anonymous_kib(&vm);
    let demoted = demote(&vm);
    assert!(count(&demoted, "pages_mapped") >= 6500, "{demoted}");
    let after = anonymous_kib(&vm);
    assert!(after + 6500 * 4 <= before, "{before} KiB, then {after}: {demoted}");
    // Copied over in place by a rewind.
    let mut vm = Vm::restore(&snapshot, "firecracker");
    vm.call("touch pages=7000 write=100");
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({})));
    let before = anonymous_kib(&vm);
    let demoted = demote(&vm);
    assert!(count(&demoted, "pages_dropped") >= 6500, "{demoted}");
    let after = anonymous_kib(&vm);
    assert!(after + 6500 * 4 <= before, "{before} KiB, then {after}: {demoted}");
    assert_eq!(vm.call("check").digest, digest);
}

#[test]
fn a_demotion_of_so_many_pages_leaves_the_others_to_the_next_one() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 7000, 1);
    for policy in ["eager", "firecracker"] {
        let mut vm = Vm::restore(&snapshot, policy);
        vm.call("touch pages=7000 write=50 seed=3");
        let digest = vm.call("check").digest;
        let body = json!({ "to": "spilled", "spill_dir": dir.path(), "most_pages": 1000 });
        let mut rounds = 0;
        let mut given = 0;
        loop {
            let demoted = vm.api_ok("PUT", "/tvmm/demote", Some(body.clone()));
            let pages = ["pages_dropped", "pages_mapped", "pages_spilled"].map(|key| count(&demoted, key));
            let pages: u64 = pages.iter().sum();
            given += pages;
            rounds += 1;
            if count(&demoted, "pages_left") == 0 {
                break;
            }
            // A piece that has been begun is finished.
            assert!((1000..1100).contains(&pages), "{policy}, round {rounds}: {demoted}");
        }
        assert!(rounds >= 3 && given >= 3000, "{policy}: {given} pages in {rounds} rounds");
        assert_eq!(vm.call("check").digest, digest, "{policy}");
    }
}

#[test]
fn writes_of_a_guest_that_runs_meanwhile_are_not_lost() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 6000, 1);
    let written = |policy: &str, demotions: usize| {
        let mut vm = Vm::restore(&snapshot, policy);
        vm.call("free filled=1");
        let begun = vm.begin("fill pages=6000 seed=2");
        (0..demotions).for_each(|_| drop(demote(&vm)));
        vm.finish(&begun);
        vm.call("check").digest
    };
    let expected = written("firecracker", 0);
    for policy in ["eager", "firecracker", "firecracker-uffd", "catalyzer"] {
        (0..rounds(4)).for_each(|round| assert_eq!(written(policy, 2 + round), expected, "{policy}, round {round}"));
    }
}

/// A snapshot below `dir` of a guest that has filled 3,000 pages and can give pages to its balloon.
pub(super) fn with_free_page_reporting(dir: &Path) -> PathBuf {
    let mut config = config(1, 128);
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    let mut vm = Vm::boot(&config);
    vm.call("fill pages=3000 seed=3");
    vm.call("balloon op=status");
    let snapshot = dir.join("snapshot");
    vm.snapshot(&snapshot, &[]);
    snapshot
}

#[test]
fn pages_given_to_the_balloon_after_a_demotion_are_zero() {
    let dir = scratch();
    let snapshot = with_free_page_reporting(dir.path());
    let emptied = |policy: &str, demotes: bool| {
        let mut vm = Vm::restore(&snapshot, policy);
        vm.wait_for_socket();
        if demotes {
            demote(&vm);
        }
        vm.call("balloon op=report filled=1");
        if demotes {
            demote(&vm);
        }
        vm.call("check").digest
    };
    for policy in ["eager", "firecracker"] {
        assert_eq!(emptied(policy, true), emptied(policy, false), "{policy}");
    }
}

#[test]
fn demotions_that_cannot_be_are_refused_with_the_reason() {
    let vm = Vm::boot(&config(1, 64));
    vm.wait_for_socket();
    let stderr = run_err(&["demote", "--api-sock", text(vm.socket())]);
    assert!(stderr.contains("Cannot demote a VM that was booted"), "{stderr}");
    let vm = Vm::wait_for_api();
    vm.wait_for_socket();
    let fault = vm.api_fault("PUT", "/tvmm/demote", Some(json!({})));
    assert!(fault.contains("not supported before starting the microVM"), "{fault}");
    let fault = vm.api_fault("PUT", "/tvmm/demote", Some(json!({ "too": 1 })));
    assert!(fault.contains("too"), "{fault}");
}

#[test]
fn a_rewind_ends_a_demotion_that_is_under_way() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 7000, 1);
    let mut vm = Vm::restore(&snapshot, "eager");
    vm.call("touch pages=7000 write=50 seed=3");
    let before = anonymous_kib(&vm);
    let body = json!({ "to": "spilled", "spill_dir": dir.path(), "rate_mib_s": 1 }).to_string();
    let socket = vm.socket().to_owned();
    std::thread::scope(|scope| {
        let demoting = scope.spawn(|| http(&socket, "PUT", "/tvmm/demote", &body));
        wait_until("memory is given back", || anonymous_kib(&vm) + 64 < before);
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        let (status, answer) = demoting.join().unwrap();
        let fault = answer["fault_message"].as_str().unwrap_or_default();
        assert!(status == 400 && fault.contains("given up: the machine was rewound"), "{status} {answer}");
    });
    assert_eq!(vm.call("check").digest, digest);
    let highest = json!({ "rate_mib_s": u64::MAX });
    assert!(count(&vm.api_ok("PUT", "/tvmm/demote", Some(highest)), "steps") > 0);
}

#[test]
fn the_command_says_where_the_pages_went() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 500, 1);
    let vm = Vm::restore(&snapshot, "eager");
    vm.wait_for_socket();
    let output = run(&["demote", "--api-sock", text(vm.socket())]);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.starts_with("gave "), "{printed}");
    assert!(printed.contains("mapped from their files"), "{printed}");
}
