//! Rewinds, demotions and live snapshots when something fails or comes between: disks that are full, that fail or that
//! hang, several requests at once.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use rustix::mount::UnmountFlags;
use serde_json::{Value, json};

use super::rewind::{image, with_drive};
use crate::skip::skip;
use crate::snapshots::crash::SmallDisk;
use crate::snapshots::live::{check_order, marched};
use crate::support::artefact::content;
use crate::support::pool::filled;
use crate::support::service::wait_until;
use crate::support::slow_file::SlowFile;
use crate::support::{Random, Vm, config, http, rounds, run_ok, scratch, text, without_progress};

fn live(vm: &Vm, out: &Path) -> (u16, Value) {
    vm.api("PUT", "/snapshot/create", Some(json!({ "snapshot_path": out, "tvmm": { "live": true } })))
}

#[test]
fn a_live_snapshot_to_a_full_disk_leaves_nothing_and_the_guest_that_writes_all_the_time_runs_on() {
    const PAGES: usize = 3000;
    let dir = scratch();
    let mut vm = Vm::boot(&config(2, 128));
    vm.call(&format!("fill pages={PAGES} seed=1"));
    vm.wait_for_socket();
    vm.begin(&format!("march pages={PAGES} ms=600000"));
    let good = dir.path().join("good");
    let marched_to = || {
        let _ = std::fs::remove_dir_all(&good);
        let (status, answer) = live(&vm, &good);
        assert_eq!(status, 200, "{answer}");
        check_order(&marched(&good, PAGES))
    };
    wait_until("the guest has written all pages", || marched_to() > PAGES as u64);
    let mut last = 0;
    let mut refused = 0;
    // The first pass does not fit, or a later one, or what is written after the pause, or nothing of it fails.
    for mib in [1, 9, 12, 13, 14, 200] {
        let Some(small) = SmallDisk::new(mib) else { return };
        let out = small.path("out");
        let (status, answer) = live(&vm, &out);
        assert_eq!(vm.state(), "Running", "{mib} MiB: {answer}");
        if status == 200 {
            println!("{mib} MiB: {}", answer["live"]);
            last = check_order(&marched(&out, PAGES)).max(last);
        } else {
            let said = answer["fault_message"].as_str().unwrap_or_default();
            assert!(said.contains("No space left on device"), "{mib} MiB: {status} {answer}");
            assert_eq!(std::fs::read_dir(out.parent().unwrap()).unwrap().count(), 0, "{mib} MiB: something is left");
            refused += 1;
        }
        assert!(mib > 1 || status != 200, "12 MiB do not fit into one");
        assert!(mib < 200 || status == 200, "{answer}");
    }
    println!("{refused} live snapshots refused by full disks");
    // The guest marches on, and no refused snapshot has lost a page of a later one.
    wait_until("the guest marches on", || marched_to() > last);
}

#[test]
fn a_diff_after_a_live_snapshot_that_a_full_disk_refused_has_every_page() {
    let dir = scratch();
    let base = dir.path().join("base");
    filled(&base, 3000, 1);
    for more in [&["--track-dirty-pages"][..], &[]] {
        let mut vm = Vm::restore_with(&base, "firecracker", more);
        vm.call("touch pages=2000 write=100 seed=5");
        let Some(small) = SmallDisk::new(2) else { return };
        let body = json!({ "snapshot_path": small.path("out"), "snapshot_type": "Diff", "tvmm": { "live": true } });
        assert!(vm.api_fault("PUT", "/snapshot/create", Some(body)).contains("No space left on device"));
        let digest = vm.call("check").digest;
        let diff = dir.path().join("diff");
        let full = dir.path().join("full");
        run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&diff), "--diff", "--live"]);
        vm.snapshot(&full, &[]);
        assert_eq!(content(&diff), content(&full), "{more:?}");
        assert_eq!(Vm::restore(&diff, "eager").call("check").digest, digest, "{more:?}");
        [diff, full].iter().for_each(|path| std::fs::remove_dir_all(path).unwrap());
    }
}

/// Takes what can be taken of a file out of the page cache: all but what a process has mapped.
fn uncache(path: &Path) {
    fadvise(File::open(path).unwrap(), 0, None, Advice::DontNeed).unwrap();
}

