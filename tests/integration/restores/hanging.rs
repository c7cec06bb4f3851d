//! A snapshot on a file system that hangs: the VM is ended with the reason, never frozen.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::slow_file::SlowFile;
use crate::support::{Vm, config, finish, run, run_ok, scratch, text, tvmm, without_progress};

/// A snapshot of a guest that has filled some memory, its memory file on a file system that can hang.
struct Scene {
    snapshot: PathBuf,
    slow: SlowFile,
    dir: TempDir,
}

fn scene() -> Option<Scene> {
    let dir = scratch();
    let snapshot = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=5000 seed=4");
    vm.snapshot(&snapshot, &[]);
    let slow = SlowFile::over(&snapshot.join("memory"))?;
    Some(Scene { snapshot, slow, dir })
}

const QUICK: [&str; 2] = ["--fault-timeout", "1"];

impl Scene {
    fn memory(&self) -> String {
        text(&self.snapshot.join("memory")).to_string()
    }

    /// A guest that runs, and whose memory does not come from now on.
    fn running(&self, policy: &str, more: &[&str]) -> Vm {
        let mut vm = Vm::restore_with(&self.snapshot, policy, more);
        vm.call("hello");
        self.slow.hang();
        vm
    }
}

/// Waits for tvmm to end; what it says, in one line, with exit code 1.
fn ends_with(vm: &mut Vm) -> String {
    let (status, stderr) = vm.wait();
    let stderr = without_progress(&stderr);
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
}

#[test]
fn source_that_works_serves_as_any_file() {
    let Some(scene) = scene() else { return };
    let digest = Vm::restore(&scene.snapshot, "firecracker-uffd").call("check").digest;
    for policy in ["eager", "firecracker", "trenv"] {
        assert_eq!(Vm::restore_with(&scene.snapshot, policy, &QUICK).call("check").digest, digest, "{policy}");
    }
}

#[test]
fn hanging_source_of_the_fault_service_ends_the_vm_naming_page_file_and_limit() {
    let Some(scene) = scene() else { return };
    let report = scene.dir.path().join("report.json");
    let mut vm = scene.running("firecracker-uffd", &["--fault-timeout", "1", "--report", text(&report)]);
    vm.begin("check");
    let said = ends_with(&mut vm);
    for part in ["for the page at guest-physical 0x", &scene.memory(), "offset 0x", "has taken 1 s (--fault-timeout)"] {
        assert!(said.contains(part), "{said}");
    }
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert!(
        report["fault_ins"]["served"]["read"].as_u64() > Some(0),
        "what happened until then is reported: {report:#}"
    );
}

#[test]
fn hanging_source_of_a_mapping_ends_the_vm_naming_file_and_limit() {
    let Some(scene) = scene() else { return };
    let mut vm = scene.running("firecracker", &QUICK);
    vm.begin("check");
    let said = ends_with(&mut vm);
    for part in ["vCPU 0 has waited 1 s (--fault-timeout)", &scene.memory()] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn source_that_hangs_before_the_guest_runs_ends_the_restore() {
    let Some(scene) = scene() else { return };
    scene.slow.hang();
    for policy in ["eager", "firecracker", "firecracker-uffd"] {
        let output = run(&["restore", "--snapshot", text(&scene.snapshot), "--policy", policy, "--fault-timeout", "1"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&scene.memory()) && said.contains("1 s (--fault-timeout)"), "{policy}: {said}");
    }
}

#[test]
fn hanging_source_of_the_background_thread_ends_the_vm() {
    let Some(scene) = scene() else { return };
    let profile = scene.dir.path().join("p.profile");
    run_ok(&["profile", "record", "--snapshot", text(&scene.snapshot), "--run", "hello", "--out", text(&profile)]);
    // The cold pages are brought in while the guest runs.
    let args = ["--profile", text(&profile), "--fault-timeout", "1", "--paused"];
    let mut vm = Vm::restore_with(&scene.snapshot, "aquifer", &args);
    // The restore itself reads samples.
    vm.wait_for_state("Paused");
    scene.slow.hang();
    vm.resume();
    vm.begin("check");
    let said = ends_with(&mut vm);
    assert!(said.contains(&scene.memory()) && said.contains("1 s (--fault-timeout)"), "{said}");
}

#[test]
fn vm_whose_memory_does_not_come_can_be_ended_by_a_signal() {
    for policy in ["firecracker-uffd", "firecracker"] {
        let Some(scene) = scene() else { return };
        let mut vm = scene.running(policy, &[]);
        vm.begin("check");
        std::thread::sleep(Duration::from_millis(300));
        let asked = Instant::now();
        let (status, stderr) = vm.terminate();
        assert_eq!(status.code(), Some(1), "{policy}: {stderr}");
        assert!(stderr.contains("did not stop in time"), "{policy}: {stderr}");
        assert!(asked.elapsed() < Duration::from_secs(25), "it ends long before the fault time-out");
    }
}

#[test]
fn snapshot_of_a_vm_whose_memory_does_not_come_fails() {
    for policy in ["firecracker-uffd", "firecracker"] {
        let Some(scene) = scene() else { return };
        let mut vm = scene.running(policy, &QUICK);
        let mut command = tvmm();
        command.args(["snapshot", "--api-sock", text(vm.socket()), "--out", text(&scene.dir.path().join("second"))]);
        let output = finish(&mut command);
        assert_eq!(output.status.code(), Some(1), "{policy}: {}", String::from_utf8_lossy(&output.stderr));
        let said = ends_with(&mut vm);
        assert!(said.contains(&scene.memory()), "{policy}: {said}");
    }
}

#[test]
fn fault_timeout_that_cannot_be_is_refused() {
    for seconds in ["0", "-1", "86401", "soon"] {
        let output = run(&["restore", "--snapshot", "/nowhere", "--fault-timeout", seconds]);
        assert_eq!(output.status.code(), Some(2), "{seconds}");
    }
}
