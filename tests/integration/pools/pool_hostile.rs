//! Pools that are damaged, full, in use, not ours, or too new.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;
use tvmm::sys::locks;

use crate::support::pool::{Pool, filled};
use crate::support::{Vm, finish, refusal, run, run_err, run_ok, scratch, text, tvmm};

/// Offsets of the writer's lock and of the version in a superblock (`docs/pools.md`).
const WRITER: u64 = 8192;
const VERSION: u64 = 8;

/// Offset of the data in the file: what the guest filled starts with a pattern, so it is looked for.
fn data_of(pool: &Pool) -> (u64, Vec<u64>) {
    let bytes = std::fs::read(pool.file()).unwrap();
    let pages = bytes.len() as u64 / 4096;
    // Header, catalogue, sums and hashes come first; each is less than the last tenth of a small pool.
    let start = bytes.len() as u64 / 10 / (2 << 20) * (2 << 20);
    let used = (start / 4096..pages).filter(|page| {
        let at = (page * 4096) as usize;
        bytes[at..at + 4096].iter().any(|byte| *byte != 0)
    });
    (start, used.collect())
}

#[test]
fn flipped_bits_are_found_and_never_run() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    filled(&out, 3000, 7);
    pool.add(&out);
    let (_, used) = data_of(&pool);
    assert!(used.len() >= 3000, "{}", used.len());
    used.iter().for_each(|page| pool.flip(page * 4096 + 100));
    let said = pool.err("fsck", &[]);
    assert!(said.contains("do not match their checksums"), "{said}");
    let restore = |policy: &str| {
        finish(tvmm().args([
            "restore",
            "--snapshot",
            text(&out),
            "--policy",
            policy,
            "--pool",
            pool.path(),
            "--verify",
            "off",
            "--run",
            "check",
        ]))
    };
    for (policy, how) in [("eager", "Cannot read guest memory"), ("firecracker-uffd", "guest-physical 0x")] {
        let output = restore(policy);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("does not match its checksum"), "{policy}: {said}");
        assert!(said.contains(how), "{policy}: {said}");
    }
    // Damaged pages are not shared with who comes next, who is whole.
    pool.ok("rm", &["full"]);
    let again = pool.add(&out);
    assert_eq!(again["shared_pages"], 0, "{again}");
    let output = restore("eager");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn what_is_no_pool_is_refused() {
    let dir = scratch();
    let at = text(dir.path());
    let create = |more: &[&str]| run_err(&[&["pool", "create", "--tier", "cxl", "--at", at], more].concat());
    assert!(create(&[]).contains("Say with --size how large"));
    assert!(create(&["--size", "0.005"]).contains("the smallest pool is"));
    assert!(!dir.path().join("pool.tvmm").exists());
    assert!(create(&["--size=-1"]).contains("cannot be"));
    assert!(run_err(&["pool", "ls", at]).contains("There is no pool at"));
    assert!(run_err(&["pool", "ls", "/dev/null"]).contains("no device-DAX"));
    assert!(run_err(&["pool", "ls", "/nonexistent"]).contains("No such file"));
    assert!(run_err(&["pool", "ls", "numa:999"]).contains("There is no pool at"));
    let numa = run_err(&["pool", "create", "--tier", "cxl", "--at", "numa:999", "--size", "1"]);
    assert!(numa.contains("no NUMA node 999"), "{numa}");
    std::fs::write(dir.path().join("pool.tvmm"), vec![7; 64 << 20]).unwrap();
    assert!(run_err(&["pool", "ls", at]).contains("is not a pool"));
    assert!(create(&["--size", "1"]).contains("There is a pool at"));
}

#[test]
fn directory_that_is_not_there_is_made_and_taken_away_again_in_vain() {
    let dir = scratch();
    let at = dir.path().join("a/b");
    let create =
        |at: &Path, more: &[&str]| run(&[&["pool", "create", "--tier", "cxl", "--at", text(at)], more].concat());
    for in_vain in [&["--size=0.005"][..], &["--size=-1"], &["--size=9999999"], &[]] {
        refusal(&create(&at, in_vain));
        assert!(!dir.path().join("a").exists(), "{in_vain:?} left a directory");
    }
    std::fs::create_dir(dir.path().join("a")).unwrap();
    refusal(&create(&at, &["--size=0.005"]));
    assert!(dir.path().join("a").exists() && !at.exists(), "only what was made is taken away");
    assert!(create(&at, &["--size=0.1"]).status.success());
    assert!(run_ok(&["pool", "fsck", text(&at)]).contains("0 damaged"));
    for never in ["/dev/dax99.0", "s3://bucket/prefix"] {
        let said = refusal(&create(Path::new(never), &["--size=0.1"]));
        assert!(said.contains(never) && said.contains("No such file"), "{said}");
        assert!(!Path::new(never).exists());
    }
}

