//! Disks that are full, and disks that fail while they are read.

use std::fs;
use std::io::Write;
use std::path::Path;

use fastrand::Rng;
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::json;

use super::snapshots::{boot, copy_dir, policy};
use super::world::{Snap, World, words};
use crate::support::slow_file::SlowFile;
use crate::support::text;

/// A tmpfs that has little room.
struct SmallDisk<'p>(&'p Path);

impl SmallDisk<'_> {
    /// None where this user may not mount.
    fn mount(path: &Path, kib: u32) -> Option<SmallDisk<'_>> {
        fs::create_dir(path).unwrap();
        let size = std::ffi::CString::new(format!("size={kib}k")).unwrap();
        let mounted = rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(size.as_c_str()));
        mounted.is_ok().then_some(SmallDisk(path))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(self.0);
    }
}

/// A snapshot, a merge and a profile to a disk that may be too small: done whole or refused, and nothing is left.
pub fn full_disk(world: &mut World, rng: &mut Rng) {
    let kib = rng.u32(64..12_000);
    let is_full = rng.u32(..4) == 0;
    if world.vms.is_empty() {
        boot(world, rng);
    }
    let path = world.fresh("small");
    let Some(_disk) = SmallDisk::mount(&path, kib) else { return world.count("full disks skipped: no mount") };
    if is_full {
        let mut filler = fs::File::create(path.join("filler")).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
    }
    let before = left(&path);
    let out = path.join("out");
    let Some(index) = world.any_vm(rng) else { return };
    let living = &mut world.vms[index];
    living.vm.pause();
    let (status, said) = living.vm.api("PUT", "/snapshot/create", Some(json!({ "snapshot_path": out })));
    living.vm.resume();
    let digest = living.digest.clone();
    assert_eq!(living.vm.call("check").digest, digest, "a VM's memory is another");
    if status == 200 || status == 204 {
        living.tip = None;
        let snap = Snap { path: out.clone(), memory: None, parent: None, digest, profile: None, depth: 1 };
        // A guest that reads a hole of its memory file needs a page of the tmpfs, which may have none.
        world.check_or_refused(&snap, &[]);
        fs::remove_dir_all(&out).unwrap();
    } else {
        assert!(said["fault_message"].as_str().is_some_and(|said| said.contains("No space left")), "{status} {said}");
        assert_eq!(left(&path), before, "a refused snapshot left something");
        world.count("snapshots refused by full disks");
    }
    let Some(snap) = world.any_dir(rng) else { return };
    let merge = words(&["snapshot", "merge", text(&snap.path), "--out", text(&out)]);
    let record = words(&["profile", "record", "--snapshot", text(&snap.path), "--run", "hello", "--out", text(&out)]);
    for args in [merge, record] {
        let output = world.run("on a full disk", &args, None).expect("it is not killed");
        if output.status.success() {
            super::world::remove(&out);
            continue;
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains("No space left"), "{args:?}: {said}");
        assert_eq!(left(&path), before, "{args:?} left something");
        world.count("commands refused by full disks");
    }
}

fn left(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// The memory file cannot be read from some moment on: the guest ends with the reason or has the right bytes.
pub fn failing_disk(world: &mut World, rng: &mut Rng) {
    let reads = rng.u64(..40);
    let Some(snap) = world.any_dir(rng).filter(|snap| snap.parent.is_none()) else { return };
    let path = world.fresh("e");
    copy_dir(&snap.path, &path);
    let memory = path.join("memory");
    {
        let Some(file) = SlowFile::over(&memory) else { return world.count("failing disks skipped: no FUSE") };
        file.fail_after(reads);
        // The restore is of the copy: plans and images derived from the original are of no use to it.
        let snap = Snap { path: path.clone(), ..snap };
        let policy = policy(&snap, rng);
        world.check_or_refused(&snap, &policy);
        world.count("failing disks");
    }
    super::world::remove(&path);
}
