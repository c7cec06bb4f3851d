//! The policy of a restore that names none, and the reason that its report gives.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Vm, config, run_ok, scratch, text};

/// The policy of a restored VM, and the reason for it.
fn policy(vm: &Vm) -> [String; 2] {
    let report = vm.api_ok("GET", "/tvmm/report", None);
    ["policy", "policy_reason"].map(|key| report["restore"][key].as_str().unwrap_or_default().to_owned())
}

/// Restores `snapshot` with `more` arguments, and asks the guest for the digest of its memory.
fn restored(snapshot: &Path, more: &[&str], digest: &str) -> [String; 2] {
    let mut vm = Vm::spawn(scratch(), &[&["restore", "--snapshot", text(snapshot)], more].concat());
    assert_eq!(vm.call("check").digest, digest, "{more:?}");
    policy(&vm)
}

#[test]
fn a_profile_means_tiered_and_the_report_gives_the_reason() {
    let dir = scratch();
    let [snapshot, profile, plan] = ["snapshot", "p.profile", "p.plan"].map(|name| dir.path().join(name));
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=3000 seed=3");
    let digest = vm.call("check").digest;
    vm.snapshot(&snapshot, &["--verify"]);
    drop(vm);
    let run = "touch pages=400 write=20 seed=5";
    run_ok(&["profile", "record", "--snapshot", text(&snapshot), "--run", run, "--out", text(&profile)]);
    let of_profile = ["--profile", text(&profile)];

    assert_eq!(restored(&snapshot, &[], &digest), ["firecracker", "no-profile"]);
    assert_eq!(restored(&snapshot, &of_profile, &digest), ["tiered", "profile"]);
    for requested in ["firecracker", "reap", "tiered"] {
        let more = [&of_profile[..], &["--policy", requested]].concat();
        assert_eq!(restored(&snapshot, &more, &digest), [requested, "requested"]);
    }

    // `tvmm plan` shows the plan of a restore with the same options.
    let plan_of = |more: &[&str]| {
        let shown = run_ok(&[&["plan", "--snapshot", text(&snapshot), "--json"], more].concat());
        serde_json::from_str::<Value>(&shown).expect("JSON")["policy"].clone()
    };
    assert_eq!(plan_of(&[]), "firecracker");
    assert_eq!(plan_of(&[&of_profile[..], &["--out", text(&plan)]].concat()), "tiered");
    assert_eq!(restored(&snapshot, &["--plan", text(&plan)], &digest), ["tiered", "plan-file"]);

    let by_api = [(json!({}), ["firecracker", "no-profile"]), (json!({ "profile": profile }), ["tiered", "profile"])];
    for (tvmm, expected) in by_api {
        let mut vm = Vm::wait_for_api();
        let body = json!({ "snapshot_path": snapshot, "resume_vm": true, "tvmm": tvmm });
        vm.api_ok("PUT", "/snapshot/load", Some(body));
        assert_eq!(vm.call("check").digest, digest);
        assert_eq!(policy(&vm), expected);
    }
}
