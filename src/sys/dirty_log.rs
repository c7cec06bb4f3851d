//! The part of KVM's dirty log that kvm-ioctls lacks: manual protect (KVM API 4.117, 7.18
//! `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`), so that reading the log does not forget it.

use std::io;

use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// `struct kvm_clear_dirty_log` with its bitmap union as the pointer it is.
#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    dirty_bitmap: *const u64,
}

const _: () = assert!(size_of::<ClearDirtyLog>() == 24);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, kvm_bindings::KVMIO, 0xc0, ClearDirtyLog);

/// Asks KVM to keep dirty bits until they are cleared by [`clear`]. Call before any slot logs.
pub fn enable_manual_protect(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    vm.enable_cap(&cap)
}

/// Clears the bits set in `bitmap` (one per page of the slot, as `KVM_GET_DIRTY_LOG` returned it) and protects those
/// pages again. `slot_pages` is the slot's size in pages.
pub fn clear(vm: &VmFd, slot: u32, slot_pages: u64, bitmap: &[u64]) -> io::Result<()> {
    let num_pages = u32::try_from(slot_pages).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    if (bitmap.len() as u64) * 64 < slot_pages {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let request = ClearDirtyLog { slot, num_pages, first_page: 0, dirty_bitmap: bitmap.as_ptr() };
    // SAFETY: the kernel reads `num_pages` bits from `dirty_bitmap`, and the bitmap was just checked to hold at least
    // that many; the struct has the kernel's layout (size asserted above) and lives through the call.
    match unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
