//! Getting a vCPU thread out of `KVM_RUN` (KVM API, `immediate_exit`).
//!
//! A signal alone can arrive just before the thread enters the kernel and be lost. So whoever kicks first writes
//! `kvm_run.immediate_exit`, then sends the signal: either the signal interrupts the running ioctl, or the next
//! ioctl returns at once. The handler itself does nothing.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Installs the empty handler that lets the kick signal interrupt system calls. Call once, before any vCPU runs.
pub fn install_handler() -> io::Result<()> {
    register_signal_handler(kick_signal(), wake).map_err(io::Error::from)
}

/// The `immediate_exit` byte in one vCPU's `kvm_run` page.
#[derive(Debug)]
pub struct ImmediateExit(*mut u8);

// SAFETY: the pointer leads to a shared mapping which the kernel reads as one byte; all access goes through
// `AtomicU8`, so threads may share it.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// The flag of `vcpu`. The caller keeps the `VcpuFd`, which owns the mapping, alive for as long as this lives.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        ImmediateExit(&raw mut vcpu.get_kvm_run().immediate_exit)
    }

    pub fn set(&self, value: bool) {
        // SAFETY: the pointer was taken from the live kvm_run mapping of a `VcpuFd` that outlives `self` (contract of
        // `of`), a u8 is always aligned, and every other access in this process is atomic too.
        unsafe { AtomicU8::from_ptr(self.0) }.store(u8::from(value), Ordering::SeqCst);
    }
}

/// Sends the kick signal to `thread`.
pub fn signal<T>(thread: &std::thread::JoinHandle<T>) {
    use std::os::unix::thread::JoinHandleExt;
    // SAFETY: the handle has not been joined (it is borrowed), so the pthread_t is valid even if the thread has
    // finished; the handler of the signal is installed before any vCPU thread exists.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}
