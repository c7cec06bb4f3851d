//! Memory that is not what was captured: refused before the guest runs, or the VM ends with exit code 3.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::snapshots::crash::SmallDisk;
use crate::support::pool::{Pool, filled};
use crate::support::service::wait_until;
use crate::support::{Vm, run, run_err, run_ok, scratch, text};

const POLICIES: [&str; 5] = ["firecracker", "firecracker-uffd", "trenv", "catalyzer", "eager"];
const CHUNK: u64 = 64 << 10;

/// A copy of a snapshot that can be harmed.
fn copy(snapshot: &Path, to: &Path) -> PathBuf {
    let status = Command::new("cp").args(["-r", text(snapshot), text(to)]).status().unwrap();
    assert!(status.success());
    to.join("memory")
}

/// Makes the file zeros all over.
fn empty(memory: &Path) {
    let len = fs::metadata(memory).unwrap().len();
    let file = File::create(memory).unwrap();
    file.set_len(len).unwrap();
}

/// Changes one bit in the middle of what the guest filled: of some 80 chunks, hardly one that is sampled.
fn flip_one(memory: &Path) -> u64 {
    let file = File::options().read(true).write(true).open(memory).unwrap();
    let chunks = file.metadata().unwrap().len() / CHUNK;
    let mut bytes = vec![0; CHUNK as usize];
    let is_full = |chunk: &u64| {
        file.read_exact_at(&mut bytes, chunk * CHUNK).unwrap();
        bytes.chunks(4096).all(|page| page.iter().any(|byte| *byte != 0))
    };
    let full: Vec<u64> = (0..chunks).filter(is_full).collect();
    let at = full[full.len() / 2] * CHUNK + 5000;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    at
}

fn refused(args: &[&str], memory: &Path) {
    let said = run_err(&[args, &["--run", "check"]].concat());
    let is_named = said.contains(text(memory)) || said.contains(text(memory.parent().unwrap()));
    assert!(is_named && said.contains("guest-physical 0x"), "{args:?}: {said}");
}

#[test]
fn emptied_memory_and_that_of_another_snapshot_are_refused_by_every_policy_and_in_both_forms() {
    let dir = scratch();
    let [full, other, zero] = ["full", "other", "zero"].map(|name| dir.path().join(name));
    filled(&full, 3000, 1);
    filled(&other, 3000, 2);
    let memory = copy(&full, &zero);
    empty(&memory);
    let mixed = dir.path().join("mixed");
    let foreign = copy(&full, &mixed);
    fs::copy(other.join("memory"), &foreign).unwrap();
    for policy in POLICIES {
        refused(&["restore", "--snapshot", text(&zero), "--policy", policy], &memory);
        refused(&["restore", "--snapshot", text(&mixed), "--policy", policy], &foreign);
    }
    let vm = Vm::wait_for_api();
    let said = vm.api_fault("PUT", "/snapshot/load", Some(json!({ "snapshot_path": zero, "resume_vm": true })));
    assert!(said.contains(text(&memory)), "{said}");
}

#[test]
fn emptied_memory_of_the_two_file_form_is_refused() {
    let dir = scratch();
    let [state, memory] = ["state", "memory"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&crate::support::config(1, 64));
    vm.call("fill pages=2000 seed=3");
    vm.pause();
    vm.api_ok("PUT", "/snapshot/create", Some(json!({ "snapshot_path": state, "mem_file_path": memory })));
    drop(vm);
    let args = ["restore", "--snapshot", text(&state), "--mem-file", text(&memory)];
    run_ok(&[&args[..], &["--run", "check"]].concat());
    empty(&memory);
    refused(&args, &memory);
}

