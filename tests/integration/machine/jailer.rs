//! `tvmm jail`, and `jailer` by name: a VMM in a directory of its own, as Firecracker's jailer starts it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::skip::skip;
use crate::support::service::wait_until;
use crate::support::{finish, http, run_err, scratch, text, tvmm};

const UID: u32 = 54330;

/// The binary under test.
fn binary() -> PathBuf {
    PathBuf::from(tvmm().get_program())
}

/// A jail that has the libraries that the binary needs, if it is linked dynamically.
struct Jail {
    base: tempfile::TempDir,
    id: &'static str,
}

impl Jail {
    fn new(id: &'static str) -> Jail {
        let jail = Jail { base: scratch(), id };
        let output = finish(Command::new("ldd").arg(binary()));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        for library in said.split_whitespace().filter(|word| word.starts_with('/')) {
            let to = jail.root().join(&library[1..]);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(library, to).unwrap();
        }
        jail
    }

    fn root(&self) -> PathBuf {
        let name = binary().file_name().unwrap().to_owned();
        self.base.path().join(name).join(self.id).join("root")
    }

    fn command(&self, mut command: Command, more: &[&str], extra: &[&str]) -> Command {
        let uid = UID.to_string();
        command.args(["--id", self.id, "--exec-file", text(&binary()), "--uid", &uid, "--gid", &uid]);
        command.args(["--chroot-base-dir", text(self.base.path())]).args(more).arg("--").args(extra);
        command
    }

    fn pid(&self) -> Option<u32> {
        let name = format!("{}.pid", binary().file_name().unwrap().display());
        fs::read_to_string(self.root().join(name)).ok()?.trim().parse().ok()
    }

    fn socket(&self) -> PathBuf {
        self.root().join("api.sock")
    }

    fn wait_for_socket(&self) {
        wait_until("the jailed VMM answers", || std::os::unix::net::UnixStream::connect(self.socket()).is_ok());
    }

    fn put(&self, path: &str, body: serde_json::Value) {
        let (status, answer) = http(&self.socket(), "PUT", path, &body.to_string());
        assert!(status == 200 || status == 204, "{path}: {status} {answer}");
    }
}

/// The reason why no jail can be built here; the test is skipped then.
fn lacks() -> Option<&'static str> {
    let may = finish(Command::new("unshare").args(["-m", "-p", "-f", "true"])).status.success();
    (!rustix::process::geteuid().is_root() || !may).then_some("only root can build a jail")
}

macro_rules! need_root {
    () => {
        if let Some(why) = lacks() {
            skip!("root", "{why}");
            return;
        }
    };
}

/// Ends a process and waits for it.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills a process that is no child of this one.
struct Killed(u32);

impl Drop for Killed {
    fn drop(&mut self) {
        crate::support::signal(self.0, rustix::process::Signal::KILL);
    }
}

fn start(mut command: Command) -> Ends {
    Ends(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap())
}

#[test]
fn a_vm_boots_is_saved_and_restored_in_the_layout_of_firecrackers_jailer() {
    need_root!();
    let jail = Jail::new("vm-1");
    let mut by_name = tvmm();
    by_name.arg0("/usr/bin/jailer");
    let process = start(jail.command(by_name, &["--resource-limit", "no-file=900"], &["--api-sock", "/api.sock"]));
    jail.wait_for_socket();
    assert_eq!(jail.pid(), Some(process.0.id()), "the jailer has become the VMM");
    let of = |what: &str| format!("/proc/{}/{what}", process.0.id());
    let status = fs::read_to_string(of("status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n")), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000") && status.contains("Groups:\t \n"), "{status}");
    assert_eq!(fs::read_link(of("root")).unwrap(), Path::new("/"), "its root is that of its mount namespace");
    assert_eq!(fs::metadata(of("root/dev/kvm")).unwrap().uid(), UID);
    assert!(!Path::new(&of("root/etc")).join("passwd").exists());
    assert!(fs::read(of("environ")).unwrap().is_empty(), "its environment is empty");
    assert!(
        fs::read_to_string(of("limits"))
            .unwrap()
            .lines()
            .any(|line| { line.starts_with("Max open files") && line.split_whitespace().nth(3) == Some("900") })
    );
    jail.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 64 }));
    jail.put("/actions", json!({ "action_type": "InstanceStart" }));
    let (status, _) = http(&jail.socket(), "PATCH", "/vm", r#"{"state":"Paused"}"#);
    assert_eq!(status, 204);
    // By relative names: the working directory is the jail's root.
    jail.put("/snapshot/create", json!({ "snapshot_path": "state", "mem_file_path": "memory" }));
    assert_eq!(fs::metadata(jail.root().join("memory")).unwrap().len(), 64 << 20);
    drop(process);
    fs::remove_file(jail.socket()).unwrap();
    let again = start(jail.command(subcommand(), &[], &["--api-sock", "/api.sock"]));
    jail.wait_for_socket();
    let backend = json!({ "backend_type": "File", "backend_path": "memory" });
    jail.put("/snapshot/load", json!({ "snapshot_path": "state", "mem_backend": backend, "resume_vm": true }));
    let (status, answer) = http(&jail.socket(), "GET", "/", "");
    assert_eq!((status, &answer["state"], &answer["id"]), (200, &json!("Running"), &json!("vm-1")));
    drop(again);
}

