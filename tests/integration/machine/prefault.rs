//! Preloaded memory is in the guest's second-stage page tables before the guest runs, on hosts whose KVM can do that.

use std::path::Path;

use serde_json::Value;

use crate::skip::skip;
use crate::support::{Vm, config, scratch, text};

/// Restores and stays paused; pages KVM has mapped for the guest (if the kernel shows that), then how pre-faulting
/// went by the report.
fn restored(snapshot: &Path, policy: &str, more: &[&str]) -> (Option<u64>, Value) {
    let dir = scratch();
    let report = dir.path().join("report.json");
    let vm = Vm::restore_with(snapshot, policy, &[more, &["--paused", "--report", text(&report)]].concat());
    vm.wait_for_state("Paused");
    let mapped = second_stage_pages(vm.pid());
    let (status, stderr) = vm.terminate();
    assert!(status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    (mapped, report["restore"]["engine"].clone())
}

/// Pages of 4 KiB and 2 MiB in the second-stage tables of a process's VM, in 4 KiB (kernel: `virt/kvm`, debugfs).
fn second_stage_pages(pid: u32) -> Option<u64> {
    let vms = std::fs::read_dir("/sys/kernel/debug/kvm").ok()?;
    let mut own = vms.flatten().filter(|vm| vm.file_name().to_string_lossy().starts_with(&format!("{pid}-")));
    let vm = own.next()?.path();
    let count = |name: &str| std::fs::read_to_string(vm.join(name)).ok()?.trim().parse::<u64>().ok();
    Some(count("pages_4k")? + 512 * count("pages_2m")?)
}

#[test]
fn preloaded_memory_is_mapped_before_the_guest_runs() {
    let dir = scratch();
    let snapshot = dir.path().join("full");
    let mut vm = Vm::boot(&config(2, 64));
    vm.call("fill pages=3000 seed=7");
    let digest = vm.call("check").digest;
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    let (before, tracked) = restored(&snapshot, "eager", &["--track-dirty-pages"]);
    let (mapped, engine) = restored(&snapshot, "eager", &[]);
    let prefault = &engine["prefault"];
    let preloaded = engine["planned"]["preload"].as_u64().unwrap();
    let kvm = kvm_ioctls::Kvm::new().expect("/dev/kvm can be opened");
    if kvm.check_extension_raw(kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
        assert_eq!(prefault["outcome"], "unavailable", "{engine:#}");
        assert_eq!((&prefault["calls"], &prefault["pages"]), (&0.into(), &0.into()));
        return skip!("prefault", "this KVM has no KVM_PRE_FAULT_MEMORY");
    }
    assert_eq!(prefault["outcome"], "done", "{engine:#}");
    assert!(preloaded >= 3000 && prefault["pages"] == preloaded, "{engine:#}");
    assert!(prefault["calls"].as_u64().unwrap() >= 1, "{engine:#}");
    assert_eq!(tracked["prefault"]["outcome"], "dirty_pages_tracked", "{tracked:#}");
    assert_eq!(tracked["prefault"]["calls"], 0, "{tracked:#}");
    match (before, mapped) {
        (Some(before), Some(mapped)) => {
            assert!(before < 100 && mapped >= preloaded, "mapped {before} without, {mapped} of {preloaded} with");
        }
        _ => println!("not checked against KVM's own counts: no /sys/kernel/debug/kvm here"),
    }
    let (_, on_demand) = restored(&snapshot, "firecracker", &[]);
    assert_eq!(on_demand["prefault"]["outcome"], "nothing_to_do", "{on_demand:#}");
    // The guest reads the same bytes, before and after it wrote, whether KVM mapped pages ahead or on demand.
    let rewritten = |policy| {
        let mut vm = Vm::restore_with(&snapshot, policy, &[]);
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        vm.call("touch pages=2000 write=50 seed=3");
        vm.call("check").digest
    };
    assert_eq!(rewritten("eager"), rewritten("firecracker"));
}
