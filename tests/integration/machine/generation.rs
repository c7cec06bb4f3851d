//! A restore must let the guest notice that it is a clone (VM generation id) and what time it is.

use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::support::artefact::{inspect, pages};
use crate::support::{Vm, config, run_err, run_ok, scratch, text};

const VMGENID: u64 = 0xf_f000;

/// The id in the memory file of a snapshot that holds its page.
fn id_in(snapshot: &Path) -> [u8; 16] {
    let mut id = [0; 16];
    std::fs::File::open(snapshot.join("memory")).unwrap().read_exact_at(&mut id, VMGENID).unwrap();
    id
}

#[test]
fn every_boot_and_every_restore_has_its_own_generation_id_whatever_backs_its_page() {
    let dir = scratch();
    let full = dir.path().join("full");
    let vm = Vm::boot(&config(1, 64));
    vm.snapshot(&full, &[]);
    let mut ids = HashSet::from([[0; 16], id_in(&full)]);
    for (index, policy) in ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv"].iter().enumerate() {
        let mut clone = Vm::restore(&full, policy);
        clone.call("hello");
        // Only tvmm wrote the page; the diff has it all the same.
        let diff = dir.path().join(format!("diff{index}"));
        clone.snapshot(&diff, &["--diff"]);
        assert!(ids.insert(id_in(&diff)), "{policy}");
        assert_eq!(inspect(&diff)["layers"].as_array().unwrap().len(), 2);
        let whole = dir.path().join(format!("whole{index}"));
        clone.snapshot(&whole, &[]);
        assert_eq!(id_in(&whole), id_in(&diff), "{policy}: the id stays the same while the guest runs");
    }
    // The diff of a clone that was never let run holds the new id and nothing else the guest did.
    let paused = Vm::restore_with(&full, "firecracker", &["--track-dirty-pages", "--paused"]);
    paused.wait_for_state("Paused");
    let diff = dir.path().join("paused");
    paused.capture(&diff, "Diff");
    assert!(ids.insert(id_in(&diff)));
    assert!(pages(&diff).0 <= 4, "{:?}", pages(&diff));
    // A clone of a clone.
    let mut again = Vm::restore(&diff, "firecracker");
    again.call("hello");
    let out = dir.path().join("again");
    again.snapshot(&out, &[]);
    assert!(ids.insert(id_in(&out)));
}

#[test]
fn machine_without_acpi_has_no_generation_id_and_restores() {
    let dir = scratch();
    let full = dir.path().join("full");
    let mut config = config(1, 64);
    config["tvmm"] = json!({ "acpi": false });
    Vm::boot(&config).snapshot(&full, &[]);
    assert_eq!(id_in(&full), [0; 16]);
    let mut restored = Vm::restore(&full, "firecracker");
    restored.call("hello");
    let diff = dir.path().join("diff");
    restored.snapshot(&diff, &["--diff"]);
    assert_eq!(id_in(&diff), [0; 16]);
}

#[test]
fn clock_stands_still_over_a_snapshot_or_goes_on_to_the_present() {
    const APART: Duration = Duration::from_millis(1500);
    let dir = scratch();
    let full = dir.path().join("full");
    let mut vm = Vm::boot(&config(2, 64));
    let before = vm.call("clock").number("mono_ns");
    vm.snapshot(&full, &[]);
    let after = vm.call("clock").number("mono_ns");
    assert!(after >= before);
    drop(vm);
    std::thread::sleep(APART);
    let apart = APART.as_nanos() as u64;
    for policy in ["eager", "firecracker-uffd"] {
        let still = Vm::restore(&full, policy).call("clock").number("mono_ns");
        assert!(still >= before, "{policy}: {before} {still}");
        let mut restored = Vm::restore_with(&full, policy, &["--clock-realtime"]);
        let moved = restored.call("clock").number("mono_ns");
        assert!(moved >= before + apart, "{policy}: {before} {moved}");
        // Timers set after the jump still run, on all vCPUs.
        let spin = restored.call_raw("spin cpus=all ms=50");
        assert!(spin.starts_with("ok ") && spin.contains(" backwards=0"), "{spin}");
    }
    let vm = Vm::wait_for_api();
    let load = json!({ "snapshot_path": full, "resume_vm": true, "clock_realtime": true });
    vm.api_ok("PUT", "/snapshot/load", Some(load));
    let mut vm = vm;
    assert!(vm.call("clock").number("mono_ns") >= before + apart);
}

#[test]
fn guest_that_turns_itself_off_or_resets_ends_the_vm_and_the_report_says_which() {
    // The built-in guest does neither by itself; that a signal and an answer are told apart shows the key.
    let dir = scratch();
    let config_path = dir.path().join("vm.json");
    let report = dir.path().join("r.json");
    std::fs::write(&config_path, config(1, 64).to_string()).unwrap();
    run_ok(&["--config", text(&config_path), "--run", "hello", "--report", text(&report)]);
    let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(told["ending"], "answered");
    assert!(run_err(&["restore", "--snapshot", "/nonexistent", "--clock-realtime"]).contains("/nonexistent"));
}
