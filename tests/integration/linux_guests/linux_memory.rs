//! Balloon and pmem of a stock Linux guest. `TVMM_LINUX_GUEST` names a directory with `vmlinuz-VERSION` and
//! `initrd-VERSION.cpio`, as the testbed makes it (`tests/testbed/`).

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::artefact::pages;
use crate::support::shell::Shell;
use crate::support::{TIMEOUT, scratch};

fn linux_config(dir: &Path) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": dir.join("vmlinuz-6.12"),
            "initrd_path": dir.join("initrd-6.12.cpio"),
            "boot_args": "console=ttyS0 quiet reboot=k panic=-1",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 384, "track_dirty_pages": true },
    })
}

fn guests() -> Option<PathBuf> {
    let dir = std::env::var_os("TVMM_LINUX_GUEST").map(PathBuf::from);
    if dir.is_none() {
        skip!("linux", "TVMM_LINUX_GUEST does not name a directory with Linux kernels");
    }
    dir
}

/// Asks the device until `reached` is true of what it says.
fn wait_for(shell: &Shell, path: &str, reached: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let said = shell.vm.api_ok("GET", path, None);
        if reached(&said) {
            return said;
        }
        assert!(Instant::now() < deadline, "{path} still says {said}");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

fn resize(shell: &Shell, amount_mib: u64) {
    shell.vm.api_ok("PATCH", "/balloon", Some(json!({ "amount_mib": amount_mib })));
    wait_for(shell, "/balloon/statistics", |said| said["actual_mib"] == amount_mib);
}

#[test]
fn linux_balloon_goes_to_half_and_back_over_restores_and_files_stay_whole() {
    const KEPT: &str = "yes kept | head -c 4000000";
    let Some(guests) = guests() else { return };
    let dir = scratch();
    let mut config = linux_config(&guests);
    config["balloon"] = json!({
        "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true,
        "free_page_reporting": true,
    });
    let mut shell = Shell::boot(&config);
    shell.ask(&format!("{KEPT} > /run/kept"));
    let said = wait_for(&shell, "/balloon/statistics", |said| said["total_memory"].is_u64());
    assert!(said["free_memory"].as_u64() > Some(50 << 20), "{said}");
    resize(&shell, 160);
    let full = dir.path().join("full");
    shell.vm.snapshot(&full, &[]);
    drop(shell);
    for policy in ["firecracker", "firecracker-uffd"] {
        let mut shell = Shell::restore(&full, &["--policy", policy, "--track-dirty-pages"]);
        let free = |shell: &mut Shell| shell.ask_number("awk '/MemFree/ {print $2}' /proc/meminfo");
        let before = free(&mut shell);
        resize(&shell, 0);
        let after = free(&mut shell);
        assert!(after > before + 100.0 * 1024.0, "{policy}: {before} KiB free before, {after} after");
        // Memory that was free before the snapshot, or in the balloon, is used and given back.
        shell.ask("yes other | head -c 20000000 > /run/other; rm /run/other");
        resize(&shell, 100);
        shell.vm.api_ok("PATCH", "/balloon/hinting/start", None);
        wait_for(&shell, "/balloon/hinting/status", |said| said["host_cmd"] == 1);
        assert_eq!(shell.ask(&format!("{KEPT} | cmp - /run/kept && echo same")), "same", "{policy}");
        let diff = dir.path().join(policy);
        shell.vm.snapshot(&diff, &["--diff"]);
        assert!(pages(&diff).1 > 1000, "{policy}: {:?}", pages(&diff));
        drop(shell);
        let mut shell = Shell::restore(&diff, &["--policy", "eager"]);
        resize(&shell, 0);
        assert_eq!(shell.ask(&format!("{KEPT} | cmp - /run/kept && echo same")), "same", "{policy}");
    }
}

#[test]
fn linux_sees_a_pmem_image_as_a_disk_and_writes_to_another_last() {
    const CONTENT: &str = "yes tvmm | head -c 4194304";
    let Some(guests) = guests() else { return };
    let dir = scratch();
    let [image, other] = ["image", "other"].map(|name| dir.path().join(name));
    std::fs::write(&image, "tvmm\n".repeat(1 << 20).as_bytes().split_at(4 << 20).0).unwrap();
    std::fs::write(&other, vec![0; 4 << 20]).unwrap();
    let mut config = linux_config(&guests);
    config["pmem"] = json!([
        { "id": "other", "path_on_host": other },
        { "id": "root", "path_on_host": image, "read_only": true, "root_device": true },
    ]);
    let mut shell = Shell::boot(&config);
    assert_eq!(shell.ask("grep -o 'root=.*' /proc/cmdline"), "root=/dev/pmem0 ro");
    let check = format!("{CONTENT} | cmp - /dev/pmem0 && echo same");
    if shell.ask("modprobe nd_pmem 2>/run/why && echo there") != "there" {
        skip!("guest-pmem", "the guest has no nd_pmem: {}", shell.ask("cat /run/why"));
        return;
    }
    assert_eq!(shell.ask(&check), "same");
    shell.ask(&format!("{CONTENT} | dd of=/dev/pmem1 bs=64k conv=fsync 2>/dev/null"));
    let full = dir.path().join("full");
    shell.vm.pause();
    shell.vm.capture(&full, "Full");
    drop(shell);
    assert!(std::fs::read(&image).unwrap() == std::fs::read(&other).unwrap(), "what was written is in the file");
    let mut shell = Shell::restore(&full, &["--policy", "firecracker"]);
    assert_eq!(shell.ask(&check), "same");
    assert_eq!(shell.ask("cmp /dev/pmem0 /dev/pmem1 && echo same"), "same");
}