#[test]
fn identical_copies_are_accepted_however_they_were_made() {
    let dir = scratch();
    let full = dir.path().join("full");
    let digest = filled(&full, 3000, 1);
    let (archive, unpacked) = (dir.path().join("a.tar"), dir.path().join("unpacked"));
    fs::create_dir(&unpacked).unwrap();
    let [plain, archived, dense] = ["plain", "archived", "dense"].map(|name| dir.path().join(name));
    let shell = [
        format!("cp -r {0} {1}", text(&full), text(&plain)),
        format!("cp -a {0} {1}", text(&full), text(&archived)),
        format!("cp -a --sparse=never {0} {1}", text(&full), text(&dense)),
        format!("tar -C {0} -cf {1} full && tar -C {2} -xf {1}", text(dir.path()), text(&archive), text(&unpacked)),
        format!("touch -d 2001-01-01 {0}/memory && mv {0}/memory {0}/x && mv {0}/x {0}/memory", text(&plain)),
    ];
    for line in shell {
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success(), "{line}");
    }
    for snapshot in [plain, archived, dense, unpacked.join("full")] {
        for policy in ["firecracker", "eager"] {
            let args = ["restore", "--snapshot", text(&snapshot), "--policy", policy, "--verify", "full"];
            let answer = run_ok(&[&args[..], &["--run", "check"]].concat());
            assert_eq!(answer.split(' ').nth(2), Some(digest.as_str()), "{}", snapshot.display());
        }
    }
}

#[test]
fn one_flipped_bit_is_found_by_full_before_and_by_background_while_the_guest_runs() {
    let dir = scratch();
    let full = dir.path().join("full");
    filled(&full, 10_000, 1);
    let memory = full.join("memory");
    let gpa = flip_one(&memory) / CHUNK * CHUNK;
    let args = |verify| ["restore", "--snapshot", text(&full), "--verify", verify];
    let said = run_err(&[&args("full")[..], &["--run", "hello"]].concat());
    assert!(said.contains(&format!("guest-physical {gpa:#x} are not")) && said.contains(text(&memory)), "{said}");
    assert!(run(&[&args("off")[..], &["--run", "hello"]].concat()).status.success());
    // By chance a sample may find it; then the restore is refused.
    let mut found_later = false;
    for _ in 0..10 {
        let mut vm = Vm::restore_with(&full, "firecracker", &[]);
        let (status, stderr) = vm.wait();
        assert!(stderr.contains(&format!("guest-physical {gpa:#x} are not")), "{stderr}");
        found_later = status.code() == Some(3);
        assert!(found_later || status.code() == Some(1), "{stderr}");
        if found_later {
            break;
        }
    }
    assert!(found_later, "samples alone find it");
}

#[test]
fn bytes_where_the_snapshot_holds_nothing_are_found_by_full_before_and_by_background_while_the_guest_runs() {
    let dir = scratch();
    let full = dir.path().join("full");
    filled(&full, 100, 1);
    let memory = full.join("memory");
    let file = File::options().write(true).open(&memory).unwrap();
    // The highest page of 64 MiB, which the guest has not used.
    let last = file.metadata().unwrap().len() - 4096;
    file.write_all_at(&[7], last + 9).unwrap();
    let args = ["restore", "--snapshot", text(&full), "--policy", "firecracker", "--run", "hello", "--verify"];
    let named = format!("guest-physical {last:#x}");
    let said = run_err(&[&args[..], &["full"]].concat());
    assert!(said.contains(&named) && said.contains("does not hold"), "{said}");
    assert!(run(&[&args[..], &["sample"]].concat()).status.success());
    let mut vm = Vm::restore_with(&full, "firecracker", &[]);
    let (status, stderr) = vm.wait();
    assert!(status.code() == Some(3) && stderr.contains(&named), "{status}: {stderr}");
}

#[test]
fn hole_of_a_file_on_a_full_tmpfs_ends_the_vm_and_the_message_names_the_tmpfs() {
    let Some(disk) = SmallDisk::new(16) else { return };
    let full = disk.path("full");
    filled(&full, 100, 1);
    disk.fill();
    // It fills pages that the snapshot does not hold.
    let run =
        run(&["restore", "--snapshot", text(&full), "--policy", "firecracker", "--run", "fill pages=4000 seed=9"]);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.code() == Some(3) && said.contains("the tmpfs it lies on is full"), "{}: {said}", run.status);
}

/// The part of `GET /tvmm/report` about this.
fn verification(vm: &Vm) -> Value {
    vm.api_ok("GET", "/tvmm/report", None)["verification"].clone()
}

