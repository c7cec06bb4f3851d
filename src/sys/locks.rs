//! Locks of single bytes of a file or device that belong to an open file, not to a process, and end with it (fcntl(2),
//! "Open file description locks").

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

fn flock(kind: i32, byte: u64) -> io::Result<libc::flock> {
    let start = libc::off_t::try_from(byte).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let kind = kind as libc::c_short;
    Ok(libc::flock { l_type: kind, l_whence: libc::SEEK_SET as libc::c_short, l_start: start, l_len: 1, l_pid: 0 })
}

fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the kernel reads and writes one `flock`, which `lock` is.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, lock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the lock of `byte` for writing. Returns `false` if another open file has it.
pub fn try_lock(file: &File, byte: u64) -> io::Result<bool> {
    match fcntl(file, libc::F_OFD_SETLK, &mut flock(libc::F_WRLCK, byte)?) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes the lock of `byte` for reading, on a file that need not be open for writing. Returns `false` if another open
/// file has it for writing.
pub fn try_lock_shared(file: &File, byte: u64) -> io::Result<bool> {
    match fcntl(file, libc::F_OFD_SETLK, &mut flock(libc::F_RDLCK, byte)?) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A byte in `bytes` on which another open file has a lock of any kind: any of them, not always the first.
pub fn locked_in(file: &File, bytes: &Range<u64>) -> io::Result<Option<u64>> {
    let len = libc::off_t::try_from(bytes.end.saturating_sub(bytes.start));
    let mut lock = flock(libc::F_WRLCK, bytes.start)?;
    lock.l_len = len.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // A length of 0 would mean all the rest.
    if lock.l_len == 0 {
        return Ok(None);
    }
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    let is_locked = lock.l_type != libc::F_UNLCK as libc::c_short;
    Ok(is_locked.then(|| (lock.l_start as u64).max(bytes.start)))
}

/// Gives the lock of `byte` back.
pub fn unlock(file: &File, byte: u64) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, &mut flock(libc::F_UNLCK, byte)?)
}

/// True if another open file has the lock of `byte`.
pub fn is_locked(file: &File, byte: u64) -> io::Result<bool> {
    let mut lock = flock(libc::F_WRLCK, byte)?;
    fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_of_one_byte_and_one_open_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let a = open();
        let b = open();
        let readers = [(); 2].map(|()| File::open(file.path()).unwrap());
        assert!(readers.iter().all(|reader| try_lock_shared(reader, 99).unwrap()));
        assert!(!try_lock(&a, 99).unwrap());
        assert_eq!(locked_in(&a, &(0..1000)).unwrap(), Some(99));
        assert_eq!(locked_in(&a, &(0..99)).unwrap(), None);
        drop(readers);
        assert_eq!(locked_in(&a, &(0..1000)).unwrap(), None);
        assert!(try_lock(&a, 7).unwrap() && try_lock(&a, 7).unwrap());
        assert!(!try_lock(&b, 7).unwrap() && try_lock(&b, 8).unwrap());
        assert!(is_locked(&b, 7).unwrap() && !is_locked(&a, 7).unwrap() && is_locked(&a, 8).unwrap());
        unlock(&a, 7).unwrap();
        assert!(try_lock(&b, 7).unwrap());
        drop(b);
        assert!(!is_locked(&a, 8).unwrap());
    }
}