#[test]
fn a_newer_or_cut_pool_is_refused_and_left_alone() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    filled(&out, 1000, 7);
    pool.add(&out);
    pool.flip(VERSION);
    let before = std::fs::read(pool.file()).unwrap();
    let commands: [(&str, &[&str]); 4] = [("ls", &[]), ("fsck", &[]), ("gc", &[]), ("add", &[text(&out)])];
    for (command, more) in commands {
        let said = pool.err(command, more);
        assert!(said.contains("has format 17, this build reads 1"), "{command}: {said}");
    }
    let said = run_err(&["restore", "--snapshot", text(&out), "--pool", pool.path(), "--run", "check"]);
    assert!(said.contains("has format 17"), "{said}");
    assert!(std::fs::read(pool.file()).unwrap() == before);
    pool.flip(VERSION);
    pool.ok("fsck", &[]);
    File::options().write(true).open(pool.file()).unwrap().set_len(60 << 20).unwrap();
    let said = pool.err("ls", &[]);
    assert!(said.contains("it was made with"), "{said}");
}

#[test]
fn a_second_writer_is_refused_and_readers_are_not() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    filled(&out, 1000, 7);
    pool.add(&out);
    let file = File::options().read(true).write(true).open(pool.file()).unwrap();
    assert!(locks::try_lock(&file, WRITER).unwrap());
    for (command, more) in [("gc", vec![]), ("rm", vec!["full"]), ("add", vec![text(&out)])] {
        let said = pool.err(command, &more);
        assert!(said.contains("is being changed by"), "{command}: {said}");
    }
    pool.ok("ls", &[]);
    pool.ok("fsck", &[]);
    pool.restore(&out, "trenv", &[]).call("check");
    drop(file);
    pool.ok("rm", &["full"]);
}

#[test]
fn a_full_pool_refuses_and_keeps_what_it_has() {
    let dir = scratch();
    let pool = Pool::create("0.03");
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let digest = filled(&first, 3000, 7);
    filled(&second, 4000, 8);
    pool.add(&first);
    let before = pool.json("ls", &[]);
    let said = pool.err("add", &[text(&second)]);
    assert!(said.contains("is full") && said.contains("nothing was added"), "{said}");
    assert_eq!(pool.json("ls", &[]), before);
    pool.ok("fsck", &[]);
    assert_eq!(pool.restore(&first, "trenv", &[]).call("check").digest, digest);
    let said = pool.err("add", &[text(&first)]);
    assert!(said.contains("already"), "{said}");
}

#[test]
fn what_a_vm_maps_is_not_freed_until_it_is_gone() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    let digest = filled(&out, 3000, 7);
    pool.add(&out);
    let mut vm: Vm = pool.restore(&out, "trenv", &[]);
    vm.call("hello");
    pool.ok("rm", &["full"]);
    assert!(pool.err("rm", &["full"]).contains("has no snapshot"));
    let gone = run_err(&["restore", "--snapshot", text(&out), "--pool", pool.path(), "--run", "check"]);
    assert!(gone.contains("has no snapshot"), "{gone}");
    let held = pool.json("gc", &[]);
    assert_eq!((&held["held"], &held["pages"]), (&json!(1), &json!(0)), "{held}");
    assert_eq!(vm.call("check").digest, digest);
    // Killed while it maps: its lease ends with it.
    vm.kill();
    let freed = pool.json("gc", &[]);
    assert!(freed["pages"].as_u64().unwrap() >= 3000 && freed["held"] == 0, "{freed}");
    let (_, used) = data_of(&pool);
    assert!(used.len() < 1024, "{} pages were not given back", used.len());
}

#[test]
fn a_forged_catalogue_is_an_error_and_no_crash() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    filled(&out, 500, 7);
    pool.add(&out);
    let file = File::options().read(true).write(true).open(pool.file()).unwrap();
    let mut good = vec![0; 4096 * 2];
    file.read_exact_at(&mut good, 0).unwrap();
    for at in (0..8192).step_by(7) {
        let at = at as u64;
        if good[at as usize..].iter().take(7).all(|byte| *byte == 0) {
            continue;
        }
        file.write_all_at(&[0xff; 7], at).unwrap();
        let output = finish(tvmm().args(["pool", "ls", pool.path()]));
        assert!(matches!(output.status.code(), Some(0 | 1)), "{at}: {output:?}");
        file.write_all_at(&good, 0).unwrap();
    }
}
