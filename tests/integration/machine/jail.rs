//! A jailed VM does its work, keeps nothing of its host but what it was given, and cannot get more.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::devices::net::{GUEST_IP, echo, udp, with_tap};
use crate::devices::vsock::{ask, connect, with_vsock};
use crate::skip::skip;
use crate::support::cgroup::ControlGroup;
use crate::support::network::with_network;
use crate::support::pool::{Pool, filled};
use crate::support::{Vm, answer_to_run, config, finish, refusal, run_err, run_ok, scratch, text, tvmm};

/// Names the part of a jail with all layers that this host lacks; the test is skipped then.
fn lacks() -> Option<String> {
    // SAFETY: with this flag, no pointer and no length, the call touches no memory.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0_usize, 0_usize, 1_u32) };
    if version < 6 {
        return Some(format!("Landlock has version {version}"));
    }
    let unshare = finish(Command::new("unshare").args(["-m", "-n", "-i", "-u", "true"]));
    (!unshare.status.success()).then(|| "namespaces cannot be made here".to_owned())
}

macro_rules! need_jail {
    () => {
        if let Some(why) = lacks() {
            skip!("jail", "{why}");
            return;
        }
    };
}

/// Boots a jailed VM that may write below `out`.
fn boot_jailed(config: &Value, out: &Path, more: &[&str]) -> Vm {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    fs::write(&path, config.to_string()).unwrap();
    let kept = format!("{}:rw", out.display());
    let mut args = vec!["--config", text(&path), "--jail", "--jail-path", &kept];
    args.extend(more);
    let mut vm = Vm::spawn(dir, &args);
    vm.wait_line(|line| line.starts_with("ready "));
    vm
}

fn report(vm: &Vm) -> Value {
    vm.api_ok("GET", "/tvmm/report", None)["jail"].clone()
}

#[test]
fn a_jailed_vm_saves_itself_and_is_restored_in_a_jail_by_every_policy() {
    need_jail!();
    let dir = scratch();
    let full = dir.path().join("full");
    let diff = dir.path().join("diff");
    let mut vm = boot_jailed(&config(2, 64), dir.path(), &[]);
    vm.call("fill pages=2000 seed=1");
    vm.snapshot(&full, &[]);
    vm.call("fill pages=900 seed=2");
    let digest = vm.call("check").digest;
    vm.snapshot(&diff, &["--diff"]);
    let live = dir.path().join("live");
    run_ok(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&live), "--live"]);
    drop(vm);
    for policy in ["firecracker", "eager", "firecracker-uffd", "catalyzer", "trenv"] {
        for layers in ["--jail", "--jail=namespaces", "--jail=landlock"] {
            let mut vm = Vm::restore_with(&diff, policy, &[layers]);
            assert_eq!(vm.call("check").digest, digest, "{policy} {layers}");
            let jail = report(&vm);
            assert_eq!(jail["capabilities"], 0, "{policy} {layers}: {jail}");
            assert_eq!(jail["landlock_abi"].is_null(), layers == "--jail=namespaces", "{jail}");
            assert_eq!(jail["namespaces"].as_array().unwrap().is_empty(), layers == "--jail=landlock", "{jail}");
        }
    }
    assert_eq!(Vm::restore_with(&live, "eager", &["--jail"]).call("check").digest, digest, "saved while it ran");
}

#[test]
fn a_jailed_vm_is_rewound_demoted_and_saved_as_a_diff() {
    need_jail!();
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let kept = dir.path().join("kept");
    fs::create_dir(&kept).unwrap();
    let digest = filled(&snapshot, 2000, 1);
    let write = format!("{}:rw", kept.display());
    let mut vm = Vm::restore_with(&snapshot, "firecracker-uffd", &["--jail", "--jail-path", &write]);
    assert_eq!(vm.call("check").digest, digest);
    vm.call("fill pages=500 seed=9");
    let changed = vm.call("check").digest;
    let diff = kept.join("diff");
    vm.snapshot(&diff, &["--diff"]);
    vm.api_ok("PUT", "/tvmm/rewind", Some(json!({ "verify": true })));
    assert_eq!(vm.call("check").digest, digest);
    vm.api_ok("PUT", "/tvmm/demote", Some(json!({ "to": "spilled", "spill_dir": kept })));
    assert_eq!(vm.call("check").digest, digest);
    drop(vm);
    let mut vm = Vm::restore_with(&diff, "eager", &["--jail"]);
    assert_eq!(vm.call("check").digest, changed, "the parent of the diff was let in too");
}

