//! Spilling: written pages of a guest go to a file, and its guest sees the same bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::demote::{anonymous_kib, assert_content_stays, count, with_free_page_reporting};
use super::rewind::restores;
use crate::snapshots::crash::SmallDisk;
use crate::support::pool::filled;
use crate::support::service::wait_until;
use crate::support::slow_file::SlowDisk;
use crate::support::{Random, Vm, http, rounds, run, scratch, text};

fn spill(vm: &Vm, dir: &Path) -> Value {
    vm.api_ok("PUT", "/tvmm/demote", Some(json!({ "to": "spilled", "spill_dir": dir })))
}

fn report(vm: &Vm) -> Value {
    vm.api_ok("GET", "/tvmm/report", None)["spill"].clone()
}

/// The file below `dir` that a VM has spilled pages to.
fn spill_file(vm: &Vm, dir: &Path) -> File {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().flatten();
    let name = format!("{}/#", dir.display());
    let is_spill = |path: &PathBuf| std::fs::read_link(path).is_ok_and(|to| text(&to).starts_with(&name));
    let path = fds.map(|entry| entry.path()).find(is_spill).expect("the spill file is open");
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn a_spilled_guest_has_the_same_memory_whatever_placed_it() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let saved = filled(&snapshot, 2000, 1);
    for (way, mut vm) in restores(&snapshot) {
        assert_eq!(vm.call("check").digest, saved, "{way}");
        vm.call("fill pages=700 seed=5");
        let mut digest = vm.call("check").digest;
        for round in 0..2 {
            let demoted = spill(&vm, dir.path());
            let kept = count(&demoted, "pages_written") + count(&demoted, "pages_kept");
            assert!(count(&demoted, "pages_spilled") + kept >= 700, "{way}, round {round}: {demoted}");
            assert_eq!(vm.state(), "Running");
            assert_eq!(vm.call("check").digest, digest, "{way}, round {round}");
            vm.call("touch pages=40 write=100 seed=3");
            digest = vm.call("check").digest;
        }
        spill(&vm, dir.path());
        assert_content_stays(&vm, dir.path(), &way, || drop(spill(&vm, dir.path())));
        spill(&vm, dir.path());
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        assert_eq!(vm.call("check").digest, saved, "{way}: a spilled VM goes back");
        assert!(report(&vm).is_null(), "{way}: the file is gone");
        vm.call("fill pages=700 seed=6");
        let digest = vm.call("check").digest;
        spill(&vm, dir.path());
        assert_eq!(vm.call("check").digest, digest, "{way}: spilled after a rewind");
    }
}

#[test]
fn written_pages_leave_local_memory_and_come_back_when_they_are_touched() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 7000, 1);
    for policy in ["firecracker", "eager"] {
        let mut vm = Vm::restore(&snapshot, policy);
        vm.call("fill pages=7000 seed=2");
        let digest = vm.call("check").digest;
        let before = anonymous_kib(&vm);
        let demoted = spill(&vm, dir.path());
        assert!(count(&demoted, "pages_spilled") >= 6900, "{policy}: {demoted}");
        let spilled = report(&vm);
        assert!(count(&spilled, "pages_away") >= 6500 && count(&spilled, "file_bytes") > 0, "{policy}: {spilled}");
        let after = anonymous_kib(&vm);
        assert!(after + 6500 * 4 <= before, "{policy}: {before} KiB, then {after}: {demoted}");
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        let back = report(&vm);
        assert!(count(&back, "pages_back") >= 6500 && count(&back, "faults") > 0, "{policy}: {back}");
        assert!(count(&back, "pages_away") < 400, "{policy}: {back}");
        assert!(count(&back, "file_bytes") < count(&spilled, "file_bytes"), "{policy}: space is given back: {back}");
    }
}

#[test]
fn requests_at_random_moments_of_spills_find_all_bytes() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    for policy in ["eager", "firecracker", "catalyzer"] {
        let mut twin = Vm::restore(&snapshot, policy);
        let mut vm = Vm::restore(&snapshot, policy);
        let socket = vm.socket().to_path_buf();
        vm.call("hello");
        let body = json!({ "to": "spilled", "spill_dir": dir.path(), "rate_mib_s": 400 }).to_string();
        let mut random = Random(7);
        std::thread::scope(|scope| {
            for round in 0..rounds(30) {
                let call = format!("touch pages=3000 write=100 seed={round}");
                let begun = vm.begin(&call);
                let spilling = scope.spawn(|| http(&socket, "PUT", "/tvmm/demote", &body));
                vm.finish(&begun);
                twin.call(&call);
                if random.below(2) == 0 {
                    let digest = vm.call("check").digest;
                    assert_eq!(digest, twin.call("check").digest, "{policy}, round {round}");
                }
                let (status, answer) = spilling.join().unwrap();
                assert_eq!(status, 200, "{policy}, round {round}: {answer}");
            }
        });
        assert_eq!(vm.call("check").digest, twin.call("check").digest, "{policy}");
    }
}

#[test]
fn pages_given_to_the_balloon_while_they_are_spilled_are_zero() {
    let dir = scratch();
    let snapshot = with_free_page_reporting(dir.path());
    let emptied = |policy: &str, spills: bool| {
        let mut vm = Vm::restore(&snapshot, policy);
        vm.call("fill pages=3000 seed=4");
        if spills {
            spill(&vm, dir.path());
        }
        vm.call("balloon op=report filled=1");
        if spills {
            spill(&vm, dir.path());
        }
        vm.call("check").digest
    };
    for policy in ["eager", "firecracker"] {
        assert_eq!(emptied(policy, true), emptied(policy, false), "{policy}");
    }
}