/// Puts an empty request to a VM that may end before it answers.
fn ask_in_vain(socket: &Path, path: &str) {
    let head = format!("PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}");
    crate::support::exchange(socket, head.as_bytes());
}

#[test]
fn a_rewind_whose_disk_fails_ends_the_vm_with_the_reason() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    let memory = snapshot.join("memory");
    for policy in ["firecracker", "eager", "firecracker-uffd"] {
        let Some(slow) = SlowFile::over(&memory) else { return };
        let mut vm = Vm::restore_with(&snapshot, policy, &["--verify", "off", "--track-dirty-pages"]);
        vm.call("touch pages=2500 write=100 seed=1");
        slow.fail_after(0);
        uncache(&memory);
        let (status, answer) = vm.api("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        assert_eq!(status, 500, "{policy}: {answer}");
        assert!(answer.to_string().contains("Input/output error"), "{policy}: {answer}");
        let (exit, stderr) = vm.wait();
        let stderr = without_progress(&stderr);
        assert!(
            !exit.success() && stderr.contains("cannot rewind") && !stderr.contains("panicked"),
            "{policy}: {stderr}"
        );
        assert!(stderr.contains(text(&memory)), "{policy}: {stderr}");
        drop(slow);
    }
}

#[test]
fn a_demotion_whose_disk_fails_is_refused_and_the_vm_runs_on() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 3000, 1);
    let memory = snapshot.join("memory");
    let Some(slow) = SlowFile::over(&memory) else { return };
    let mut vm = Vm::restore_with(&snapshot, "eager", &["--verify", "off"]);
    assert_eq!(vm.call("check").digest, digest);
    slow.fail_after(0);
    uncache(&memory);
    for _ in 0..2 {
        let fault = vm.api_fault("PUT", "/tvmm/demote", Some(json!({})));
        assert!(fault.contains("Input/output error") && fault.contains(text(&memory)), "{fault}");
        assert_eq!((vm.state().as_str(), &vm.call("check").digest), ("Running", &digest));
    }
}

#[test]
fn a_demotion_whose_disk_hangs_ends_the_vm_with_the_reason() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    let memory = snapshot.join("memory");
    let Some(slow) = SlowFile::over(&memory) else { return };
    let mut vm = Vm::restore_with(&snapshot, "eager", &["--fault-timeout", "1", "--verify", "off"]);
    vm.call("check");
    slow.hang();
    uncache(&memory);
    let socket = vm.socket().to_path_buf();
    let asked = std::thread::spawn(move || ask_in_vain(&socket, "/tvmm/demote"));
    let (exit, stderr) = vm.wait();
    for part in ["The demotion has waited 1 s (--fault-timeout)", text(&memory)] {
        assert!(!exit.success() && stderr.contains(part), "{exit:?} {stderr}");
    }
    asked.join().unwrap();
}

#[test]
fn a_rewind_without_room_for_its_drives_is_refused_and_the_vm_runs_on() {
    let Some(small) = SmallDisk::new(3) else { return };
    let dir = scratch();
    let image = image(dir.path());
    let mut vm = Vm::boot(&with_drive(&image, false));
    vm.call("fill pages=500 seed=1");
    vm.call("blk op=write sectors=64 seed=1 chunk=64");
    let digest = vm.call("check").digest;
    let snapshot = dir.path().join("snapshot");
    vm.snapshot(&snapshot, &["--copy-drives"]);
    drop(vm);
    let drives = small.path("drives");
    std::fs::create_dir(&drives).unwrap();
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &["--drive-dir", text(&drives)]);
    vm.call("blk op=write sectors=64 seed=2 chunk=64");
    vm.call("fill pages=700 seed=2");
    let changed = vm.call("check").digest;
    small.fill();
    let said = vm.api_fault("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
    assert!(said.starts_with("Cannot rewind the VM: its drives") && said.contains("No space left"), "{said}");
    assert_eq!((vm.state().as_str(), &vm.call("check").digest), ("Running", &changed));
    assert_eq!(vm.call("blk op=check sectors=64 seed=2 chunk=64").number("bad"), 0);
    assert_eq!(std::fs::read_dir(&drives).unwrap().count(), 1, "a part of a copy is left");
    std::fs::remove_file(small.path("filler")).unwrap();
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
    assert_eq!(vm.call("check").digest, digest);
    assert_eq!(vm.call("blk op=check sectors=64 seed=1 chunk=64").number("bad"), 0);
    assert_eq!(std::fs::read_dir(&drives).unwrap().count(), 1);
}

