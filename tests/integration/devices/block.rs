//! Virtio block devices: what the guest writes is on the disk, and stays consistent over snapshots.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::artefact::pages;
use crate::support::{Answer, Vm, config, finish, is_emulated, refusal, run_err, run_ok, scratch, text, tvmm};

const MIB: u64 = 1 << 20;
const ENGINES: [&str; 2] = ["Sync", "Async"];

fn image(dir: &Path, name: &str, len: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

fn drive(id: &str, path: &Path, more: Value) -> Value {
    let mut drive = json!({
        "drive_id": id, "path_on_host": path, "is_root_device": false, "cache_type": "Writeback", "io_engine": "Sync",
    });
    drive.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    drive
}

fn with_drives(drives: &[Value]) -> Value {
    let mut config = config(1, 128);
    config["drives"] = json!(drives);
    config
}

fn one_drive(path: &Path, engine: &str) -> Value {
    with_drives(&[drive("disk", path, json!({ "io_engine": engine }))])
}

/// An answer of `blk` in which nothing went wrong.
fn good(answer: &Answer) {
    for key in ["failed", "unsupported", "bad", "strange"] {
        assert_eq!(answer.number(key), 0, "{key}: {answer:?}");
    }
}

fn blk(vm: &mut Vm, what: &str) -> Answer {
    let answer = vm.call(&format!("blk {what}"));
    good(&answer);
    answer
}

fn kill(mut vm: Vm) {
    crate::support::signal(vm.pid(), rustix::process::Signal::KILL);
    vm.wait();
}

#[test]
fn what_one_guest_writes_another_reads_with_either_engine() {
    let dir = scratch();
    for (engine, other) in [("Sync", "Async"), ("Async", "Sync")] {
        let path = image(dir.path(), engine, 8 * MIB);
        let mut vm = Vm::boot(&one_drive(&path, engine));
        blk(&mut vm, "op=write sectors=16384 seed=7 chunk=64 depth=16 segs=3");
        // One more sector of another seed in the middle, by interrupt.
        blk(&mut vm, "op=write sector=5000 sectors=1 seed=8 irq=1");
        blk(&mut vm, "op=flush");
        kill(vm);
        let mut vm = Vm::boot(&one_drive(&path, other));
        assert_eq!(blk(&mut vm, "op=info").number("capacity"), 16384);
        blk(&mut vm, "op=check sectors=5000 seed=7 chunk=200 depth=8 segs=5 irq=1");
        blk(&mut vm, "op=check sector=5000 sectors=1 seed=8");
        blk(&mut vm, "op=check sector=5001 sectors=11383 seed=7 depth=64 segs=1 chunk=7");
        let wrong = vm.call("blk op=check sectors=16 seed=6");
        assert_eq!(wrong.number("bad"), 16, "the check sees what differs");
    }
}

#[test]
fn drives_are_what_their_config_says() {
    let dir = scratch();
    let paths: Vec<_> = ["a", "b", "c"].map(|name| image(dir.path(), name, MIB + 100)).to_vec();
    let config = with_drives(&[
        drive("first", &paths[0], json!({ "cache_type": "Unsafe" })),
        drive("read-only", &paths[1], json!({ "is_read_only": true })),
        drive("the-root", &paths[2], json!({ "is_root_device": true })),
    ]);
    let mut vm = Vm::boot(&config);
    let ids = [0, 1, 2].map(|nth| vm.call(&format!("blk nth={nth} op=id")).value("id").to_owned());
    assert_eq!(ids, ["the-root", "first", "read-only"], "the root device is the first, as in Firecracker");
    let mut info = |nth, key| vm.call(&format!("blk nth={nth} op=info")).number(key);
    assert_eq!([0, 1, 2].map(|nth| info(nth, "flush")), [1, 0, 1]);
    assert_eq!([0, 1, 2].map(|nth| info(nth, "ro")), [0, 0, 1]);
    assert_eq!(info(0, "capacity"), 2048, "what is no whole sector is left out");
    assert_eq!(vm.call("blk nth=2 op=write").number("failed"), 1);
    assert_eq!(vm.call("blk nth=0 op=read sector=2048").number("failed"), 1, "beyond the end");
    for (id, op) in [(0, "discard"), (0, "zero")] {
        vm.call(&format!("blk nth={id} op=write sectors=64 seed=3 chunk=64"));
        let done = vm.call(&format!("blk nth={id} op={op} sector=8 sectors=8"));
        let expected = if done.number("unsupported") == 0 { 8 } else { 0 };
        assert_eq!(vm.call(&format!("blk nth={id} op=check sectors=64 seed=3")).number("bad"), expected);
    }
    assert_eq!(std::fs::metadata(&paths[1]).unwrap().len(), MIB + 100);
}

#[test]
fn snapshot_in_the_middle_of_requests_loses_and_doubles_nothing() {
    let dir = scratch();
    // Several times as long as the snapshots take, on the fastest of hosts.
    let rounds = if is_emulated() { 60 } else { 1500 };
    for engine in ENGINES {
        let path = image(dir.path(), engine, 8 * MIB);
        let mut vm = Vm::boot(&one_drive(&path, engine));
        let id = vm.begin(&format!("blk op=stress sectors=8192 chunk=32 depth=32 rounds={rounds} segs=2"));
        // A chain of diffs under load: each is restored in a process of its own and goes on.
        for generation in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            let out = dir.path().join(format!("{engine}-{generation}"));
            vm.pause();
            let mut args = vec!["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out)];
            args.extend(if generation == 0 { [].as_slice() } else { &["--diff"] });
            run_ok(&args);
            let done = vm.try_line(|line| line.starts_with("ok "), std::time::Duration::ZERO);
            assert_eq!(done, None, "the requests ended before snapshot {generation}");
            kill(vm);
            vm = Vm::restore(&out, ["firecracker", "eager", "firecracker-uffd"][generation]);
        }
        let line = vm.finish(&id);
        assert!(line.starts_with("ok "), "{line}");
        let answer = Answer::parse(&line);
        good(&answer);
        assert_eq!(answer.number("requests"), rounds * 2 * 256);
        blk(&mut vm, &format!("op=check sectors=8192 seed={} chunk=64 depth=8", rounds + 1));
    }
}

#[test]
fn diff_has_the_pages_that_only_the_device_wrote() {
    let dir = scratch();
    let path = image(dir.path(), "disk", 8 * MIB);
    let mut vm = Vm::boot(&one_drive(&path, "Async"));
    blk(&mut vm, "op=write sectors=16384 chunk=512 depth=8");
    vm.snapshot(&dir.path().join("base"), &[]);
    // Every byte of the buffer comes from the disk; the guest only looks.
    let digest = blk(&mut vm, "op=read sectors=4096 chunk=2048 depth=2").digest;
    vm.snapshot(&dir.path().join("diff"), &["--diff"]);
    let (held, _) = pages(&dir.path().join("diff"));
    assert!(held >= 512, "{held} pages in the diff, the device wrote 512");
    vm.pause();
    kill(vm);
    let mut vm = Vm::restore(&dir.path().join("diff"), "firecracker");
    assert_eq!(blk(&mut vm, "op=read sectors=4096 chunk=2048 depth=2").digest, digest);
}

#[test]
fn image_that_is_cut_gives_the_guest_errors_and_the_machine_lives() {
    let dir = scratch();
    for engine in ENGINES {
        let path = image(dir.path(), engine, MIB);
        let mut vm = Vm::boot(&one_drive(&path, engine));
        blk(&mut vm, "op=write sectors=2048 seed=5 chunk=64");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(MIB / 2).unwrap();
        assert_eq!(vm.call("blk op=read sectors=2048 chunk=64").number("failed"), 16);
        assert_eq!(vm.call("blk op=write sectors=2048 chunk=64").number("failed"), 32);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), MIB / 2, "a write does not make it longer again");
        blk(&mut vm, "op=check sectors=1024 seed=5 chunk=64");
        vm.call("hello");
    }
}

