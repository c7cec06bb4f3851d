//! Limits on other users of the host: which files they may read, write and plant, and what they may do with another
//! user's snapshot or pool.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::fs::Mode;
use rustix::mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount};

use crate::skip::skip;
use crate::support::cold::Scene;
use crate::support::nobody::as_nobody;
use crate::support::pool::{Pool, filled};
use crate::support::{Vm, config, finish, run_err, run_ok, scratch, service, text, tvmm};

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

/// All files below `dir`, at any depth.
fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => found.extend(files_below(&entry.path())),
            _ => found.push(entry.path()),
        }
    }
    found
}

/// `tvmm` with a umask that takes no right away.
fn permissive(args: &[&str]) -> Command {
    let mut command = tvmm();
    command.args(args);
    // SAFETY: umask(2) is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::umask(Mode::empty());
            Ok(())
        })
    };
    command
}

fn ok(mut command: Command) -> Output {
    let output = finish(&mut command);
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn files_with_guest_memory_are_their_owners_only_whatever_the_umask() {
    let dir = scratch();
    let out = |name: &str| dir.path().join(name);
    let config_path = out("vm.json");
    let mut with_balloon = config(1, 128);
    with_balloon["drives"] = serde_json::json!([]);
    fs::write(&config_path, with_balloon.to_string()).unwrap();
    let mut vm = Vm::spawn_of(permissive(&[]), scratch(), &["--config", text(&config_path)]);
    vm.wait_line(|line| line.starts_with("ready "));
    vm.call("fill pages=3000 seed=4");
    let state = serde_json::json!({ "state": "Paused" });
    vm.api_ok("PATCH", "/vm", Some(state));
    let two = out("two");
    let full = out("full");
    fs::create_dir(&two).unwrap();
    let body = serde_json::json!({ "snapshot_path": two.join("state"), "mem_file_path": two.join("memory") });
    vm.api_ok("PUT", "/snapshot/create", Some(body));
    vm.resume();
    ok(permissive(&["snapshot", "--api-sock", text(vm.socket()), "--out", text(&full)]));
    drop(vm);
    let profile = out("p.profile");
    let report = out("report.json");
    let trace = out("trace.json");
    let run = "touch pages=400 write=30 seed=5";
    let record = ["profile", "record", "--snapshot", text(&full), "--run", run, "--out", text(&profile)];
    ok(permissive(&record));
    let restore = ["restore", "--snapshot", text(&full), "--profile", text(&profile), "--run", "hello"];
    let reports = ["--policy", "reap", "--report", text(&report), "--trace", text(&trace)];
    ok(permissive(&[&restore[..], &reports[..]].concat()));
    ok(permissive(&[&restore[..], &["--policy", "tiered"]].concat()));
    let pool = out("pool");
    let cold = out("cold");
    let cache = out("cache");
    fs::create_dir(&pool).unwrap();
    ok(permissive(&["pool", "create", "--tier", "cxl", "--at", text(&pool), "--size", "0.1"]));
    ok(permissive(&["pool", "create", "--tier", "remote", "--at", text(&cold)]));
    ok(permissive(&["pool", "add", text(&cold), text(&full)]));
    let server = crate::support::cold::Server::start(&cold, "127.0.0.1:0", &[]);
    let fetch = ["restore", "--snapshot", text(&full), "--run", "hello", "--cold", &server.cold(), "--cold-cache"];
    ok(permissive(&[&fetch[..], &[text(&cache)]].concat()));
    let all = files_below(dir.path());
    for suffix in [".image", ".chunks", ".chunk", ".plan", "two/memory", "full/memory", "pool.tvmm", "p.profile"] {
        assert!(all.iter().any(|path| text(path).ends_with(suffix)), "no {suffix} in {all:#?}");
    }
    let open: Vec<String> = all
        .iter()
        .filter(|path| **path != config_path && mode_of(path) & 0o077 != 0)
        .map(|path| format!("{:o} {}", mode_of(path), path.display()))
        .collect();
    assert!(open.is_empty(), "{open:#?}");
}

#[test]
fn cold_cache_follows_no_links_leaves_other_files_and_refuses_a_directory_of_others() {
    let scene = Scene::make();
    let server = scene.serve("127.0.0.1:0");
    let cache = scene.dir.path().join("cache");
    let args = |size: &'static str| {
        ["restore", "--snapshot", text(&scene.bare), "--run", "check", "--cold-cache-size", size]
            .map(str::to_owned)
            .into_iter()
            .chain(["--cold".to_owned(), server.cold(), "--cold-cache".to_owned(), text(&cache).to_owned()])
            .collect::<Vec<String>>()
    };
    let strs = |args: &[String]| args.iter().map(String::as_str).collect::<Vec<&str>>().join("\u{1f}");
    let run = |size| run_ok(&strs(&args(size)).split('\u{1f}').collect::<Vec<_>>());
    assert!(run("64").contains(&scene.digest));
    // A link at the place of every chunk, to a file that must stay as it is.
    let victim = scene.dir.path().join("victim");
    fs::write(&victim, "mine").unwrap();
    let chunks = files_below(&cache);
    for chunk in &chunks {
        fs::remove_file(chunk).unwrap();
        symlink(&victim, chunk).unwrap();
    }
    let others = ["notes.chunk", "draft.partial", "a-1.chunk"].map(|name| cache.join(name));
    others.iter().for_each(|path| fs::write(path, vec![7; 3 << 20]).unwrap());
    assert!(run("64").contains(&scene.digest));
    assert!(run("4").contains(&scene.digest), "a cache that is full makes room");
    assert_eq!(fs::read(&victim).unwrap(), b"mine");
    assert!(others.iter().all(|path| path.exists()), "only chunks are removed");
    chmod(&cache, 0o777);
    let said = run_err(&strs(&args("64")).split('\u{1f}').collect::<Vec<_>>());
    assert!(said.contains("Cannot use the cache directory") && said.contains("chmod go-w"), "{said}");
}

