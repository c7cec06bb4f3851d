//! Writers of a pool that are killed at any moment.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::skip::skip;
use crate::support::pool::{Pool, filled};
use crate::support::{rounds, run_err, run_ok, scratch, text, tvmm};

/// Runs a command of the pool and kills it after `share` (of 1) of `usual`.
fn kill_after(args: &[&str], usual: Duration, share: f64) {
    let mut child = tvmm().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(usual.mul_f64(share));
    let _ = child.kill();
    child.wait().unwrap();
}

#[test]
fn a_pool_survives_writers_that_are_killed() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let digests = [filled(&first, 2000, 7), filled(&second, 3000, 8)];
    pool.add(&first);
    let start = Instant::now();
    pool.add(&second);
    let usual = start.elapsed().mul_f64(1.2);
    pool.ok("rm", &["second"]);
    pool.ok("gc", &[]);
    let rounds = rounds(16);
    for round in 0..rounds {
        let share = round as f64 / rounds as f64;
        kill_after(&["pool", "add", pool.path(), text(&second)], usual, share);
        let found = pool.json("fsck", &[]);
        assert_eq!(found["good"], true, "{round}: {found}");
        let names = pool.json("ls", &[]).to_string();
        assert!(names.contains("\"first\""), "{round}: {names}");
        if names.contains("\"second\"") {
            kill_after(&["pool", "rm", pool.path(), "second"], usual / 4, share);
            kill_after(&["pool", "gc", pool.path()], usual / 4, share);
            assert_eq!(pool.json("fsck", &[])["good"], true, "{round}");
        }
    }
    assert_eq!(pool.restore(&first, "trenv", &[]).call("check").digest, digests[0]);
    pool.ok("gc", &[]);
    let listed = pool.json("ls", &[]);
    // It may have survived, or not.
    if !listed.as_array().unwrap().iter().any(|head| head["name"] == "second" && head["removed"] == false) {
        pool.add(&second);
    }
    assert_eq!(pool.restore(&second, "eager", &[]).call("check").digest, digests[1]);
    assert_eq!(pool.json("fsck", &[])["good"], true);
}

#[test]
fn a_torn_superblock_leaves_the_state_before() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let digest = filled(&first, 1000, 7);
    filled(&second, 1000, 8);
    pool.add(&first);
    let file = File::options().read(true).write(true).open(pool.file()).unwrap();
    let slots = || {
        let mut bytes = vec![0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = slots();
    pool.add(&second);
    let after = slots();
    let torn = if before[..4096] == after[..4096] { 4096 } else { 0 };
    // Half of the new one over the old one.
    let half = [&after[torn..torn + 60], &before[torn + 60..torn + 4096]].concat();
    file.write_all_at(&half, torn as u64).unwrap();
    let found = pool.json("fsck", &[]);
    assert_eq!((&found["good"], &found["both_states"]), (&true.into(), &false.into()), "{found}");
    let names = pool.json("ls", &[]).to_string();
    assert!(names.contains("first") && !names.contains("second"), "{names}");
    assert_eq!(pool.restore(&first, "trenv", &[]).call("check").digest, digest);
    pool.add(&second);
    assert_eq!(pool.json("fsck", &[])["both_states"], true);
}

#[test]
fn vms_that_are_killed_while_they_map_leave_no_lease() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    let digest = filled(&out, 2000, 7);
    pool.add(&out);
    let restore = ["restore", "--snapshot", text(&out), "--policy", "trenv", "--pool", pool.path(), "--run", "check"];
    for round in 0..rounds(20) {
        kill_after(&restore, Duration::from_micros(500), round as f64);
    }
    assert_eq!(pool.json("show", &[])["vms"], serde_json::json!([]));
    assert_eq!(pool.restore(&out, "trenv", &[]).call("check").digest, digest);
    pool.ok("rm", &["full"]);
    let freed = pool.json("gc", &[]);
    assert!(freed["held"] == 0 && freed["pages"].as_u64().unwrap() >= 2000, "{freed}");
}

#[test]
fn a_pool_whose_file_system_is_full_is_as_it_was() {
    let dir = scratch();
    let small = scratch();
    let mounted = rustix::mount::mount("tvmm", small.path(), "tmpfs", rustix::mount::MountFlags::empty(), c"size=24m");
    if let Err(error) = mounted {
        return skip!("mount", "cannot mount a tmpfs: {error}");
    }
    let at = text(small.path());
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    filled(&first, 1000, 7);
    filled(&second, 8000, 8);
    run_ok(&["pool", "create", "--tier", "cxl", "--at", at, "--size", "0.2"]);
    run_ok(&["pool", "add", at, text(&first)]);
    let said = run_err(&["pool", "add", at, text(&second)]);
    assert!(said.contains("No space left"), "{said}");
    let found = run_ok(&["pool", "fsck", at, "--json"]);
    let listed = run_ok(&["pool", "ls", at]);
    let left = std::fs::metadata(small.path().join("pool.tvmm")).unwrap().blocks() * 512;
    rustix::mount::unmount(small.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(found.contains("\"good\": true"), "{found}");
    assert!(listed.contains("first") && !listed.contains("second"), "{listed}");
    assert!(left < 16 << 20, "{left} bytes are still there");
}