#[test]
fn patch_changes_the_image_and_the_limits_of_a_running_machine() {
    let dir = scratch();
    let path = image(dir.path(), "a", MIB);
    let larger = image(dir.path(), "b", 2 * MIB);
    let metrics = dir.path().join("metrics");
    let mut config = one_drive(&path, "Async");
    config["metrics"] = json!({ "metrics_path": metrics });
    let mut vm = Vm::boot(&config);
    assert_eq!(blk(&mut vm, "op=info").number("capacity"), 2048);
    let missing = json!({ "drive_id": "disk", "path_on_host": dir.path().join("missing") });
    assert!(vm.api_fault("PATCH", "/drives/disk", Some(missing)).contains("Cannot open"));
    let fault = vm.api_fault("PATCH", "/drives/other", Some(json!({ "drive_id": "other" })));
    assert_eq!(fault, "There is no drive `other`.");
    vm.api_ok("PATCH", "/drives/disk", Some(json!({ "drive_id": "disk", "path_on_host": larger })));
    let info = blk(&mut vm, "op=info");
    assert_eq!((info.number("capacity"), info.number("changed")), (4096, 1));
    blk(&mut vm, "op=write sector=4000 sectors=96 seed=2");
    assert_ne!(std::fs::read(&larger).unwrap()[4000 * 512..][..512], [0; 512]);
    let limits = json!({ "ops": { "size": 4, "refill_time": 20 } });
    let patch = json!({ "drive_id": "disk", "rate_limiter": limits });
    vm.api_ok("PATCH", "/drives/disk", Some(patch));
    blk(&mut vm, "op=check sector=4000 sectors=96 seed=2 chunk=8");
    let known = &vm.api_ok("GET", "/vm/config", None)["drives"][0];
    assert_eq!((&known["path_on_host"], &known["rate_limiter"]), (&json!(larger), &limits));
    vm.api_ok("PUT", "/actions", Some(json!({ "action_type": "FlushMetrics" })));
    let written = std::fs::read_to_string(&metrics).unwrap();
    let last: Value = serde_json::from_str(written.lines().last().unwrap()).unwrap();
    let counted = serde_json::to_string(&last).unwrap();
    assert!(!counted.contains("\"rate_limiter_throttled_events\":0"), "{counted}");
    // The limits outlive a snapshot.
    vm.snapshot(&dir.path().join("s"), &[]);
    vm.pause();
    kill(vm);
    let vm = Vm::restore(&dir.path().join("s"), "eager");
    vm.wait_for_socket();
    assert_eq!(vm.api_ok("GET", "/vm/config", None)["drives"][0]["rate_limiter"], limits);
}

