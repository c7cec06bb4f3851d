//! Linux guests: the kernel of `make linux-kernel` and the root image of `make linux-rootfs`, in the directory that
//! `TVMM_LINUX_DIR` names. They need a host whose KVM runs stock Linux user space (`docs/linux-guests.md`).

use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::shell::Shell;
use crate::support::{Answer, Vm, run_err, run_ok, scratch, signal, text};

const KERNELS: [&str; 2] = ["vmlinux", "bzImage"];

/// The directory with the kernel and the root image. Without one it prints why the calling test is skipped.
fn built() -> Option<PathBuf> {
    let dir = std::env::var_os("TVMM_LINUX_DIR").map(PathBuf::from);
    if dir.is_none() {
        skip!("linux-image", "TVMM_LINUX_DIR is not set (make linux-kernel linux-rootfs; docs/linux-guests.md)");
    }
    dir
}

/// A machine whose root is the image, read-only.
fn machine(dir: &Path, kernel: &str, vcpus: u32, words: &str) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": dir.join(kernel),
            "boot_args": format!("console=ttyS0 quiet reboot=t panic=-1 {words}"),
        },
        "drives": [{
            "drive_id": "root", "path_on_host": dir.join("rootfs.erofs"), "is_root_device": true, "is_read_only": true,
        }],
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": 256, "track_dirty_pages": true },
    })
}

/// The same with a vsock device at `path`.
fn with_vsock(mut config: Value, path: &Path) -> Value {
    config["vsock"] = json!({ "guest_cid": 3, "uds_path": path });
    config
}