/// Pages of a file that are in the page cache, as fincore(1) of util-linux tells; none where it is missing.
fn cached_pages(path: &Path) -> Option<u64> {
    let output = Command::new("fincore").args(["--noheadings", "--raw", "--output", "PAGES", text(path)]).output();
    String::from_utf8(output.ok().filter(|output| output.status.success())?.stdout).ok()?.trim().parse().ok()
}

#[test]
fn report_tells_what_was_verified_and_verifying_brings_nothing_into_the_page_cache() {
    // Not in /tmp, which may be a tmpfs: nothing of that can be evicted.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let full = dir.path().join("full");
    filled(&full, 10_000, 1);
    let memory = full.join("memory");
    let off = Vm::restore_with(&full, "firecracker", &["--verify", "off"]);
    off.wait_for_state("Running");
    assert_eq!((&verification(&off)["state"], &verification(&off)["verified_pages"]), (&json!("off"), &json!(0)));
    drop(off);
    let file = File::open(&memory).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut vm = Vm::restore_with(&full, "firecracker", &[]);
    vm.call("hello");
    let before = cached_pages(&memory);
    wait_until("all memory is verified", || verification(&vm)["state"] == "done");
    let done = verification(&vm);
    let pages = done["pages"].as_u64().unwrap();
    assert!(pages > 10_000, "{done}");
    assert_eq!((&done["verified_pages"], &done["unverified_pages"]), (&json!(pages), &json!(0)), "{done}");
    if let (Some(before), Some(after)) = (before, cached_pages(&memory)) {
        // The guest itself may have touched a page more, which is one of 2 MiB in the cache.
        assert!(after <= before + 512, "{before} pages were cached, now {after}");
    }
    vm.call("check");
    drop(vm);
    for (policy, verify, state) in
        [("firecracker", "sample", "sampled"), ("firecracker", "full", "done"), ("eager", "off", "done")]
    {
        let vm = Vm::restore_with(&full, policy, &["--verify", verify]);
        vm.wait_for_state("Running");
        let told = verification(&vm);
        assert_eq!(told["state"], state, "{policy}: {told}");
        let left = told["unverified_pages"].as_u64().unwrap();
        assert_eq!(left == 0, state == "done", "{policy}: {told}");
    }
}

#[test]
fn damage_in_a_parent_is_found() {
    let dir = scratch();
    let [base, diff] = ["base", "diff"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&crate::support::config(1, 64));
    vm.call("fill pages=3000 seed=3");
    vm.snapshot(&base, &[]);
    vm.call("touch pages=8 write=100");
    vm.snapshot(&diff, &["--diff"]);
    drop(vm);
    empty(&base.join("memory"));
    let said = run_err(&["restore", "--snapshot", text(&diff), "--run", "check"]);
    assert!(said.contains("base/memory") && said.contains("guest-physical 0x"), "{said}");
}

#[test]
fn damage_in_a_pool_is_found() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    filled(&out, 3000, 7);
    pool.add(&out);
    let restore = ["restore", "--snapshot", text(&out), "--policy", "trenv", "--pool", pool.path()];
    run_ok(&[&restore[..], &["--verify", "full", "--run", "check"]].concat());
    // Everything that is data, see `pool_hostile`.
    let bytes = fs::read(pool.file()).unwrap();
    let pages = bytes.chunks(4096).enumerate().skip(bytes.len() / 4096 / 10);
    let used = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0)).map(|(index, _)| index as u64);
    used.for_each(|page| pool.flip(page * 4096 + 100));
    let said = run_err(&[&restore[..], &["--run", "check"]].concat());
    assert!(said.contains(pool.path()) && said.contains("guest-physical 0x"), "{said}");
}

#[test]
fn modes_that_there_are_not_are_refused() {
    assert_eq!(run(&["restore", "--snapshot", "/nowhere", "--verify", "soon"]).status.code(), Some(2));
    let vm = Vm::wait_for_api();
    let load = json!({ "snapshot_path": "/nowhere", "tvmm": { "verify": "soon" } });
    let said = vm.api_fault("PUT", "/snapshot/load", Some(load));
    assert!(said.contains("unknown variant"), "{said}");
}
