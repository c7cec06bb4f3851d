//! Repurposing: a restored VM becomes the VM of another snapshot in place, and nothing of the former guest is left.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::fork::Children;
use crate::devices::net::{GUEST, GUEST_IP, udp, with_tap};
use crate::devices::vsock::{ask, connect, with_vsock};
use crate::machine::platform::{hides_cpuid, without_leaf1_ecx};
use crate::support::cold::Scene;
use crate::support::network::with_network;
use crate::support::pool::{Pool, filled};
use crate::support::service::wait_until;
use crate::support::skip::skip;
use crate::support::{Random, TIMEOUT, Vm, config, http, rounds, run, run_err, run_ok, scratch, text};

/// The body that makes a VM that of `snapshot`, and lets it compare all of itself with the snapshot.
fn body(snapshot: &Path, options: Value) -> Value {
    json!({ "snapshot_path": snapshot, "resume_vm": true, "tvmm": options, "compare": true })
}

fn repurpose(vm: &Vm, snapshot: &Path, options: Value) -> Value {
    vm.api_ok("PUT", "/tvmm/repurpose", Some(body(snapshot, options)))
}

fn refused(vm: &Vm, body: Value) -> String {
    vm.api_fault("PUT", "/tvmm/repurpose", Some(body))
}

/// The ways to place memory, as keys of `tvmm`.
fn ways(pool: &Pool) -> Vec<Value> {
    vec![
        json!({ "policy": "firecracker" }),
        json!({ "policy": "eager" }),
        json!({ "policy": "firecracker-uffd" }),
        json!({ "policy": "catalyzer" }),
        json!({ "policy": "trenv" }),
        json!({ "policy": "trenv", "in_place_mapping": "shared" }),
        json!({ "policy": "trenv", "pools": [pool.path()] }),
        json!({ "policy": "trenv", "pools": [pool.path()], "in_place_mapping": "shared" }),
        json!({ "policy": "eager", "pools": [pool.path()], "verify": "full" }),
        json!({ "policy": "firecracker", "verify": "off" }),
    ]
}

#[test]
fn a_vm_becomes_that_of_another_snapshot_whatever_places_the_memory_of_both() {
    let dir = scratch();
    let pool = Pool::create("1");
    let snapshots: Vec<(PathBuf, String)> = (0..3)
        .map(|number| {
            let path = dir.path().join(number.to_string());
            let digest = filled(&path, 1000 + 900 * number, number + 1);
            pool.add(&path);
            (path, digest)
        })
        .collect();
    let ways = ways(&pool);
    let mut vm = Vm::restore_with(&snapshots[0].0, "firecracker", &[]);
    vm.wait_for_socket();
    let mut random = Random(13);
    let mut number = 0;
    // Each way follows each other in the end; in one run each is met at least twice.
    for round in 0..20 {
        vm.call(&format!("touch pages=700 write=100 seed={round}"));
        vm.call(&format!("fill pages={} seed={}", 100 + random.below(2500), round + 50));
        number = (number + 1 + random.below(2) as usize) % snapshots.len();
        let way = &ways[round % ways.len()];
        let (snapshot, digest) = &snapshots[number];
        let repurposed = repurpose(&vm, snapshot, way.clone());
        assert!(repurposed["total_us"].as_u64().unwrap() > 0, "{repurposed}");
        assert_eq!(vm.state(), "Running");
        assert_eq!(vm.call("check").digest, *digest, "round {round}, {way}");
        let report = vm.api_ok("GET", "/tvmm/report", None);
        assert_eq!(report["restore"]["snapshot"], repurposed["snapshot"]);
        assert_eq!(report["restore"]["repurposed"], round + 1);
        assert_eq!(report["restore"]["policy"], way["policy"]);
    }
}

