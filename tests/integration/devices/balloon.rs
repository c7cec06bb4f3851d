//! Memory that the guest gives back: it leaves the host, it leaves the snapshot, and it reads as zeros.

use serde_json::{Value, json};

use crate::support::artefact::pages;
use crate::support::{TIMEOUT, Vm, config, run_err, scratch, text};

const POLICIES: [&str; 3] = ["eager", "firecracker", "firecracker-uffd"];
/// Filled pages: 12 MiB.
const FILLED: u64 = 3000;

fn with_balloon(mib: u64, balloon: Value) -> Value {
    let mut config = config(1, mib);
    let mut all = json!({ "amount_mib": 0, "deflate_on_oom": false });
    all.as_object_mut().unwrap().extend(balloon.as_object().unwrap().clone());
    config["balloon"] = all;
    config
}

fn all_features() -> Value {
    json!({ "stats_polling_interval_s": 1, "free_page_hinting": true, "free_page_reporting": true })
}

/// The resident memory of the VM's process, MiB.
fn resident_mib(vm: &Vm) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn resize(vm: &mut Vm, amount_mib: u64) {
    vm.wait_for_socket();
    vm.api_ok("PATCH", "/balloon", Some(json!({ "amount_mib": amount_mib })));
    let answer = vm.call("balloon op=follow");
    assert_eq!((answer.number("target"), answer.number("held")), (amount_mib * 256, amount_mib * 256));
}

/// Ways to give the filled pages back while the guest goes on using them.
const WAYS: [&str; 3] = ["report", "inflate", "hint"];

fn give_back_filled(vm: &mut Vm, way: &str) {
    if way == "hint" {
        // The driver looks for the device when it is first called.
        vm.call("balloon op=status");
        vm.api_ok("PATCH", "/balloon/hinting/start", None);
    }
    vm.call(&format!("balloon op={way} filled=1"));
}

#[test]
fn balloon_to_half_and_back_gives_memory_to_the_host_and_takes_it_again() {
    let mut vm = Vm::boot(&with_balloon(128, all_features()));
    vm.call("fill pages=18000 seed=3");
    let digest = vm.call("check").digest;
    vm.call("free filled=1");
    let before = resident_mib(&vm);
    resize(&mut vm, 64);
    let after = resident_mib(&vm);
    assert!(before >= after + 56, "{before} MiB before, {after} MiB with 64 MiB in the balloon");
    let statistics = vm.api_ok("GET", "/balloon/statistics", None);
    assert_eq!([&statistics["target_mib"], &statistics["actual_mib"], &statistics["actual_pages"]], [64, 64, 16384]);
    resize(&mut vm, 10);
    resize(&mut vm, 0);
    vm.call("fill pages=18000 seed=3");
    assert_eq!(vm.call("check").digest, digest);
    assert!(resident_mib(&vm) + 8 >= before);
    assert_eq!(vm.api_ok("GET", "/balloon", None)["amount_mib"], 0);
}

#[test]
fn balloon_in_a_snapshot_goes_on_under_every_policy() {
    let dir = scratch();
    let mut vm = Vm::boot(&with_balloon(128, all_features()));
    vm.call("fill pages=500 seed=1");
    let digest = vm.call("check").digest;
    resize(&mut vm, 64);
    let out = dir.path().join("full");
    vm.snapshot(&out, &[]);
    assert!(pages(&out).0 < 2000, "{:?}", pages(&out));
    for policy in POLICIES {
        let mut restored = Vm::restore(&out, policy);
        assert_eq!(restored.call("balloon op=status").number("held"), 64 * 256, "{policy}");
        assert_eq!(restored.api_ok("GET", "/balloon", None)["amount_mib"], 64);
        resize(&mut restored, 32);
        resize(&mut restored, 80);
        resize(&mut restored, 0);
        assert_eq!(restored.call("check").digest, digest, "{policy}");
        restored.call("fill pages=15000 seed=2");
        let digest = restored.call("check").digest;
        let diff = dir.path().join(policy);
        restored.snapshot(&diff, &["--diff"]);
        assert_eq!(Vm::restore(&diff, "eager").call("check").digest, digest, "{policy}");
    }
}

#[test]
fn pages_given_back_are_zero_under_every_policy_and_leave_full_and_diff_snapshots() {
    let dir = scratch();
    let mut vm = Vm::boot(&with_balloon(64, all_features()));
    vm.call(&format!("fill pages={FILLED} seed=7"));
    let filled = vm.call("check").digest;
    let base = dir.path().join("base");
    vm.snapshot(&base, &[]);
    give_back_filled(&mut vm, "report");
    let zeros = vm.call("check").digest;
    assert_ne!(zeros, filled);
    let full = dir.path().join("without");
    vm.snapshot(&full, &[]);
    assert!(pages(&full).0 + FILLED <= pages(&base).0 + 50, "{:?} of {:?}", pages(&full), pages(&base));
    let mut number = 0;
    for policy in POLICIES {
        for (way, touched) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
            let what = format!("{policy}, {way}, touched before: {touched}");
            let mut restored = Vm::restore(&base, policy);
            if touched {
                assert_eq!(restored.call("check").digest, filled, "{what}");
            }
            give_back_filled(&mut restored, way);
            number += 1;
            let [diff, full, later] = ["diff", "full", "later"].map(|name| dir.path().join(format!("{name}{number}")));
            restored.snapshot(&diff, &["--diff"]);
            assert!(pages(&diff).1 >= FILLED, "{what}: {:?}", pages(&diff));
            restored.snapshot(&full, &[]);
            assert!(pages(&full).0 + FILLED <= pages(&base).0 + 100, "{what}: {:?}", pages(&full));
            assert_eq!(restored.call("check").digest, zeros, "{what}");
            restored.call(&format!("touch pages={FILLED} write=60 seed=5"));
            let touched = restored.call("check").digest;
            restored.snapshot(&later, &["--diff"]);
            for (snapshot, digest) in [(&diff, &zeros), (&full, &zeros), (&later, &touched)] {
                let mut again = Vm::restore(snapshot, policy);
                assert_eq!(again.call("check").digest, *digest, "{what}: {}", text(snapshot));
            }
        }
    }
}

