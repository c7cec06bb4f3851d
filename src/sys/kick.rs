//! Gets a vCPU thread out of `KVM_RUN` (KVM API, `immediate_exit`).
//!
//! A signal alone can arrive just before the thread enters the kernel and be lost. So the kicking thread first writes
//! `kvm_run.immediate_exit`, then sends the signal: either the signal interrupts the running ioctl, or the next ioctl
//! returns at once. The handler itself does nothing.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

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

    pub fn get(&self) -> bool {
        // SAFETY: as in `set`.
        unsafe { AtomicU8::from_ptr(self.0) }.load(Ordering::SeqCst) != 0
    }
}

/// Sends the kick signal to `thread`.
pub fn signal<T>(thread: &std::thread::JoinHandle<T>) {
    use std::os::unix::thread::JoinHandleExt;
    // SAFETY: the handle has not been joined (it is borrowed), so the pthread_t is valid even if the thread has
    // finished; the handler of the signal is installed before any vCPU thread exists.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
}

/// A timer that sends the kick signal to the thread that made it, again and again until it is dropped: ends system
/// calls that may otherwise never return.
pub struct Alarm(libc::timer_t);

impl Alarm {
    /// Arms the timer: first after `every`, then each `every` later.
    pub fn for_this_thread(every: Duration) -> io::Result<Self> {
        // SAFETY: a sigevent is plain integers and pointers, for which zeroes are a valid value.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        // Not `libc::gettid`: std refers to that name weakly, and with link-time optimisation of a static binary the
        // weak reference wins, nothing is linked, and the call goes to address 0.
        // SAFETY: the call has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::syscall(libc::SYS_gettid) } as libc::c_int;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers are to locals; the handler of the signal was installed before any vCPU existed, and the
        // thread it goes to is this one, which drops the timer (a raw pointer is not Send).
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let alarm = Alarm(timer);
        let time = libc::timespec {
            tv_sec: every.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(every.subsec_nanos()),
        };
        let times = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer was just made, the times are a local, and the old setting is not asked for.
        match unsafe { libc::timer_settime(timer, 0, &times, std::ptr::null_mut()) } {
            0 => Ok(alarm),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `for_this_thread` and is deleted nowhere else.
        unsafe { libc::timer_delete(self.0) };
    }
}