#[test]
fn a_vm_gives_its_guest_up_and_its_memory_back_before_it_becomes_another() {
    let dir = scratch();
    let pool = Pool::create("1");
    let path = dir.path().join("a");
    let digest = filled(&path, 1000, 1);
    pool.add(&path);
    let mut vm = Vm::restore_with(&path, "eager", &[]);
    vm.wait_for_socket();
    let vacate = |vm: &Vm| vm.api_ok("PUT", "/tvmm/vacate", Some(json!({})));
    for (round, way) in ways(&pool).into_iter().enumerate() {
        vm.call(&format!("fill pages=3000 seed={}", round + 5));
        let before = anonymous_kib(&vm);
        vacate(&vm);
        let after = anonymous_kib(&vm);
        assert!(after + 3000 * 4 <= before, "{way}: {before} KiB before, {after} after");
        assert_eq!(vm.state(), "Paused");
        for (method, path, body) in [
            ("PATCH", "/vm", json!({ "state": "Resumed" })),
            ("PUT", "/tvmm/rewind", json!({})),
            ("PUT", "/tvmm/demote", json!({})),
            ("PUT", "/snapshot/create", json!({ "snapshot_path": dir.path().join("x") })),
        ] {
            let fault = vm.api_fault(method, path, Some(body));
            assert!(fault.contains("given its guest up"), "{path}: {fault}");
        }
        // A second time changes nothing, and a snapshot that is not there leaves it as it is.
        vacate(&vm);
        refused(&vm, body(&dir.path().join("none"), json!({})));
        repurpose(&vm, &path, way.clone());
        assert_eq!(vm.call("check").digest, digest, "{way}");
    }
    // A VM that cannot be repurposed runs on.
    let mut booted = Vm::boot(&config(1, 64));
    booted.wait_for_socket();
    let fault = booted.api_fault("PUT", "/tvmm/vacate", Some(json!({})));
    assert!(fault.contains("was booted"), "{fault}");
    assert_eq!(booted.state(), "Running");
    booted.call("fill pages=10 seed=1");
}

/// Memory of a VM's process that no file backs, KiB.
fn anonymous_kib(vm: &Vm) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn memory_comes_from_a_cold_pool_too() {
    let scene = Scene::make();
    let dir = scratch();
    let other = dir.path().join("other");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=300 seed=9");
    let digest = vm.call("check").digest;
    vm.snapshot(&other, &[]);
    drop(vm);
    let mut vm = Vm::restore_with(&other, "firecracker", &[]);
    vm.wait_for_socket();
    for policy in ["firecracker-uffd", "firecracker", "eager", "catalyzer", "trenv"] {
        let cold = json!({ "policy": policy, "cold_pools": [scene.pool] });
        repurpose(&vm, &scene.bare, cold.clone());
        assert_eq!(vm.call("check").digest, scene.digest, "{policy}");
        vm.call("fill pages=3000 seed=6");
        // Chunks may still be on their way for a guest that is gone.
        (0..3).for_each(|_| drop(repurpose(&vm, &scene.bare, cold.clone())));
        repurpose(&vm, &other, json!({ "policy": "firecracker" }));
        assert_eq!(vm.call("check").digest, digest, "{policy}");
        vm.call("fill pages=2000 seed=5");
    }
}

/// The bytes that the guest of snapshot `number` has in its memory.
fn canary(number: usize) -> String {
    format!("CANARY-{number}-7f3e9a51c2d8")
}

/// The numbers of the canaries in a file.
fn canaries(path: &Path) -> Vec<usize> {
    let content = std::fs::read(path).unwrap();
    let candidates = (0..content.len()).filter(|&at| content[at] == b'C');
    let number = |at: usize| (0..100).find(|&number| content[at..].starts_with(canary(number).as_bytes()));
    candidates.filter(|&at| content[at..].starts_with(b"CANARY-")).filter_map(number).collect()
}

