//! Again and again: nothing is left behind and nothing grows.

use std::path::Path;
use std::time::Duration;

use crate::support::artefact::{names_below, pages};
use crate::support::{Vm, answer_to_run, config, rounds, scratch, text, tvmm};

#[test]
fn two_hundred_restores_leave_nothing_behind() {
    let dir = scratch();
    let out = dir.path().join("full");
    let temporary = dir.path().join("tmp");
    let socket = dir.path().join("api.sock");
    std::fs::create_dir(&temporary).unwrap();
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=100 seed=7");
    let digest = vm.call("check").digest;
    vm.snapshot(&out, &[]);
    drop(vm);
    let before = names_below(dir.path());
    for round in 0..rounds(200) {
        let policy = ["eager", "firecracker"][round % 2];
        let mut command = tvmm();
        command.args(["restore", "--snapshot", text(&out), "--policy", policy, "--run", "check"]);
        command.arg("--api-sock").arg(&socket).env("TMPDIR", &temporary).current_dir(dir.path());
        let output = command.output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && stderr.is_empty(), "round {round}: {:?} {stderr}", output.status);
        assert_eq!(answer_to_run(&stdout).digest, digest, "round {round}: {stdout}");
        assert_eq!(names_below(dir.path()), before, "round {round}");
    }
}

/// Memory of a process outside its guest RAM that no file backs, KiB: what a leak would add to. (The proportional share
/// of the binary's pages depends on how many processes run it.) Guest RAM is the one mapping of that size.
fn vmm_anonymous_kib(pid: u32, guest_kib: u64) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let number = |line: &str| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
    let mut total = 0;
    let mut in_guest = false;
    let mut found = 0;
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            in_guest = number(line) == guest_kib;
            found += u32::from(in_guest);
        } else if line.starts_with("Anonymous:") && !in_guest {
            total += number(line);
        }
    }
    assert_eq!(found, 1, "guest RAM is one mapping");
    total
}

fn snapshot_cycles(vm: &mut Vm, dir: &Path, count: usize) {
    for round in 0..count {
        vm.call(&format!("touch pages=200 write=50 seed={}", round + 1));
        let kind: &[&str] = if round % 3 == 0 { &[] } else { &["--diff"] };
        // The parent of a diff has to stay where it was written.
        vm.snapshot(&dir.join(format!("s{round}")), kind);
    }
    assert!(pages(&dir.join("s0")).0 > 200);
    for round in 0..count {
        std::fs::remove_dir_all(dir.join(format!("s{round}"))).unwrap();
    }
}

fn pause_cycles(vm: &mut Vm, count: usize) {
    for _ in 0..count {
        vm.pause();
        vm.resume();
    }
    vm.call("hello");
}

#[test]
fn pauses_and_snapshots_leave_descriptors_threads_and_memory_flat() {
    const MIB: u64 = 33;
    // Heap fragmentation, arenas of threads that met, and caches of the runtime; a leak of a page set in 30 snapshots
    // would be more.
    const SLACK_KIB: u64 = 512;
    let dir = scratch();
    let mut vm = Vm::boot(&config(2, MIB));
    vm.call("fill pages=2000 seed=1");
    pause_cycles(&mut vm, 10);
    snapshot_cycles(&mut vm, dir.path(), 15);
    let settle = || std::thread::sleep(Duration::from_millis(200));
    settle();
    let before = (vm.open_files(), vm.threads(), vmm_anonymous_kib(vm.pid(), MIB << 10));
    let digest = vm.call("check").digest;
    pause_cycles(&mut vm, 200);
    assert_eq!(vm.call("check").digest, digest);
    snapshot_cycles(&mut vm, dir.path(), 30);
    settle();
    let after = (vm.open_files(), vm.threads(), vmm_anonymous_kib(vm.pid(), MIB << 10));
    assert_eq!(after.0, before.0, "open files");
    assert_eq!(after.1, before.1, "threads");
    eprintln!("memory of the VMM before and after: {} KiB, {} KiB", before.2, after.2);
    assert!(after.2 <= before.2 + SLACK_KIB, "the VMM grew from {} to {} KiB", before.2, after.2);
    assert_eq!(names_below(dir.path()), Vec::<String>::new());
}
