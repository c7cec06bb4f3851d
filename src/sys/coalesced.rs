//! Port writes that KVM collects instead of leaving the guest for each (KVM API 4.116 `KVM_REGISTER_COALESCED_MMIO`,
//! `KVM_CAP_COALESCED_PIO`): a ring in a page shared with the kernel, one per VM, read at the next exit.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};

use crate::snapshot::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The consumer's side of the ring.
#[derive(Debug)]
pub struct CoalescedRing {
    page: NonNull<kvm_coalesced_mmio_ring>,
    /// There is one consumer at a time; every vCPU's thread may be it.
    consumer: Mutex<()>,
}

// SAFETY: the page is shared with the kernel only; the indices are accessed as atomics and the entries only by the
// holder of `consumer`, between `first` and `last`, where the kernel does not write.
unsafe impl Send for CoalescedRing {}
// SAFETY: as above.
unsafe impl Sync for CoalescedRing {}

impl CoalescedRing {
    /// Lets KVM collect writes to `port` of this VM. `vcpu` is any of its vCPUs. `None` if this KVM cannot.
    pub fn register(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, port: u64) -> io::Result<Option<Self>> {
        // The value of this capability is the ring's page in a vCPU's mapping.
        let page_offset = kvm.check_extension_int(Cap::CoalescedMmio);
        if page_offset <= 0 || !kvm.check_extension(Cap::CoalescedPio) {
            return Ok(None);
        }
        vm.register_coalesced_mmio(IoEventAddress::Pio(port), 1).map_err(io::Error::from)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no existing memory.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                libc::off_t::from(page_offset) * PAGE as libc::off_t,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast::<kvm_coalesced_mmio_ring>());
        Ok(page.map(|page| CoalescedRing { page, consumer: Mutex::new(()) }))
    }

    /// Takes the waiting entries, in order: calls `write` with the port and the bytes written to it, writes to one port
    /// joined. Returns whether anything waited. If nothing did, all earlier bytes were written: entries are given back
    /// to KVM after `write`.
    pub fn drain(&self, mut write: impl FnMut(u64, &[u8])) -> bool {
        if self.first().load(Ordering::Acquire) == self.last().load(Ordering::Acquire) {
            return false;
        }
        let _consumer = self.consumer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut port = 0;
        let mut bytes = Vec::new();
        let mut first = self.first().load(Ordering::Acquire);
        // Only the present entries: another vCPU may write without end.
        let last = self.last().load(Ordering::Acquire);
        let has_any = first != last;
        while first != last && first < ENTRIES {
            // SAFETY: `first` is below the number of entries in the page, and the kernel does not write an entry
            // between `first` and `last` (acquired above) until `first` has moved past it.
            let entry = unsafe { self.page.as_ref().coalesced_mmio.as_ptr().add(first as usize).read_volatile() };
            first = (first + 1) % ENTRIES;
            if entry.phys_addr != port && !bytes.is_empty() {
                write(port, &bytes);
                bytes.clear();
            }
            port = entry.phys_addr;
            bytes.extend_from_slice(&entry.data[..(entry.len as usize).min(entry.data.len())]);
        }
        if !bytes.is_empty() {
            write(port, &bytes);
        }
        self.first().store(first, Ordering::Release);
        has_any
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: the field is an aligned u32 in the mapped page, which lives as long as `self`; all access to it in
        // this process is atomic.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).first) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as for `first`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.page.as_ptr()).last) }
    }
}

impl Drop for CoalescedRing {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `register` and nothing else refers to it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}
