//! Fork: children of a running VM have its memory of one instant, and are VMs of their own afterwards.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::devices::vsock::{ask, connect, with_vsock};
use crate::snapshots::live::{check_order, marched};
use crate::support::pool::filled;
use crate::support::service::{is_served, wait_until, wait_until_gone};
use crate::support::{Answer, TIMEOUT, Vm, config, http, run, run_err, run_ok, scratch, signal, text, tvmm};

/// A directory of a test, in which VMs have their sockets: vsock device `v` of the parent, `v-N` of child N.
pub(super) struct Place(pub(super) TempDir);

impl Place {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Boots a VM that answers requests on vsock port 52. `with` changes its config.
    pub(super) fn boot(&self, with: impl FnOnce(&mut Value)) -> Vm {
        let path = self.path("v");
        let mut config = with_vsock(&path);
        with(&mut config);
        let mut vm = Vm::boot(&config);
        vm.begin("vsock_serve port=52 lines=1");
        guest(&path, "hello");
        vm
    }

    /// The names of fork points.
    pub(super) fn fork_points(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter_map(|name| name.into_string().ok()).filter(|name| name.ends_with(".fork")).collect()
    }

    /// The body of a request whose children have sockets `NAME-N.sock` and `v-NAME-N`.
    pub(super) fn body(&self, name: &str, count: u32) -> Value {
        json!({ "count": count, "out_sock": self.path(&format!("{name}-{{n}}.sock")),
            "vsock_override": { "uds_path": self.path(&format!("v-{name}-{{n}}")) } })
    }

    /// A VM that was restored from a snapshot of a guest that has done `call`.
    fn restored(&self, call: &str) -> Vm {
        let vm = self.boot(|_| {});
        guest(&self.path("v"), call);
        let snapshot = self.path("snapshot");
        vm.snapshot(&snapshot, &[]);
        drop(vm);
        std::fs::remove_file(self.path("v")).unwrap();
        let vm = Vm::restore(&snapshot, "firecracker");
        vm.wait_for_socket();
        vm
    }

    /// Forks the VM at `socket`.
    pub(super) fn fork(&self, socket: &Path, name: &str, count: u32) -> Children {
        let (status, answer) = http(socket, "PUT", "/tvmm/fork", &self.body(name, count).to_string());
        assert_eq!(status, 200, "{answer}");
        let children = Children::of(&answer);
        assert_eq!(children.pids.len(), count as usize);
        assert!(answer["stood_still_us"].as_u64().unwrap() > 0 && answer["memory_bytes"].as_u64().unwrap() > 0);
        children
    }
}

/// The children of a fork; they are killed when this is dropped.
pub struct Children {
    pub pids: Vec<u32>,
    pub sockets: Vec<PathBuf>,
}

impl Children {
    pub fn of(answer: &Value) -> Children {
        let children = answer["children"].as_array().expect("children");
        let pids = children.iter().map(|child| child["pid"].as_u64().unwrap() as u32).collect();
        let sockets = children.iter().map(|child| PathBuf::from(child["socket"].as_str().unwrap())).collect();
        Children { pids, sockets }
    }

    /// Kills the child of this index.
    fn kill(&mut self, index: usize) -> u32 {
        let pid = self.pids.remove(index);
        self.sockets.remove(index);
        signal(pid, Signal::KILL);
        pid
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for (pid, socket) in self.pids.iter().zip(&self.sockets) {
            let arguments = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if arguments.contains(text(socket)) {
                signal(*pid, Signal::KILL);
            }
        }
    }
}

/// Runs a function of the guest behind a vsock device.
pub(super) fn guest(path: &Path, function: &str) -> Answer {
    let line = ask(&connect(path, 52), &format!("run a {function}"));
    assert!(line.starts_with("ok "), "{function}: {line}");
    Answer::parse(&line)
}

pub(super) fn state(socket: &Path) -> String {
    http(socket, "GET", "/", "").1["state"].as_str().expect("a state").to_owned()
}

