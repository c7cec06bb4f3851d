//! Snapshot and restore: what a guest remembers.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::artefact::{content, inspect, pages};
use crate::support::{Answer, Vm, config, run_ok, scratch, text};

const POLICIES: [&str; 2] = ["eager", "firecracker"];

#[test]
fn lazy_page_that_cannot_be_had_ends_the_vm_at_once_with_the_reason() {
    let dir = scratch();
    let full = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=2000 seed=4");
    vm.snapshot(&full, &[]);
    let report = dir.path().join("report");
    let mut restored = Vm::restore_with(&full, "firecracker-uffd", &["--report", text(&report)]);
    restored.call("hello");
    // The pages go while the VM runs.
    std::fs::OpenOptions::new().write(true).open(full.join("memory")).unwrap().set_len(0).unwrap();
    restored.begin("check");
    let (status, stderr) = restored.wait();
    assert_eq!(status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("Cannot read guest memory at guest-physical 0x"), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    let stop = report["slices"].as_array().unwrap().iter().find(|slice| slice["slice"] == "stop").unwrap();
    assert!(stop["length_us"].as_f64().unwrap() < 5e6, "nothing waits for a vCPU that will not stop: {stop}");
}

#[test]
fn memory_survives_in_the_same_and_in_a_new_process() {
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=2000 seed=7");
    let before = vm.call("check").digest;
    vm.snapshot(&out, &[]);
    assert_eq!(vm.call("check").digest, before);
    for policy in POLICIES {
        let mut restored = Vm::restore(&out, policy);
        assert_eq!(restored.call("check").digest, before, "{policy}");
    }
}

#[test]
fn restored_guests_share_nothing_but_the_snapshot() {
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=1000 seed=7");
    let before = vm.call("check").digest;
    vm.snapshot(&out, &[]);
    let unharmed = content(&out);
    let mut restored: Vec<Vm> = POLICIES.iter().chain(&POLICIES).map(|policy| Vm::restore(&out, policy)).collect();
    let mut digests: Vec<String> = Vec::new();
    for (seed, vm) in restored.iter_mut().enumerate() {
        vm.call(&format!("touch pages=1000 write=50 seed={}", seed + 1));
        digests.push(vm.call("check").digest);
    }
    for (index, vm) in restored.iter_mut().enumerate() {
        assert_eq!(vm.call("check").digest, digests[index]);
        assert!(!digests[..index].contains(&digests[index]) && digests[index] != before);
    }
    assert_eq!(vm.call("check").digest, before);
    assert_eq!(content(&out), unharmed);
}

#[test]
fn restored_and_never_run_is_the_same_memory_again() {
    const VCPUS: u32 = 2;
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(VCPUS, 128));
    vm.call("fill pages=3000 seed=3");
    vm.call("clock");
    vm.snapshot(&out, &[]);
    let before = std::fs::read(out.join("memory")).unwrap();
    for policy in POLICIES {
        let restored = Vm::restore_with(&out, policy, &["--track-dirty-pages", "--paused"]);
        restored.wait_for_state("Paused");
        let [diff, full] = ["diff", "full"].map(|kind| dir.path().join(format!("{policy}-{kind}")));
        restored.capture(&diff, "Diff");
        restored.capture(&full, "Full");
        assert_eq!(content(&diff), content(&full), "{policy}");
        assert_eq!(pages(&full), pages(&out), "{policy}");
        // Only KVM may have written, and only to the clock structure of each vCPU (32 bytes).
        let after = std::fs::read(full.join("memory")).unwrap();
        let changed: Vec<usize> = (0..before.len()).filter(|&at| before[at] != after[at]).collect();
        assert!(changed.len() <= 32 * VCPUS as usize, "{policy}: {} bytes differ: {changed:x?}", changed.len());
        assert!(pages(&diff).0 <= u64::from(VCPUS), "{policy}: {:?} pages changed", pages(&diff));
    }
}

#[test]
fn restored_vm_is_snapshotted_again_three_generations_long() {
    for (policy, kind) in [("eager", "full"), ("eager", "diff"), ("firecracker", "full"), ("firecracker", "diff")] {
        let dir = scratch();
        let mut snapshot = dir.path().join("0");
        let mut vm = Vm::boot(&config(1, 128));
        vm.call("fill pages=1500 seed=11");
        let mut digest = vm.call("check").digest;
        vm.snapshot(&snapshot, &[]);
        for generation in 1..=3 {
            let mut restored = Vm::restore(&snapshot, policy);
            assert_eq!(restored.call("check").digest, digest, "{policy} {kind} {generation}");
            restored.call(&format!("touch pages=700 write=50 seed={generation}"));
            restored.call(&format!("fill pages=100 seed={generation}"));
            digest = restored.call("check").digest;
            let parent = inspect(&snapshot)["manifest"]["id"].clone();
            snapshot = dir.path().join(generation.to_string());
            restored.snapshot(&snapshot, if kind == "diff" { &["--diff"] } else { &[] });
            let manifest = inspect(&snapshot)["manifest"].clone();
            let expected = if kind == "diff" { parent } else { json!(null) };
            assert_eq!(manifest["parent"]["id"], expected, "{policy} {kind} {generation}");
            // The process it came from goes on, and so does what it remembers.
            assert_eq!(restored.call("check").digest, digest);
        }
        assert_eq!(Vm::restore(&snapshot, policy).call("check").digest, digest, "{policy} {kind}");
    }
}

