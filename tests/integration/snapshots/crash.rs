//! A VMM that is killed while it writes a snapshot, and disks that are full: what is under a snapshot's name is whole,
//! or nothing is there.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::skip::skip;
use crate::support::artefact::inspect;
use crate::support::{TIMEOUT, Vm, config, run_err, run_ok, scratch, signal, text};

/// A full snapshot whose restored copies are killed while they are snapshotted.
struct Scene {
    dir: TempDir,
    /// The digest of the parent's memory.
    digest: String,
}

impl Scene {
    fn new() -> Scene {
        let dir = scratch();
        let mut vm = Vm::boot(&config(1, 64));
        vm.call("fill pages=6000 seed=1");
        let digest = vm.call("check").digest;
        vm.snapshot(&dir.path().join("parent"), &[]);
        Scene { dir, digest }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A paused machine restored from the parent and changed, and the digest of its memory. The parent is whole: all of
    /// its memory is verified by `eager`, and the guest agrees.
    fn changed(&self, seed: u64) -> (Vm, String) {
        let mut vm = Vm::restore(&self.path("parent"), "eager");
        assert_eq!(vm.call("check").digest, self.digest, "the parent was damaged");
        vm.call(&format!("touch pages=3000 write=100 seed={}", seed + 1));
        let digest = vm.call("check").digest;
        vm.pause();
        (vm, digest)
    }

    /// The time that a snapshot with this request takes here and now.
    fn duration(&self, request: &Value) -> Duration {
        let (vm, _) = self.changed(1000);
        let start = Instant::now();
        vm.api_ok("PUT", "/snapshot/create", Some(request.clone()));
        start.elapsed()
    }

    /// Asks for a snapshot and kills the VMM `after` that; without it, as soon as the snapshot has its name.
    fn kill(&self, mut vm: Vm, request: &Value, after: Option<Duration>) {
        let body = request.to_string();
        let head = "PUT /snapshot/create HTTP/1.1\r\nHost: x\r\nContent-Length:";
        let mut client = UnixStream::connect(vm.socket()).unwrap();
        client.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        let named = Path::new(request["snapshot_path"].as_str().unwrap());
        match after {
            Some(after) => std::thread::sleep(after),
            None => {
                let deadline = Instant::now() + TIMEOUT;
                while !named.exists() {
                    assert!(Instant::now() < deadline, "the snapshot is never finished");
                }
            }
        }
        signal(vm.pid(), Signal::KILL);
        vm.wait();
    }

    /// Work directories left by writers that were killed.
    fn partials(&self) -> usize {
        let names = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_str().unwrap().ends_with(".partial")).count()
    }

    /// Kills a VMM at `rounds` moments spread over a snapshot to the directory `out`.
    fn kill_at_many_moments(&self, rounds: u32, kind: &str) {
        let out = self.path("out");
        let request = json!({ "snapshot_path": out, "snapshot_type": kind });
        let duration = self.duration(&request);
        fs::remove_dir_all(&out).unwrap();
        let mut finished = 0;
        let mut abandoned = 0;
        for round in 0..rounds {
            let (vm, digest) = self.changed(u64::from(round));
            self.kill(vm, &request, moment(duration, round, rounds));
            abandoned += self.partials().min(1);
            assert!(self.partials() <= 1, "what the killed writer before this one left was not swept");
            if out.exists() {
                finished += 1;
                run_ok(&["inspect", text(&out)]);
                assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest, "round {round}");
                fs::remove_dir_all(&out).unwrap();
            }
        }
        println!(
            "{kind}: {duration:?} each; of {rounds} killed, {finished} finished, {abandoned} left a work directory"
        );
        assert!(abandoned > 0 && finished > 0, "kills came only before or only after the end of a snapshot");
        let (vm, digest) = self.changed(2000);
        vm.api_ok("PUT", "/snapshot/create", Some(request));
        assert_eq!(self.partials(), 0, "abandoned work directories are swept by the next snapshot of the name");
        assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest);
        run_ok(&["inspect", text(&self.path("parent"))]);
    }
}