fn rewind(socket: &Path) {
    let (status, answer) = http(socket, "PUT", "/tvmm/rewind", r#"{"verify":true}"#);
    assert_eq!(status, 200, "{answer}");
}

/// Fields of `/proc/PID/stat` behind the name, from the state on.
fn stat(pid: u32) -> Vec<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().map(str::to_owned).collect()
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn children_have_the_parents_memory_and_write_for_themselves() {
    let place = Place(scratch());
    let vm = place.boot(|_| {});
    let digest = guest(&place.path("v"), "fill pages=2000 seed=1").digest;
    let children = place.fork(vm.socket(), "c", 3);
    let digest_of = |name: &str| guest(&place.path(name), "check").digest;
    let content = digest_of("v");
    for (index, socket) in children.sockets.iter().enumerate() {
        assert_eq!(state(socket), "Running");
        assert_eq!(digest_of(&format!("v-c-{}", index + 1)), content, "{digest}");
        let id = http(socket, "GET", "/", "").1["id"].clone();
        assert_eq!(id, format!("anonymous-instance-{}", index + 1));
    }
    guest(&place.path("v-c-1"), "fill pages=1500 seed=2");
    guest(&place.path("v"), "fill pages=100 seed=3");
    let parents = digest_of("v");
    let first = digest_of("v-c-1");
    assert!(first != content && parents != content && first != parents);
    assert_eq!(digest_of("v-c-2"), content);
    // A child goes back to the instant of the fork.
    rewind(&children.sockets[0]);
    assert_eq!(digest_of("v-c-1"), content);
    assert_eq!(digest_of("v"), parents, "the parent runs on");
    let forks = vm.api_ok("GET", "/tvmm/report", None)["forks"].clone();
    assert_eq!(forks, json!({ "done": 1, "failed": 0, "children": 3 }));
}

#[test]
fn a_restored_vm_is_forked_and_its_own_diffs_stay_sound() {
    let place = Place(scratch());
    let vm = place.restored("fill pages=800 seed=1");
    guest(&place.path("v"), "fill pages=500 seed=2");
    let content = guest(&place.path("v"), "check").digest;
    let children = place.fork(vm.socket(), "c", 1);
    assert_eq!(guest(&place.path("v-c-1"), "check").digest, content);
    let diff = place.path("diff");
    vm.snapshot(&diff, &["--diff"]);
    drop(vm);
    // A fork point ends with its users, so it is no parent of a diff.
    let out = place.path("child-diff");
    let take = |more: &str| {
        run(&["snapshot", "--api-sock", text(&children.sockets[0]), "--out", text(&out), "--resume", more])
    };
    let refused = String::from_utf8(take("--diff").stderr).unwrap();
    assert!(refused.contains("its fork point ends with the VMs that use it"), "{refused}");
    assert!(take("--verify").status.success(), "a full snapshot stands alone");
    drop(children);
    for path in [diff, out] {
        std::fs::remove_file(place.path("v")).unwrap_or_default();
        let vm = Vm::restore_with(&path, "eager", &["--vsock", text(&place.path("v"))]);
        vm.wait_for_socket();
        assert_eq!(guest(&place.path("v"), "check").digest, content);
    }
}

#[test]
fn a_vm_is_forked_whatever_placed_its_memory() {
    let place = Place(scratch());
    let vm = place.boot(|_| {});
    guest(&place.path("v"), "fill pages=900 seed=1");
    let content = guest(&place.path("v"), "check").digest;
    let snapshot = place.path("snapshot");
    vm.snapshot(&snapshot, &[]);
    drop(vm);
    let ways: [&[&str]; 6] = [
        &["firecracker"],
        &["eager"],
        &["firecracker-uffd"],
        &["catalyzer"],
        &["trenv"],
        &["trenv", "--in-place-mapping", "shared"],
    ];
    for (index, way) in ways.into_iter().enumerate() {
        std::fs::remove_file(place.path("v")).unwrap();
        // It stands by, and goes on standing by.
        let vm = Vm::restore_with(&snapshot, way[0], &[&way[1..], &["--standby"]].concat());
        vm.wait_for_state("Paused");
        let name = format!("c{index}");
        let children = place.fork(vm.socket(), &name, 2);
        assert_eq!(vm.state(), "Paused", "{way:?}");
        for child in 1..=2 {
            assert_eq!(guest(&place.path(&format!("v-{name}-{child}")), "check").digest, content, "{way:?}");
        }
        guest(&place.path(&format!("v-{name}-1")), "fill pages=100 seed=2");
        assert_eq!(guest(&place.path("v"), "check").digest, content, "{way:?}: a request lets it run");
        assert_eq!(vm.state(), "Running");
        drop(children);
    }
}

#[test]
fn parent_and_children_outlive_each_other_in_any_order_and_nothing_is_left() {
    let place = Place(scratch());
    let vm = place.boot(|_| {});
    guest(&place.path("v"), "fill pages=700 seed=1");
    let content = guest(&place.path("v"), "check").digest;
    let mut children = place.fork(vm.socket(), "c", 3);
    // The parent reaps a child.
    wait_until_gone(children.kill(1));
    assert_eq!(vm.state(), "Running");
    let parent = vm.pid();
    drop(vm);
    wait_until_gone(parent);
    assert_eq!(place.fork_points().len(), 1);
    // A fork of a fork, whose own fork point outlives it.
    guest(&place.path("v-c-1"), "fill pages=300 seed=2");
    let changed = guest(&place.path("v-c-1"), "check").digest;
    let mut grandchildren = place.fork(&children.sockets[0], "g", 2);
    let old = place.fork_points();
    assert_eq!(old.len(), 2);
    // Each is in a session of its own, and has no descriptor of its ancestors.
    for pid in children.pids.iter().chain(&grandchildren.pids) {
        assert_eq!(stat(*pid)[3], pid.to_string());
    }
    let [child, grandchild] = [children.pids[0], grandchildren.pids[0]].map(descriptors);
    assert!(grandchild <= child + 2, "{grandchild} descriptors, its parent has {child}");
    let killed = children.kill(0);
    wait_until("it is gone or a zombie of another parent", || {
        std::fs::read_to_string(format!("/proc/{killed}/stat")).map_or(true, |stat| stat.contains(") Z "))
    });
    assert_eq!(guest(&place.path("v-g-1"), "check").digest, changed);
    guest(&place.path("v-g-1"), "fill pages=300 seed=4");
    rewind(&grandchildren.sockets[0]);
    assert_eq!(guest(&place.path("v-g-1"), "check").digest, changed);
    assert_eq!(guest(&place.path("v-c-3"), "check").digest, content);
    // Fork points without users are swept by the next fork.
    grandchildren.kill(0);
    let last = place.fork(&grandchildren.sockets[0], "l", 1);
    assert_eq!(place.fork_points().len(), 3);
    drop((children, grandchildren));
    let one_more = || place.fork(&last.sockets[0], "m", 1);
    wait_until("the ended VMs hold nothing", || {
        let children = one_more();
        let is_swept = !place.fork_points().iter().any(|name| old.contains(name));
        drop(children);
        for name in ["m-1.sock", "v-m-1"] {
            std::fs::remove_file(place.path(name)).unwrap();
        }
        is_swept
    });
}

#[test]
fn a_child_that_does_not_start_ends_all_others_and_the_parent_runs_on() {
    let place = Place(scratch());
    let vm = place.boot(|_| {});
    std::fs::create_dir(place.path("1")).unwrap();
    let mut body = place.body("c", 3);
    body["vsock_override"]["uds_path"] = json!(place.path("{n}").join("v"));
    let fault = vm.api_fault("PUT", "/tvmm/fork", Some(body.clone()));
    let is_told = |fault: &str| fault.contains("/2/v") || fault.contains("/3/v");
    assert!(fault.starts_with("Cannot fork the VM: the child for ") && is_told(&fault), "{fault}");
    assert!(!place.path("1/v").exists(), "the first child has ended");
    assert!(!["c-1.sock", "c-2.sock", "c-3.sock"].iter().any(|name| place.path(name).exists()));
    assert_eq!(place.fork_points(), Vec::<String>::new());
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let of_parent = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)) == Some(&vm.pid().to_string())
    };
    assert_eq!(pids.filter(of_parent).count(), 0);
    // The same with files for messages, from which the reason comes then.
    body["log"] = json!(place.path("log-{n}"));
    let fault = vm.api_fault("PUT", "/tvmm/fork", Some(body));
    assert!(is_told(&fault), "{fault}");
    assert!(place.path("log-2").exists() || place.path("log-3").exists());
    assert_eq!(vm.state(), "Running");
    guest(&place.path("v"), "hello");
    let forks = vm.api_ok("GET", "/tvmm/report", None)["forks"].clone();
    assert_eq!(forks, json!({ "done": 0, "failed": 2, "children": 0 }));
    drop(place.fork(vm.socket(), "d", 2));
}