/// A directory mounted over itself, to be read only.
struct ReadOnly<'a>(&'a Path);

impl ReadOnly<'_> {
    /// `None`, with the reason printed, where this user may not mount.
    fn mount(path: &Path) -> Option<ReadOnly<'_>> {
        if let Err(error) = mount_bind(path, path) {
            skip!("mount", "a directory cannot be mounted: {error}");
            return None;
        }
        let mounted = ReadOnly(path);
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
        Some(mounted)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn vms_open_a_pool_to_read_only_and_hold_its_pages_without_writing_a_byte() {
    let dir = scratch();
    let pool = Pool::create("0.25");
    let out = dir.path().join("full");
    let digest = filled(&out, 6000, 7);
    pool.add(&out);
    let before = fs::read(pool.file()).unwrap();
    let Some(mounted) = ReadOnly::mount(pool.dir.path()) else { return };
    let mut vm = pool.restore(&out, "trenv", &[]);
    vm.call("hello");
    for descriptor in fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().map(|entry| entry.unwrap().path()) {
        if fs::read_link(&descriptor).is_ok_and(|target| target == pool.file()) {
            let access = rustix::fs::OFlags::from_bits_retain(
                u32::from_str_radix(
                    fs::read_to_string(text(&descriptor).replace("/fd/", "/fdinfo/"))
                        .unwrap()
                        .lines()
                        .find_map(|line| line.strip_prefix("flags:"))
                        .unwrap()
                        .trim(),
                    8,
                )
                .unwrap(),
            );
            assert!(!access.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR), "{access:?}");
        }
    }
    let shown = pool.json("show", &[]);
    assert_eq!(shown["vms"][0]["pid"], vm.pid(), "{shown}");
    assert!(shown["vms"][0]["planned_pages"]["in_place"].as_u64().unwrap() >= 6000, "{shown}");
    assert_eq!(shown["vms"][0]["snapshot"], shown["snapshots"][0]["snapshot"], "{shown}");
    assert!(pool.ok("fsck", &[]).contains("1 VMs"));
    assert!(pool.err("rm", &["full"]).contains("Read-only"));
    drop(mounted);
    assert!(fs::read(pool.file()).unwrap() == before, "no byte of the pool has changed");
    // Those who may write free nothing that the VM maps.
    pool.ok("rm", &["full"]);
    assert_eq!(pool.json("gc", &[])["held"], 1);
    assert_eq!(vm.call("check").digest, digest);
    drop(vm);
    assert_eq!(pool.json("gc", &[])["snapshots"], 1);
}

#[test]
fn sockets_follow_the_umask_and_the_api_is_the_owners() {
    for (umask, vsock_mode, api_mode) in [(0o022, 0o755, 0o600), (0o077, 0o700, 0o600), (0o007, 0o770, 0o600)] {
        let dir = scratch();
        let vsock = dir.path().join("v.sock");
        let path = dir.path().join("vm.json");
        let mut with_vsock = config(1, 128);
        with_vsock["vsock"] = serde_json::json!({ "guest_cid": 3, "uds_path": vsock });
        fs::write(&path, with_vsock.to_string()).unwrap();
        let mut command = tvmm();
        // SAFETY: umask(2) is safe between fork and exec.
        unsafe {
            command.pre_exec(move || {
                rustix::process::umask(Mode::from_raw_mode(umask));
                Ok(())
            })
        };
        let mut vm = Vm::spawn_of(command, scratch(), &["--config", text(&path)]);
        vm.wait_line(|line| line.starts_with("ready "));
        assert_eq!((mode_of(&vsock), mode_of(vm.socket())), (vsock_mode, api_mode), "umask {umask:03o}");
    }
}