/// The moment to kill in a round: spread over a snapshot's duration and a bit more, and then right at its end.
fn moment(duration: Duration, round: u32, rounds: u32) -> Option<Duration> {
    let is_last = round + 2 >= rounds;
    (!is_last).then(|| duration.mul_f64(1.2 * f64::from(round) / f64::from(rounds)))
}

#[test]
fn full_snapshot_of_a_killed_vmm_is_whole_or_not_there() {
    Scene::new().kill_at_many_moments(20, "Full");
}

#[test]
fn diff_snapshot_of_a_killed_vmm_is_whole_or_not_there() {
    Scene::new().kill_at_many_moments(20, "Diff");
}

#[test]
fn two_file_snapshot_of_a_killed_vmm_is_the_old_one_or_the_new_one_or_not_there() {
    const ROUNDS: u32 = 12;
    let scene = Scene::new();
    let state = scene.path("out.state");
    let memory = scene.path("out.mem");
    let request = json!({ "snapshot_path": state, "mem_file_path": memory });
    let duration = scene.duration(&request);
    let mut old = None;
    for round in 0..ROUNDS {
        let (vm, new) = scene.changed(u64::from(round));
        if round + 2 >= ROUNDS {
            let _ = fs::remove_file(&state);
        }
        scene.kill(vm, &request, moment(duration, round, ROUNDS));
        if !state.exists() {
            old = None;
            continue;
        }
        run_ok(&["inspect", text(&state), "--mem-file", text(&memory)]);
        let mut restored = Vm::restore_with(&state, "eager", &["--mem-file", text(&memory)]);
        let found = restored.call("check").digest;
        assert!(found == new || round == 0 || Some(&found) == old.as_ref(), "round {round} left another's memory");
        old = Some(found);
    }
    let (vm, digest) = scene.changed(2000);
    vm.api_ok("PUT", "/snapshot/create", Some(request));
    assert_eq!(scene.partials(), 0);
    let mut restored = Vm::restore_with(&state, "eager", &["--mem-file", text(&memory)]);
    assert_eq!(restored.call("check").digest, digest);
}

#[test]
fn work_directory_of_a_living_writer_is_not_swept() {
    let scene = Scene::new();
    let layout = tvmm::snapshot::MemoryLayout::from_gpa_ranges(&[(0, 4096)]).unwrap();
    let target = tvmm::snapshot::Location::Dir(scene.path("out"));
    let kind = tvmm::snapshot::SnapshotKind::Full;
    let writer = tvmm::snapshot::SnapshotWriter::create(target, layout, kind, None).unwrap();
    let (vm, _) = scene.changed(1);
    vm.api_ok("PUT", "/snapshot/create", Some(json!({ "snapshot_path": scene.path("out") })));
    assert_eq!(scene.partials(), 1);
    drop(writer);
    assert_eq!(scene.partials(), 0);
}

#[test]
fn sigterm_during_a_snapshot_waits_for_it() {
    let scene = Scene::new();
    let (mut vm, digest) = scene.changed(1);
    let out = scene.path("out");
    let body = json!({ "snapshot_path": out }).to_string();
    let head = "PUT /snapshot/create HTTP/1.1\r\nHost: x\r\nContent-Length:";
    let mut client = UnixStream::connect(vm.socket()).unwrap();
    client.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while scene.partials() == 0 && !out.exists() {
        assert!(Instant::now() < deadline);
    }
    signal(vm.pid(), Signal::TERM);
    assert!(vm.wait().0.success());
    assert_eq!(Vm::restore(&out, "eager").call("check").digest, digest);
}

