//! Reasons against repurposing a machine.

use crate::vmm::own_memory::NotItsOwn;

/// The reason why a machine cannot become that of a snapshot. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRepurposable {
    #[error(transparent)]
    NotItsOwn(#[from] NotItsOwn),
    #[error("Cannot repurpose a VM by a page-fault handler. Name the snapshot's files or a pool")]
    ToHandler,
    #[error("Cannot repurpose the VM while a snapshot of it is being sealed. Try again when that is done")]
    Sealing,
    #[error("Cannot repurpose the VM: its guest has ended")]
    Ended,
    #[error("Cannot repurpose the VM: it has a pmem device. Restore the snapshot in its own process")]
    Pmem,
    #[error(
        "Cannot repurpose the VM: it {}. {} --track-dirty-pages",
        if *.has { "tracks dirty pages, and would not any more" } else { "does not track dirty pages" },
        if *.has { "Add" } else { "Leave out" }
    )]
    Tracking { has: bool },
    #[error("Cannot repurpose the VM: its {what} is {has}, the snapshot's {wants}. Restore it in its own process")]
    Differs { what: &'static str, has: String, wants: String },
    #[error(
        "Cannot repurpose the VM: leaf {leaf:#x} of the CPUID of vCPU {vcpu} differs from the snapshot's (another CPU \
         template or host). Restore it in its own process"
    )]
    Cpuid { vcpu: u8, leaf: u32 },
    #[error(
        "Cannot repurpose the VM: the snapshot does not say what MSR {msr:#x} of vCPU {vcpu} is to be, so the former \
         guest's value would stay. Restore it in its own process"
    )]
    Msr { vcpu: u8, msr: u32 },
}
