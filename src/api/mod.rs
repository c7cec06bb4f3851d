//! The HTTP API: Firecracker's paths, bodies and answers on a Unix socket, turned into control commands.
//!
//! The server has its own thread, and async stays on it. It owns nothing of the machine: each request becomes a
//! [`Command`](crate::vmm::control::Command), and the connection waits for the reply.

pub mod client;
mod connection;
mod devices;
mod fault;
mod requests;
mod routes;
#[cfg(test)]
mod tests;
pub(crate) mod watched;

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::sync::watch;

use self::connection::{Acceptor, Times};
use crate::vmm::control::ControlSender;

/// Only the owner may control the machine.
const SOCKET_MODE: u32 = 0o600;
/// Connections the kernel holds until the server thread accepts them.
const BACKLOG: i32 = 128;

/// Why the API server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Something is at the socket's path.
    #[error(
        "API socket {} exists already. If no VMM serves it any more, remove it; otherwise choose another path.",
        path.display()
    )]
    SocketExists {
        /// The path.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("API socket {} cannot be bound.", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread could not be started.
    #[error("API server thread cannot be started.")]
    Thread {
        /// What the kernel said.
        source: io::Error,
    },
}

/// A running API server. Dropping it is [`ApiServer::shutdown`].
#[derive(Debug)]
pub struct ApiServer {
    socket: Option<SocketFile>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// Serves the API at `socket_path`. When this returns, clients can connect; what they ask waits until the machine's
/// main loop takes it from the other end of `control`.
///
/// Process start is part of restore time, so only the socket is made here; all else starts on the new thread.
pub fn serve(socket_path: &Path, control: ControlSender, instance_id: &str) -> Result<ApiServer, ApiError> {
    serve_with(socket_path, control, instance_id, connection::TIMES)
}

fn serve_with(
    socket_path: &Path,
    control: ControlSender,
    instance_id: &str,
    times: Times,
) -> Result<ApiServer, ApiError> {
    let (listener, socket) = bind(socket_path)?;
    let (stop, stopped) = watch::channel(false);
    let instance_id = instance_id.to_owned();
    let acceptor = move |listener| Acceptor { listener, router: routes::router(control), stopped, times };
    let thread = thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || run(listener, acceptor, &instance_id))
        .map_err(|source| ApiError::Thread { source })?;
    Ok(ApiServer { socket: Some(socket), stop, thread: Some(thread) })
}

/// Serves the API on one connection alone, and ends this process when its other end closes: first by SIGTERM, then, if
/// the machine does not stop in time, at once. Whoever holds the other end so never leaves a VM behind.
pub fn serve_stream(stream: UnixStream, control: ControlSender, instance_id: &str) -> Result<ApiServer, ApiError> {
    let (stop, stopped) = watch::channel(false);
    let instance_id = instance_id.to_owned();
    let thread = thread::Builder::new()
        .name("api".to_owned())
        .spawn(move || run_stream(stream, routes::router(control), stopped, &instance_id))
        .map_err(|source| ApiError::Thread { source })?;
    Ok(ApiServer { socket: None, stop, thread: Some(thread) })
}

impl ApiServer {
    /// Where clients connect; `None` if the server has one connection alone.
    pub fn socket_path(&self) -> Option<&Path> {
        self.socket.as_ref().map(|socket| socket.path.as_path())
    }

    /// Removes the socket, lets answers under way reach their clients, and ends the thread.
    ///
    /// Drop the [`ControlReceiver`](crate::vmm::control::ControlReceiver) first: requests the machine will not answer
    /// any more are then answered with an error at once; otherwise they are waited for for a short time.
    pub fn shutdown(self) {}
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.socket.take().into_iter().for_each(|mut socket| socket.remove());
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The file of a socket we bound.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
    is_removed: bool,
}

impl SocketFile {
    /// Removes the file, once, unless another one has taken its place. The inode tells them apart only as long as the
    /// socket is open, because a freed inode may be used again.
    fn remove(&mut self) {
        if std::mem::replace(&mut self.is_removed, true) {
            return;
        }
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.device_and_inode);
        if is_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "API socket cannot be removed.");
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Binds the socket with its mode in place before it has a name, whatever the umask.
pub(crate) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), ApiError> {
    let error = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ApiError::SocketExists { path: path.to_owned() },
        _ => ApiError::Bind { path: path.to_owned(), source },
    };
    let address = SockAddr::unix(path).map_err(error)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(error)?;
    // Linux gives the file the mode of the unbound socket's own inode, less the umask.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(SOCKET_MODE)).map_err(error)?;
    let socket = Socket::from(OwnedFd::from(file));
    socket.bind(&address).map_err(error)?;
    let metadata = fs::symlink_metadata(path).map_err(error)?;
    let file =
        SocketFile { path: path.to_owned(), device_and_inode: (metadata.dev(), metadata.ino()), is_removed: false };
    socket.listen(BACKLOG).map_err(error)?;
    socket.set_nonblocking(true).map_err(error)?;
    Ok((UnixListener::from(OwnedFd::from(socket)), file))
}

/// The server thread.
fn run(listener: UnixListener, acceptor: impl FnOnce(tokio::net::UnixListener) -> Acceptor, instance_id: &str) {
    let served = tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
        runtime.block_on(async {
            let acceptor = acceptor(tokio::net::UnixListener::from_std(listener)?);
            tracing::debug!(instance_id, "API server is listening.");
            acceptor.serve_all().await;
            Ok(())
        })
    });
    if let Err(error) = served {
        // The listener is closed, so clients are refused instead of left waiting.
        tracing::error!(instance_id, %error, "API server cannot be started.");
    }
}

/// How long a machine may take to stop when its only connection is gone.
const ORPHAN_GRACE: Duration = Duration::from_secs(3);

/// The server thread of one connection.
fn run_stream(stream: UnixStream, router: axum::Router, mut stopped: watch::Receiver<bool>, instance_id: &str) {
    let served = tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
        runtime.block_on(async {
            stream.set_nonblocking(true)?;
            let stream = tokio::net::UnixStream::from_std(stream)?;
            connection::serve_only(stream, router, stopped.clone()).await;
            if !*stopped.borrow() {
                tracing::debug!(instance_id, "The other end of the API's connection is closed.");
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
                let ended = tokio::time::timeout(ORPHAN_GRACE, stopped.wait_for(|stopped| *stopped)).await;
                if ended.is_err() {
                    std::process::exit(1);
                }
            }
            Ok(())
        })
    });
    if let Err(error) = served {
        tracing::error!(instance_id, %error, "API server cannot be started.");
    }
}