#[test]
fn two_rewinds_at_once_both_lead_to_the_snapshot() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 2000, 1);
    let mut vm = Vm::restore_with(&snapshot, "firecracker", &[]);
    for round in 0..rounds(10) {
        vm.call(&format!("touch pages=1500 write=100 seed={round}"));
        let socket = vm.socket().to_path_buf();
        let ask = move || http(&socket, "PUT", "/tvmm/rewind", r#"{"verify":true}"#);
        let others = [std::thread::spawn(ask.clone()), std::thread::spawn(ask.clone())];
        let statuses = others.map(|other| other.join().unwrap()).map(|(status, _)| status);
        assert_eq!(statuses, [200, 200]);
        assert_eq!(vm.call("check").digest, digest);
    }
    assert_eq!(vm.api_ok("GET", "/tvmm/report", None)["restore"]["rewinds"], 2 * rounds(10));
}

#[test]
fn a_rewind_in_a_snapshot_is_refused_or_comes_before_or_after_it() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 3000, 1);
    let mut random = Random(17);
    let mut vm = Vm::restore(&snapshot, "firecracker");
    let mut refused = 0;
    let mut took = Duration::ZERO;
    for round in 0..rounds(20) {
        vm.call(&format!("touch pages=2000 write=100 seed={round}"));
        let changed = vm.call("check").digest;
        vm.pause();
        let out = dir.path().join("out");
        let kind = if random.below(2) == 0 { "Full" } else { "Diff" };
        let body = json!({ "snapshot_path": out, "snapshot_type": kind, "tvmm": { "resume": true } }).to_string();
        let socket = vm.socket().to_path_buf();
        let start = Instant::now();
        let asked = std::thread::spawn(move || (http(&socket, "PUT", "/snapshot/create", &body), start.elapsed()));
        std::thread::sleep(took.mul_f64(1.3 * random.below(100) as f64 / 100.0));
        let (status, answer) = vm.api("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        if status != 200 {
            assert!(status == 400 && answer.to_string().contains("seal"), "{status} {answer}");
            refused += 1;
        }
        let ((taken, said), now) = asked.join().unwrap();
        took = took.max(now);
        assert_eq!(taken, 200, "{kind}: {said}");
        let saved = Vm::restore(&out, "eager").call("check").digest;
        assert!(saved == changed || saved == digest && status == 200, "{kind}: neither before nor after the rewind");
        let now = vm.call("check").digest;
        assert_eq!(now, if status == 200 { digest.clone() } else { changed }, "{kind}: {answer}");
        // The next diff builds on neither.
        vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
        std::fs::remove_dir_all(&out).unwrap();
    }
    println!("{refused} rewinds refused while a snapshot was sealed");
}

#[test]
fn a_rewind_whose_disk_hangs_ends_the_vm_with_the_reason() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 3000, 1);
    let memory = snapshot.join("memory");
    for policy in ["firecracker", "firecracker-uffd"] {
        let Some(slow) = SlowFile::over(&memory) else { return };
        let args = ["--fault-timeout", "1", "--verify", "off", "--track-dirty-pages"];
        let mut vm = Vm::restore_with(&snapshot, policy, &args);
        vm.call("touch pages=2500 write=100 seed=1");
        slow.hang();
        uncache(&memory);
        let socket = vm.socket().to_path_buf();
        let asked = std::thread::spawn(move || ask_in_vain(&socket, "/tvmm/rewind"));
        let (exit, stderr) = vm.wait();
        for part in ["The rewind has waited 1 s (--fault-timeout)", text(&memory)] {
            assert!(!exit.success() && stderr.contains(part), "{policy}: {exit:?} {stderr}");
        }
        asked.join().unwrap();
        drop(slow);
    }
}

