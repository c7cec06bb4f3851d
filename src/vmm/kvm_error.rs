//! Errors between a machine and KVM.

use std::io;

/// KVM is absent or refuses a request.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error(
        "Cannot open /dev/kvm: it does not exist. Load the module for this CPU (`modprobe kvm_intel` or `modprobe \
         kvm_amd`); inside a VM, its host must allow nested virtualisation"
    )]
    Missing,
    #[error(
        "Cannot open /dev/kvm: permission denied. Add this user to the group that owns it (`usermod -aG kvm USER`, \
         then log in again), or run as root"
    )]
    Denied,
    #[error(
        "/dev/kvm is {0}, not KVM's device. Remove it and make the device (`mknod /dev/kvm c 10 232`), or give the \
         container the host's (`--device /dev/kvm`)"
    )]
    NoDevice(&'static str),
    #[error("Cannot {doing}")]
    Call { doing: &'static str, source: kvm_ioctls::Error },
    #[error("This host's KVM has API version {0}, tvmm needs 12")]
    Version(i32),
    #[error("Cannot {doing} of vCPU {vcpu}")]
    Vcpu { doing: &'static str, vcpu: u8, source: kvm_ioctls::Error },
    #[error("KVM refuses to set MSR {index:#x} of vCPU {vcpu} to {value:#x}")]
    MsrRefused { vcpu: u8, index: u32, value: u64 },
    #[error(
        "vCPU {0} did not stop in time: it waits in the kernel, most likely for memory that does not come (a file \
         system that hangs, a page-fault handler that does not answer)"
    )]
    VcpuStuck(u8),
    #[error("Cannot start the thread of vCPU {vcpu}")]
    VcpuThread { vcpu: u8, source: io::Error },
    #[error("The CPU template (cpu-config) cannot be used: {0}")]
    CpuTemplate(String),
}