#[test]
fn images_that_cannot_be_drives_are_refused_before_the_guest_boots() {
    let dir = scratch();
    let path = image(dir.path(), "disk", MIB);
    let vm = Vm::boot(&one_drive(&path, "Sync"));
    let refused = |path: &Path, more: Value| {
        let file = dir.path().join("vm.json");
        std::fs::write(&file, with_drives(&[drive("disk", path, more)]).to_string()).unwrap();
        refusal(&finish(tvmm().args(["--config", text(&file)])))
    };
    for read_only in [false, true] {
        let message = refused(&path, json!({ "is_read_only": read_only }));
        assert!(message.contains("another process has locked it"), "{message}");
    }
    drop(vm);
    let message = refused(&dir.path().join("missing"), json!({}));
    assert!(message.contains("Cannot open") && message.contains("missing for drive `disk`"), "{message}");
    assert!(refused(&image(dir.path(), "short", 511), json!({})).contains("less than one sector"));
    assert!(refused(dir.path(), json!({ "is_read_only": true })).contains("neither a file nor a block device"));
}

#[test]
fn changed_disk_is_refused_at_restore_unless_it_is_named() {
    let dir = scratch();
    let path = image(dir.path(), "disk", MIB);
    let mut vm = Vm::boot(&one_drive(&path, "Sync"));
    blk(&mut vm, "op=write sectors=2048 seed=5 chunk=64");
    let out = dir.path().join("s");
    vm.snapshot(&out, &[]);
    let function = "blk op=check sectors=64 seed=5";
    let command =
        |more: &[&str]| finish(tvmm().args(["restore", "--snapshot", text(&out), "--run", function]).args(more));
    let refused = |more: &[&str]| refusal(&command(more));
    let restored = |more: &[&str]| {
        let output = command(more);
        assert!(output.status.success(), "{output:?}");
        good(&Answer::parse(&String::from_utf8_lossy(&output.stdout)));
    };
    assert!(refused(&[]).contains("another process has locked it"));
    let copy = dir.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    restored(&["--drive", &format!("disk={}", text(&copy))]);
    kill(vm);
    restored(&[]);
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[1], MIB - 1).unwrap();
    let message = refused(&[]);
    assert!(message.contains("was written to after the snapshot was taken"), "{message}");
    restored(&["--drive", &format!("disk={}", text(&path))]);
    let larger = image(dir.path(), "larger", 2 * MIB);
    let message = refused(&["--drive", &format!("disk={}", text(&larger))]);
    assert!(message.contains("the guest knows a disk of 1048576 bytes, this one has 2097152"), "{message}");
    let copy = format!("disk={}", text(&copy));
    let message = refused(&["--drive", &copy, "--drive", "other=/x"]);
    assert!(message.contains("no drive `other` to override; it has: disk"), "{message}");
    let message = refused(&["--drive-dir", text(dir.path())]);
    assert!(message.contains("no copy of a drive"), "{message}");
}