#[test]
fn a_full_disk_leaves_the_pages_in_local_memory() {
    let Some(disk) = SmallDisk::new(4) else { return };
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 1);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    vm.call("fill pages=5000 seed=2");
    let digest = vm.call("check").digest;
    let body = json!({ "to": "spilled", "spill_dir": disk.path("") });
    let fault = vm.api_fault("PUT", "/tvmm/demote", Some(body));
    assert!(fault.contains("Cannot write the spill file in") && fault.contains("No space left"), "{fault}");
    assert_eq!(vm.call("check").digest, digest);
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
}

#[test]
fn a_spill_file_with_other_bytes_ends_the_vm_and_names_the_page() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 1);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    vm.call("fill pages=2000 seed=2");
    spill(&vm, dir.path());
    let file = spill_file(&vm, dir.path());
    let len = file.metadata().unwrap().len();
    (0..len / 512).for_each(|at| file.write_all_at(b"?", at * 512 + 7).unwrap());
    vm.begin("check");
    let (status, stderr) = vm.wait();
    assert_eq!(status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("Cannot bring back the page at guest-physical 0x"), "{stderr}");
    assert!(stderr.contains("other bytes than were written"), "{stderr}");
}

/// A VM whose written pages are in a file of a disk, and no longer in the page cache; their digest.
fn spilled_to(disk: &SlowDisk, snapshot: &Path, more: &[&str]) -> (Vm, String) {
    let mut vm = Vm::restore_with(snapshot, "firecracker", more);
    vm.call("fill pages=2000 seed=2");
    let digest = vm.call("check").digest;
    assert!(count(&spill(&vm, disk.path()), "pages_spilled") >= 1500);
    assert!(count(&report(&vm), "file_bytes") > 0);
    disk.uncache(&spill_file(&vm, disk.path()));
    (vm, digest)
}

#[test]
fn a_slow_spill_disk_is_waited_for_and_a_dead_or_hanging_one_ends_the_vm_with_the_page() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 1);
    let Some(mut disk) = SlowDisk::new(dir.path(), 64) else { return };
    let (mut vm, digest) = spilled_to(&disk, &snapshot, &[]);
    disk.reads().hold_below(u64::MAX);
    let begun = vm.begin("check");
    wait_until("the spill waits for the disk", || disk.reads().held() > 0);
    assert_eq!(vm.state(), "Running", "the API answers meanwhile");
    disk.reads().hold_below(0);
    disk.reads().let_go();
    assert!(vm.finish(&begun).contains(&digest));
    drop(vm);
    let (mut vm, _) = spilled_to(&disk, &snapshot, &[]);
    disk.reads().fail_after(0);
    vm.begin("check");
    let (status, stderr) = vm.wait();
    assert_eq!(status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("Cannot bring back the page at guest-physical 0x"), "{stderr}");
    assert!(stderr.contains("Input/output error"), "{stderr}");
    disk.reads().fail_after(u64::MAX);
    let (mut vm, _) = spilled_to(&disk, &snapshot, &["--fault-timeout", "1"]);
    disk.reads().hang();
    vm.begin("check");
    // The file system holds the thread that reads until the disk answers, or is given up.
    wait_until("tvmm ends, but for that thread", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", vm.pid())).unwrap();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
    });
    disk.give_up();
    let (status, stderr) = vm.wait();
    assert!(!status.success() && stderr.contains("1 s (--fault-timeout)"), "{status:?} {stderr}");
    assert!(stderr.contains("guest-physical 0x"), "{stderr}");
}

#[test]
fn spills_that_cannot_be_are_refused_with_the_reason() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 500, 1);
    let mut vm = Vm::restore(&snapshot, "eager");
    vm.call("fill pages=500 seed=2");
    let digest = vm.call("check").digest;
    let refused = |body: Value| vm.api_fault("PUT", "/tvmm/demote", Some(body));
    assert!(refused(json!({ "to": "spilled" })).contains("spill_dir"));
    for useless in [json!({ "spill_dir": dir.path() }), json!({ "spill_mib": 1 })] {
        assert!(refused(useless).contains("leave it out"));
    }
    assert!(refused(json!({ "to": "spilled", "spill_dir": dir.path(), "rate_mib_s": 0 })).contains("zero"));
    let missing = dir.path().join("none");
    let fault = refused(json!({ "to": "spilled", "spill_dir": missing }));
    assert!(fault.contains("Cannot make a spill file in") && fault.contains("none"), "{fault}");
    spill(&vm, dir.path());
    let other = scratch();
    let fault = refused(json!({ "to": "spilled", "spill_dir": other.path() }));
    assert!(fault.contains("some of its pages are in"), "{fault}");
    assert_eq!(vm.call("check").digest, digest);
    let output = run(&["demote", "--api-sock", text(vm.socket()), "--to", "spilled"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("--spill-dir"), "{said}");
    let socket = vm.socket().to_owned();
    let args = ["demote", "--api-sock", text(&socket), "--to", "spilled", "--spill-dir", text(dir.path())];
    let output = run(&[&args[..], &["--rate", "100"]].concat());
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.contains(" spilled; kept: "), "{printed}");
    let output = run(&[&args[..], &["--spill-size", "64", "--json"]].concat());
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(count(&printed, "spill_file_len") > 0 && printed["is_spill_full"] == false, "{printed}");
    vm.call("fill pages=2000 seed=3");
    let digest = vm.call("check").digest;
    let len = count(&report(&vm), "file_len");
    let output = run(&[&args[..], &["--spill-size", "1"]].concat());
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && printed.contains(" spilled, and no more fit into the file"), "{printed}");
    assert!(count(&report(&vm), "file_len") <= len.max(1 << 20));
    assert_eq!(vm.call("check").digest, digest);
}