#[test]
fn pools_work_in_a_jail_and_cannot_be_written_from_it() {
    need_jail!();
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 2000, 3);
    let pool = Pool::create("1");
    pool.add(&snapshot);
    let mut vm = Vm::restore_with(&snapshot, "trenv", &["--pool", pool.path(), "--jail"]);
    assert_eq!(vm.call("check").digest, digest);
    let jail = report(&vm);
    let entry = jail["paths"].as_array().unwrap().iter().find(|entry| entry["path"] == pool.path());
    assert_eq!(entry.expect("the pool is in the jail")["use"], "read", "{jail}");
}

#[test]
fn files_outside_are_refused_with_the_option_that_lets_them_in() {
    need_jail!();
    let dir = scratch();
    let other = scratch();
    let vm = boot_jailed(&config(1, 64), dir.path(), &[]);
    vm.pause();
    let outside = other.path().join("snapshot");
    let create = |path: &Path| Some(json!({ "snapshot_path": path }));
    let said = vm.api_fault("PUT", "/snapshot/create", create(&outside));
    assert!(said.contains(&format!("--jail-path {}:rw", outside.display())), "{said}");
    let climbing = dir.path().join("..").join(other.path().file_name().unwrap()).join("x");
    assert!(vm.api_fault("PUT", "/snapshot/create", create(&climbing)).contains("--jail-path"));
    vm.api_ok("PUT", "/snapshot/create", create(&dir.path().join("inside")));
    assert!(!outside.exists() && dir.path().join("inside/manifest.json").exists());
    let fork = json!({ "count": 1, "out_sock": dir.path().join("c{n}.sock") });
    let said = vm.api_fault("PUT", "/tvmm/fork", Some(fork));
    assert!(said.contains("jailed") && said.contains("without --jail"), "{said}");
}

#[test]
fn a_vm_that_waits_for_the_api_is_jailed_before_its_first_request() {
    need_jail!();
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 500, 4);
    let mut vm = Vm::spawn(scratch(), &["--jail", "--jail-path", text(&snapshot)]);
    vm.wait_for_socket();
    let load = |path: &Path| Some(json!({ "snapshot_path": path, "resume_vm": true }));
    let said = vm.api_fault("PUT", "/snapshot/load", load(&dir.path().join("other")));
    assert!(said.contains("--jail-path"), "{said}");
    vm.api_ok("PUT", "/snapshot/load", load(&snapshot));
    assert_eq!(vm.call("check").digest, digest);
}

