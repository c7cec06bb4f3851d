//! Live snapshots: memory is written while the guest runs, and is that of one instant all the same.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::artefact::{content, inspect};
use crate::support::pool::filled;
use crate::support::service::wait_until;
use crate::support::{Random, Vm, config, rounds, run_err, run_ok, scratch, text};

/// Takes a live snapshot; the answer.
fn live(vm: &Vm, out: &Path, kind: &str) -> Value {
    let body = json!({ "snapshot_path": out, "snapshot_type": kind, "tvmm": { "live": true } });
    vm.api_ok("PUT", "/snapshot/create", Some(body))
}

/// The numbers that the guest's `march` has written, by the index of their page, in a snapshot without a parent.
pub fn marched(snapshot: &Path, pages: usize) -> Vec<u64> {
    let memory = std::fs::read(snapshot.join("memory")).unwrap();
    let mut numbers = vec![0; pages];
    for page in memory.chunks_exact(4096).filter(|page| page.starts_with(b"tvmmarch")) {
        let word = |nth: usize| u64::from_le_bytes(page[nth * 8..][..8].try_into().unwrap());
        numbers[word(1) as usize] = word(2);
    }
    numbers
}

/// Checks that no number is there without the one before. Returns the last number.
pub fn check_order(numbers: &[u64]) -> u64 {
    let pages = numbers.len() as u64;
    let last = numbers.iter().copied().max().unwrap();
    for (index, number) in (0..).zip(numbers) {
        // The greatest number up to the last that belongs to this page: number n is written to page (n - 1) % pages.
        let due = (0..pages).map(|back| last.saturating_sub(back)).find(|n| *n > 0 && (n - 1) % pages == index);
        assert_eq!(*number, due.unwrap_or(0), "page {index} of {pages}, last number {last}");
    }
    last
}

/// Takes live snapshots beside `out` until the guest has marched on from `before`. Returns the last one, and the last
/// number in it. Earlier ones stay: a diff builds on them.
fn marching(vm: &Vm, out: &Path, kind: &str, before: u64, pages: usize) -> (PathBuf, u64) {
    for attempt in 0..60 {
        let out = out.with_extension(attempt.to_string());
        let taken = live(vm, &out, kind);
        assert!(taken["live"]["passes"].as_u64().unwrap() >= 1, "{taken}");
        assert_eq!(vm.state(), "Running");
        let merged = out.with_extension("merged");
        if kind == "Diff" {
            run_ok(&["snapshot", "merge", text(&out), "--out", text(&merged)]);
        }
        let last = check_order(&marched(if kind == "Diff" { &merged } else { &out }, pages));
        let _ = std::fs::remove_dir_all(&merged);
        if last > before {
            return (out, last);
        }
        assert_eq!(last, before);
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("the guest does not march");
}

#[test]
fn a_live_snapshot_of_a_guest_that_writes_is_memory_at_one_instant() {
    const PAGES: usize = 1500;
    let dir = scratch();
    let base = dir.path().join("base");
    filled(&base, 3000, 1);
    let mut untracked = config(1, 128);
    untracked["machine-config"]["track_dirty_pages"] = json!(false);
    let boot = |config: &Value| {
        let mut vm = Vm::boot(config);
        vm.call("fill pages=3000 seed=1");
        vm
    };
    let ways: [(&str, Vm, &str); 7] = [
        ("booted", boot(&config(1, 128)), "Full"),
        ("booted, untracked", boot(&untracked), "Full"),
        ("tracked", Vm::restore(&base, "firecracker"), "Full"),
        ("tracked", Vm::restore(&base, "firecracker"), "Diff"),
        ("copied", Vm::restore_with(&base, "eager", &[]), "Diff"),
        ("lazy", Vm::restore_with(&base, "firecracker-uffd", &[]), "Full"),
        ("in place", Vm::restore_with(&base, "trenv", &["--in-place-mapping", "shared"]), "Diff"),
    ];
    for (index, (way, mut vm, kind)) in ways.into_iter().enumerate() {
        vm.wait_for_socket();
        let before = vm.port_reads();
        vm.begin(&format!("march pages={PAGES} ms=600000"));
        wait_until("the guest takes the request", || vm.port_reads() > before);
        let name = |what: &str| dir.path().join(format!("{index}-{what}"));
        let (_, first) = marching(&vm, &name("first"), kind, 0, PAGES);
        let (snapshot, second) = marching(&vm, &name("second"), kind, first, PAGES);
        drop(vm);
        let child = Vm::restore(&snapshot, "firecracker");
        child.wait_for_socket();
        let (_, third) = marching(&child, &name("child"), "Full", second, PAGES);
        assert!(third > second, "{way}: the child marches on");
    }
}

#[test]
fn a_live_snapshot_of_an_idle_guest_equals_one_of_the_paused_guest() {
    let dir = scratch();
    let base = dir.path().join("base");
    filled(&base, 2000, 1);
    let mut booted = config(2, 128);
    booted["boot-source"] = json!({ "boot_args": "init_on_free=1" });
    let mut vm = Vm::boot(&booted);
    vm.call("fill pages=2000 seed=1");
    let restored = Vm::restore_with(&base, "firecracker", &[]);
    for (index, mut vm) in [vm, restored].into_iter().enumerate() {
        vm.wait_for_socket();
        vm.call("free filled=1");
        vm.call("fill pages=700 seed=4");
        let digest = vm.call("check").digest;
        let out = dir.path().join(format!("live-{index}"));
        run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out), "--live"]);
        assert_eq!(vm.state(), "Running", "a live snapshot leaves the VM as it is");
        assert_eq!(inspect(&out)["damage"], json!([]));
        assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest);
        vm.pause();
        let paused = dir.path().join(format!("live-of-paused-{index}"));
        let taken = live(&vm, &paused, "Full");
        assert_eq!(taken["live"], Value::Null, "a paused VM is saved as it stands");
        assert_eq!(vm.state(), "Paused");
        assert_eq!(Vm::restore(&paused, "eager").call("check").digest, digest);
    }
}

