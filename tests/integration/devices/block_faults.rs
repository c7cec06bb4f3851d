//! Drives on what is not a healthy file: block devices, limits, and hosts that forbid io_uring.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::{Answer, Vm, answer_to_run, config, finish, refusal, scratch, text, tvmm};

const MIB: u64 = 1 << 20;

fn with_drive(path: &Path, engine: &str) -> Value {
    let mut config = config(1, 128);
    config["drives"] = json!([{
        "drive_id": "disk", "path_on_host": path, "is_root_device": false, "cache_type": "Writeback",
        "io_engine": engine,
    }]);
    config
}

fn image(dir: &Path, len: u64) -> PathBuf {
    let path = dir.join("disk");
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

/// `blk` with a result in which nothing went wrong.
fn good(vm: &mut Vm, what: &str) -> Answer {
    let answer = vm.call(&format!("blk {what}"));
    for key in ["failed", "unsupported", "bad", "strange"] {
        assert_eq!(answer.number(key), 0, "{what}: {key}: {answer:?}");
    }
    answer
}

/// A loop device of the host.
struct Loop(String);

impl Loop {
    /// None, with the reason said, where there are none.
    fn over(image: &Path) -> Option<Loop> {
        match Command::new("losetup").args(["--find", "--show"]).arg(image).output() {
            Ok(done) if done.status.success() => Some(Loop(String::from_utf8(done.stdout).unwrap().trim().to_owned())),
            other => {
                skip!("loop", "no loop device can be had: {other:?}");
                None
            }
        }
    }

    /// Writes back what the kernel keeps of it, and forgets it.
    fn flush(&self) {
        let flushed = Command::new("blockdev").args(["--flushbufs", &self.0]).status();
        assert!(flushed.is_ok_and(|status| status.success()), "blockdev --flushbufs {}", self.0);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // If it fails the device stays: nothing that a test could do about it.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_device_gives_space_back_and_its_errors_reach_the_guest() {
    let dir = scratch();
    for engine in ["Sync", "Async"] {
        let path = image(dir.path(), 8 * MIB);
        let Some(device) = Loop::over(&path) else { return };
        let held = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let mut vm = Vm::boot(&with_drive(Path::new(&device.0), engine));
        assert_eq!(good(&mut vm, "op=info").number("capacity"), 16384);
        good(&mut vm, "op=write sectors=16384 seed=7 chunk=64 depth=8");
        good(&mut vm, "op=flush");
        assert!(held() >= 8 * MIB, "{engine}: {}", held());
        for (op, sector) in [("discard", 0), ("zero", 4096)] {
            let before = held();
            good(&mut vm, &format!("op={op} sector={sector} sectors=4096"));
            let bad = vm.call(&format!("blk op=check sector={sector} sectors=4096 seed=7 chunk=64")).number("bad");
            assert_eq!(bad, 4096, "{engine}: {op}");
            good(&mut vm, "op=flush");
            assert!(op == "zero" || held() <= before - MIB, "{engine}: {before}, then {}", held());
        }
        good(&mut vm, "op=check sector=8192 sectors=8192 seed=7 chunk=64");
        // The disk loses its second half: reading there is an I/O error of the device.
        device.flush();
        File::options().write(true).open(&path).unwrap().set_len(4 * MIB).unwrap();
        device.flush();
        assert_eq!(vm.call("blk op=read sector=8192 sectors=8192 chunk=64").number("failed"), 128, "{engine}");
        good(&mut vm, "op=read sectors=8000 chunk=64");
        vm.call("hello");
    }
}

#[test]
fn limit_on_the_length_of_files_gives_the_guest_errors_and_ends_nobody() {
    let dir = scratch();
    for engine in ["Sync", "Async"] {
        let path = image(dir.path(), 2 * MIB);
        let file = dir.path().join("vm.json");
        std::fs::write(&file, with_drive(&path, engine).to_string()).unwrap();
        let mut limited = Command::new("prlimit");
        limited.arg(format!("--fsize={MIB}")).arg(tvmm().get_program());
        limited.args(["--config", text(&file), "--run", "blk op=write sectors=4096 chunk=64"]);
        let output = finish(&mut limited);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(answer_to_run(&said).number("failed"), 32, "{engine}: {said}");
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn host_that_forbids_io_uring_is_told_of_the_other_engine() {
    let dir = scratch();
    let path = image(dir.path(), MIB);
    for (engine, refused) in [("Async", true), ("Sync", false)] {
        let file = dir.path().join("vm.json");
        std::fs::write(&file, with_drive(&path, engine).to_string()).unwrap();
        let mut command = tvmm();
        command.args(["--config", text(&file), "--run", "blk op=write sectors=8"]);
        // SAFETY: between fork and exec only two system calls are made, with memory of the child's own.
        unsafe { command.pre_exec(forbid_io_uring) };
        let output = finish(&mut command);
        if refused {
            let said = refusal(&output);
            assert!(
                said.contains("Drive `disk` cannot have io_engine Async") && said.contains("use io_engine Sync"),
                "{said}"
            );
            assert!(said.contains("Operation not permitted"), "{said}");
        } else {
            assert!(output.status.success(), "{output:?}");
        }
    }
}

/// As container runtimes do: io_uring_setup(2) answers EPERM.
fn forbid_io_uring() -> std::io::Result<()> {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let end = libc::BPF_RET;
    let mut filter = [
        step(load, 0, 0, 0),
        step(equal, 0, 1, libc::SYS_io_uring_setup as u32),
        step(end, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(end, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions are locals that live until the calls return.
    let result = unsafe {
        match libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) {
            0 => libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program),
            failed => failed,
        }
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
