//! `tvmm serve` and drives that guests write to: each VM has an image of its own, which ends with it.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::service::{Service, wait_until, wait_until_gone};
use crate::support::{finish, scratch, text};

const LEN: u64 = 4 << 20;

fn blk(service: &Service, vm: &Value, what: &str) -> Value {
    let answer = service.invoke(json!({ "func_name": "disk", "vmId": vm, "params": what }));
    let result = answer["result"].as_str().unwrap();
    assert!(result.split(' ').filter(|word| word.starts_with("failed=")).all(|word| word == "failed=0"), "{result}");
    answer
}

/// Returns true if the disk has `sectors` of this seed.
fn has(service: &Service, vm: &Value, seed: u32) -> bool {
    let answer = blk(service, vm, &format!("op=check sectors=64 seed={seed}"));
    answer["result"].as_str().unwrap().split(' ').any(|word| word == "bad=0")
}

/// A function `disk` whose image guests may write to.
fn put_disk(service: &Service, image: &Path) {
    let function =
        json!({ "func_name": "disk", "call": "blk", "mem_size": 64, "image": image, "image_read_only": false });
    service.ok("POST", "/functions", Some(function));
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    std::fs::write(&path, vec![0x5a; LEN as usize]).unwrap();
    path
}

/// The only drive of a VM: where its own image is.
fn own_image(vm: &Value) -> PathBuf {
    let drives = vm["drives"].as_array().unwrap();
    assert_eq!((drives.len(), &drives[0]["drive_id"], &drives[0]["len"]), (1, &json!("root"), &json!(LEN)), "{vm}");
    let method = drives[0]["method"].as_str().unwrap();
    assert!(["reflink", "copy_file_range", "read_write"].contains(&method), "{method}");
    drives[0]["path_on_host"].as_str().unwrap().into()
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn vms_of_one_snapshot_write_to_their_own_images_at_once() {
    let dir = scratch();
    let state = dir.path().join("state");
    let image = image(dir.path());
    let service = Service::start(&state, &[]);
    put_disk(&service, &image);
    let booted = service.ok("POST", "/vms", Some(json!({ "func_name": "disk" })));
    blk(&service, &booted["vmId"], "op=write sectors=64 seed=1");
    let snapshot = service.ok("POST", "/snapshots", Some(json!({ "vmId": booted["vmId"], "ssId": "base" })));
    assert_eq!(snapshot["drive_copies"], json!(["root"]));
    blk(&service, &booted["vmId"], "op=write sectors=64 seed=2");
    let taken = std::fs::read(state.join("snapshots/base/drive-root")).unwrap();

    let restore = || service.ok("POST", "/vms", Some(json!({ "func_name": "disk", "ssId": "base" })));
    let clones = [restore(), restore()];
    for (clone, seed) in clones.iter().zip([3, 4]) {
        assert!(has(&service, &clone["vmId"], 1), "the disk is the snapshot's");
        blk(&service, &clone["vmId"], &format!("op=write sectors=64 seed={seed}"));
    }
    for (clone, seed) in clones.iter().zip([3, 4]) {
        assert!(has(&service, &clone["vmId"], seed) && !has(&service, &clone["vmId"], 1));
    }
    let images: Vec<Vec<u8>> = clones.iter().map(|clone| std::fs::read(own_image(clone)).unwrap()).collect();
    assert!(images[0] != images[1] && images[0] != taken, "each has its own");
    assert!(has(&service, &booted["vmId"], 2));
    assert_ne!(std::fs::read(own_image(&booted)).unwrap(), taken);
    assert_eq!(std::fs::read(state.join("snapshots/base/drive-root")).unwrap(), taken, "the snapshot's is as it was");
    assert_eq!(std::fs::read(&image).unwrap(), vec![0x5a; LEN as usize], "the function's is as it was");

    // A recorded run has one too, and so has a VM of a copy of the snapshot.
    service.ok("PUT", "/snapshots?from_snapshot=base&ssId=copy", None);
    let profile = service.ok(
        "POST",
        "/snapshots/copy/profile",
        Some(json!({ "params": "op=write sectors=64 seed=5", "repeat": 2 })),
    );
    assert_eq!(profile["runs"], 2);
    let answer = service
        .invoke(json!({ "func_name": "disk", "ssId": "copy", "params": "op=check sectors=64 seed=1", "keep": false }));
    assert!(answer["result"].as_str().unwrap().contains("bad=0"), "{answer}");

    let metrics =
        crate::support::exchange(service.socket(), b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let counted = metrics.lines().filter_map(|line| line.strip_prefix("tvmm_drive_copies_total{")?.split_once("} "));
    assert_eq!(counted.map(|(_, count)| count.parse::<u64>().unwrap()).sum::<u64>(), 4, "{metrics}");

    for vm in clones.iter().chain([&booted]) {
        let own = own_image(vm);
        service.ok("DELETE", &format!("/vms/{}", vm["vmId"].as_str().unwrap()), None);
        wait_until("the image is gone", || !own.exists());
    }
    wait_until("nothing is left", || entries(&state.join("run")) == 0);
}

#[test]
fn images_of_a_daemon_that_was_killed_are_removed_and_vms_that_cannot_start_leave_none() {
    let dir = scratch();
    let state = dir.path().join("state");
    let image = image(dir.path());
    let mut service = Service::start(&state, &[]);
    put_disk(&service, &image);
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "disk" })));
    let own = own_image(&vm);
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm["vmId"], "ssId": "base" })));
    service.kill();
    wait_until_gone(vm["pid"].as_u64().unwrap() as u32);
    assert!(own.exists());
    let service = Service::start(&state, &[]);
    assert!(!own.exists());

    for (bad, said) in [(dir.path().join("missing"), "missing"), (dir.path().to_owned(), "neither a file")] {
        put_disk(&service, &bad);
        let refused = service.refused(422, "POST", "/vms", Some(json!({ "func_name": "disk" })));
        assert!(refused.contains(said), "{refused}");
    }
    let body = json!({ "func_name": "disk", "ssId": "base", "tvmm": { "pools": ["/nonexistent/pool"] } });
    service.refused(422, "POST", "/vms", Some(body));
    wait_until("nothing is left", || entries(&state.join("run")) == 0);

    // A daemon that is told to end leaves no image.
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "disk", "ssId": "base" })));
    assert!(own_image(&vm).exists());
    assert!(service.terminate().success());
    assert!(!own_image(&vm).exists());
}

