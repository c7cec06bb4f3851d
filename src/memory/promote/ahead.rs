//! Promotion before the guest runs of pages whose failed writes would not be reported.
//!
//! KVM itself writes some pages (clocks, steal time); if it cannot, it silently does not. A KVM without a second stage
//! of paging also sets accessed and dirty bits, and some kinds of it push interrupt frames on the guest's stack by such
//! writes. If these fail, the guest gets a page fault or a triple fault for no fault of its own.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_sregs};

use super::operands::Cpu;
use super::view::{self, LinearView};
use super::{InPlace, Resort, failed};
use crate::memory::Error;
use crate::snapshot::{Extent, Gfn, PAGE_SIZE};
use crate::sys::guest_memory::Memory;

/// An MSR with the guest-physical address of a structure that KVM writes.
struct Pointer {
    msr: u32,
    /// The bits that say that the structure is in use; none: in use whenever the address is not 0.
    enabled: u64,
    /// The bits that are not part of the address.
    flags: u64,
    len: u64,
}

/// Linux Documentation/virt/kvm/x86/msr.rst; Hyper-V Top-Level Functional Specification 6.0b, appendix F.
const POINTERS: [Pointer; 12] = [
    pointer(0x11, 0, 0, 12),
    pointer(0x12, 1, 1, 32),
    pointer(0x4b56_4d00, 0, 0, 12),
    pointer(0x4b56_4d01, 1, 1, 32),
    pointer(0x4b56_4d02, 1, 0x3f, 64),
    pointer(0x4b56_4d03, 1, 0x3f, 64),
    pointer(0x4b56_4d04, 1, 3, 4),
    pointer(0x4000_0001, 1, 0xfff, PAGE_SIZE),
    pointer(0x4000_0021, 1, 0xfff, PAGE_SIZE),
    pointer(0x4000_0073, 1, 0xfff, PAGE_SIZE),
    pointer(0x4000_0082, 1, 0xfff, PAGE_SIZE),
    pointer(0x4000_0083, 1, 0xfff, PAGE_SIZE),
];

const fn pointer(msr: u32, enabled: u64, flags: u64, len: u64) -> Pointer {
    Pointer { msr, enabled, flags, len }
}

/// The pages that KVM writes for a vCPU with these MSRs.
pub fn kernel_written(msrs: &[kvm_msr_entry]) -> Vec<Extent> {
    let written = msrs.iter().filter_map(|entry| {
        let pointer = POINTERS.iter().find(|pointer| pointer.msr == entry.index)?;
        let gpa = entry.data & !pointer.flags;
        let is_used = gpa != 0 && entry.data & pointer.enabled == pointer.enabled;
        let last = gpa.checked_add(pointer.len - 1).filter(|_| is_used)?;
        let first = Gfn::containing(gpa);
        Some(Extent { first, pages: Gfn::containing(last).0 - first.0 + 1 })
    });
    written.collect()
}

/// The state of a vCPU before it first enters the guest.
pub struct VcpuAhead {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub msrs: Vec<kvm_msr_entry>,
}

/// Promotes the pages that are written for this vCPU without a report. `by_software`: KVM runs guests without a second
/// stage of paging.
pub fn promote(in_place: &InPlace, memory: &Memory, vcpu: &VcpuAhead, by_software: bool) -> Result<(), Error> {
    let mut pages = kernel_written(&vcpu.msrs);
    if by_software {
        let cpu = Cpu { regs: &vcpu.regs, sregs: &vcpu.sregs, extended: &|| None };
        let view = LinearView::new(memory, &vcpu.sregs);
        let written = [view.stacks(&cpu), view::descriptors(&vcpu.sregs).to_vec()].concat();
        pages.extend(view.pages(&written).0);
        pages.extend(view.tables_to_be_written());
    }
    let promoted = in_place.promote(&pages).map_err(failed)?;
    in_place.counts().add(Resort::Ahead, promoted);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_kvm_writes_are_known_by_their_msrs() {
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let page = |first, pages| Extent { first: Gfn(first), pages };
        assert_eq!(kernel_written(&[msr(0x4b56_4d01, 0x5001)]), [page(5, 1)]);
        assert_eq!(kernel_written(&[msr(0x4b56_4d01, 0x5000)]), [], "disabled");
        assert_eq!(kernel_written(&[msr(0x4b56_4d00, 0x5ffc)]), [page(5, 2)], "across pages");
        assert_eq!(kernel_written(&[msr(0x4b56_4d03, 0x7fc1), msr(0x4b56_4d02, 0)]), [page(7, 1)]);
        assert_eq!(kernel_written(&[msr(0x4b56_4d01, u64::MAX), msr(0x10, 0x5001)]), []);
    }
}