fn write(dir: &Path, config: &Value) -> PathBuf {
    let path = dir.join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

/// The answer among what the console says, a prompt before it perhaps.
fn answer_in(output: &str) -> Answer {
    let line = output.lines().find_map(|line| line.find("ok run-").map(|start| &line[start..]));
    Answer::parse(line.unwrap_or_else(|| panic!("no answer in {output}")))
}

#[test]
fn linux_boots_from_either_image_runs_a_script_and_ends() {
    let Some(built) = built() else { return };
    for (kernel, vcpus) in KERNELS.into_iter().zip([1, 2]) {
        let dir = scratch();
        let script = format!(
            "test \"$(nproc)\" = {vcpus} && grep -q ' / erofs ro' /proc/mounts && touch /tmp/x && ! touch /x && exit 7"
        );
        let words = format!("tvmm.cmd={}", base64(script.as_bytes()));
        let config = write(dir.path(), &machine(&built, kernel, vcpus, &words));
        let output = run_ok(&["--config", text(&config)]);
        assert!(output.contains("guest: up 6.") && output.contains("guest: exit 7"), "{kernel}: {output}");
    }
}

/// The files of a DAX root are read where they lie: the guest's page cache holds next to nothing.
#[test]
fn a_root_in_persistent_memory_is_not_cached_by_the_guest() {
    let Some(built) = built() else { return };
    let mut config = machine(&built, "vmlinux", 1, "rootfstype=erofs rootflags=dax=always");
    config.as_object_mut().unwrap().remove("drives");
    let root = built.join("rootfs.erofs");
    config["pmem"] = json!([{ "id": "root", "path_on_host": root, "root_device": true, "read_only": true }]);
    let mut shell = Shell::boot(&config);
    assert_eq!(shell.ask("python3 -c 'import json; print(6 * 7)'"), "42");
    assert!(shell.ask("cat /proc/mounts").contains("/ erofs ro"));
    let cached = shell.ask_number("awk '$1 == \"Cached:\" { print $2 }' /proc/meminfo");
    assert!(cached < 1024.0, "{cached} KiB");
    assert_eq!(shell.end("poweroff"), "power-off");
}

#[test]
fn a_shell_on_the_console_does_what_is_typed() {
    let Some(built) = built() else { return };
    let mut shell = Shell::boot(&machine(&built, "vmlinux", 1, ""));
    assert_eq!(shell.ask("python3 -c 'print(6 * 7)'"), "42");
    assert_eq!(shell.end("poweroff"), "power-off");
}

#[test]
fn python_functions_answer_before_and_after_a_snapshot() {
    let Some(built) = built() else { return };
    let dir = scratch();
    let mut vm = Vm::boot(&machine(&built, "vmlinux", 2, "tvmm.console=agent"));
    assert_eq!(vm.call("info").number("vcpus"), 2);
    let json = vm.call("json records=100");
    let kept = vm.call("memory mib=16 seed=3");
    assert!(vm.call_raw("nosuch").starts_with("err "));
    assert!(vm.call_raw("matmul n=x").contains("ValueError"));
    let first = dir.path().join("first");
    vm.snapshot(&first, &[]);
    vm.call("memory mib=4 seed=9");
    let diff = dir.path().join("diff");
    vm.snapshot(&diff, &["--diff"]);
    let later = vm.call("memory");
    assert_ne!(later, kept);
    for policy in ["eager", "firecracker", "firecracker-uffd", "trenv"] {
        let mut clone = Vm::restore(&first, policy);
        assert_eq!(clone.call("memory"), kept, "{policy}");
        assert_eq!(clone.call("json records=100"), json, "{policy}");
        assert_eq!(Vm::restore(&diff, policy).call("memory"), later, "{policy}");
    }
}

#[test]
fn clones_of_linux_differ_in_random_numbers_and_metadata_and_agree_on_time() {
    let Some(built) = built() else { return };
    let dir = scratch();
    let mut vm = Vm::boot(&machine(&built, "vmlinux", 1, "tvmm.console=agent"));
    let before: f64 = vm.call("clone").value("uptime").parse().unwrap();
    let out = dir.path().join("snapshot");
    vm.snapshot(&out, &[]);
    let mut seen = std::collections::BTreeSet::from([vm.call("clone").value("random").to_owned()]);
    for number in 0..20 {
        let mut clone = Vm::restore_with(&out, "firecracker", &["--metadata", &format!("name=clone{number}")]);
        let answer = clone.call("clone");
        assert!(seen.insert(answer.value("random").to_owned()), "clone {number} repeats random numbers");
        assert_eq!(answer.value("metadata"), format!("{{\"name\":\"clone{number}\"}}"));
        assert!(answer.value("uptime").parse::<f64>().unwrap() >= before, "the clock went back: {answer:?}");
    }
}

#[test]
fn requests_reach_linux_by_vsock_at_boot_and_at_restore() {
    let Some(built) = built() else { return };
    let dir = scratch();
    let socket = dir.path().join("v.sock");
    let config = with_vsock(machine(&built, "vmlinux", 1, ""), &socket);
    let path = write(dir.path(), &config);
    let port = ["--run-port", "52", "--run-timeout", "250"];
    let ask = |more: &[&str]| answer_in(&run_ok(&[more, &port].concat()));
    let booted = ask(&["--config", text(&path), "--run", "compress kib=64"]);

    let shell = Shell::boot(&config);
    let out = dir.path().join("snapshot");
    shell.vm.snapshot(&out, &[]);
    let other = dir.path().join("other.sock");
    let restored = ["restore", "--snapshot", text(&out), "--vsock", text(&other), "--run", "compress kib=64"];
    assert_eq!(ask(&restored), booted);
    let taken = run_err(&["restore", "--snapshot", text(&out), "--run", "hello", "--run-port", "52"]);
    assert!(taken.contains(text(&socket)), "{taken}");
}

#[test]
fn what_linux_writes_to_a_drive_outlives_snapshot_and_crash() {
    let Some(built) = built() else { return };
    let dir = scratch();
    let disk = dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
    let mut config = machine(&built, "vmlinux", 2, "");
    let drive = json!({
        "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "cache_type": "Writeback",
    });
    config["drives"].as_array_mut().unwrap().push(drive);
    let digest = "echo 3 >/proc/sys/vm/drop_caches; sha256sum </dev/vdb";
    let mut shell = Shell::boot(&config);
    let empty = shell.ask(digest);
    shell.ask("dd if=/dev/urandom of=/dev/vdb bs=64k conv=fsync");
    let full = shell.ask(digest);
    assert_ne!(full, empty);
    let out = dir.path().join("snapshot");
    shell.vm.snapshot(&out, &["--copy-drives"]);
    shell.ask("dd if=/dev/zero of=/dev/vdb bs=64k conv=fsync");
    assert_eq!(shell.ask(digest), empty);
    signal(shell.vm.pid(), Signal::KILL);
    shell.vm.wait();
    let clones = dir.path().join("clones");
    std::fs::create_dir(&clones).unwrap();
    let mut clone = Shell::restore(&out, &["--drive-dir", text(&clones)]);
    assert_eq!(clone.ask(digest), full);
}

/// Programs on the host that send back what the guest sends, behind the vsock device at `path`.
fn echo_programs(path: &Path, port: u32) {
    let listener = UnixListener::bind(format!("{}_{port}", text(path))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut write = &stream;
                let _ = std::io::copy(&mut &stream, &mut write);
                let _ = stream.shutdown(Shutdown::Write);
            });
        }
    });
}

