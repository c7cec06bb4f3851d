//! Counts of the translations that KVM has made for a VM (KVM API 4.133, `KVM_GET_STATS_FD`).

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_ioctls::VmFd;
use serde::Serialize;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);

/// Bytes of `struct kvm_stats_header`, and of `struct kvm_stats_desc` without its name.
const HEADER: usize = 24;
const DESCRIPTION: usize = 16;
/// The most statistics that a VM can have; more are an error.
const MOST: u32 = 1024;

/// Translations in KVM's page tables for the guest now: faulted in and not lost again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Translations {
    pub pages_4k: u64,
    pub pages_2m: u64,
}

/// Reads the counts; `None` on a kernel that has none (before 5.14).
pub fn translations(vm: &VmFd) -> io::Result<Option<Translations>> {
    // SAFETY: takes no argument and returns a new descriptor.
    let fd = unsafe { ioctl(vm, KVM_GET_STATS_FD()) };
    if fd < 0 {
        let error = io::Error::last_os_error();
        let is_unknown = matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL));
        return if is_unknown { Ok(None) } else { Err(error) };
    }
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let word = |bytes: &[u8], at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let name_len = word(&header, 4).min(256) as usize;
    let count = word(&header, 8).min(MOST) as usize;
    let descriptions = u64::from(word(&header, 16));
    let data = u64::from(word(&header, 20));
    let mut bytes = vec![0; count * (DESCRIPTION + name_len)];
    file.read_exact_at(&mut bytes, descriptions)?;
    let mut found = Translations::default();
    for description in bytes.chunks_exact(DESCRIPTION + name_len) {
        let name = description[DESCRIPTION..].split(|byte| *byte == 0).next().unwrap_or_default();
        let counter = match name {
            b"pages_4k" => &mut found.pages_4k,
            b"pages_2m" => &mut found.pages_2m,
            _ => continue,
        };
        let mut value = [0; 8];
        file.read_exact_at(&mut value, data + u64::from(word(description, 8)))?;
        *counter = u64::from_ne_bytes(value);
    }
    Ok(Some(found))
}