#[test]
fn a_repurposing_whose_disk_hangs_ends_the_process_with_the_reason() {
    let dir = scratch();
    let one = dir.path().join("one");
    let two = dir.path().join("two");
    filled(&one, 300, 1);
    filled(&two, 3000, 2);
    let memory = two.join("memory");
    let Some(slow) = SlowFile::over(&memory) else { return };
    let mut vm = Vm::restore_with(&one, "firecracker", &["--fault-timeout", "1"]);
    vm.call("hello");
    slow.hang();
    let body = json!({ "snapshot_path": two, "resume_vm": true, "tvmm": { "policy": "eager" } }).to_string();
    let socket = vm.socket().to_path_buf();
    let asked = std::thread::spawn(move || {
        let head = "PUT /tvmm/repurpose HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length:";
        crate::support::exchange(&socket, format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes())
    });
    let (exit, stderr) = vm.wait();
    for part in ["1 s (--fault-timeout)", text(&memory)] {
        assert!(!exit.success() && stderr.contains(part), "{exit:?} {stderr}");
    }
    asked.join().unwrap();
}

/// A file system of its own in a file, whose writes can be made to hang.
struct FrozenDisk(std::path::PathBuf);

impl FrozenDisk {
    /// `None`, with the reason printed, where there are no tools for it or this user may not mount.
    fn new(dir: &Path) -> Option<FrozenDisk> {
        let image = dir.join("disk.img");
        let at = dir.join("disk");
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        for (program, args) in [
            ("fsfreeze", vec!["--version"]),
            ("mkfs.ext4", vec!["-q", "-F", text(&image)]),
            ("mount", vec!["-o", "loop", text(&image), text(&at)]),
        ] {
            match Command::new(program).args(args).output() {
                Ok(done) if done.status.success() => {}
                other => {
                    skip!("loop", "a file system cannot be made, mounted and frozen ({program}): {other:?}");
                    return None;
                }
            }
        }
        Some(FrozenDisk(at))
    }

    /// Lets writes hang from now on.
    fn freeze(&self) {
        assert!(Command::new("fsfreeze").arg("--freeze").arg(&self.0).status().unwrap().success());
    }

    fn thaw(&self) -> bool {
        let thawed = Command::new("fsfreeze").arg("--unfreeze").arg(&self.0).output();
        thawed.is_ok_and(|done| done.status.success())
    }
}

impl Drop for FrozenDisk {
    fn drop(&mut self) {
        // A test that fails may leave it frozen.
        self.thaw();
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Returns whether a snapshot of `pages` pages is being written below `dir`: some are there, and many are missing.
fn is_being_written(dir: &Path, pages: u64) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    let memory = entries.flatten().map(|entry| entry.path().join("memory"));
    memory
        .filter_map(|path| path.metadata().ok())
        .any(|memory| memory.blocks() > 0 && memory.blocks() / 8 < pages / 4 * 3)
}

#[test]
fn a_vm_answers_while_the_disk_of_its_live_snapshot_hangs() {
    const PAGES: u64 = 40_000;
    let dir = scratch();
    let Some(disk) = FrozenDisk::new(dir.path()) else { return };
    let mut vm = Vm::boot(&config(1, 256));
    vm.call(&format!("fill pages={PAGES} seed=1"));
    let digest = vm.call("check").digest;
    vm.wait_for_socket();
    // A snapshot that is written before the disk hangs proves nothing.
    for attempt in 0..10 {
        let out = disk.0.join(format!("out-{attempt}"));
        let body = json!({ "snapshot_path": out, "tvmm": { "live": true } }).to_string();
        let socket = vm.socket().to_path_buf();
        let asked = std::thread::spawn(move || http(&socket, "PUT", "/snapshot/create", &body));
        wait_until("the memory is being written", || asked.is_finished() || is_being_written(&disk.0, PAGES));
        disk.freeze();
        let hangs = is_being_written(&disk.0, PAGES) && !asked.is_finished();
        for _ in 0..3 {
            assert_eq!(vm.call("check").digest, digest);
            assert_eq!(vm.state(), "Running");
        }
        let hangs = hangs && !asked.is_finished();
        assert!(disk.thaw());
        let (status, answer) = asked.join().unwrap();
        assert_eq!(status, 200, "{answer}");
        if hangs {
            assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest);
            return;
        }
        std::fs::remove_dir_all(&out).unwrap();
    }
    panic!("each of ten snapshots was written before the disk hung");
}