/// The process that serves this socket, or will.
pub(super) fn process_of(socket: &Path) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).any(|argument| argument == text(socket).as_bytes())
    })
}

#[test]
fn a_child_ends_with_its_parent_though_an_order_for_another_child_is_left() {
    let dir = scratch();
    let snapshot = dir.path().join("snapshot");
    filled(&snapshot, 10, 1);
    let config = dir.path().join("child.json");
    std::fs::write(&config, json!({ "snapshot-load": { "snapshot_path": snapshot } }).to_string()).unwrap();
    let socket = dir.path().join("child.sock");
    let (parent, stdin) = UnixStream::pair().unwrap();
    parent.set_read_timeout(Some(TIMEOUT)).unwrap();
    let args = ["--config", text(&config), "--api-sock", text(&socket), "--await-parent"];
    let child = tvmm().args(args).stdin(OwnedFd::from(stdin)).spawn().unwrap();
    let step = || {
        let mut news = [0; 5];
        (&parent).read_exact(&mut news).unwrap();
        assert_eq!(u32::from_le_bytes(news[1..].try_into().unwrap()), child.id());
        news[0]
    };
    assert_eq!(step(), b'w');
    assert!(socket.exists());
    // The orders to restore for two children, of which the parent has started one.
    (&parent).write_all(b"ff").unwrap();
    assert_eq!(step(), b'd');
    assert_eq!(state(&socket), "Paused");
    drop(parent);
    let child = RefCell::new(child);
    wait_until("the child has ended", || child.borrow_mut().try_wait().unwrap().is_some());
    assert!(!socket.exists());
}