#[test]
fn clones_of_a_snapshot_with_copies_have_disks_of_their_own() {
    let dir = scratch();
    let path = image(dir.path(), "disk", 4 * MIB);
    let shared = image(dir.path(), "shared", MIB);
    let read_only = drive("shared", &shared, json!({ "is_read_only": true }));
    let mut vm = Vm::boot(&with_drives(&[drive("disk", &path, json!({})), read_only]));
    blk(&mut vm, "op=write sectors=8192 seed=5 chunk=64 depth=4");
    let base = dir.path().join("base");
    let tip = dir.path().join("tip");
    let merged = dir.path().join("merged");
    vm.snapshot(&base, &[]);
    blk(&mut vm, "op=write sector=8 sectors=8 seed=6");
    vm.snapshot(&tip, &["--diff", "--copy-drives"]);
    // The machine runs on and changes its disk; the snapshot does not care.
    blk(&mut vm, "op=write sectors=8192 seed=9 chunk=64 depth=4");
    run_ok(&["snapshot", "merge", text(&tip), "--out", text(&merged)]);
    let message = run_err(&["restore", "--snapshot", text(&tip), "--run", "hello"]);
    assert!(message.contains("has copies of its drives (disk)") && message.contains("--drive-dir"), "{message}");
    let mut clones = Vec::new();
    for (index, snapshot) in [&tip, &merged, &tip].into_iter().enumerate() {
        let own = dir.path().join(format!("clone{index}"));
        std::fs::create_dir(&own).unwrap();
        let mut clone = Vm::restore_with(snapshot, "firecracker", &["--drive-dir", text(&own)]);
        blk(&mut clone, "op=check sectors=8 seed=5");
        blk(&mut clone, "op=check sector=8 sectors=8 seed=6");
        blk(&mut clone, "op=check sector=16 sectors=8176 seed=5 chunk=64");
        blk(&mut clone, &format!("op=write sectors=8192 chunk=64 seed={}", 20 + index));
        clones.push((clone, own));
    }
    for (index, (clone, own)) in clones.iter_mut().enumerate() {
        blk(clone, &format!("op=check sectors=8192 chunk=64 seed={}", 20 + index));
        assert_eq!(clone.api_ok("GET", "/vm/config", None)["drives"][0]["path_on_host"], json!(own.join("disk.img")));
    }
    // A name that is taken is not overwritten, and a failed restore leaves nothing behind.
    let args = ["restore", "--snapshot", text(&tip), "--run", "hello", "--drive-dir"];
    let message = run_err(&[&args[..], &[text(&clones[0].1)]].concat());
    assert!(message.contains("Cannot copy a drive to") || message.contains("Cannot create"), "{message}");
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let more = [text(&empty), "--drive", "nobody=/x"];
    assert!(run_err(&[&args[..], &more].concat()).contains("no drive `nobody`"));
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0);
    // Firecracker's two files have no place for copies.
    vm.pause();
    let files = json!({
        "snapshot_path": dir.path().join("state"), "mem_file_path": dir.path().join("mem"),
        "tvmm": { "copy_drives": true },
    });
    assert!(vm.api_fault("PUT", "/snapshot/create", Some(files)).contains("need a snapshot directory"));
    vm.resume();
    blk(&mut vm, "op=check sectors=8192 seed=9 chunk=64");
}

#[test]
fn load_through_the_api_takes_drive_overrides() {
    let dir = scratch();
    let path = image(dir.path(), "disk", MIB);
    let mut vm = Vm::boot(&one_drive(&path, "Async"));
    blk(&mut vm, "op=write sectors=2048 seed=5 chunk=64");
    let out = dir.path().join("s");
    vm.snapshot(&out, &[]);
    let copy = dir.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    let mut clone = Vm::wait_for_api();
    let overrides = json!([{ "drive_id": "disk", "path_on_host": copy }]);
    let body = json!({ "snapshot_path": out, "resume_vm": true, "tvmm": { "drive_overrides": overrides } });
    clone.api_ok("PUT", "/snapshot/load", Some(body));
    blk(&mut clone, "op=write sectors=2048 seed=6 chunk=64");
    blk(&mut vm, "op=check sectors=2048 seed=5 chunk=64");
    blk(&mut clone, "op=check sectors=2048 seed=6 chunk=64");
}
