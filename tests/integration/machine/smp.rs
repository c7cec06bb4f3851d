//! Several vCPUs: live registers, timers and interrupts between them.

use std::time::Duration;

use serde_json::json;

use crate::support::{Vm, config, is_emulated, scratch};

/// The answer to a `spin` that was interrupted by a snapshot.
fn assert_undisturbed(line: &str, vcpus: u32, place: &str) {
    assert!(line.starts_with("ok "), "{place}: {line}");
    for good in ["simd_bad=0", "gpr_bad=0", "backwards=0", &format!("cpus={vcpus}")] {
        assert!(line.split(' ').any(|word| word == good), "{place}, {good}: {line}");
    }
    assert!(!line.contains(" ticks=0 "), "{place}, the timer has stopped: {line}");
}

/// All vCPUs busy for `ms`, a timer interrupt every `timer_us`. An emulated host may need longer than that for one
/// interrupt, and its guest would do nothing else.
fn spinning(ms: u32, timer_us: u32) -> String {
    let (ms, timer_us) = if is_emulated() { (ms.max(500), 100_000) } else { (ms, timer_us) };
    format!("spin cpus=all ms={ms} timer_us={timer_us}")
}

fn spin_survives_a_snapshot_in_the_middle(vcpus: u32) {
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(vcpus, 128));
    vm.call("fill pages=300 seed=1");
    let digest = vm.call("check").digest;
    let spin = vm.begin(&spinning(1500, 1000));
    std::thread::sleep(Duration::from_millis(200));
    vm.snapshot(&out, &[]);
    assert_undisturbed(&vm.finish(&spin), vcpus, "in the old process");
    for policy in ["eager", "firecracker"] {
        let mut restored = Vm::restore(&out, policy);
        // Answered only if the snapshot was taken while it ran.
        assert_undisturbed(&restored.finish(&spin), vcpus, policy);
        assert_eq!(restored.call("check").digest, digest);
        let again = restored.call_raw(&spinning(50, 1000));
        assert_undisturbed(&again, vcpus, policy);
    }
}

#[test]
fn two_spinning_vcpus_survive_a_snapshot_in_the_middle() {
    spin_survives_a_snapshot_in_the_middle(2);
}

#[test]
fn four_spinning_vcpus_survive_a_snapshot_in_the_middle() {
    spin_survives_a_snapshot_in_the_middle(4);
}

#[test]
fn spin_survives_a_diff_snapshot_and_a_pause() {
    let dir = scratch();
    let [full, diff] = ["full", "diff"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(2, 128));
    vm.snapshot(&full, &[]);
    let spin = vm.begin(&spinning(1500, 200));
    for _ in 0..20 {
        vm.pause();
        vm.resume();
    }
    vm.snapshot(&diff, &["--diff"]);
    assert_undisturbed(&vm.finish(&spin), 2, "in the old process");
    assert_undisturbed(&Vm::restore(&diff, "firecracker").finish(&spin), 2, "restored");
}

#[test]
fn sleeping_vcpus_wake_up_after_restore() {
    for vcpus in [2, 4, 8] {
        let dir = scratch();
        let out = dir.path().join("full");
        let mut vm = Vm::boot(&config(vcpus, 128));
        for cpu in 0..vcpus {
            vm.call(&format!("fill pages=200 seed={cpu} cpu={cpu}"));
        }
        let digest = vm.call("check").digest;
        vm.snapshot(&out, &[]);
        for policy in ["eager", "firecracker"] {
            let mut restored = Vm::restore(&out, policy);
            assert_eq!(restored.call("info").number("vcpus"), u64::from(vcpus));
            for cpu in (0..vcpus).rev() {
                assert_eq!(restored.call(&format!("check cpu={cpu}")).digest, digest, "{policy}, vCPU {cpu}");
            }
            for cpu in 0..vcpus {
                restored.call(&format!("touch pages=100 write=50 seed={} cpu={cpu}", cpu + 1));
                vm.call(&format!("touch pages=100 write=50 seed={} cpu={cpu}", cpu + 1));
            }
            assert_eq!(restored.call("check cpu=1").digest, vm.call("check cpu=1").digest, "{policy}");
        }
    }
}

#[test]
fn guest_that_is_still_booting_boots_on_after_restore() {
    // Sooner and later while the guest boots: some snapshots have vCPUs that still wait for INIT and SIPI.
    let mut said = Vec::new();
    for round in 0..8 {
        let dir = scratch();
        let out = dir.path().join("full");
        let vm = Vm::wait_for_api();
        vm.wait_for_socket();
        let machine = config(4, 64)["machine-config"].clone();
        assert_eq!(vm.api("PUT", "/machine-config", Some(machine)).0, 204);
        assert_eq!(vm.api("PUT", "/actions", Some(json!({ "action_type": "InstanceStart" }))).0, 204);
        std::thread::sleep(Duration::from_micros(300 * round));
        vm.pause();
        vm.capture(&out, "Full");
        let begun = vm.kill().concat();
        let mut restored = Vm::restore(&out, if round % 2 == 0 { "firecracker" } else { "eager" });
        if !begun.ends_with("vcpus=4") {
            let whole = begun.clone() + &restored.wait_line(|_| true);
            assert!(whole.starts_with("ready ") && whole.ends_with("vcpus=4"), "{begun:?}, in the end {whole:?}");
        }
        said.push(begun.len());
        assert_undisturbed(&restored.call_raw(&spinning(20, 1000)), 4, "restored");
    }
    eprintln!("bytes the guest had said when it was stopped: {said:?}");
}
