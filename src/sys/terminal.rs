//! The terminal on standard input.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

/// Holds the terminal on standard input in raw mode until dropped.
#[derive(Debug)]
pub struct RawTerminal(());

/// The mode to go back to, while a terminal is in raw mode.
static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Takes the terminal out of raw mode, if it is in it: for code that ends the process without unwinding.
pub fn restore() {
    if let Some(saved) = SAVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        // Nothing can be done about a terminal that is gone.
        let _ = set(&saved);
    }
}

/// As [`restore`], for a signal handler: neither waits nor allocates. A terminal that another thread is setting stays
/// as it is.
pub fn restore_in_handler() {
    if let Ok(saved) = SAVED.try_lock()
        && let Some(saved) = &*saved
    {
        // Nothing can be done about a terminal that is gone.
        let _ = set(saved);
    }
}

impl RawTerminal {
    /// Puts standard input into raw mode if it is a terminal; `None` if it is not.
    pub fn enter() -> io::Result<Option<Self>> {
        use std::io::IsTerminal;
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        // SAFETY: termios is plain data for which all-zero is valid; tcgetattr overwrites it.
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `saved` is a valid termios, and the descriptor of standard input is open.
        if unsafe { libc::tcgetattr(stdin.as_raw_fd(), &mut saved) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut raw = saved;
        // SAFETY: works on a local termios.
        unsafe { libc::cfmakeraw(&mut raw) };
        // Keep "\n" → "\r\n" on output: tvmm's own messages and many guests rely on it.
        raw.c_oflag = saved.c_oflag;
        set(&raw)?;
        *SAVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(saved);
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn set(mode: &libc::termios) -> io::Result<()> {
    // SAFETY: `mode` is a valid termios; the descriptor of standard input is open.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, mode) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
