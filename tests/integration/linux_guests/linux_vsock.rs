//! The vsock device and a stock Linux kernel, with the agent listening in it. `TVMM_LINUX_GUEST` names a directory with
//! `vmlinuz-VERSION` and `initrd-VERSION.cpio`, as the testbed makes it (`tests/testbed/`).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::linux_guests::agent::agent;
use crate::skip::skip;
use crate::support::{Answer, TIMEOUT, Vm, answer_to_run, run, scratch, text};

const PORT: u32 = 52;

/// An archive that the kernel unpacks over the initrd before it (cpio, "newc").
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(&mut self, name: &str, mode: u32, data: &[u8]) {
        let numbers = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.0.extend(b"070701");
        numbers.iter().for_each(|number| self.0.extend(format!("{number:08x}").bytes()));
        self.0.extend(name.bytes().chain([0]));
        self.align();
        self.0.extend(data);
        self.align();
    }

    fn align(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.0
    }
}

const EXECUTABLE: u32 = 0o100_755;

/// The initrd `base`, and a script that runs the agent.
fn initrd(base: &Path, dir: &Path) -> PathBuf {
    let mut archive = Archive::default();
    archive.add("agent", EXECUTABLE, &std::fs::read(agent()).unwrap());
    archive.add("functions", 0o040_755, &[]);
    archive.add(
        "functions/sum",
        EXECUTABLE,
        b"#!/bin/sh\nyes ${1#word=} | head -c 1000000 | sha256sum >/run/s\n\
        echo sum=$(cut -c1-16 /run/s)\n",
    );
    archive.add("cmd", EXECUTABLE, b"echo guest: agent\n/agent --functions /functions\n");
    let path = dir.join("initrd");
    let base = std::fs::read(base).unwrap();
    let padding = vec![0; base.len().next_multiple_of(512) - base.len()];
    std::fs::write(&path, [base, padding, archive.finish()].concat()).unwrap();
    path
}

/// Sends one request on a connection of its own; None: no process listens on the guest's port.
fn ask(path: &Path, line: &str) -> Option<String> {
    let mut stream = UnixStream::connect(path).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).ok()?;
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next()?.ok().filter(|line| line.starts_with("OK "))?;
    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
    Some(lines.next().expect("an answer").unwrap())
}

fn ask_until_there(path: &Path, line: &str) -> String {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(answer) = ask(path, line) {
            return answer;
        }
        assert!(Instant::now() < deadline, "nobody listens in the guest");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn agent_in_a_stock_kernel_answers_over_vsock_before_and_after_restores() {
    let Some(guests) = std::env::var_os("TVMM_LINUX_GUEST").map(PathBuf::from) else {
        skip!("linux", "TVMM_LINUX_GUEST does not name a directory with Linux kernels");
        return;
    };
    let dir = scratch();
    let path = dir.path().join("v");
    let out = dir.path().join("snapshot");
    let other = dir.path().join("w");
    let config = json!({
        "boot-source": {
            "kernel_image_path": guests.join("vmlinuz-6.12"),
            "initrd_path": initrd(&guests.join("initrd-6.12.cpio"), dir.path()),
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 256, "track_dirty_pages": true },
        "vsock": { "guest_cid": 3, "uds_path": path },
    });
    let file = dir.path().join("vm.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let mut vm = Vm::spawn(scratch(), &["--config", text(&file)]);
    vm.wait_line(|line| line.starts_with("guest: agent"));
    assert!(ask_until_there(&path, "run a hello").starts_with("ok a a0ac0ed9675fab36 "));
    let sum = Answer::parse(&ask(&path, "run b sum word=hello").unwrap());
    // A connection that is open when the machine is captured.
    let mut open = UnixStream::connect(&path).unwrap();
    open.write_all(format!("CONNECT {PORT}\nrun c hello\n").as_bytes()).unwrap();
    let mut lines = BufReader::new(open.try_clone().unwrap()).lines().map(Result::unwrap);
    assert!(lines.nth(1).unwrap().starts_with("ok c "));
    vm.snapshot(&out, &[]);
    open.write_all(b"run d hello\n").unwrap();
    assert!(lines.next().unwrap().starts_with("ok d "), "the original goes on");
    for (round, policy) in ["eager", "firecracker", "firecracker-uffd"].into_iter().enumerate() {
        let request = ["--run", "sum word=hello", "--run-port", "52", "--policy", policy];
        let restore = ["restore", "--snapshot", text(&out), "--vsock", text(&other)];
        let output = run(&[&restore[..], &request].concat());
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(answer_to_run(&said).value("sum"), sum.value("sum"), "{policy}, round {round}");
    }
    // A second generation, and several requests one after the other.
    let clone = Vm::restore_with(&out, "firecracker", &["--vsock", text(&other), "--track-dirty-pages"]);
    for _ in 0..5 {
        assert!(ask_until_there(&other, "run e hello").starts_with("ok e "));
    }
    let again = dir.path().join("again");
    clone.snapshot(&again, &["--diff"]);
    clone.terminate();
    let _second = Vm::restore_with(&again, "firecracker", &["--vsock", text(&other)]);
    assert!(ask_until_there(&other, "run f hello").starts_with("ok f "));
}