#[test]
fn children_copy_pages_of_the_parent_ahead_as_far_as_they_may() {
    let place = Place(scratch());
    let vm = place.restored("fill pages=2000 seed=1");
    guest(&place.path("v"), "fill pages=700 seed=2");
    let content = guest(&place.path("v"), "check").digest;
    // Nothing; a part of what the parent has written; all of it.
    for (mib, least, most) in [(0, 0, 0), (1, 1 << 20, 1 << 20), (100, 700 * 4096, 7 << 20)] {
        let name = format!("c{mib}");
        let mut body = place.body(&name, 2);
        body["dram_mib"] = json!(mib);
        body["paused"] = json!(true);
        let answer = vm.api_ok("PUT", "/tvmm/fork", Some(body));
        let children = Children::of(&answer);
        let copied = answer["copied_bytes"].as_u64().unwrap();
        assert!((least..=most).contains(&copied), "{mib} MiB: {copied}");
        for (index, socket) in children.sockets.iter().enumerate() {
            let report = http(socket, "GET", "/tvmm/report", "").1;
            // The VMM itself writes a few pages.
            let private = report["memory"]["guest_private_kib"].as_u64().unwrap() << 10;
            assert!((copied..copied + (1 << 20)).contains(&private), "{mib} MiB: {private} of {copied}");
            http(socket, "PATCH", "/vm", r#"{"state":"Resumed"}"#);
            let vsock = format!("v-{name}-{}", index + 1);
            assert_eq!(guest(&place.path(&vsock), "check").digest, content);
            guest(&place.path(&vsock), "fill pages=100 seed=3");
            rewind(socket);
            assert_eq!(guest(&place.path(&vsock), "check").digest, content);
        }
    }
}

#[test]
fn children_get_own_copies_of_drives() {
    let place = Place(scratch());
    let image = place.path("image");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let vm = place.boot(|config| {
        config["drives"] = json!([{ "drive_id": "disk", "path_on_host": image, "is_root_device": false,
            "is_read_only": false }]);
    });
    guest(&place.path("v"), "blk op=write sectors=64 seed=1 chunk=64");
    let children = place.fork(vm.socket(), "c", 2);
    let bad = |name: &str, seed: u64| {
        guest(&place.path(name), &format!("blk op=check sectors=64 seed={seed} chunk=64")).number("bad")
    };
    assert_eq!(["v", "v-c-1", "v-c-2"].map(|name| bad(name, 1)), [0, 0, 0]);
    guest(&place.path("v-c-1"), "blk op=write sectors=64 seed=2 chunk=64");
    guest(&place.path("v"), "blk op=write sectors=64 seed=3 chunk=64");
    assert_eq!([bad("v", 3), bad("v-c-1", 2), bad("v-c-2", 1)], [0, 0, 0]);
    rewind(&children.sockets[0]);
    assert_eq!(bad("v-c-1", 1), 0);
    // Copies in directories of the user's own outlive the fork point.
    let mut body = place.body("d", 1);
    body["drive_dir"] = json!(place.path("drives/{n}"));
    let more = Children::of(&vm.api_ok("PUT", "/tvmm/fork", Some(body)));
    assert!(place.path("drives/1/disk.img").exists());
    assert_eq!(bad("v-d-1", 3), 0);
    drop(more);
}

#[test]
fn a_live_fork_has_the_memory_of_one_instant_and_children_go_on_from_it() {
    const PAGES: usize = 1500;
    let place = Place(scratch());
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=3000 seed=1");
    vm.wait_for_socket();
    let before = vm.port_reads();
    vm.begin(&format!("march pages={PAGES} ms=600000"));
    wait_until("the guest takes the request", || vm.port_reads() > before);
    let body = json!({ "count": 2, "out_sock": place.path("m-{n}.sock"), "live": true });
    let answer = vm.api_ok("PUT", "/tvmm/fork", Some(body.clone()));
    let children = Children::of(&answer);
    assert!(answer["live"]["passes"].as_u64().unwrap() >= 1, "{answer}");
    assert_eq!(vm.state(), "Running");
    let fork_point = PathBuf::from(answer["fork_point"].as_str().unwrap());
    let last = check_order(&marched(&fork_point.join("snapshot"), PAGES));
    for socket in &children.sockets {
        let out = place.path("marched");
        wait_until("the child marches on", || {
            run_ok(&["snapshot", "--api-sock", text(socket), "--out", text(&out), "--resume"]);
            let now = check_order(&marched(&out, PAGES));
            std::fs::remove_dir_all(&out).unwrap();
            assert!(now >= last);
            now > last
        });
    }
    // A paused VM is captured as it stands.
    vm.pause();
    let body = json!({ "count": 1, "out_sock": place.path("n-{n}.sock"), "live": true });
    let answer = vm.api_ok("PUT", "/tvmm/fork", Some(body));
    assert_eq!((Children::of(&answer).pids.len(), &answer["live"]), (1, &Value::Null));
    assert_eq!(vm.state(), "Paused");
}

#[test]
fn a_paused_parent_stays_paused_and_children_may_begin_so() {
    let place = Place(scratch());
    let vm = place.boot(|config| config["machine-config"]["vcpu_count"] = json!(2));
    vm.pause();
    let mut body = place.body("c", 2);
    body["paused"] = json!(true);
    let children = Children::of(&vm.api_ok("PUT", "/tvmm/fork", Some(body)));
    assert_eq!(vm.state(), "Paused");
    for (index, socket) in children.sockets.iter().enumerate() {
        assert_eq!(state(socket), "Paused");
        http(socket, "PATCH", "/vm", r#"{"state":"Resumed"}"#);
        guest(&place.path(&format!("v-c-{}", index + 1)), "spin ms=10 cpus=all");
    }
    vm.resume();
    guest(&place.path("v"), "hello");
}

#[test]
fn forks_that_cannot_be_are_refused_with_the_reason() {
    let place = Place(scratch());
    let unborn = Vm::wait_for_api();
    let fault = unborn.api_fault("PUT", "/tvmm/fork", Some(place.body("c", 1)));
    assert!(fault.contains("not supported before starting the microVM"), "{fault}");
    let vm = place.boot(|_| {});
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut body = place.body("c", 2);
        change(&mut body);
        vm.api_fault("PUT", "/tvmm/fork", Some(body))
    };
    assert!(refused(&|body| body["count"] = json!(0)).contains("Cannot fork the VM into 0 VMs. Ask for 1 to 256"));
    assert!(refused(&|body| body["count"] = json!(257)).contains("into 257 VMs"));
    assert!(refused(&|body| body["cuont"] = json!(1)).contains("cuont"));
    assert!(refused(&|body| body["out_sock"] = json!("/x.sock")).contains("Put {n}, the number of the child"));
    assert!(refused(&|body| drop(body["vsock_override"].take())).contains("a vsock socket of its own"));
    assert!(refused(&|body| body["dir"] = json!(place.path("missing"))).contains("which is no directory"));
    std::fs::write(place.path("c-2.sock"), "").unwrap();
    assert!(refused(&|_| {}).contains("c-2.sock exists"));
    assert!(is_served(vm.socket()) && vm.state() == "Running");
    assert_eq!(place.fork_points(), Vec::<String>::new());
    let stderr = run_err(&["fork", "--api-sock", text(vm.socket()), "--count", "0"]);
    assert!(stderr.contains("Cannot fork the VM into 0 VMs"), "{stderr}");
}

#[test]
fn the_command_prints_sockets_processes_and_the_time_that_the_vm_stood_still() {
    let place = Place(scratch());
    // Without a vsock device: this guest is not asked.
    let mut vm = Vm::boot(&config(1, 64));
    vm.call("fill pages=100 seed=1");
    let socket = place.path("vm-{n}.sock");
    let log = place.path("log-{n}");
    let args = ["fork", "--api-sock", text(vm.socket()), "--count", "2", "--out-sock", text(&socket)];
    let output = run(&[&args[..], &["--log", text(&log)]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let pid = |line: &str| line.rsplit(' ').next().unwrap().parse().unwrap();
    let path = |line: &str| PathBuf::from(line.split(' ').next().unwrap());
    let children = Children { pids: lines.lines().map(pid).collect(), sockets: lines.lines().map(path).collect() };
    assert_eq!(children.sockets, [place.path("vm-1.sock"), place.path("vm-2.sock")]);
    assert!(children.sockets.iter().all(|socket| state(socket) == "Running"));
    assert!(stderr.contains("forked 2 VMs in") && stderr.contains("the VM stood still for"), "{stderr}");
    assert!(place.path("log-2").exists());
    let socket = place.path("j-{n}.sock");
    let args = ["fork", "--api-sock", text(vm.socket()), "--count", "1", "--out-sock", text(&socket), "--json"];
    let answer: Value = serde_json::from_str(&run_ok(&args)).unwrap();
    assert_eq!(Children::of(&answer).sockets, [place.path("j-1.sock")]);
    vm.call("hello");
}
