//! Disks of a stock Linux guest. Needs `TVMM_LINUX_GUEST`: a directory with `vmlinuz-6.12` and `initrd-6.12.cpio`, as
//! `make testbed-build` makes; skipped without.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::{Vm, run_ok, scratch, text};

/// The script that the guest runs: each line that it prints tells of a check that passed.
const SCRIPT: &str = r#"
set -e
for d in vda vdb; do
    q=/sys/block/$d/queue
    echo "disk: $d $(cat /sys/block/$d/size) $(cat /sys/block/$d/ro) $(cat /sys/block/$d/serial) $(cat $q/write_cache)"
done
grep -o 'root=.*' /proc/cmdline
head -c 2097152 /dev/urandom >/tmp/x
dd if=/tmp/x of=/dev/vda bs=64k conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
head -c 2097152 /dev/vda | cmp - /tmp/x
blkdiscard /dev/vda
mke2fs /dev/vda >/dev/null 2>&1
modprobe ext4
mount -t ext4 /dev/vda /mnt
echo "blk: mounted"
for i in 1 2 3 4 5 6 7 8; do
    cp /tmp/x /mnt/x$i
    sync
    echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp/x /mnt/x$i
    echo "blk: round $i"
done
fstrim /mnt
umount /mnt
! dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null
echo "blk: all checked"
"#;

fn guest() -> Option<PathBuf> {
    let guest = std::env::var_os("TVMM_LINUX_GUEST").map(PathBuf::from);
    if guest.is_none() {
        skip!("linux", "TVMM_LINUX_GUEST does not name a directory with Linux kernels");
    }
    guest
}

fn image(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

/// An initrd that runs `script`: the guest's, and a second archive behind it.
fn initrd(guest: &Path, dir: &Path, script: &str) -> PathBuf {
    let path = dir.join("initrd");
    let mut bytes = std::fs::read(guest.join("initrd-6.12.cpio")).unwrap();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    for (name, mode, data) in [("cmd", 0o100_755, script), ("TRAILER!!!", 0, "")] {
        // cpio's "newc": the magic, thirteen hexadecimal numbers, the name, the data, both padded to four bytes.
        let fields = [0, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
        bytes.extend(format!("070701{header}{name}\0").bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(data.bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    std::fs::write(&path, bytes).unwrap();
    path
}

fn config(guest: &Path, dir: &Path, drives: Value) -> PathBuf {
    let config = json!({
        "boot-source": {
            "kernel_image_path": guest.join("vmlinuz-6.12"),
            "initrd_path": initrd(guest, dir, SCRIPT),
            "boot_args": "console=ttyS0 quiet panic=-1 reboot=k",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 512, "track_dirty_pages": true },
        "drives": drives,
    });
    let path = dir.join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    path
}

#[test]
fn stock_linux_keeps_its_file_system_over_snapshots_under_load_with_either_engine() {
    let Some(guest) = guest() else { return };
    for engine in ["Sync", "Async"] {
        let dir = scratch();
        let (disk, other) = (image(dir.path(), "disk", 32), image(dir.path(), "other", 8));
        let drives = json!([
            { "drive_id": "other", "path_on_host": other, "is_root_device": false, "is_read_only": true },
            {
                "drive_id": "root", "path_on_host": disk, "is_root_device": true, "cache_type": "Writeback",
                "io_engine": engine,
            },
        ]);
        let path = config(&guest, dir.path(), drives);
        let mut vm = Vm::spawn(scratch(), &["--config", text(&path)]);
        vm.wait_line(|line| line.starts_with("guest: up"));
        vm.wait_line(|line| line.trim_end() == "disk: vda 65536 0 root write back");
        vm.wait_line(|line| line.trim_end() == "disk: vdb 16384 1 other write through");
        vm.wait_line(|line| line.trim_end() == "root=/dev/vda rw");
        vm.wait_line(|line| line.contains("blk: mounted"));
        for (round, diff) in [(2, false), (4, true)] {
            vm.wait_line(|line| line.contains(&format!("blk: round {round}")));
            let out = dir.path().join(format!("s{round}"));
            vm.pause();
            let mut args = vec!["snapshot", "--api-sock", text(vm.socket()), "--out", text(&out)];
            args.extend(diff.then_some("--diff"));
            run_ok(&args);
            crate::support::signal(vm.pid(), rustix::process::Signal::KILL);
            vm.wait();
            vm = Vm::restore(&out, "firecracker");
        }
        vm.wait_line(|line| line.contains("blk: all checked"));
        let end = vm.wait_line(|line| line.contains("guest: exit"));
        assert!(end.contains("guest: exit 0"), "{end}");
        let (status, stderr) = vm.wait();
        assert!(status.success(), "{stderr}");
        let check = Command::new("e2fsck").args(["-f", "-n"]).arg(&disk).output();
        let check = check.or_else(|_| Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&disk).output());
        match check {
            Ok(check) => assert!(check.status.success(), "{engine}: {check:?}"),
            Err(error) => skip!("e2fsck", "the file system check: e2fsck cannot be run: {error}"),
        }
    }
}