/// Every thread: no capabilities, no new privileges, other namespaces than this process; nothing to see in its root.
#[test]
fn every_thread_of_a_jailed_vm_is_in_the_jail() {
    need_jail!();
    let dir = scratch();
    let vm = boot_jailed(&config(2, 64), dir.path(), &[]);
    let of = |what: &str| format!("/proc/{}/{what}", vm.pid());
    let tasks: Vec<_> = fs::read_dir(of("task")).unwrap().map(|task| task.unwrap().path()).collect();
    assert!(tasks.len() >= 4, "main, API and two vCPUs: {tasks:?}");
    for task in &tasks {
        let status = fs::read_to_string(task.join("status")).unwrap();
        for line in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(status.contains(&format!("{line}:\t0000000000000000")), "{line}: {status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        for name in ["mnt", "net", "ipc", "uts"] {
            let theirs = fs::read_link(task.join("ns").join(name)).unwrap();
            assert_ne!(theirs, fs::read_link(format!("/proc/self/ns/{name}")).unwrap(), "{name}");
        }
    }
    let mut names: Vec<String> =
        fs::read_dir(of("root")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let first = |path: &Path| path.components().nth(1).unwrap().as_os_str().to_str().unwrap().to_owned();
    let cwd = std::env::current_dir().unwrap();
    let known = [first(&cwd), first(dir.path()), first(vm.socket()), "proc".to_owned(), "sys".to_owned()];
    names.retain(|name| !known.contains(name));
    assert!(names.is_empty(), "the root has {names:?}");
    assert!(!Path::new(&of("root/proc/1")).exists() && Path::new(&of("root/proc/self/maps")).exists());
    let limits = fs::read_to_string(of("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    // A process that cannot be dumped has a root-owned /proc, whatever its user.
    assert_eq!(fs::metadata(of("mem")).unwrap().uid(), 0);
}

#[test]
fn a_jailed_vm_runs_as_the_user_that_it_is_given() {
    need_jail!();
    if !rustix::process::geteuid().is_root() {
        skip!("root", "only root can become another user");
        return;
    }
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    let digest = filled(&snapshot, 800, 5);
    let own = dir.path().join("own");
    fs::create_dir(&own).unwrap();
    let give = |path: &Path| chown(path, Some(54321), Some(54321)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    [dir.path(), &snapshot, &own].into_iter().for_each(give);
    fs::read_dir(&snapshot).unwrap().for_each(|entry| give(&entry.unwrap().path()));
    let write = format!("{}:rw", own.display());
    for policy in ["firecracker", "firecracker-uffd"] {
        let home = scratch();
        give(home.path());
        let args = ["restore", "--snapshot", text(&snapshot), "--policy", policy];
        let jail = ["--jail", "--jail-uid", "54321", "--jail-path", &write];
        let mut vm = Vm::spawn(home, &[&args[..], &jail[..]].concat());
        assert_eq!(vm.call("check").digest, digest);
        let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
        assert!(status.contains("Uid:\t54321\t54321\t54321\t54321\n"), "{status}");
        assert!(status.contains("Gid:\t54321\t54321\t54321\t54321\n") && status.contains("Groups:\t \n"), "{status}");
        let out = own.join(policy);
        vm.snapshot(&out, &["--diff"]);
        assert_eq!(fs::metadata(&out).unwrap().uid(), 54321);
    }
}

/// Without privileges a user namespace gives the power to make the others.
#[test]
fn a_user_without_privileges_can_jail_a_vm() {
    need_jail!();
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 800, 6);
    let user = |command: &mut Command| {
        command.uid(54322).gid(54322);
    };
    let mut probe = Command::new("unshare");
    user(probe.args(["-U", "-m", "-n", "true"]));
    let mut kvm = Command::new("test");
    user(kvm.args(["-w", "/dev/kvm"]));
    if !rustix::process::geteuid().is_root() || !finish(&mut probe).status.success() {
        skip!("userns", "users may not make namespaces here");
        return;
    }
    if !finish(&mut kvm).status.success() {
        skip!("userns", "other users may not open /dev/kvm here");
        return;
    }
    let give = |path: &Path| chown(path, Some(54322), Some(54322)).unwrap();
    [dir.path(), &snapshot].into_iter().for_each(give);
    fs::read_dir(&snapshot).unwrap().for_each(|entry| give(&entry.unwrap().path()));
    let mut command = tvmm();
    user(command.args([
        "restore",
        "--snapshot",
        text(&snapshot),
        "--policy",
        "firecracker",
        "--jail",
        "--run",
        "check",
    ]));
    let output = finish(&mut command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn taps_and_sockets_of_a_jailed_vm_work() {
    need_jail!();
    let dir = scratch();
    let path = dir.path().join("v");
    let mut vm = boot_jailed(&with_vsock(&path), dir.path(), &[]);
    vm.begin("vsock_serve port=52 lines=1");
    assert!(ask(&connect(&path, 52), "run a hello").starts_with("ok a "));
    drop(vm);
    with_network(|network| {
        let dir = scratch();
        network.tap("tap0");
        let mut vm = boot_jailed(&with_tap("tap0", 2), dir.path(), &[]);
        network.wait_for("tap0");
        vm.begin(&format!("net_answer ip={GUEST_IP} frames=3 ms=60000"));
        echo(&udp(), &[1, 500]);
        assert_eq!(report(&vm)["network"], "own", "the VM has left the network of its tap");
    });
}

#[test]
fn outputs_of_a_jailed_run_are_written() {
    need_jail!();
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 7);
    let report = dir.path().join("report.json");
    let trace = dir.path().join("trace.json");
    let args = ["restore", "--snapshot", text(&snapshot), "--run", "hello", "--jail"];
    let outputs = ["--report", text(&report), "--trace", text(&trace)];
    answer_to_run(&run_ok(&[&args[..], &outputs[..]].concat()));
    let read = |path: &Path| serde_json::from_str::<Value>(&fs::read_to_string(path).unwrap()).unwrap();
    assert!(read(&report)["jail"]["entered_us"].as_f64().unwrap() > 0.0);
    assert!(!read(&trace)["traceEvents"].as_array().unwrap().is_empty());
}

#[test]
fn jails_that_cannot_be_had_are_refused() {
    let dir = scratch();
    let missing = dir.path().join("missing");
    let args = ["--api-sock", text(&dir.path().join("a")).to_owned().leak()];
    let refused = |more: &[&str]| run_err(&[&args[..], more].concat());
    assert!(refused(&["--jail", "--jail-path", text(&missing)]).contains("does not exist"));
    assert!(refused(&["--jail", "--jail-tap", "tvmm-no-tap"]).contains("tvmm-no-tap"));
    assert!(refused(&["--jail", "--jail-netns", "tvmm-no-ns"]).contains("ip netns add tvmm-no-ns"));
    assert!(refused(&["--jail", "--jail-cgroup", text(&missing)]).contains("cgroup"));
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
    let said = run_err(&["--api-sock", text(&shared.join("a")), "--jail"]);
    assert!(said.contains("directory of its own"), "{said}");
    let output = finish(tvmm().args(args).args(["--jail-uid", "5"]));
    assert_eq!(output.status.code(), Some(2), "--jail-uid needs --jail");
    if rustix::process::geteuid().is_root() {
        let mut command = tvmm();
        let output = finish(command.args(args).args(["--jail=landlock", "--jail-uid", "5"]).uid(54323));
        let _ = refusal(&output);
    }
}

/// The results of the deeds of a VMM that was taken over, by thread and deed: `done`, or an errno.
fn deeds(output: &std::process::Output) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(&output.stderr);
    let deeds = text.lines().filter_map(|line| line.strip_prefix("takeover ")?.split_once(": "));
    deeds.map(|(deed, result)| (deed.to_owned(), result.to_owned())).collect()
}

/// A debug build tries in its jail what an attacker would.
#[test]
fn a_vmm_that_was_taken_over_has_nothing_to_take() {
    need_jail!();
    if std::env::var_os("TVMM_BINARY").is_some() {
        skip!("debug", "only a debug build has the deeds of an attacker");
        return;
    }
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 100, 8);
    let secret = scratch();
    let file = secret.path().join("secret");
    fs::write(&file, "x").unwrap();
    let group = ControlGroup::new("memory", "memory.limit_in_bytes", "memory.max");
    let cgroup = group.as_ref().map(|group| group.procs().parent().unwrap().display().to_string()).unwrap_or_default();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let byte = 7_u8;
    let victims = format!(
        "file={file} written={memory} pid={pid} address={address} cgroup={cgroup} port={port}",
        file = file.display(),
        memory = snapshot.join("memory").display(),
        pid = std::process::id(),
        address = &raw const byte as usize,
        port = listener.local_addr().unwrap().port(),
    );
    let attack = |layers: &str| {
        let args = ["restore", "--snapshot", text(&snapshot), "--run", "hello", layers];
        let output = finish(tvmm().args(args).env("TVMM_TAKEOVER", &victims));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        deeds(&output)
    };
    let all = attack("--jail");
    assert_eq!(all.len(), 2 * 20, "{all:?}");
    let done: Vec<&String> = all.iter().filter(|(_, result)| *result == "done").map(|(deed, _)| deed).collect();
    assert!(done.is_empty(), "{done:?}");
    assert!(all.values().all(|errno| errno.parse::<i32>().is_ok()), "{all:?}");
    // One layer alone lets some deeds be done, so that the deeds are real ones: Landlock has no rule for UDP.
    let landlock = attack("--jail=landlock");
    assert_eq!(landlock["main udp_send"], "done", "{landlock:?}");
    assert!(landlock["main read_file"] != "done" && landlock["main signal"] != "done", "{landlock:?}");
    let namespaces = attack("--jail=namespaces");
    assert!(namespaces["other read_file"] != "done" && namespaces["other mount"] != "done", "{namespaces:?}");
    assert_eq!(fs::read(&file).unwrap(), b"x");
}
