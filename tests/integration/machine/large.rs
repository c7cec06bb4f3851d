//! Guests of all sizes: around the MMIO gap, odd ones, mostly empty ones.

use serde_json::json;

use crate::support::artefact::{disk_use, inspect, pages};
use crate::support::{Vm, config, run_err, scratch, text};

const GIB: u64 = 1 << 30;
const PAGE: u64 = 4096;

/// Disk use of a snapshot's memory file and the bytes of the pages it holds.
fn sizes(snapshot: &std::path::Path) -> (u64, u64) {
    (disk_use(&snapshot.join("memory")), pages(snapshot).0 * PAGE)
}

fn address(answer: &crate::support::Answer) -> u64 {
    u64::from_str_radix(answer.value("gpa").trim_start_matches("0x"), 16).unwrap()
}

#[test]
fn memory_above_the_mmio_gap_survives() {
    let dir = scratch();
    let [full, diff] = ["full", "diff"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(2, 5 * 1024));
    // Almost all RAM below the gap is taken and never touched, so that the next pages lie above it.
    vm.call(&format!("alloc pages={}", (3 * GIB - (16 << 20)) / PAGE));
    assert!(address(&vm.call("fill pages=8000 seed=1")) >= 4 * GIB);
    assert!(address(&vm.call("fill pages=1000 seed=2")) < 3 * GIB);
    let before = vm.call("check").digest;
    vm.snapshot(&full, &[]);
    let (disk, held) = sizes(&full);
    assert!((9000 * PAGE..9500 * PAGE).contains(&held), "{held} bytes held");
    assert!(disk <= held + held / 10, "{disk} bytes on disk for {held} bytes of pages");
    assert_eq!(std::fs::metadata(full.join("memory")).unwrap().len(), 5 * GIB);
    vm.call("touch pages=2000 write=50 seed=3");
    let after = vm.call("check").digest;
    vm.snapshot(&diff, &["--diff"]);
    assert!(pages(&diff).0 < 1200, "{:?}", pages(&diff));
    for policy in ["eager", "firecracker"] {
        for (snapshot, digest) in [(&full, &before), (&diff, &after)] {
            let mut restored = Vm::restore(snapshot, policy);
            assert_eq!(restored.call("check").digest, *digest, "{policy} {}", snapshot.display());
            // The guest can use memory that it had not touched before: more than is left below the gap.
            assert!(address(&restored.call("fill pages=3000 seed=4 cpu=1")) >= 4 * GIB);
        }
    }
}

#[test]
fn odd_sizes_boot_and_restore() {
    // The smallest that the built-in guest boots in, one that is no power of two, the gap exactly, and just above it.
    for mib in [3, 5, 129, 3072, 3073] {
        let dir = scratch();
        let out = dir.path().join("full");
        let mut vm = Vm::boot(&config(1, mib));
        let free = vm.call("info").number("free_pages");
        let wanted = free.min(200);
        if wanted > 0 {
            vm.call(&format!("fill pages={wanted} seed=1"));
        }
        if mib == 3073 {
            // One MiB above the gap, contiguous with nothing.
            let below = free - wanted - 256;
            vm.call(&format!("alloc pages={below}"));
            assert!(address(&vm.call("fill pages=256 seed=2")) >= 4 * GIB);
        }
        let digest = vm.call("check").digest;
        vm.snapshot(&out, &[]);
        assert_eq!(inspect(&out)["manifest"]["sizes"]["memory"], mib << 20);
        for policy in ["eager", "firecracker"] {
            let mut restored = Vm::restore(&out, policy);
            assert_eq!(restored.call("info").number("mem"), mib, "{policy}");
            assert_eq!(restored.call("check").digest, digest, "{policy}, {mib} MiB");
        }
    }
}

#[test]
fn memory_too_small_for_the_kernel_is_refused_by_name() {
    for (mib, reason) in [(1, "too small"), (2, "does not fit")] {
        for protocol in ["pvh", "linux64"] {
            let dir = scratch();
            let path = dir.path().join("vm.json");
            let mut config = config(1, mib);
            config["tvmm"] = json!({ "boot_protocol": protocol });
            std::fs::write(&path, config.to_string()).unwrap();
            let stderr = run_err(&["--config", text(&path), "--run", "hello"]);
            assert!(stderr.contains(reason), "{mib} MiB, {protocol}: {stderr}");
        }
    }
}

#[test]
fn full_snapshot_takes_the_room_of_its_nonzero_pages() {
    const FILLED: u64 = (64 << 20) / PAGE;
    let dir = scratch();
    let out = dir.path().join("full");
    let mut config = config(1, 512);
    config["boot-source"] = json!({ "boot_args": "init_on_free=1" });
    let mut vm = Vm::boot(&config);
    // Another 32 MiB have been touched and are zero again: present in the host's memory, nothing for the snapshot.
    vm.call("fill pages=8192 seed=1");
    vm.call("free filled=1");
    vm.call(&format!("alloc pages={}", 8192 + 5));
    vm.call(&format!("fill pages={FILLED} seed=2"));
    let digest = vm.call("check").digest;
    vm.snapshot(&out, &[]);
    let (disk, held) = sizes(&out);
    assert!((FILLED * PAGE..(FILLED + 200) * PAGE).contains(&held), "{} pages held", held / PAGE);
    assert!(disk <= held + held / 10, "{disk} bytes on disk for {held} bytes of pages");
    assert_eq!(std::fs::metadata(out.join("memory")).unwrap().len(), 512 << 20);
    eprintln!("{disk} bytes on disk for {held} bytes of pages");
    // A restored VM has zero pages of the file's holes; snapshotted again they still take no room.
    let again = dir.path().join("again");
    let mut restored = Vm::restore(&out, "firecracker");
    assert_eq!(restored.call("check").digest, digest);
    restored.snapshot(&again, &[]);
    let (disk, held) = sizes(&again);
    assert!(held < (FILLED + 200) * PAGE && disk <= held + held / 10, "{disk} bytes on disk, {held} bytes of pages");
}
