//! Signals that end the process, as a readable descriptor (signalfd(2)).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};

/// SIGTERM, SIGINT and SIGHUP, blocked in the process and readable here.
#[derive(Debug)]
pub struct EndSignals(File);

/// The signal by which a terminal, or the owner of a service, says that something has changed.
pub const HANG_UP: i32 = libc::SIGHUP;

/// Lets a reader that goes away (`tvmm inspect DIR | head`) end the process, as in any other program. For commands that
/// only print; a VM must outlive its readers.
pub fn end_with_reader() {
    // SAFETY: restores the default disposition of a signal; no handler of ours is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Lets writes beyond a limit on the length of files (RLIMIT_FSIZE) fail with EFBIG instead of ending the process: for
/// a guest's disk that is an I/O error.
pub fn outlive_file_size_limit() {
    // SAFETY: ignores a signal; no handler of ours is involved.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Blocks all signals in this thread, so that they reach the threads made for them; all but SIGSYS, which is about
/// this thread (`seccomp.rs`).
pub fn block_all() {
    // SAFETY: sigset_t is plain data; sigfillset initialises it before it is used.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid sigset_t for all calls; the old mask is not asked for.
    unsafe {
        libc::sigfillset(&mut set);
        libc::sigdelset(&mut set, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

impl EndSignals {
    /// Blocks the signals in this thread, and so in every thread it starts from now on. Call before any thread is
    /// started.
    pub fn take() -> io::Result<Self> {
        // SAFETY: sigset_t is plain data; sigemptyset initialises it before it is used.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` is a valid sigset_t for all calls; the signal numbers are valid.
        unsafe {
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, signal);
            }
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        Ok(EndSignals(unsafe { File::from_raw_fd(fd) }))
    }

    /// The number of a pending signal, if there is one.
    pub fn take_one(&mut self) -> Option<i32> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        let number: [u8; 4] = info[..4].try_into().ok()?;
        Some(i32::from_ne_bytes(number))
    }
}

impl AsFd for EndSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EndSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
