//! The HTTP API of one VM: Firecracker's paths, bodies and answers on a Unix socket. `sys/api_client.rs` is the client.
//!
//! Owns: routes, request bodies, faults, connections and their time-outs. Each request becomes a
//! [`Command`](crate::config::request::Command); the connection waits for the reply.
//! Must not know: the machine. The server has its own thread, and async stays on it.
//! Start reading: `routes.rs`, then `requests.rs` (bodies to commands) and `connection.rs`.

mod connection;
mod devices;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod fault;
mod requests;
mod routes;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::Builder;
use std::time::Duration;

use tokio::sync::watch;

use self::connection::{Acceptor, Times};
use crate::config::control::ControlSender;
use crate::sys::unix_socket::{SocketError, SocketFile, bind};
use crate::sys::worker::Worker;

/// The reason why the API server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The thread could not be started.
    #[error("Cannot start the API server's thread")]
    Thread {
        /// The error of the kernel.
        source: io::Error,
    },
}

/// A running API server. Dropping it is [`ApiServer::shutdown`].
#[derive(Debug)]
pub struct ApiServer {
    // Dropped, and so removed, before the thread ends: no client connects to a server that is stopping.
    socket: Option<SocketFile>,
    _thread: Worker,
}

/// Serves the API at `socket_path`. When this returns, clients can connect; their requests wait until the machine's
/// main loop takes them from the other end of `control`.
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
    let thread = start_thread(stop, move || run(listener, acceptor, &instance_id))?;
    Ok(ApiServer { socket: Some(socket), _thread: thread })
}

/// Serves the API on one connection alone, and ends this process when its other end closes: first by SIGTERM, then, if
/// the machine does not stop in time, at once. So the process that holds the other end never leaves a VM behind.
pub fn serve_stream(stream: UnixStream, control: ControlSender, instance_id: &str) -> Result<ApiServer, ApiError> {
    let (stop, stopped) = watch::channel(false);
    let instance_id = instance_id.to_owned();
    let thread = start_thread(stop, move || run_stream(stream, routes::router(control), stopped, &instance_id))?;
    Ok(ApiServer { socket: None, _thread: thread })
}

/// Starts the server's thread, which ends when `stop` says true.
fn start_thread(stop: watch::Sender<bool>, work: impl FnOnce() + Send + 'static) -> Result<Worker, ApiError> {
    let stop = move || {
        // An error means that the thread has ended.
        let _ = stop.send(true);
    };
    Worker::start(Builder::new().name("api".to_owned()), stop, work).map_err(|source| ApiError::Thread { source })
}

impl ApiServer {
    /// The socket that clients connect to; `None` if the server has one connection alone.
    pub fn socket_path(&self) -> Option<&Path> {
        self.socket.as_ref().map(SocketFile::path)
    }

    /// Removes the socket, lets answers under way reach their clients, and ends the thread.
    ///
    /// Drop the [`ControlReceiver`](crate::config::control::ControlReceiver) first: requests that the machine will not
    /// answer are then answered with an error at once. Otherwise the server waits for them for a short time.
    pub fn shutdown(self) {}
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
        // The listener is closed, so that clients are refused instead of left waiting.
        tracing::error!(instance_id, %error, "Cannot start the API server");
    }
}

/// Time for a machine to stop after its only connection has closed.
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
        tracing::error!(instance_id, %error, "Cannot start the API server");
    }
}
