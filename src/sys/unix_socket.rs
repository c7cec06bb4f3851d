//! Listening Unix sockets that only their owner can connect to.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// Only the owner may control the machine.
const SOCKET_MODE: u32 = 0o600;
/// Connections the kernel holds until the server thread accepts them.
const BACKLOG: i32 = 128;

/// The reason why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something is at the socket's path.
    #[error(
        "API socket {} exists already. If no VMM serves it any more, remove it; otherwise choose another path.",
        path.display()
    )]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("API socket {} cannot be bound.", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// The file of a socket we bound. It is removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl SocketFile {
    /// The path that clients connect to.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    /// Removes the file, unless another one has taken its place. The inode tells them apart only as long as the socket
    /// is open, because a freed inode may be used again.
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.device_and_inode);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "Cannot remove the API socket");
        }
    }
}

/// Removes a socket that no process serves any more. A file of another kind also refuses connections, and stays.
pub fn remove_stale(path: &Path) {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).is_err_and(refused) {
        // A failure shows when the address is bound.
        let _ = fs::remove_file(path);
    }
}

/// Binds the socket with its mode in place before it has a name, whatever the umask.
pub fn bind(path: &Path) -> Result<(UnixListener, SocketFile), SocketError> {
    let error = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => SocketError::Exists { path: path.to_owned() },
        _ => SocketError::Bind { path: path.to_owned(), source },
    };
    let address = SockAddr::unix(path).map_err(error)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(error)?;
    // Linux gives the file the mode of the unbound socket's own inode, less the umask.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(SOCKET_MODE)).map_err(error)?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&address).map_err(error)?;
    let metadata = fs::symlink_metadata(path).map_err(error)?;
    let file = SocketFile { path: path.to_owned(), device_and_inode: (metadata.dev(), metadata.ino()) };
    socket.listen(BACKLOG).map_err(error)?;
    socket.set_nonblocking(true).map_err(error)?;
    Ok((UnixListener::from(OwnedFd::from(socket)), file))
}
