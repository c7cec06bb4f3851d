//! Files under a running guest that are cut, or whose disk fails: the VM ends with exit code 3, and says which page of
//! guest memory, which file, which offset, and why.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::pool::{Pool, filled};
use crate::support::slow_file::SlowFile;
use crate::support::{Vm, config, run, scratch, text};

const CUT_TO: u64 = 8192;

/// Takes a snapshot of a guest with memory that it has not touched since; its memory file.
fn snapshot(out: &Path) -> PathBuf {
    filled(out, 5000, 4);
    out.join("memory")
}

fn cut(path: &Path) {
    File::options().write(true).open(path).unwrap().set_len(CUT_TO).unwrap();
}

/// Waits until the VM has ended because of lost memory; what it says, which names `path`.
fn ends_with(vm: &mut Vm, path: &Path) -> String {
    let (status, stderr) = vm.wait();
    assert_eq!(status.code(), Some(3), "{stderr}");
    let stderr = stderr.lines().last().unwrap_or_default().to_string();
    for part in ["tvmm: The guest cannot go on: Cannot read guest memory at guest-physical 0x", text(path), "offset 0x"]
    {
        assert!(stderr.contains(part), "{stderr}");
    }
    stderr
}

#[test]
fn memory_file_that_is_cut_under_a_guest_ends_the_vm_with_page_file_and_offset() {
    let shared: &[&str] = &["--in-place-mapping", "shared"];
    for (policy, more) in [("firecracker", &[][..]), ("trenv", &[]), ("trenv", shared), ("firecracker-uffd", &[])] {
        let dir = scratch();
        let memory = snapshot(&dir.path().join("full"));
        let report = dir.path().join("report.json");
        let args = [more, &["--report", text(&report)]].concat();
        let mut vm = Vm::restore_with(&dir.path().join("full"), policy, &args);
        vm.call("hello");
        cut(&memory);
        vm.send_if_alive(b"run last check\n");
        let said = ends_with(&mut vm, &memory);
        assert!(said.contains("was cut"), "{policy}: {said}");
        let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
        assert_eq!(report["ending"], "memory-lost", "{policy}");
    }
}

#[test]
fn disk_that_fails_under_a_guest_ends_the_vm_with_page_file_and_offset() {
    for policy in ["firecracker", "trenv", "firecracker-uffd"] {
        let dir = scratch();
        let memory = snapshot(&dir.path().join("full"));
        let Some(disk) = SlowFile::over(&memory) else { return };
        let mut vm = Vm::restore_with(&dir.path().join("full"), policy, &["--verify", "sample"]);
        vm.call("hello");
        disk.fail_after(0);
        vm.send_if_alive(b"run last check\n");
        let said = ends_with(&mut vm, &memory);
        assert!(said.contains("error") && !said.contains("was cut"), "{policy}: {said}");
    }
}

#[test]
fn disk_that_fails_before_the_guest_runs_refuses_the_restore() {
    for policy in ["eager", "firecracker", "firecracker-uffd"] {
        let dir = scratch();
        let memory = snapshot(&dir.path().join("full"));
        let Some(disk) = SlowFile::over(&memory) else { return };
        disk.fail_after(0);
        let output = run(&["restore", "--snapshot", text(&dir.path().join("full")), "--policy", policy]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        // 3, if a page that the restore itself touches is the first.
        assert!(matches!(output.status.code(), Some(1 | 3)), "{policy}: {said}");
        let is_told = said.contains("Input/output error") || said.contains("EIO");
        assert!(said.contains(text(&memory)) && is_told, "{policy}: {said}");
    }
}

#[test]
fn device_that_touches_lost_memory_ends_the_vm() {
    let dir = scratch();
    let socket = dir.path().join("vsock");
    let mut config = config(1, 128);
    config["vsock"] = json!({ "guest_cid": 3, "uds_path": socket });
    let mut vm = Vm::boot(&config);
    vm.call("fill pages=1000 seed=2");
    vm.snapshot(&dir.path().join("full"), &[]);
    drop(vm);
    std::fs::remove_file(&socket).unwrap();
    let memory = dir.path().join("full/memory");
    let mut vm = Vm::restore_with(&dir.path().join("full"), "firecracker", &[]);
    vm.call("hello");
    // A guest that still works on after its answer may touch the memory first, and the VM ends before it reads this.
    let mut stream = UnixStream::connect(&socket).unwrap();
    cut(&memory);
    // The guest sleeps; the device looks into its queue for a buffer.
    let _ = stream.write_all(b"CONNECT 1000\n");
    ends_with(&mut vm, &memory);
}

#[test]
fn capture_of_lost_memory_ends_the_vm_and_leaves_no_snapshot() {
    let dir = scratch();
    let memory = snapshot(&dir.path().join("full"));
    let mut vm = Vm::restore_with(&dir.path().join("full"), "firecracker", &[]);
    vm.call("hello");
    vm.pause();
    cut(&memory);
    let second = dir.path().join("second");
    let output = run(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&second)]);
    assert_eq!(output.status.code(), Some(1));
    ends_with(&mut vm, &memory);
    assert!(!second.exists());
}

#[test]
fn pool_that_is_cut_under_a_guest_ends_the_vm() {
    let dir = scratch();
    let pool = Pool::create("0.1");
    let out = dir.path().join("full");
    filled(&out, 3000, 7);
    pool.add(&out);
    let mut vm = pool.restore(&out, "trenv", &[]);
    vm.call("hello");
    cut(&pool.file());
    vm.send_if_alive(b"run last check\n");
    ends_with(&mut vm, pool.dir.path());
}

#[test]
fn pmem_image_that_is_cut_under_a_guest_ends_the_vm() {
    let dir = scratch();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![7; 4 << 20]).unwrap();
    let mut config = config(1, 64);
    config["pmem"] = json!([{ "id": "p0", "path_on_host": image, "read_only": true }]);
    let mut vm = Vm::boot(&config);
    vm.call("hello");
    cut(&image);
    vm.send_if_alive(b"run last pmem\n");
    ends_with(&mut vm, &image);
}
