//! Stock Linux kernels as guests. `TVMM_LINUX_GUEST` names a directory with `vmlinuz-VERSION` and
//! `initrd-VERSION.cpio`, as the testbed makes it (`tests/testbed/`). A KVM that emulates kernel code (KVM_PVM) cannot
//! run them.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::scratch;
use crate::support::shell::Shell;

const VERSIONS: [&str; 2] = ["6.1", "6.12"];

/// The guests' directory, or why there is none.
fn guests() -> Option<PathBuf> {
    let dir = std::env::var_os("TVMM_LINUX_GUEST").map(PathBuf::from);
    if dir.is_none() {
        skip!("linux", "TVMM_LINUX_GUEST does not name a directory with Linux kernels");
    }
    dir
}

fn linux_config(dir: &Path, version: &str, vcpus: u32) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": dir.join(format!("vmlinuz-{version}")),
            "initrd_path": dir.join(format!("initrd-{version}.cpio")),
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1",
        },
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": 256, "track_dirty_pages": true },
    })
}

#[test]
fn linux_stock_kernels_boot_to_a_shell_and_turn_the_machine_off() {
    let Some(guests) = guests() else { return };
    for version in VERSIONS {
        for vcpus in [1, 2, 4] {
            let mut shell = Shell::boot(&linux_config(&guests, version, vcpus));
            assert!(shell.ask("uname -r").starts_with(version));
            assert_eq!(shell.ask_number("nproc"), f64::from(vcpus), "{version}");
            // Found by ACPI alone: the command line says nothing of them.
            let found = shell.ask("ls /sys/bus/acpi/devices");
            for device in ["PNP0501:00", "TVMM0001:00", "ACPI0013:00"] {
                assert!(found.contains(device), "{found}");
            }
            let (command, ending) = if vcpus == 2 { ("reboot -f", "reset") } else { ("poweroff -f", "power-off") };
            assert_eq!(shell.end(command), ending, "{version}, {vcpus} vCPUs");
        }
    }
}

/// Debian's cloud kernels do not read MP tables, so they find one processor; what they need of the rest is there.
#[test]
fn linux_without_acpi_boots_and_resets() {
    let Some(guests) = guests() else { return };
    for version in VERSIONS {
        let mut config = linux_config(&guests, version, 2);
        config["tvmm"] = json!({ "acpi": false });
        let mut shell = Shell::boot(&config);
        assert_eq!(shell.ask("ls /sys/firmware | grep -c acpi"), "0", "{version}");
        assert_eq!(shell.end("reboot -f"), "reset", "{version}");
    }
}

/// By how many seconds the guest's clock is ahead of the host's: at least, at most.
fn clock_ahead(shell: &mut Shell) -> (f64, f64) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let asked = now();
    let guest = shell.ask_number("date +%s");
    (guest - now(), guest + 1.0 - asked)
}

#[test]
fn linux_goes_on_after_restore_with_its_own_random_numbers_and_the_right_time() {
    let Some(guests) = guests() else { return };
    for (version, vcpus) in [("6.12", 2), ("6.12", 4), ("6.1", 1)] {
        let dir = scratch();
        let out = dir.path().join("s");
        let mut shell = Shell::boot(&linux_config(&guests, version, vcpus));
        let boot_id = shell.ask("cat /proc/sys/kernel/random/boot_id");
        shell.ask("echo kept > /run/kept");
        // A kernel that boots slowly counts ticks at first and loses some: its clock need not be right, but as it was.
        let ahead = clock_ahead(&mut shell);
        let before = shell.uptime();
        shell.vm.snapshot(&out, &[]);
        assert!(shell.uptime() >= before);
        drop(shell);
        std::thread::sleep(Duration::from_secs(3));
        let mut random = Vec::new();
        for more in [&[][..], &["--policy", "eager", "--clock-realtime"], &["--policy", "firecracker-uffd"]] {
            let mut clone = Shell::restore(&out, more);
            let place = format!("{version}, {vcpus} vCPUs, {more:?}");
            let urandom = clone.ask("head -c 16 /dev/urandom | md5sum");
            assert!(!random.contains(&urandom), "{place}");
            random.push(urandom);
            assert_eq!(clone.ask("cat /run/kept /proc/sys/kernel/random/boot_id"), format!("kept~{boot_id}"));
            let first = clone.uptime();
            let second = clone.uptime();
            assert!(before <= first && first <= second, "{place}: {before} {first} {second}");
            if more.contains(&"--clock-realtime") {
                let (least, most) = clock_ahead(&mut clone);
                assert!(most > ahead.0 - 0.5 && least < ahead.1 + 0.5, "{place}: {least}–{most}, before {ahead:?}");
                assert!(first >= before + 3.0, "{place}: {before} {first}");
            }
            // Debian's 6.1 kernel has no driver for the generation id.
            if version == "6.12" {
                let said = clone.ask("dmesg | grep -c 'crng reseeded due to virtual machine fork'");
                assert_eq!(said, "1", "{place}");
            }
            assert_eq!(clone.ask_number("nproc"), f64::from(vcpus), "{place}");
            assert_eq!(clone.end("poweroff -f"), "power-off", "{place}");
        }
    }
}
