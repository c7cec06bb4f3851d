//! Hosts that cannot run a machine: tvmm says which thing is missing and what to do.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use crate::skip::skip;
use crate::support::{Vm, config, finish, refusal, scratch, text, tvmm};

/// Runs tvmm in a mount namespace of its own, after the shell commands `prepare` changed it. `None`, with the reason
/// printed, where this user may not do that.
fn with_other_mounts(prepare: &str, args: &[&str], uid: Option<u32>) -> Option<Output> {
    let probe = finish(Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", prepare]));
    if !probe.status.success() {
        skip!("namespaces", "a mount namespace cannot be made here: {}", String::from_utf8_lossy(&probe.stderr));
        return None;
    }
    let run = match uid {
        None => format!("{prepare} && exec \"$@\""),
        Some(uid) => format!("{prepare} && exec setpriv --reuid={uid} --regid={uid} --clear-groups \"$@\""),
    };
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &run, "sh"]);
    command.arg(tvmm().get_program()).args(args);
    Some(finish(&mut command))
}

/// Boot and restore both need KVM; `check` judges what they say without it.
fn boot_and_restore_say(prepare: &str, uid: Option<u32>, check: impl Fn(&str)) {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config(1, 64).to_string()).unwrap();
    let snapshot = dir.path().join("s");
    Vm::boot(&config(1, 64)).snapshot(&snapshot, &[]);
    if uid.is_some() {
        let open = Command::new("chmod").arg("-R").arg("a+rX").arg(dir.path()).status().unwrap();
        assert!(open.success());
    }
    for args in [&["--config", text(&path)][..], &["restore", "--snapshot", text(&snapshot)]] {
        let Some(output) = with_other_mounts(prepare, args, uid) else { return };
        check(&refusal(&output));
    }
}

#[test]
fn kvm_that_is_missing_is_named_with_the_remedy() {
    boot_and_restore_say("mount -t tmpfs none /dev", None, |said| {
        assert!(said.contains("/dev/kvm: it does not exist") && said.contains("modprobe kvm_"), "{said}");
    });
}

#[test]
fn kvm_that_is_not_permitted_is_named_with_the_remedy() {
    // A file that only root may open stands in for a device that only its group may.
    let hide = "mount -t tmpfs none /dev && touch /dev/kvm && chmod 600 /dev/kvm";
    boot_and_restore_say(hide, Some(65534), |said| {
        assert!(said.contains("/dev/kvm: permission denied") && said.contains("usermod -aG kvm"), "{said}");
    });
}

#[test]
fn kvm_that_is_some_other_file_is_refused() {
    let cases = [("touch /dev/kvm", "an ordinary file"), ("mknod /dev/kvm c 1 3", "another device")];
    for (make, kind) in cases {
        boot_and_restore_say(&format!("mount -t tmpfs none /dev && {make}"), None, |said| {
            assert!(said.contains(&format!("/dev/kvm is {kind}, not KVM's device")), "{said}");
            assert!(said.contains("mknod /dev/kvm c 10 232"), "{said}");
        });
    }
}

#[test]
fn snapshot_can_be_inspected_and_merged_without_kvm() {
    let dir = scratch();
    let snapshot = dir.path().join("s");
    Vm::boot(&config(1, 64)).snapshot(&snapshot, &[]);
    let merged = dir.path().join("m");
    for args in [&["inspect", text(&snapshot)][..], &["snapshot", "merge", text(&snapshot), "--out", text(&merged)]] {
        let Some(output) = with_other_mounts("mount -t tmpfs none /dev", args, None) else { return };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn unprivileged_user_who_may_not_read_the_snapshot_is_refused() {
    let dir = scratch();
    let snapshot = dir.path().join("s");
    Vm::boot(&config(1, 64)).snapshot(&snapshot, &[]);
    let mut command = tvmm();
    command.args(["restore", "--snapshot", text(&snapshot)]).uid(65534).gid(65534);
    let said = refusal(&finish(&mut command));
    assert!(said.contains("Permission denied") && said.contains(text(&snapshot)), "{said}");
}

/// Runs tvmm as a user who may use KVM, and userfaultfd as `device` says; what it refuses with.
fn without_userfaultfd(device: &str, args: &[&str]) -> Option<String> {
    let prepare =
        format!("{device} mount -t tmpfs none /dev && mknod -m 666 /dev/kvm c 10 232 && {{ $make || true; }}");
    with_other_mounts(&prepare, args, Some(65534)).map(|output| refusal(&output))
}

#[test]
fn userfaultfd_that_is_not_permitted_is_refused_with_the_remedy() {
    let permitted = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if permitted.is_ok_and(|text| text.trim() == "1") {
        skip!("unprivileged-uffd", "vm.unprivileged_userfaultfd=1 permits it to everybody");
        return;
    }
    let dir = scratch();
    let snapshot = dir.path().join("s");
    Vm::boot(&config(1, 64)).snapshot(&snapshot, &[]);
    let open = Command::new("chmod").arg("-R").arg("a+rX").arg(dir.path()).status().unwrap();
    assert!(open.success());
    let profile = dir.path().join("p");
    let restore = ["restore", "--snapshot", text(&snapshot), "--policy", "firecracker-uffd", "--run", "hello"];
    let record = ["profile", "record", "--snapshot", text(&snapshot), "--run", "hello", "--out", text(&profile)];
    // There is no such device, or only root may open it.
    let closed = "make=\"mknod -m 600 /dev/userfaultfd c $(stat -c '%Hr %Lr' /dev/userfaultfd 2>/dev/null)\";";
    for device in ["make=true;", closed] {
        for args in [&restore[..], &record] {
            let Some(said) = without_userfaultfd(device, args) else { return };
            for part in ["Cannot use userfaultfd", "/dev/userfaultfd", "vm.unprivileged_userfaultfd=1"] {
                assert!(said.contains(part), "{said}");
            }
        }
    }
    // A policy that needs none is not held up.
    let args = ["restore", "--snapshot", text(&snapshot), "--policy", "trenv", "--run", "hello"];
    let prepare = "mount -t tmpfs none /dev && mknod -m 666 /dev/kvm c 10 232";
    let Some(output) = with_other_mounts(prepare, &args, Some(65534)) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