/// A snapshot of a guest with its canary in the buffers of guest and serial port: in a line without its end.
fn with_canary(dir: &Path, number: usize) -> PathBuf {
    let mut vm = Vm::boot(&config(1, 64));
    vm.call(&format!("fill pages={} seed={number}", 200 + 300 * number));
    vm.send(canary(number).as_bytes());
    let snapshot = dir.join(number.to_string());
    // The guest takes the bytes in its own time.
    loop {
        vm.snapshot(&snapshot, &[]);
        if canaries(&snapshot.join("memory")).contains(&number) {
            return snapshot;
        }
        std::fs::remove_dir_all(&snapshot).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn no_byte_of_a_former_guest_is_in_a_snapshot_of_the_next() {
    let dir = scratch();
    let snapshots: Vec<PathBuf> = (0..3).map(|number| with_canary(dir.path(), number)).collect();
    let policies = ["firecracker", "eager", "firecracker-uffd", "catalyzer", "trenv"];
    let mappings = ["private", "shared"];
    let mut random = Random(5);
    let mut vm = Vm::restore_with(&snapshots[0], "firecracker", &[]);
    vm.wait_for_socket();
    let mut number = 0;
    for round in 0..rounds(12) {
        // In some rounds the former guest has not run since it came.
        if random.below(3) > 0 {
            vm.send(b"\n");
            vm.call(&format!("touch pages=150 write=100 seed={round}"));
            // A second one, which the guest of no snapshot has.
            vm.send(format!("{}\n", canary(77)).as_bytes());
            vm.call("hello");
        }
        number = (number + 1 + random.below(2) as usize) % snapshots.len();
        let policy = policies[random.below(policies.len() as u64) as usize];
        let mapping = mappings[random.below(2) as usize];
        repurpose(&vm, &snapshots[number], json!({ "policy": policy, "in_place_mapping": mapping }));
        let after = dir.path().join("after");
        vm.snapshot(&after, &[]);
        assert!(canaries(&after.join("memory")).contains(&number), "the search finds canaries");
        for entry in std::fs::read_dir(&after).unwrap() {
            let path = entry.unwrap().path();
            let found = canaries(&path);
            let are_own = found.iter().all(|found| *found == number);
            assert!(are_own, "round {round}, {policy}: {} has the canaries of {found:?}", path.display());
        }
        std::fs::remove_dir_all(&after).unwrap();
    }
}

#[test]
fn vcpus_and_pauses_are_kept_and_work_in_progress_is_gone() {
    let dir = scratch();
    let snapshot = |name: &str, seed| {
        let path = dir.path().join(name);
        let mut vm = Vm::boot(&config(2, 128));
        vm.call(&format!("fill pages=500 seed={seed} cpu=1"));
        let digest = vm.call("check").digest;
        vm.snapshot(&path, &[]);
        (path, digest)
    };
    let one = snapshot("one", 1);
    let two = snapshot("two", 2);
    let mut vm = Vm::restore(&one.0, "firecracker");
    vm.wait_for_socket();
    // `Vm::restore` tracks dirty pages.
    let tracked = |path: &Path| json!({ "snapshot_path": path, "compare": true, "track_dirty_pages": true });
    for round in 0..4 {
        vm.begin("spin ms=100 cpus=all");
        let (path, digest) = if round % 2 == 0 { &two } else { &one };
        vm.api_ok("PUT", "/tvmm/repurpose", Some(tracked(path)));
        assert_eq!(vm.state(), "Paused");
        vm.resume();
        assert_eq!(vm.call("check cpu=1").digest, *digest);
    }
    // The next diff is one against the snapshot that the VM has become.
    vm.call("fill pages=40 seed=3 cpu=1");
    let digest = vm.call("check").digest;
    let diff = dir.path().join("diff");
    vm.snapshot(&diff, &["--diff"]);
    let mut restored = Vm::restore(&diff, "firecracker");
    assert_eq!(restored.call("check").digest, digest);
    // And a rewind goes back to it.
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
    assert_eq!(vm.call("check").digest, one.1);
}

#[test]
fn input_that_the_former_guest_has_not_taken_can_be_dropped() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 100, 1);
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &[]);
    vm.wait_for_socket();
    for round in 0..6 {
        // More than the FIFO takes waits in the VMM, and more than that in the pipe.
        vm.api_ok("PATCH", "/vm", Some(json!({ "state": "Paused" })));
        let line = format!("run stale{round} hello {}\n", "x".repeat(70));
        (0..[1, 100, 400][round % 3]).for_each(|_| vm.send(line.as_bytes()));
        let mut body = body(&snapshot, json!({ "policy": "firecracker" }));
        body["discard_console"] = json!(true);
        vm.api_ok("PUT", "/tvmm/repurpose", Some(body));
        vm.begin("check");
        let said = vm.wait_line(|line| {
            assert!(!line.contains("stale"), "round {round}: {line}");
            line.starts_with("ok t")
        });
        assert!(said.contains(&digest), "round {round}: {said}");
    }
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_and_the_vm_runs_on() {
    let dir = scratch();
    let own = dir.path().join("own");
    let digest = filled(&own, 300, 1);
    let take = |name: &str, config: &Value| {
        let path = dir.path().join(name);
        Vm::boot(config).snapshot(&path, &[]);
        path
    };
    let mut with_entropy = config(1, 64);
    with_entropy["entropy"] = json!({});
    let mut cases = vec![
        (take("large", &config(1, 128)), "its memory in MiB is 64, the snapshot's 128"),
        (take("wide", &config(2, 64)), "its number of vCPUs is 1, the snapshot's 2"),
        (take("entropy", &with_entropy), "its set of devices is empty, the snapshot's entropy with 1 queues"),
    ];
    // AVX is bit 28.
    if hides_cpuid(1 << 28) {
        let mut masked = config(1, 64);
        masked["cpu-config"] = without_leaf1_ecx(&format!("0b0{}", "x".repeat(28)));
        cases.push((take("masked", &masked), "leaf 0x1 of the CPUID of vCPU 0 differs"));
    } else {
        skip!("cpuid", "this host's KVM shows guests the host's CPUID");
    }
    let mut vm = Vm::restore_with(&own, "firecracker", &[]);
    vm.wait_for_socket();
    vm.call("fill pages=77 seed=5");
    let now = vm.call("check").digest;
    assert_ne!(now, digest);
    for (snapshot, why) in &cases {
        let refusal = refused(&vm, body(snapshot, json!({})));
        assert!(refusal.starts_with("Cannot repurpose the VM: ") && refusal.contains(why), "{refusal}");
        assert_eq!((vm.state().as_str(), &vm.call("check").digest), ("Running", &now));
    }
    let mut tracked = body(&own, json!({}));
    tracked["track_dirty_pages"] = json!(true);
    assert!(refused(&vm, tracked).contains("it does not track dirty pages. Leave out --track-dirty-pages"));
    let handler =
        json!({ "snapshot_path": own, "mem_backend": { "backend_type": "Uffd", "backend_path": "/nowhere" } });
    assert!(refused(&vm, handler).contains("by a page-fault handler"));
    assert!(refused(&vm, body(&dir.path().join("nowhere"), json!({}))).contains("nowhere"));
    let mut misspelt = body(&own, json!({}));
    misspelt["comparre"] = json!(true);
    assert!(refused(&vm, misspelt).contains("comparre"));
    // Damage that the comparison finds before the guest would run.
    let damaged = dir.path().join("damaged");
    filled(&damaged, 2000, 2);
    let memory = damaged.join("memory");
    let bytes: Vec<u8> = std::fs::read(&memory).unwrap().iter().map(|byte| byte ^ 0x10).collect();
    std::fs::write(&memory, bytes).unwrap();
    let refusal = refused(&vm, body(&damaged, json!({ "verify": "full" })));
    assert!(refusal.contains("damaged") || refusal.contains("checksum"), "{refusal}");
    assert_eq!((vm.state().as_str(), &vm.call("check").digest), ("Running", &now));
    repurpose(&vm, &own, json!({}));
    assert_eq!(vm.call("check").digest, digest, "its own snapshot fits");
}