#[test]
fn linux_reaches_programs_on_the_host_by_vsock_before_and_after_a_restore() {
    let Some(built) = built() else { return };
    let dir = scratch();
    let first = dir.path().join("v.sock");
    let second = dir.path().join("w.sock");
    let mut shell = Shell::boot(&with_vsock(machine(&built, "vmlinux", 2, ""), &first));
    let echo = "python3 -c 'import socket,threading; s=socket.socket(40,1); s.connect((2,700)); \
                d=bytes(range(256))*4096; threading.Thread(target=lambda:(s.sendall(d),s.shutdown(1))).start(); \
        print(b\"\".join(iter(lambda:s.recv(65536),b\"\"))==d)'";
    let refused = "python3 -c 'import socket; print(socket.socket(40,1).connect_ex((2,701)))'";
    echo_programs(&first, 700);
    assert_eq!(shell.ask(echo), "True");
    assert_eq!(shell.ask(refused), "104", "ECONNRESET: nobody listens");
    let out = dir.path().join("snapshot");
    shell.vm.snapshot(&out, &[]);
    assert_eq!(shell.ask(echo), "True");
    let mut clone = Shell::restore(&out, &["--vsock", text(&second)]);
    echo_programs(&second, 700);
    assert_eq!(clone.ask(echo), "True");
    assert_eq!(clone.ask(refused), "104");
}

#[test]
fn linux_with_32_processors_uses_them_all_before_and_after_a_restore() {
    let Some(built) = built() else { return };
    let dir = scratch();
    let mut shell = Shell::boot(&machine(&built, "vmlinux", 32, ""));
    // Goes to each processor in turn, and asks the kernel where it is.
    let visited = "python3 -c 'import os; print(len({os.sched_setaffinity(0,{c}) or \
        open(\"/proc/self/stat\").read().split()[38] for c in range(32)}))'";
    assert_eq!(shell.ask(visited), "32");
    let out = dir.path().join("snapshot");
    shell.vm.snapshot(&out, &[]);
    assert_eq!(shell.ask(visited), "32");
    drop(shell);
    let mut clone = Shell::restore(&out, &[]);
    assert_eq!(clone.ask(visited), "32");
    assert_eq!(clone.end("poweroff"), "power-off");
}

#[test]
fn linux_gets_io_errors_from_a_drive_that_is_cut_and_lives() {
    let Some(built) = built() else { return };
    for engine in ["Sync", "Async"] {
        let dir = scratch();
        let disk = dir.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        let mut config = machine(&built, "vmlinux", 1, "");
        let drive = json!({ "drive_id": "disk", "path_on_host": disk, "is_root_device": false, "io_engine": engine });
        config["drives"].as_array_mut().unwrap().push(drive);
        let mut shell = Shell::boot(&config);
        let copy = |from: &str, to: &str, skip: u32| {
            format!(
                "echo 3 >/proc/sys/vm/drop_caches; dd if={from} of={to} bs=1M skip={skip} count=8 conv=fsync \
                 2>/dev/null; echo $?"
            )
        };
        assert_eq!(shell.ask(&copy("/dev/vdb", "/tmp/half", 8)), "0", "{engine}");
        std::fs::File::options().write(true).open(&disk).unwrap().set_len(8 << 20).unwrap();
        assert_eq!(shell.ask(&copy("/dev/vdb", "/tmp/half", 8)), "1", "{engine}");
        assert_ne!(shell.ask("dmesg | grep -c 'I/O error, dev vdb'"), "0", "{engine}");
        assert_eq!(shell.ask(&copy("/dev/vdb", "/tmp/half", 0)), "0", "{engine}: the first half is there");
        assert_eq!(shell.ask(&copy("/dev/zero", "/dev/vdb", 0)), "1", "{engine}: a cut disk is not written to");
        std::fs::File::options().write(true).open(&disk).unwrap().set_len(16 << 20).unwrap();
        assert_eq!(shell.ask(&copy("/dev/zero", "/dev/vdb", 0)), "0", "{engine}: a whole one is");
        assert_eq!(shell.end("poweroff"), "power-off", "{engine}");
    }
}

/// RFC 4648.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = ALPHABET[(word >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}
