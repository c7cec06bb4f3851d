//! Children that outlive the terminal of their parent.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the child of `command` lead a session of its own (setsid(2)).
pub fn into_own_session(command: &mut Command) {
    let lead = || {
        // SAFETY: an async-signal-safe system call without arguments.
        if unsafe { libc::setsid() } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure allocates nothing, takes no lock and calls only the system call above.
    unsafe { command.pre_exec(lead) };
}