#[test]
fn only_a_restored_vm_is_repurposed() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 10, 1);
    let vm = Vm::boot(&config(1, 64));
    vm.wait_for_socket();
    assert!(refused(&vm, body(&snapshot, json!({}))).starts_with("Cannot repurpose a VM that was booted"));
    assert_eq!(vm.state(), "Running");
    let stderr = run_err(&["repurpose", "--api-sock", text(vm.socket()), "--snapshot", text(&snapshot)]);
    assert!(stderr.contains("Cannot repurpose a VM that was booted"), "{stderr}");
    let vm = Vm::wait_for_api();
    assert!(refused(&vm, body(&snapshot, json!({}))).contains("not supported before starting the microVM"));
}

#[test]
fn the_command_repurposes_with_paths_of_its_own_directory() {
    let dir = scratch();
    let one = dir.path().join("one");
    filled(&one, 100, 1);
    let digest = filled(&dir.path().join("two"), 200, 2);
    let mut vm = Vm::restore_with(&one, "firecracker", &[]);
    vm.wait_for_socket();
    let mut command = crate::support::tvmm();
    command.current_dir(dir.path()).args(["repurpose", "--api-sock", text(vm.socket()), "--snapshot", "two"]);
    let output = command.args(["--policy", "eager", "--compare", "--metadata", "key=value"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("repurposed in ") && stderr.contains("the VM equals its snapshot"), "{stderr}");
    assert_eq!(vm.call("check").digest, digest);
    let output = run(&["repurpose", "--api-sock", text(vm.socket()), "--snapshot", text(&one), "--json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["snapshot"], vm.api_ok("GET", "/tvmm/report", None)["restore"]["snapshot"]);
    let output = run(&["repurpose", "--api-sock", "s", "--snapshot", "x", "--plan", "p", "--dram", "1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("--plan cannot be used with --dram"));
}

/// A snapshot at `dir`/`name` of a guest that serves vsock port 52 and has filled memory from `seed`.
fn answering(dir: &Path, name: &str, socket: &Path, seed: u64) -> (PathBuf, String) {
    let snapshot = dir.join(name);
    let mut vm = Vm::boot(&with_vsock(socket));
    vm.call(&format!("fill pages=400 seed={seed}"));
    let digest = vm.call("check").digest;
    vm.begin("vsock_serve port=52 lines=1");
    assert!(ask(&connect(socket, 52), "run a hello").starts_with("ok a "));
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    std::fs::remove_file(socket).unwrap();
    (snapshot, digest)
}

#[test]
fn connections_end_and_the_next_guest_answers_on_the_same_socket_or_another() {
    let dir = scratch();
    let path = dir.path().join("v");
    let snapshots = [answering(dir.path(), "one", &path, 1), answering(dir.path(), "two", &path, 2)];
    let vm = Vm::restore_with(&snapshots[0].0, "firecracker", &[]);
    vm.wait_for_socket();
    for round in 0..4 {
        let mut stream = connect(&path, 52);
        assert!(ask(&stream, "run a hello").starts_with("ok a "));
        stream.write_all(b"half a line").unwrap();
        let (snapshot, digest) = &snapshots[(round + 1) % 2];
        repurpose(&vm, snapshot, json!({ "policy": "firecracker" }));
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest, b"", "nothing of the former guest comes any more");
        let answer = ask(&connect(&path, 52), "run b check");
        assert!(answer.contains(digest.as_str()), "{answer}, not {digest}");
    }
    let other = dir.path().join("w");
    let mut elsewhere = body(&snapshots[1].0, json!({}));
    elsewhere["vsock_override"] = json!({ "uds_path": other });
    vm.api_ok("PUT", "/tvmm/repurpose", Some(elsewhere));
    assert!(ask(&connect(&other, 52), "run c check").contains(snapshots[1].1.as_str()));
    assert!(!path.exists(), "the former device's socket is gone");
}

#[test]
fn a_repurposed_vm_may_stand_by_for_a_connection_or_a_line() {
    let dir = scratch();
    let path = dir.path().join("v");
    let snapshots = [answering(dir.path(), "one", &path, 1), answering(dir.path(), "two", &path, 2)];
    let vm = Vm::restore_with(&snapshots[0].0, "firecracker", &["--standby"]);
    vm.wait_for_state("Paused");
    let standby = |path: &Path| json!({ "snapshot_path": path, "compare": true, "tvmm": { "standby": true } });
    // From one guest that stands by to the next: the descriptors that are waited for are new ones.
    for round in 0..4 {
        vm.api_ok("PUT", "/tvmm/repurpose", Some(standby(&snapshots[(round + 1) % 2].0)));
        assert_eq!(vm.state(), "Paused");
    }
    assert!(ask(&connect(&path, 52), "run a check").contains(snapshots[0].1.as_str()));
    assert_eq!(vm.state(), "Running");
    vm.api_ok("PUT", "/tvmm/repurpose", Some(standby(&snapshots[1].0)));
    assert_eq!(vm.state(), "Paused");
    assert!(ask(&connect(&path, 52), "run a check").contains(snapshots[1].1.as_str()));
    drop(vm);
    let plain = [dir.path().join("three"), dir.path().join("four")];
    filled(&plain[0], 30, 3);
    let digest = filled(&plain[1], 40, 4);
    let mut vm = Vm::restore_with(&plain[0], "firecracker", &[]);
    vm.wait_for_socket();
    vm.api_ok("PUT", "/tvmm/repurpose", Some(standby(&plain[1])));
    assert_eq!(vm.state(), "Paused");
    assert_eq!(vm.call("check").digest, digest);
    assert_eq!(vm.state(), "Running");
}

#[test]
fn drives_and_balloons_are_those_of_the_next_snapshot() {
    let dir = scratch();
    let take = |name: &str, seed: u64| {
        let image = dir.path().join(format!("{name}.image"));
        std::fs::write(&image, vec![7; 1 << 20]).unwrap();
        let mut config = config(1, 128);
        config["drives"] = json!([{ "drive_id": name, "path_on_host": image, "is_root_device": false,
            "is_read_only": false }]);
        config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1,
            "free_page_hinting": true, "free_page_reporting": true });
        let mut vm = Vm::boot(&config);
        vm.call(&format!("blk op=write sectors=64 seed={seed} chunk=64"));
        vm.call(&format!("fill pages=3000 seed={seed}"));
        let digest = vm.call("check").digest;
        vm.call("balloon op=status");
        let snapshot = dir.path().join(name);
        vm.snapshot(&snapshot, &["--copy-drives"]);
        (snapshot, digest)
    };
    let snapshots = [take("one", 1), take("two", 2)];
    let drives = |number: usize| {
        let path = dir.path().join(format!("drives{number}"));
        std::fs::create_dir(&path).unwrap();
        path
    };
    let mut vm = Vm::restore_with(&snapshots[0].0, "firecracker", &["--drive-dir", text(&drives(100))]);
    vm.wait_for_socket();
    for (round, policy) in ["firecracker", "firecracker-uffd", "eager", "trenv"].into_iter().enumerate() {
        vm.call("blk op=write sectors=64 seed=9 chunk=64");
        for op in ["report", "inflate"] {
            vm.call(&format!("balloon op={op} filled=1"));
        }
        let number = (round + 1) % 2;
        let (snapshot, digest) = &snapshots[number];
        assert!(refused(&vm, body(snapshot, json!({ "policy": policy }))).contains("drive_dir"));
        // In the middle of requests, if the guest has read this by then; if not, the next one reads its own drive.
        vm.begin("blk op=read sectors=1024 chunk=64");
        repurpose(&vm, snapshot, json!({ "policy": policy, "drive_dir": drives(round) }));
        assert_eq!(vm.call("check").digest, *digest, "{policy}");
        let seed = number + 1;
        assert_eq!(vm.call(&format!("blk op=check sectors=64 seed={seed} chunk=64")).number("bad"), 0, "{policy}");
        assert_eq!(vm.call("balloon op=status").number("held"), 0, "{policy}");
        let drive = &vm.api_ok("GET", "/vm/config", None)["drives"][0];
        assert_eq!(drive["drive_id"], ["one", "two"][number]);
        // The next device works for the next memory.
        vm.call("balloon op=report filled=1");
        assert_ne!(vm.call("check").digest, *digest, "{policy}: the pages are zero");
    }
}

#[test]
fn an_image_that_cannot_be_the_drive_is_refused_while_the_former_guest_runs() {
    let dir = scratch();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let mut config = config(1, 64);
    config["drives"] = json!([{ "drive_id": "one", "path_on_host": image, "is_root_device": false,
        "is_read_only": false }]);
    let mut booted = Vm::boot(&config);
    booted.call("fill pages=100 seed=1");
    let digest = booted.call("check").digest;
    let snapshot = dir.path().join("snapshot");
    booted.snapshot(&snapshot, &[]);
    drop(booted);
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &[]);
    vm.wait_for_socket();
    let short = dir.path().join("short");
    std::fs::write(&short, vec![0; 512]).unwrap();
    let taken = dir.path().join("taken");
    std::fs::write(&taken, vec![0; 1 << 20]).unwrap();
    let lock = std::fs::File::open(&taken).unwrap();
    lock.lock().unwrap();
    let given = |id: &str, image: &Path| json!({ "drive_id": id, "path_on_host": image });
    let overrides = |drives: Value| body(&snapshot, json!({ "drive_overrides": drives }));
    for (drives, why) in [
        (json!([given("one", Path::new("/no/where"))]), "Cannot open /no/where for drive `one`"),
        (json!([given("one", &short)]), "the guest knows a disk of 1048576 bytes, this one has 512"),
        (json!([given("one", &taken)]), "another process has locked it"),
        (json!([given("one", &image), given("none", &image)]), "no drive `none` to override"),
    ] {
        let fault = refused(&vm, overrides(drives));
        assert!(fault.contains(why), "{fault}");
        assert_eq!(vm.state(), "Running");
        assert_eq!(vm.call("check").digest, digest);
    }
    drop(lock);
    // The second time, the image is locked by the VM itself.
    for _ in 0..2 {
        vm.call("fill pages=10 seed=5");
        vm.api_ok("PUT", "/tvmm/repurpose", Some(overrides(json!([given("one", &taken)]))));
        assert_eq!(vm.call("check").digest, digest);
    }
}

fn count(of: &str, vm: &Vm) -> usize {
    std::fs::read_dir(format!("/proc/{}/{of}", vm.pid())).unwrap().count()
}

#[test]
fn many_lives_leave_no_descriptor_thread_or_memory_behind() {
    let dir = scratch();
    let snapshots: Vec<(PathBuf, String)> = (0..2)
        .map(|number| {
            let path = dir.path().join(number.to_string());
            let digest = filled(&path, 1000, number + 1);
            (path, digest)
        })
        .collect();
    let policies = ["firecracker", "firecracker-uffd", "eager"];
    let mut vm = Vm::restore_with(&snapshots[0].0, "firecracker", &[]);
    vm.wait_for_socket();
    let mut random = Random(3);
    let mut step = |vm: &mut Vm, round: usize| {
        match random.below(3) {
            0 => drop(vm.call(&format!("touch pages={} write=100", 1 + random.below(900)))),
            // The next guest may come before this one has read the request: it must end by itself.
            1 => drop(vm.begin("spin ms=30")),
            _ => {}
        }
        let policy = policies[random.below(policies.len() as u64) as usize];
        let mut body = body(&snapshots[round % 2].0, json!({ "policy": policy, "verify": "sample" }));
        // The comparison takes most of the time.
        body["compare"] = json!(random.below(8) == 0);
        vm.api_ok("PUT", "/tvmm/repurpose", Some(body));
    };
    (0..6).for_each(|round| step(&mut vm, round));
    let before = [count("fd", &vm), count("task", &vm)];
    let lives = rounds(60);
    (0..lives).for_each(|round| step(&mut vm, round));
    assert_eq!(vm.call("check").digest, snapshots[(lives - 1) % 2].1);
    // The last policy may need a fault service and its descriptors.
    wait_until("descriptors and threads to be as before", || {
        count("fd", &vm) <= before[0] + 6 && count("task", &vm) <= before[1] + 2
    });
}

/// Sends datagrams until the guest answers one: the bridge drops what comes before it has noticed that the tap is open
/// again.
fn send_until_answered() {
    let socket = udp();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    loop {
        socket.send_to(b"to the guest that is there", (GUEST, 7)).unwrap();
        if socket.recv_from(&mut [0; 100]).is_ok() {
            return;
        }
        assert!(Instant::now() < deadline, "the guest does not answer");
    }
}

#[test]
fn an_interface_goes_to_the_next_guest_on_the_same_tap_or_another() {
    with_network(|network| {
        let dir = scratch();
        ["tap0", "tap1"].iter().for_each(|tap| network.tap(tap));
        let snapshots = ["one", "two"].map(|name| {
            let mut vm = Vm::boot(&with_tap("tap0", 2));
            network.wait_for("tap0");
            vm.call("net_info");
            let id = vm.begin(&format!("net_answer ip={GUEST_IP} frames=1 ms=60000"));
            let snapshot = dir.path().join(name);
            vm.snapshot(&snapshot, &[]);
            drop(vm);
            network.wait_closed("tap0");
            (snapshot, id)
        });
        let mut vm = Vm::restore_with(&snapshots[0].0, "firecracker", &[]);
        vm.wait_for_socket();
        for (round, tap) in ["tap0", "tap1", "tap1", "tap0"].into_iter().enumerate() {
            let (snapshot, id) = &snapshots[(round + 1) % 2];
            let mut body = body(snapshot, json!({ "policy": "eager" }));
            body["network_overrides"] = json!([{ "iface_id": "eth0", "host_dev_name": tap }]);
            vm.api_ok("PUT", "/tvmm/repurpose", Some(body));
            network.wait_for(tap);
            send_until_answered();
            assert!(vm.finish(id).contains("udp=1"), "{tap}");
            assert_eq!(vm.call("net_info").number("announced"), 1);
        }
    });
}

#[test]
fn a_repurposed_vm_is_snapshotted_while_it_runs_and_forked() {
    let dir = scratch();
    let path = dir.path().join("v");
    let snapshots = [answering(dir.path(), "one", &path, 1), answering(dir.path(), "two", &path, 2)];
    let vm = Vm::restore_with(&snapshots[0].0, "firecracker", &[]);
    vm.wait_for_socket();
    repurpose(&vm, &snapshots[1].0, json!({}));
    let fork = json!({ "count": 1, "out_sock": dir.path().join("c-{n}.sock"),
        "vsock_override": { "uds_path": dir.path().join("v-{n}") } });
    let answer = vm.api_ok("PUT", "/tvmm/fork", Some(fork));
    let children = Children::of(&answer);
    let socket = &children.sockets[0];
    let number = text(socket).trim_end_matches(".sock").rsplit('-').next().unwrap();
    let its_vsock = dir.path().join(format!("v-{number}"));
    assert!(ask(&connect(&its_vsock, 52), "run a check").contains(snapshots[1].1.as_str()));
    // The child is a restored VM too, and becomes what its parent was.
    let mut back = body(&snapshots[0].0, json!({}));
    back["vsock_override"] = json!({ "uds_path": its_vsock });
    let (status, answer) = http(socket, "PUT", "/tvmm/repurpose", &back.to_string());
    assert_eq!(status, 200, "{answer}");
    assert!(ask(&connect(&its_vsock, 52), "run b check").contains(snapshots[0].1.as_str()));
    drop(children);
    assert!(ask(&connect(&path, 52), "run c check").contains(snapshots[1].1.as_str()));
    let live = dir.path().join("live");
    run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&live), "--live"]);
    drop(vm);
    std::fs::remove_file(&path).unwrap();
    let vm = Vm::restore_with(&live, "firecracker", &[]);
    vm.wait_for_socket();
    assert!(ask(&connect(&path, 52), "run d check").contains(snapshots[1].1.as_str()));
}
