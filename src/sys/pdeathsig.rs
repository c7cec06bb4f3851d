//! Children that end with the thread that spawned them.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The child gets SIGTERM when the thread that spawns it ends (prctl(2), PR_SET_PDEATHSIG), however that comes about.
pub fn to_parent(command: &mut Command) {
    let parent = std::process::id();
    let tie = move || {
        // SAFETY: async-signal-safe system calls on integers, as is all that may be done between fork and exec.
        let tied = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
        if tied != 0 {
            return Err(io::Error::last_os_error());
        }
        // The mask is inherited, and the signal above must come through.
        // SAFETY: sigset_t is plain data; sigemptyset initialises it before it is used. Both calls are
        // async-signal-safe.
        let unmasked = unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut())
        };
        if unmasked != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have ended before the call.
        // SAFETY: getppid has no arguments and cannot fail.
        if unsafe { libc::getppid() } as u32 != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure allocates nothing, takes no lock and calls only the two system calls above.
    unsafe { command.pre_exec(tie) };
}