/// A small file system of its own, unmounted when dropped.
pub struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// `None`, with the reason printed, where this user may not mount.
    pub fn new(mib: u32) -> Option<SmallDisk> {
        let dir = scratch();
        let size = std::ffi::CString::new(format!("size={mib}m")).unwrap();
        match rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), Some(size.as_c_str())) {
            Ok(()) => Some(SmallDisk { dir }),
            Err(error) => {
                skip!("mount", "a tmpfs cannot be mounted here: {error}");
                None
            }
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(self.dir.path()).unwrap().count() == 0
    }

    /// Fills it to the last byte.
    pub fn fill(&self) {
        let mut file = fs::File::create(self.path("filler")).unwrap();
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

fn snapshot_refused(vm: &Vm, out: &Path, more: &[&str]) -> String {
    let mut args = vec!["snapshot", "--api-sock", text(vm.socket()), "--out", text(out), "--resume"];
    args.extend(more);
    run_err(&args)
}

#[test]
fn disk_full_while_capturing_leaves_nothing_and_loses_no_page() {
    let Some(small) = SmallDisk::new(4) else { return };
    let good = scratch();
    let mut vm = Vm::boot(&config(1, 96));
    vm.call("fill pages=4000 seed=1");
    vm.snapshot(&good.path().join("full"), &[]);
    for (round, kind) in [&["--diff"][..], &[], &["--diff"]].into_iter().enumerate() {
        vm.call(&format!("touch pages=2000 write=100 seed={}", round + 1));
        let digest = vm.call("check").digest;
        let said = snapshot_refused(&vm, &small.path("out"), kind);
        assert!(said.contains("No space left on device") && said.contains(text(small.dir.path())), "{said}");
        assert!(small.is_empty(), "something was left on the full disk");
        assert_eq!(vm.state(), "Running");
        assert_eq!(vm.call("check").digest, digest);
    }
    let digest = vm.call("check").digest;
    let diff = good.path().join("diff");
    vm.snapshot(&diff, &["--diff"]);
    for policy in ["eager", "firecracker"] {
        assert_eq!(Vm::restore(&diff, policy).call("check").digest, digest, "{policy}");
    }
}

/// The memory fits, on another disk; what is written after the guest runs on again does not.
#[test]
fn disk_full_while_sealing_leaves_nothing_and_loses_no_page() {
    let Some(small) = SmallDisk::new(1) else { return };
    small.fill();
    let good = scratch();
    let mut vm = Vm::boot(&config(1, 96));
    vm.call("fill pages=4000 seed=1");
    vm.snapshot(&good.path().join("full"), &[]);
    vm.call("touch pages=1000 write=100 seed=7");
    vm.pause();
    let body = json!({
        "snapshot_path": small.path("state"),
        "mem_file_path": good.path().join("memory"),
        "snapshot_type": "Diff",
        "tvmm": { "resume": true },
    });
    let said = vm.api_fault("PUT", "/snapshot/create", Some(body));
    assert!(said.contains("No space left on device"), "{said}");
    assert_eq!(fs::read_dir(small.dir.path()).unwrap().count(), 1, "only the filler");
    assert_eq!(fs::read_dir(good.path()).unwrap().count(), 1, "only the full snapshot");
    assert_eq!(vm.state(), "Running", "it was to run on, and does");
    vm.call("touch pages=10 write=100 seed=8");
    let digest = vm.call("check").digest;
    let diff = good.path().join("diff");
    vm.snapshot(&diff, &["--diff"]);
    assert_eq!(Vm::restore(&diff, "eager").call("check").digest, digest);
}

#[test]
fn reading_a_snapshot_back_takes_no_room_on_a_tmpfs() {
    let Some(small) = SmallDisk::new(64) else { return };
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=3000 seed=1");
    let out = small.path("out");
    vm.snapshot(&out, &["--verify"]);
    let memory = fs::metadata(out.join("memory")).unwrap();
    let held = inspect(&out)["memory"]["pages_held"].as_u64().unwrap();
    assert_eq!(memory.blocks() * 512 / 4096, held, "the file has its pages and no others");
}

#[test]
fn disk_full_while_merging_leaves_nothing() {
    let Some(small) = SmallDisk::new(4) else { return };
    let scene = Scene::new();
    let said = run_err(&["snapshot", "merge", text(&scene.path("parent")), "--out", text(&small.path("out"))]);
    assert!(said.contains("No space left on device"), "{said}");
    assert!(small.is_empty());
}

#[test]
fn snapshot_into_a_directory_that_is_not_there_is_refused_and_the_machine_runs_on() {
    let mut vm = Vm::boot(&config(1, 64));
    let said = snapshot_refused(&vm, Path::new("/nonexistent/out"), &[]);
    assert!(said.contains("/nonexistent") && said.contains("No such file"), "{said}");
    assert_eq!(vm.state(), "Running");
    vm.call("hello");
}
