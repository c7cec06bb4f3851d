//! The host's side of the device: the socket that host programs connect to, and the programs' sockets that the guest
//! reaches (Firecracker's convention: `CONNECT <port>\n` on `uds_path`; `<uds_path>_<port>` for the guest's
//! connections).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::devices::Error;

/// `sun_path` with its NUL (unix(7)), and the longest `_<port>`.
const PATH_MAX: usize = 108 - 1 - "_4294967295".len();

/// The longest `CONNECT <port>\n`.
const LINE_MAX: usize = 32;

/// The listening socket; dropping it removes its file, unless another file has taken the path.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`, which must be free.
    pub fn bind(path: &Path) -> Result<Self, Error> {
        check_len(path)?;
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => Error::VsockPathTaken { path: path.to_owned() },
            _ => Error::VsockSocket { doing: "listen on", path: path.to_owned(), source },
        };
        let socket = UnixListener::bind(path).map_err(failed)?;
        let mut listener = Listener { socket, path: path.to_owned(), file: None };
        listener.file = identity(path);
        listener.socket.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// The next program that has connected; `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.socket.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }
}

/// Checks that a socket can be made at `path`, and makes none.
///
/// # Errors
/// The path is taken or too long, or its directory is missing.
pub fn check_free(path: &Path) -> Result<(), Error> {
    check_len(path)?;
    if path.symlink_metadata().is_ok() {
        return Err(Error::VsockPathTaken { path: path.to_owned() });
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let found = dir.metadata().map(drop);
    found.map_err(|source| Error::VsockSocket { doing: "listen on", path: path.to_owned(), source })
}

fn check_len(path: &Path) -> Result<(), Error> {
    if path.as_os_str().len() > PATH_MAX {
        return Err(Error::VsockPathLong { path: path.to_owned(), max: PATH_MAX });
    }
    Ok(())
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.file.is_some() && identity(&self.path) == self.file {
            // Best effort: a drop cannot report an error.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Connects to the program that listens for the guest's connections to `port`. Never waits: a full backlog refuses.
pub fn connect(uds_path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut path = OsString::from(uds_path);
    path.push(format!("_{port}"));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path.as_os_str())?)?;
    Ok(UnixStream::from(socket))
}

/// The input so far of a program that has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// `CONNECT <port>`.
    Connect(u32),
    /// A part of the line.
    Partial,
    /// Other bytes, or the program has gone.
    Invalid,
}

/// Takes the line that opens a connection, and no byte after it.
pub fn greeting(stream: &UnixStream) -> Greeting {
    let mut bytes = [0; LINE_MAX];
    let seen = match rustix::net::recv(stream, &mut bytes, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Greeting::Invalid,
        Ok((_, seen)) => seen.min(LINE_MAX),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Greeting::Partial,
        Err(_) => return Greeting::Invalid,
    };
    let greeting = parse(&bytes[..seen]);
    if let (Greeting::Connect(_), Some(end)) = (greeting, bytes.iter().position(|byte| *byte == b'\n')) {
        // These bytes were just peeked at, and only this thread reads them.
        let taken = rustix::net::recv(stream, &mut bytes[..=end], RecvFlags::DONTWAIT);
        if taken.is_err() {
            return Greeting::Invalid;
        }
    }
    greeting
}

fn parse(bytes: &[u8]) -> Greeting {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() < LINE_MAX { Greeting::Partial } else { Greeting::Invalid };
    };
    let port = || {
        let line = std::str::from_utf8(&bytes[..end]).ok()?.trim_end_matches('\r');
        let (word, port) = line.split_once(' ')?;
        let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        (word.eq_ignore_ascii_case("connect") && is_number).then(|| port.parse().ok())?
    };
    port().map_or(Greeting::Invalid, Greeting::Connect)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn only_a_whole_connect_line_is_a_greeting() {
        for (line, wanted) in [
            ("CONNECT 52\n", Greeting::Connect(52)),
            ("connect 4294967295\r\n", Greeting::Connect(u32::MAX)),
            ("CONNECT 52\nmore\n", Greeting::Connect(52)),
            ("", Greeting::Partial),
            ("CONNECT 5", Greeting::Partial),
            ("CONNECT\n", Greeting::Invalid),
            ("CONNECT \n", Greeting::Invalid),
            ("CONNECT +5\n", Greeting::Invalid),
            ("CONNECT 5 \n", Greeting::Invalid),
            ("CONNECT 4294967296\n", Greeting::Invalid),
            ("LISTEN 5\n", Greeting::Invalid),
            ("\n", Greeting::Invalid),
            ("CONNECT 00000000000000000000000000000005\n", Greeting::Invalid),
        ] {
            assert_eq!(parse(&line.as_bytes()[..line.len().min(LINE_MAX)]), wanted, "{line:?}");
        }
    }

    #[test]
    fn greeting_takes_its_line_and_leaves_the_rest() {
        let (mut program, mut device) = UnixStream::pair().unwrap();
        program.write_all(b"CONNECT 7").unwrap();
        assert_eq!(greeting(&device), Greeting::Partial);
        program.write_all(b"\nhello").unwrap();
        assert_eq!(greeting(&device), Greeting::Connect(7));
        let mut rest = [0; 5];
        device.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
        drop(program);
        assert_eq!(greeting(&device), Greeting::Invalid);
    }

    #[test]
    fn socket_file_goes_with_its_listener_and_a_taken_path_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(Error::VsockPathTaken { .. })));
        drop(listener);
        assert!(!path.exists());
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Listener::bind(&path), Err(Error::VsockPathTaken { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn foreign_socket_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = Listener::bind(&path).unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        let other = Listener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn path_that_leaves_no_room_for_a_port_is_refused() {
        let long = PathBuf::from("/tmp").join("x".repeat(PATH_MAX));
        assert!(matches!(Listener::bind(&long), Err(Error::VsockPathLong { .. })));
    }
}