#[test]
fn two_file_form_restores_by_command_line_and_by_api() {
    let dir = scratch();
    let [state, memory] = ["state", "memory"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=500 seed=5");
    let before = vm.call("check").digest;
    vm.pause();
    let body = json!({ "snapshot_path": state, "mem_file_path": memory, "snapshot_type": "Full" });
    assert_eq!(vm.api("PUT", "/snapshot/create", Some(body)).0, 204);
    for policy in POLICIES {
        let mut by_cli = Vm::restore_with(&state, policy, &["--mem-file", text(&memory)]);
        assert_eq!(by_cli.call("check").digest, before, "{policy}");
        let mut by_api = Vm::wait_for_api();
        by_api.wait_for_socket();
        let body = json!({
            "snapshot_path": state,
            "mem_backend": { "backend_type": "File", "backend_path": memory },
            "resume_vm": true,
            "tvmm": { "policy": policy },
        });
        let (status, answer) = by_api.api("PUT", "/snapshot/load", Some(body));
        assert_eq!(status, 204, "{answer}");
        assert_eq!(by_api.call("check").digest, before, "{policy}");
    }
}

#[test]
fn guest_clock_goes_on_without_the_time_the_snapshot_lay_around() {
    const AROUND: Duration = Duration::from_secs(2);
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    let host = Instant::now();
    let before = vm.call("clock").number("mono_ns");
    run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out)]);
    drop(vm);
    std::thread::sleep(AROUND);
    for policy in POLICIES {
        let mut restored = Vm::restore(&out, policy);
        let after = restored.call("clock").number("mono_ns");
        let elapsed = host.elapsed();
        assert!(after >= before, "{policy}: {after} ns is before {before} ns");
        let advanced = Duration::from_nanos(after - before);
        assert!(advanced <= elapsed - AROUND / 2, "{policy}: {advanced:?} on the guest's clock, {elapsed:?} outside");
        assert!(restored.call("clock").number("mono_ns") > after, "{policy}: the clock stands still");
    }
}

#[test]
fn guest_clock_never_goes_back_over_pauses_and_generations() {
    let dir = scratch();
    let mut vm = Vm::boot(&config(1, 128));
    let mut last = 0;
    let mut later = |vm: &mut Vm| {
        let now = vm.call("clock").number("mono_ns");
        assert!(now > last, "{now} after {last}");
        last = now;
    };
    for generation in 0..3 {
        later(&mut vm);
        vm.pause();
        vm.resume();
        later(&mut vm);
        let out = dir.path().join(generation.to_string());
        vm.snapshot(&out, &[]);
        let mut next = Vm::restore(&out, "firecracker");
        later(&mut next);
        vm = next;
    }
}

#[test]
fn request_in_the_receive_fifo_is_answered_after_restore() {
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    let expected = vm.call("hello").digest;
    vm.pause();
    vm.send(b"run early hello\nrun half hel");
    // One thread reads standard input and answers the API; after a few answers it has read what was there before.
    for _ in 0..3 {
        assert_eq!(vm.api("GET", "/", None).0, 200);
    }
    vm.capture(&out, "Full");
    for policy in POLICIES {
        let mut restored = Vm::restore(&out, policy);
        assert!(restored.finish("early").contains(&expected), "{policy}");
        restored.send(b"lo\n");
        assert!(restored.finish("half").starts_with(&format!("ok half {expected} ")), "{policy}");
    }
    vm.resume();
    assert!(vm.finish("early").contains(&expected));
    vm.send(b"lo\n");
    assert!(vm.finish("half").contains(&expected));
}

#[test]
fn answer_begun_before_the_snapshot_is_finished_after_it_and_no_byte_is_lost_or_doubled() {
    let mut split = 0;
    let mut cut = Vec::new();
    for round in 0..12 {
        let dir = scratch();
        let out = dir.path().join("full");
        let mut vm = Vm::boot(&config(1, 64));
        let expected = vm.call("info");
        let id = vm.begin("info");
        std::thread::sleep(Duration::from_micros(100 * round));
        vm.pause();
        vm.capture(&out, "Full");
        let begun = vm.kill().concat();
        let mut restored = Vm::restore(&out, "firecracker");
        let after = restored.begin("hello");
        // If the answer was complete, `hello` is the first line; else the rest of it comes first.
        let first = restored.wait_line(|_| true);
        let whole = if first.starts_with(&format!("ok {after} ")) { begun.clone() } else { begun.clone() + &first };
        assert!(whole.starts_with(&format!("ok {id} ")), "{begun:?} and then {first:?}");
        assert_eq!(Answer::parse(&whole), expected, "{begun:?} and then {first:?}");
        if !begun.is_empty() && begun != whole {
            split += 1;
            cut.push(begun.len());
        }
    }
    eprintln!("{split} answers were split, after {cut:?} bytes");
}