#[test]
fn snapshots_that_took_no_copies_of_what_their_guest_writes_to_are_not_restored() {
    let dir = scratch();
    let state = dir.path().join("state");
    let image = image(dir.path());
    let service = Service::start(&state, &[]);
    put_disk(&service, &image);
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "disk" })));
    service.ok("POST", "/snapshots", Some(json!({ "vmId": vm["vmId"], "ssId": "base" })));
    assert!(service.terminate().success());
    // As a daemon wrote it that knew no copies.
    let path = state.join("snapshot-records/base.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(record.as_object_mut().unwrap().remove("drive_copies"), Some(json!(["root"])));
    std::fs::write(&path, record.to_string()).unwrap();

    let service = Service::start(&state, &[]);
    let write = "op=write sectors=64 seed=1";
    for (path, body) in [
        ("/vms", json!({ "func_name": "disk", "ssId": "base" })),
        ("/invocations", json!({ "func_name": "disk", "params": write })),
        ("/invocations", json!({ "func_name": "disk", "params": write, "record": "uffd" })),
        ("/snapshots/base/profile", json!({ "params": write })),
    ] {
        let refused = service.refused(409, "POST", path, Some(body));
        assert!(refused.contains("take the snapshot again"), "{path}: {refused}");
    }
    assert_eq!(std::fs::read(&image).unwrap(), vec![0x5a; LEN as usize]);
}

/// A file system that is unmounted at the end, before its folder is removed.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).expect("it was mounted");
    }
}

#[test]
fn an_image_that_does_not_fit_is_told_as_a_full_disk_and_one_of_another_file_system_is_copied() {
    let dir = scratch();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    if let Err(error) = rustix::mount::mount("tvmm-test", &small, "tmpfs", MountFlags::empty(), Some(c"size=6m")) {
        return skip!("mount", "a small file system cannot be mounted: {error}");
    }
    let _mounted = Mounted(small.clone());
    let service = Service::start(&small.join("state"), &[]);
    put_disk(&service, &image(dir.path()));
    let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "disk" })));
    assert!(own_image(&vm).exists());
    let refused = service.refused(507, "POST", "/vms", Some(json!({ "func_name": "disk" })));
    assert!(refused.contains("No space left"), "{refused}");
    wait_until("only the first VM's is left", || entries(&small.join("state/run")) == 1);
    blk(&service, &vm["vmId"], "op=write sectors=64 seed=1");
    assert!(service.terminate().success());
}

#[test]
fn images_are_reflinks_where_the_file_system_has_them() {
    let dir = scratch();
    let file = dir.path().join("xfs.img");
    let at = dir.path().join("xfs");
    std::fs::File::create(&file).unwrap().set_len(320 << 20).unwrap();
    std::fs::create_dir(&at).unwrap();
    if Command::new("mkfs.xfs").arg("-V").output().is_err() {
        return skip!("xfs", "there is no `mkfs.xfs` (package xfsprogs)");
    }
    let made = finish(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1", text(&file)]));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mounted = finish(Command::new("mount").args(["-o", "loop", text(&file), text(&at)]));
    if !mounted.status.success() {
        return skip!("xfs", "xfs cannot be mounted: {}", String::from_utf8_lossy(&mounted.stderr));
    }
    let _mounted = Mounted(at.clone());
    let service = Service::start(&at.join("state"), &[]);
    put_disk(&service, &image(&at));
    let booted = service.ok("POST", "/vms", Some(json!({ "func_name": "disk" })));
    blk(&service, &booted["vmId"], "op=write sectors=64 seed=1");
    service.ok("POST", "/snapshots", Some(json!({ "vmId": booted["vmId"], "ssId": "base" })));
    let restored = service.ok("POST", "/vms", Some(json!({ "func_name": "disk", "ssId": "base" })));
    for vm in [&booted, &restored] {
        own_image(vm);
        assert_eq!(vm["drives"][0]["method"], "reflink");
    }
    assert!(has(&service, &restored["vmId"], 1));
    assert!(service.terminate().success());
}
