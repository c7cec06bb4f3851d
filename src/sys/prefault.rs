//! Mapping guest memory into the second-stage page tables before the guest touches it (KVM API 4.143
//! `KVM_PRE_FAULT_MEMORY`, Linux 6.11), which kvm-ioctls lacks.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, kvm_pre_fault_memory};
use kvm_ioctls::{Kvm, VcpuFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::kick::Alarm;

const _: () = assert!(size_of::<kvm_pre_fault_memory>() == 64);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, kvm_bindings::KVMIO, 0xd5, kvm_pre_fault_memory);

/// Time for which KVM may go on without mapping a single page. One page takes microseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// True if this KVM has the call; the vCPU's state decides whether it works.
pub fn is_available(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(u64::from(KVM_CAP_PRE_FAULT_MEMORY)) > 0
}

/// The amount that KVM was asked to map, and has mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub calls: u64,
    pub bytes: u64,
}

/// Maps `[gpa, gpa + len)` (whole pages, within one memslot) as if `vcpu` had read it; pages that the host could write
/// are writable for the guest then. Adds to `progress`. The vCPU cannot run meanwhile, because its thread needs the
/// borrowed `VcpuFd`.
///
/// # Errors
/// `EOPNOTSUPP`: KVM shadows page tables for this vCPU. `EINTR`: KVM maps nothing for [`PATIENCE`]; it retries for ever
/// while a request that only `KVM_RUN` handles is pending, as after a memslot was deleted. `ENOENT`: no memslot.
/// `EFAULT`: the host has no memory there.
pub fn prefault(vcpu: &VcpuFd, gpa: u64, len: u64, progress: &mut Progress) -> io::Result<()> {
    let _alarm = Alarm::for_this_thread(PATIENCE)?;
    let mut range = kvm_pre_fault_memory { gpa, size: len, ..Default::default() };
    let mut last_progress = Instant::now();
    while range.size > 0 {
        let before = range.size;
        progress.calls += 1;
        // SAFETY: the struct has the kernel's layout (size asserted above) and lives through the call; the kernel reads
        // it, writes back what is left to do, and touches no other memory of this process but to map it to the guest.
        let result = unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
        let error = (result != 0).then(io::Error::last_os_error);
        // An error may come with progress; the next call returns it again.
        let mapped = before.saturating_sub(range.size);
        progress.bytes += mapped;
        if mapped > 0 {
            last_progress = Instant::now();
            continue;
        }
        match error {
            Some(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                if last_progress.elapsed() >= PATIENCE {
                    return Err(io::Error::from_raw_os_error(libc::EINTR));
                }
            }
            Some(error) => return Err(error),
            // Neither progress nor an error: nothing would ever change.
            None => return Err(io::Error::from_raw_os_error(libc::EINTR)),
        }
    }
    Ok(())
}
