//! Background work that costs others nothing: it runs while a CPU and the disk are idle.

use std::io;

/// `IOPRIO_WHO_PROCESS`, and `IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)` (Linux `include/uapi/linux/ioprio.h`).
const WHO_PROCESS: libc::c_long = 1;
const CLASS_IDLE: libc::c_long = 3 << 13;

/// Puts the calling thread into the idle classes of the CPU scheduler (sched(7)) and the I/O scheduler (ioprio_set(2)).
pub fn become_idle() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 means the calling thread; the kernel reads the parameters, which are a local.
    if unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_IDLE, &raw const none) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the arguments are numbers; 0 means the calling thread.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, CLASS_IDLE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