#[test]
fn diffs_of_a_restored_vm_need_no_dirty_tracking() {
    let dir = scratch();
    let base = dir.path().join("base");
    let path = |name: &str| dir.path().join(name);
    filled(&base, 2000, 1);
    for policy in ["firecracker", "eager", "firecracker-uffd", "trenv"] {
        let mut vm = Vm::restore_with(&base, policy, &[]);
        vm.call("touch pages=300 write=100 seed=3");
        let digest = vm.call("check").digest;
        // The guest works on for a moment after its answer, so it stands still between the two.
        run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&path("diff")), "--diff"]);
        vm.snapshot(&path("full"), &[]);
        assert_eq!(content(&path("diff")), content(&path("full")), "{policy}");
        // A diff without a record of the writes is one against the snapshot of the restore, also the second time.
        vm.call("touch pages=100 write=100 seed=4");
        vm.snapshot(&path("second"), &["--diff"]);
        let layers = inspect(&path("second"))["layers"].as_array().unwrap().len();
        assert_eq!(layers, 2, "{policy}");
        let held = inspect(&path("diff"))["memory"]["pages_held"].as_u64().unwrap();
        assert!((300..1500).contains(&held), "{policy}: {held} pages held, 300 written");
        assert_eq!(Vm::restore(&path("diff"), "eager").call("check").digest, digest, "{policy}");
        ["diff", "full", "second"].iter().for_each(|name| std::fs::remove_dir_all(path(name)).unwrap());
    }
}

#[test]
fn other_operations_meet_a_live_snapshot() {
    let dir = scratch();
    let base = dir.path().join("base");
    let digest = filled(&base, 9000, 1);
    let mut vm = Vm::restore(&base, "firecracker");
    vm.wait_for_socket();
    let mut random = Random(7);
    let socket = vm.socket().to_path_buf();
    for round in 0..rounds(12) {
        let out = dir.path().join(format!("live-{round}"));
        let mut asking = crate::support::tvmm();
        asking.args(["snapshot", "--api-sock", text(&socket), "--out", text(&out), "--live"]);
        let mut asking =
            asking.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(30_000)));
        match random.below(4) {
            0 => {
                let _ = vm.api("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
            }
            1 => {
                vm.pause();
                vm.resume();
            }
            2 => {
                let other = dir.path().join(format!("other-{round}"));
                let _ = vm.api(
                    "PUT",
                    "/snapshot/create",
                    Some(json!({ "snapshot_path": other, "tvmm": { "live": true } })),
                );
            }
            _ => drop(vm.call("touch pages=200 write=0")),
        }
        asking.wait().unwrap();
        assert_eq!(vm.state(), "Running");
        assert_eq!(vm.call("check").digest, digest);
        if out.exists() {
            assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest);
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
}

#[test]
fn what_cannot_be_saved_live_is_refused_and_the_vm_runs_on() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 64));
    vm.wait_for_socket();
    let body = json!({ "snapshot_path": dir.path().join("s"), "tvmm": { "live": true, "resume": true } });
    let said = vm.api_fault("PUT", "/snapshot/create", Some(body));
    assert!(said.contains("give `live` or `resume`"), "{said}");
    let said = run_err(&["snapshot", "--api-sock", text(vm.socket()), "--out", "/nowhere/at/all", "--live"]);
    assert!(said.contains("/nowhere/at"), "{said}");
    let diff = json!({ "snapshot_path": dir.path().join("d"), "snapshot_type": "Diff", "tvmm": { "live": true } });
    assert!(vm.api_fault("PUT", "/snapshot/create", Some(diff)).contains("take a full one first"));
    assert_eq!(vm.state(), "Running");
    vm.call("hello");
}