fn subcommand() -> Command {
    let mut command = tvmm();
    command.arg("jail");
    command
}

#[test]
fn a_daemon_in_a_process_namespace_leaves_its_number() {
    need_root!();
    let jail = Jail::new("vm-2");
    let more = ["--new-pid-ns", "--daemonize"];
    let output = finish(&mut jail.command(subcommand(), &more, &["--api-sock", "/api.sock"]));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let pid = jail.pid().expect("a process id");
    let _ends = Killed(pid);
    jail.wait_for_socket();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let inner = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    assert!(inner.ends_with("\t1"), "{inner}");
    let session = status.lines().find(|line| line.starts_with("NSsid:")).unwrap();
    assert!(session.split_whitespace().any(|id| id == pid.to_string()), "it leads a session: {session}");
    assert_eq!(fs::read_link(format!("/proc/{pid}/fd/0")).unwrap(), Path::new("/dev/null"));
}

#[test]
fn a_jailed_vmm_is_in_its_cgroup() {
    need_root!();
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let has = |kind: &str, option: &str| {
        mounts.lines().any(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            fields[2] == kind && (option.is_empty() || fields[3].split(',').any(|word| word == option))
        })
    };
    let version = if has("cgroup", "cpu") { "1" } else { "2" };
    if !has("cgroup", "cpu") && !has("cgroup2", "") {
        skip!("cgroup", "no cgroup hierarchy is mounted");
        return;
    }
    let setting = if version == "1" { "cpu.shares=300" } else { "cpu.weight=300" };
    let jail = Jail::new("vm-3");
    let parent = format!("tvmm-test-{}", std::process::id());
    let more = ["--cgroup", setting, "--cgroup-version", version, "--parent-cgroup", &parent];
    let process = start(jail.command(subcommand(), &more, &["--api-sock", "/api.sock"]));
    jail.wait_for_socket();
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", process.0.id())).unwrap();
    assert!(groups.lines().any(|line| line.ends_with(&format!("/{parent}/vm-3"))), "{groups}");
    drop(process);
    for line in mounts.lines().filter(|line| line.split(' ').nth(2).is_some_and(|kind| kind.starts_with("cgroup"))) {
        let group = Path::new(line.split(' ').nth(1).unwrap()).join(&parent);
        if group.exists() {
            wait_until("the cgroup is empty", || fs::remove_dir(group.join("vm-3")).is_ok());
            fs::remove_dir(group).unwrap();
        }
    }
}

#[test]
fn jails_with_bad_arguments_are_refused() {
    let dir = scratch();
    let base = text(dir.path()).to_owned();
    let refused = |exec: &str, more: &[&str]| {
        let args = ["jail", "--id", "x", "--uid", "1", "--gid", "1", "--chroot-base-dir", &base, "--exec-file", exec];
        run_err(&[&args[..], more].concat())
    };
    assert!(refused("/no/such/vmm", &[]).contains("/no/such/vmm"));
    assert!(refused("/", &[]).contains("no file"));
    let exec = binary();
    assert!(refused(text(&exec), &["--parent-cgroup", "../x"]).contains("relative"));
    assert!(refused(text(&exec), &["--netns", "/no/such/netns"]).contains("/no/such/netns"));
    assert!(refused(text(&exec), &["--cgroup", "nosuch.file=1"]).contains("nosuch"));
    for bad in [&["--id", "a/b"][..], &["--cgroup", "x"], &["--resource-limit", "core=1"], &["--uid", "me"]] {
        let mut command = tvmm();
        command.arg("jail").args(["--exec-file", "/bin/true", "--gid", "1"]);
        for (flag, value) in [("--id", "x"), ("--uid", "1")] {
            if bad[0] != flag {
                command.args([flag, value]);
            }
        }
        assert_eq!(finish(command.args(bad)).status.code(), Some(2), "{bad:?}");
    }
}