const POLICIES: [&str; 9] =
    ["eager", "firecracker", "firecracker-uffd", "catalyzer", "trenv", "reap", "faasnap", "aquifer", "tiered"];

#[test]
fn user_who_may_only_read_a_snapshot_restores_it_by_every_policy() {
    let dir = scratch();
    let snapshot = dir.path().join("full");
    let home = dir.path().join("home");
    let digest = filled(&snapshot, 3000, 7);
    let profile = dir.path().join("p.profile");
    let run = "touch pages=900 write=30 seed=5";
    run_ok(&["profile", "record", "--snapshot", text(&snapshot), "--run", run, "--out", text(&profile)]);
    for path in [dir.path(), &snapshot] {
        chmod(path, 0o755);
    }
    files_below(&snapshot).iter().chain([&profile]).for_each(|path| chmod(path, 0o644));
    let before = files_below(&snapshot);
    fs::create_dir(&home).unwrap();
    fs::create_dir(home.join("cache")).unwrap();
    chmod(&home, 0o755);
    chown(home.join("cache"), Some(65534), Some(65534)).unwrap();
    // The second time finds what the first has kept.
    for policy in POLICIES.iter().chain(["reap", "tiered"].iter()) {
        let args = ["restore", "--snapshot", text(&snapshot), "--policy", policy, "--run", "check"];
        let of_profile = ["--profile", text(&profile)];
        let is_from_profile = ["reap", "faasnap", "aquifer", "tiered"].contains(policy);
        let more = if is_from_profile { &of_profile[..] } else { &[] };
        let Some(command) = as_nobody(&home, &[&args[..], more].concat()) else { return };
        let output = ok(command);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(&digest), "{policy}: {said} {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{policy}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(files_below(&snapshot), before, "nothing is left beside the snapshot");
    let kept = files_below(&home.join("cache/tvmm/plans"));
    for suffix in [".image", ".plan"] {
        assert!(kept.iter().any(|path| text(path).ends_with(suffix)), "{kept:#?}");
    }
    assert!(kept.iter().all(|path| mode_of(path) == 0o600), "{kept:#?}");
    // A directory of others is not used, nor one that is not this user's.
    let args = ["restore", "--snapshot", text(&snapshot), "--policy", "reap", "--profile", text(&profile)];
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o777);
    let more = ["--run", "hello", "--plan-dir", text(&shared)];
    let Some(mut command) = as_nobody(&home, &[&args[..], &more].concat()) else { return };
    let output = finish(&mut command);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Cannot keep plans") && said.contains("chmod go-w"), "{said}");
}

#[test]
fn plan_dir_keeps_plans_and_images_by_snapshot() {
    let dir = scratch();
    let snapshot = dir.path().join("full");
    let plans = dir.path().join("plans");
    let digest = filled(&snapshot, 3000, 7);
    let profile = dir.path().join("p.profile");
    let run = "touch pages=900 write=30 seed=5";
    run_ok(&["profile", "record", "--snapshot", text(&snapshot), "--run", run, "--out", text(&profile)]);
    let before = files_below(&snapshot);
    let report = dir.path().join("r.json");
    let Some(mounted) = ReadOnly::mount(&snapshot) else { return };
    for origin in ["made", "cache"] {
        let args = ["restore", "--snapshot", text(&snapshot), "--policy", "reap", "--profile", text(&profile)];
        let more = ["--run", "check", "--plan-dir", text(&plans), "--report", text(&report)];
        assert!(run_ok(&[&args[..], &more].concat()).contains(&digest));
        let report: serde_json::Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
        assert_eq!(report["restore"]["plan"], origin, "{report}");
    }
    let mut vm = Vm::wait_for_api();
    let tvmm = serde_json::json!({ "policy": "reap", "profile": profile, "plan_dir": plans });
    let body = serde_json::json!({ "snapshot_path": snapshot, "resume_vm": true, "tvmm": tvmm });
    vm.api_ok("PUT", "/snapshot/load", Some(body));
    assert_eq!(vm.call("check").digest, digest);
    drop(vm);
    drop(mounted);
    assert_eq!(files_below(&snapshot), before);
    let id: String =
        fs::read_dir(&plans).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(run_ok(&["inspect", text(&snapshot)]).contains(&id[..16]), "{id}");
    service::wait_until("the files are there", || files_below(&plans).len() >= 2);
}
