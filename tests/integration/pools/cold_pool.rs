//! Restores whose memory comes from a cold pool in a directory: the snapshot's memory file is not there.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde_json::{Value, json};

use crate::support::cold::{Scene, copy_bare};
use crate::support::{Vm, is_emulated, run, run_err, run_ok, scratch, text};

fn report(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_policy_restores_without_the_memory_file_and_the_bytes_are_the_same() {
    let scene = Scene::make();
    let profile = scene.dir.path().join("p.profile");
    let out = scene.dir.path().join("report.json");
    let snapshot = text(&scene.snapshot);
    run_ok(&["profile", "record", "--snapshot", snapshot, "--run", "check", "--out", text(&profile)]);
    for policy in
        ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv", "reap", "faasnap", "aquifer", "tiered"]
    {
        let mut args = vec!["restore", "--snapshot", text(&scene.bare), "--policy", policy, "--run", "check"];
        args.extend(["--cold", text(&scene.pool), "--report", text(&out)]);
        if ["reap", "faasnap", "aquifer", "tiered"].contains(&policy) {
            args.extend(["--profile", text(&profile)]);
        }
        let said = run_ok(&args);
        assert!(said.contains(&scene.digest), "{policy}: {said}");
        let report = report(&out);
        let place = &report["cold"]["places"][0];
        let bytes = place["bytes_pages"].as_u64().unwrap();
        let stored = place["bytes_stored"].as_u64().unwrap();
        // 6000 pages were filled, and `check` reads them all.
        assert!(bytes >= 6000 * 4096 && stored <= bytes, "{policy}: {place}");
        assert_eq!((&place["retries"], &place["damaged"]), (&json!(0), &json!(0)), "{policy}");
        assert_eq!(report["restore"]["policy"], policy);
    }
}

#[test]
fn fault_brings_the_whole_chunk_around_it() {
    let scene = Scene::make();
    let out = scene.dir.path().join("report.json");
    let args = ["restore", "--snapshot", text(&scene.bare), "--policy", "firecracker-uffd", "--run", "check"];
    run_ok(&[&args[..], &["--cold", text(&scene.pool), "--report", text(&out)]].concat());
    let report = report(&out);
    let served = &report["fault_ins"]["served"];
    let faults = served["read"].as_u64().unwrap() + served["write"].as_u64().unwrap();
    // 32 pages each, and some of which little is touched.
    assert!(faults < 6000 / 8, "{served}");
    assert!(served["pages_installed"].as_u64().unwrap() >= 6000, "{served}");
    let place = &report["cold"]["places"][0];
    assert!(place["round_trips"].as_u64().unwrap() <= faults + 1, "{place}");
}

#[test]
fn pool_read_past_the_page_cache_gives_the_same_bytes() {
    let scene = Scene::make();
    // The host's temporary directories may be on a file system that cannot read past the page cache. The testbed's can;
    // there, the source tree is read-only.
    let dir = if is_emulated() { scratch() } else { tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap() };
    let pool = dir.path().join("pool");
    run_ok(&["pool", "create", "--tier", "file", "--at", text(&pool)]);
    run_ok(&["pool", "add", text(&pool), text(&scene.snapshot)]);
    let probe = dir.path().join("probe");
    std::fs::write(&probe, [0; 4096]).unwrap();
    let has_direct_io = File::options().read(true).custom_flags(libc::O_DIRECT).open(&probe).is_ok();
    for (policy, depth) in [("eager", ""), ("eager", ",depth=1"), ("firecracker-uffd", "")] {
        let cold = format!("direct:{}{depth}", text(&pool));
        let args = ["restore", "--snapshot", text(&scene.bare), "--policy", policy, "--run", "check", "--cold", &cold];
        if !has_direct_io {
            let said = run_err(&args);
            assert!(said.contains("cannot be read past the page cache"), "{policy}{depth}: {said}");
            continue;
        }
        let said = run_ok(&args);
        assert!(said.contains(&scene.digest), "{policy}{depth}: {said}");
    }
}

#[test]
fn chain_of_diffs_is_one_object() {
    let scene = Scene::make();
    let (second, bare) = (scene.dir.path().join("second"), scene.dir.path().join("second-bare"));
    let mut vm = Vm::restore(&scene.snapshot, "firecracker");
    vm.call("fill pages=700 seed=9");
    let digest = vm.call("check").digest;
    vm.snapshot(&second, &["--diff"]);
    drop(vm);
    assert_ne!(digest, scene.digest);
    run_ok(&["pool", "add", text(&scene.pool), text(&second)]);
    copy_bare(&second, &bare);
    // The parent is found where the manifest says, and its memory is not needed either.
    std::fs::remove_file(scene.snapshot.join("memory")).unwrap();
    for policy in ["eager", "firecracker"] {
        let mut vm = Vm::restore_with(&bare, policy, &["--cold", text(&scene.pool)]);
        assert_eq!(vm.call("check").digest, digest, "{policy}");
    }
    assert_eq!(run_ok(&["pool", "ls", text(&scene.pool)]).lines().count(), 2);
}

#[test]
fn vm_restored_from_a_pool_can_be_snapshotted_in_full_and_as_a_diff() {
    let scene = Scene::make();
    let mut vm = scene.restore("firecracker", &[text(&scene.pool)], &["--track-dirty-pages"]);
    vm.call("fill pages=50 seed=77");
    let digest = vm.call("check").digest;
    let diff = scene.dir.path().join("diff");
    let full = scene.dir.path().join("again");
    vm.snapshot(&diff, &["--diff"]);
    vm.snapshot(&full, &[]);
    drop(vm);
    assert_eq!(Vm::restore(&full, "eager").call("check").digest, digest);
    // The diff's parent is the copy that never had its memory here.
    std::fs::copy(scene.snapshot.join("memory"), scene.bare.join("memory")).unwrap();
    assert_eq!(Vm::restore(&diff, "eager").call("check").digest, digest);
}

#[test]
fn pages_given_a_profile_are_stored_apart_and_fetched_without_the_rest() {
    let scene = Scene::make();
    let profile = scene.dir.path().join("p.profile");
    let out = scene.dir.path().join("report.json");
    let snapshot = text(&scene.snapshot);
    run_ok(&["profile", "record", "--snapshot", snapshot, "--run", "hello", "--out", text(&profile)]);
    let packed = scene.dir.path().join("packed");
    run_ok(&["pool", "create", "--tier", "file", "--at", text(&packed), "--chunk", "256"]);
    run_ok(&["pool", "add", text(&packed), snapshot, "--profile", text(&profile)]);
    let fetched = |pool: &Path| {
        let args = ["restore", "--snapshot", text(&scene.bare), "--policy", "reap", "--profile", text(&profile)];
        run_ok(&[&args[..], &["--run", "hello", "--cold", text(pool), "--report", text(&out)]].concat());
        report(&out)["cold"]["places"][0]["bytes_pages"].as_u64().unwrap()
    };
    let apart = fetched(&packed);
    let together = fetched(&scene.pool);
    assert!(apart < together, "{apart} bytes of pages, {together} where nothing is apart");
    let mut vm = scene.restore("firecracker", &[text(&packed)], &[]);
    assert_eq!(vm.call("check").digest, scene.digest);
}

#[test]
fn flipped_bits_are_refused_and_never_run() {
    let scene = Scene::make();
    let data = File::options().read(true).write(true).open(scene.object(".chunks")).unwrap();
    let len = data.metadata().unwrap().len();
    // One in each 64 KiB: whatever is asked for first is damaged.
    for offset in (0..len).step_by(64 << 10) {
        let mut byte = [0];
        data.read_exact_at(&mut byte, offset).unwrap();
        data.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    }
    let pool = text(&scene.pool);
    let args = ["restore", "--snapshot", text(&scene.bare), "--run", "check", "--cold", pool, "--policy"];
    for policy in ["eager", "firecracker"] {
        let output = run(&[&args[..], &[policy]].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{policy}: {said}");
        assert!(said.contains("does not have the bytes that its checksum is of"), "{policy}: {said}");
        assert!(said.contains(pool), "{policy}: {said}");
        assert!(
            policy == "eager" || said.contains("at guest-physical 0x") || said.contains("no longer served"),
            "{said}"
        );
        assert!(output.stdout.is_empty(), "the guest never answers");
    }
    let said = run(&["pool", "fsck", pool]);
    assert_eq!(said.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&said.stdout).contains("chunks are damaged"));
}

#[test]
fn second_pool_is_used_where_the_first_is_damaged_or_gone() {
    let scene = Scene::make();
    let copy = scene.dir.path().join("copy");
    run_ok(&["pool", "create", "--tier", "file", "--at", text(&copy)]);
    run_ok(&["pool", "add", text(&copy), text(&scene.snapshot)]);
    let data = File::options().write(true).open(scene.object(".chunks")).unwrap();
    data.write_all_at(&[0x55; 3 << 20], 1 << 20).unwrap();
    let mut vm = scene.restore("firecracker", &[text(&scene.pool), text(&copy)], &[]);
    assert_eq!(vm.call("check").digest, scene.digest);
    drop(vm);
    let id = run_ok(&["pool", "ls", text(&scene.pool)]);
    run_ok(&["pool", "rm", text(&scene.pool), id.trim()]);
    let mut vm = scene.restore("eager", &[text(&scene.pool), text(&copy)], &[]);
    assert_eq!(vm.call("check").digest, scene.digest);
}

#[test]
fn objects_that_are_not_what_they_should_be_are_refused() {
    let scene = Scene::make();
    let pool = text(&scene.pool);
    let index = scene.object(".index");
    let refused = || run_err(&["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--cold", pool]);
    let good = std::fs::read(&index).unwrap();
    for (bytes, says) in [
        (good[..good.len() / 2].to_vec(), "is truncated"),
        (good[..10].to_vec(), "is truncated"),
        (vec![0; good.len()], "wrong magic"),
        ([&good[..8], &[9, 0], &good[10..]].concat(), "is damaged"),
        ([&good[..good.len() - 1], &[!good[good.len() - 1]]].concat(), "is damaged"),
    ] {
        std::fs::write(&index, bytes).unwrap();
        let said = refused();
        assert!(said.contains(says) && said.contains(pool), "{says}: {said}");
    }
    std::fs::write(&index, &good).unwrap();
    let data = File::options().write(true).open(scene.object(".chunks")).unwrap();
    data.set_len(4096).unwrap();
    assert!(refused().contains("has 4096 bytes, not"));
    std::fs::remove_file(&index).unwrap();
    assert!(refused().contains("does not hold snapshot"));
    std::fs::write(scene.pool.join("cold-pool.json"), r#"{"format":7}"#).unwrap();
    assert!(refused().contains("was made by a later tvmm in format 7"));
    std::fs::remove_file(scene.pool.join("cold-pool.json")).unwrap();
    assert!(refused().contains("is not a cold pool"));
}

#[test]
fn object_of_another_snapshot_under_this_name_is_refused() {
    let scene = Scene::make();
    let other = Scene::make();
    for suffix in [".index", ".chunks"] {
        std::fs::copy(other.object(suffix), scene.object(suffix)).unwrap();
    }
    let said = run_err(&["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--cold", text(&scene.pool)]);
    assert!(said.contains("is of snapshot"), "{said}");
}

#[test]
fn what_is_no_cold_pool_is_refused_by_name() {
    let dir = scratch();
    let scene = Scene::make();
    let refused = |cold: &str| run_err(&["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--cold", cold]);
    for (cold, says) in [
        ("tcp:nowhere", "`nowhere` is not HOST:PORT"),
        ("ftp://a/b", "ftp://"),
        (text(dir.path()), "it has no cold-pool.json"),
        ("/nowhere/at/all", "it has no cold-pool.json"),
    ] {
        let said = refused(cold);
        assert!(said.contains(says), "{cold}: {said}");
    }
    for (args, says) in [
        (vec!["--chunk", "100"], "a power of two from 64 to 2048"),
        (vec!["--chunk", "4096"], "a power of two from 64 to 2048"),
    ] {
        let at = dir.path().join("new");
        let said = run_err(&[&["pool", "create", "--tier", "remote", "--at", text(&at)], &args[..]].concat());
        assert!(said.contains(says), "{said}");
    }
    let said = run_err(&["pool", "create", "--tier", "remote", "--at", text(&scene.bare)]);
    assert!(said.contains("the directory is not empty"), "{said}");
    let said = run_err(&["pool", "add", text(&scene.pool), text(&scene.snapshot)]);
    assert!(said.contains("already holds snapshot"), "{said}");
}

#[test]
fn api_takes_cold_pools_and_refuses_them_beside_a_handler() {
    let scene = Scene::make();
    let mut vm = Vm::wait_for_api();
    let mut body = json!({
        "snapshot_path": text(&scene.bare), "resume_vm": true,
        "mem_backend": { "backend_type": "Uffd", "backend_path": "/nowhere" },
        "tvmm": { "cold_pools": [text(&scene.pool)], "policy": "firecracker" },
    });
    let (status, fault) = vm.api("PUT", "/snapshot/load", Some(body.clone()));
    assert_eq!(status, 400);
    assert!(fault.to_string().contains("so does a pool, cold or not"), "{fault}");
    body.as_object_mut().unwrap().remove("mem_backend");
    vm.api_ok("PUT", "/snapshot/load", Some(body));
    assert_eq!(vm.call("check").digest, scene.digest);
}