#[test]
fn statistics_come_as_often_as_they_are_asked_for() {
    let mut vm = Vm::boot(&with_balloon(64, all_features()));
    assert_eq!(vm.call("balloon op=statistics").number("sent"), 1);
    // The device takes what was sent on a thread of its own.
    let deadline = std::time::Instant::now() + TIMEOUT;
    let free = loop {
        let statistics = vm.api_ok("GET", "/balloon/statistics", None);
        if let Some(free) = statistics["free_memory"].as_u64() {
            assert_eq!(statistics["total_memory"], 64 << 20);
            break free;
        }
        assert!(std::time::Instant::now() < deadline, "the first statistics do not come: {statistics}");
    };
    vm.call("fill pages=1000");
    loop {
        vm.call("balloon op=statistics");
        let statistics = vm.api_ok("GET", "/balloon/statistics", None);
        if statistics["free_memory"].as_u64().unwrap() <= free - (1000 << 12) {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "the host does not ask again: {statistics}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    vm.api_ok("PATCH", "/balloon/statistics", Some(json!({ "stats_polling_interval_s": 60 })));
    assert_eq!(vm.api_ok("GET", "/balloon", None)["stats_polling_interval_s"], 60);
    let said = vm.api_fault("PATCH", "/balloon/statistics", Some(json!({ "stats_polling_interval_s": 0 })));
    assert!(said.contains("cannot be disabled"), "{said}");
}

#[test]
fn hinting_is_begun_by_the_host_and_ends_with_the_guest_or_the_host() {
    let mut vm = Vm::boot(&with_balloon(64, all_features()));
    let status = |vm: &Vm| vm.api_ok("GET", "/balloon/hinting/status", None);
    assert_eq!(status(&vm), json!({ "host_cmd": 0, "guest_cmd": null }));
    let said = vm.api_fault("PATCH", "/balloon/hinting/start", None);
    assert!(said.contains("no driver"), "{said}");
    assert!(vm.call_raw("balloon op=hint pages=100").contains("has not begun"));
    vm.api_ok("PATCH", "/balloon/hinting/start", None);
    assert_eq!(vm.call("balloon op=hint pages=5000").number("cmd"), 1);
    assert_eq!(status(&vm), json!({ "host_cmd": 1, "guest_cmd": 0 }));
    vm.api_ok("PATCH", "/balloon/hinting/start", Some(json!({ "acknowledge_on_stop": false })));
    assert_eq!(vm.call("balloon op=hint pages=5000").number("cmd"), 3);
    assert_eq!(status(&vm), json!({ "host_cmd": 3, "guest_cmd": 0 }));
    vm.api_ok("PATCH", "/balloon/hinting/stop", None);
    assert_eq!(vm.call("balloon op=status").number("cmd"), 1);
}

#[test]
fn what_a_balloon_is_not_asked_is_refused_in_words() {
    let vm = Vm::wait_for_api();
    for (path, body) in [("/balloon", json!({ "amount_mib": 1 })), ("/balloon/hinting/start", json!({}))] {
        assert!(vm.api_fault("PATCH", path, Some(body)).contains("before starting"), "{path}");
    }
    assert!(vm.api_fault("GET", "/balloon", None).contains("No balloon device found."));
    let put = json!({ "amount_mib": 2, "deflate_on_oom": true });
    vm.api_ok("PUT", "/balloon", Some(put));
    assert_eq!(vm.api_ok("GET", "/balloon", None)["deflate_on_oom"], true);
    let vm = Vm::boot(&config(1, 64));
    for (method, path, body) in [
        ("GET", "/balloon", None),
        ("GET", "/balloon/statistics", None),
        ("GET", "/balloon/hinting/status", None),
        ("PATCH", "/balloon", Some(json!({ "amount_mib": 1 }))),
    ] {
        assert_eq!(vm.api_fault(method, path, body), "No balloon device found.", "{method} {path}");
    }
    let vm = Vm::boot(&with_balloon(64, json!({})));
    let said = vm.api_fault("PATCH", "/balloon", Some(json!({ "amount_mib": 65 })));
    assert!(said.contains("65 MiB") && said.contains("64 MiB"), "{said}");
    let said = vm.api_fault("GET", "/balloon/statistics", None);
    assert!(said.contains("not enabled"), "{said}");
    let said = vm.api_fault("PATCH", "/balloon/statistics", Some(json!({ "stats_polling_interval_s": 1 })));
    assert!(said.contains("cannot be enabled"), "{said}");
    for (method, path) in [("PATCH", "/balloon/hinting/start"), ("GET", "/balloon/hinting/status")] {
        assert!(vm.api_fault(method, path, None).contains("not enabled"), "{path}");
    }
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, with_balloon(64, json!({ "amount_mib": 100 })).to_string()).unwrap();
    let said = run_err(&["--config", text(&path)]);
    assert!(said.contains("100 MiB") && said.contains("64 MiB"), "{said}");
}
