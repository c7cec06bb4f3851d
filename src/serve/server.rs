//! Listening on TCP and on a Unix socket; the number of connections, and their ends.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::access::caller::Peer;
use super::counters::Counters;
use super::daemon::Daemon;
use super::guard::{Guard, GuardedService};
use crate::sys::timed_stream::{ANSWER_TIME, Connections, IDLE_RIGHT, MAKE_ROOM, Step, WatchedStream};
use crate::sys::tls::Tls;

/// Time for a client to send the head of a request, and longest idle time of a connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for a client to make the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause when the kernel cannot accept (no file descriptors left).
const ACCEPT_RETRY: Duration = Duration::from_millis(10);
/// Refused clients that are waited for, so that they can read the reason.
const MAX_LINGERING: usize = 4096;
/// Longest wait for each of them.
const LINGER: Duration = Duration::from_secs(2);

const TURNED_AWAY: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nConnection: close\r\n\
    Content-Type: application/json\r\nContent-Length: 57\r\n\r\n\
    {\"message\":\"Too many open connections: try again later.\"}";

/// A socket that clients connect to.
pub(super) trait Listener {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// Accepts a connection. Also returns its other end.
    fn accept_one(&self) -> impl Future<Output = io::Result<(Self::Stream, Peer)>> + Send;
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    async fn accept_one(&self) -> io::Result<(TcpStream, Peer)> {
        let (stream, remote) = self.accept().await?;
        // Answers are written at once; delaying them for more data only costs time.
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?.ip().to_canonical();
        Ok((stream, Peer::Tcp { local, remote, certificate: None }))
    }
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    async fn accept_one(&self) -> io::Result<(UnixStream, Peer)> {
        let (stream, _) = self.accept().await?;
        let uid = stream.peer_cred()?.uid();
        Ok((stream, Peer::Unix { uid }))
    }
}

/// The state that all listeners share.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) daemon: Arc<Daemon>,
    pub(super) router: Router,
    pub(super) slots: Arc<Semaphore>,
    lingering: Arc<Semaphore>,
    connections: Connections,
    guard: Arc<Guard>,
    pub(super) stopped: watch::Receiver<bool>,
}

impl Server {
    pub(super) fn new(
        daemon: Arc<Daemon>,
        router: Router,
        guard: Arc<Guard>,
        stopped: watch::Receiver<bool>,
    ) -> Server {
        let slots = Arc::new(Semaphore::new(daemon.options.limits.max_connections));
        let lingering = Arc::new(Semaphore::new(MAX_LINGERING));
        Server { daemon, router, slots, lingering, connections: Connections::default(), guard, stopped }
    }

    /// Accepts and serves until told to stop.
    pub(super) async fn serve<L: Listener>(self, listener: L, tls: Option<Arc<Tls>>) {
        let mut stopped = self.stopped.clone();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop(&mut stopped) => return,
                accepted = listener.accept_one() => accepted,
            };
            match (accepted, self.slot().await) {
                (Ok((stream, peer)), Some(slot)) => {
                    let phase = self.connections.add();
                    let io = WatchedStream::new(stream, phase.clone(), ANSWER_TIME);
                    let service = TowerToHyperService::new(self.router.clone());
                    let guarded = GuardedService { service, guard: self.guard.clone(), peer, phase };
                    let stopped = self.stopped.clone();
                    let tls = tls.clone();
                    tokio::spawn(async move {
                        match tls {
                            Some(tls) => serve_secured(&tls, io, guarded, stopped).await,
                            None => serve_one(io, guarded, stopped).await,
                        }
                        drop(slot);
                    });
                }
                // A client that expects TLS cannot read the reason.
                (Ok(_), None) if tls.is_some() => Counters::count(&self.daemon.counters.connections_refused),
                (Ok((stream, _)), None) => self.turn_away(stream),
                (Err(error), _) => {
                    tracing::warn!(%error, "Cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    /// A slot for one more connection. If none is free, an idle connection is closed for it.
    async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        let slot = self.slots.clone().try_acquire_owned().ok();
        if slot.is_none() && self.connections.make_room(IDLE_RIGHT) {
            let freed = tokio::time::timeout(MAKE_ROOM, self.slots.clone().acquire_owned()).await;
            return freed.ok().and_then(Result::ok);
        }
        slot
    }

    fn turn_away(&self, mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        Counters::count(&self.daemon.counters.connections_refused);
        let Ok(place) = self.lingering.clone().try_acquire_owned() else { return };
        tokio::spawn(async move {
            // Closing with a request unread would reset the connection, and lose the answer.
            let _ = tokio::time::timeout(LINGER, async {
                let written = poll_fn(|context| Pin::new(&mut stream).poll_write(context, TURNED_AWAY)).await;
                if !written.is_ok_and(|count| count == TURNED_AWAY.len()) {
                    return;
                }
                let _ = poll_fn(|context| Pin::new(&mut stream).poll_shutdown(context)).await;
                let mut bytes = [0; 4096];
                for _ in 0..64 {
                    let mut buffer = ReadBuf::new(&mut bytes);
                    let read = poll_fn(|context| Pin::new(&mut stream).poll_read(context, &mut buffer)).await;
                    if read.is_err() || buffer.filled().is_empty() {
                        return;
                    }
                }
            })
            .await;
            drop(place);
        });
    }
}

/// Waits until the server is told to stop, or the sender of that message is dropped.
async fn stop(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Makes the handshake of a connection, and serves it. The time limits of answers hold for the bytes that TLS makes of
/// them.
async fn serve_secured(
    tls: &Tls,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    mut service: GuardedService,
    mut stopped: watch::Receiver<bool>,
) {
    let phase = service.phase.clone();
    let accepted = tokio::select! {
        biased;
        accepted = tokio::time::timeout(HANDSHAKE, tls.accept(stream)) => accepted,
        () = stop(&mut stopped) => return,
        () = phase.ends() => return,
    };
    let secured = match accepted {
        Ok(Ok(secured)) => secured,
        Ok(Err(error)) => {
            tracing::debug!(%error, "A TLS handshake failed");
            return service.guard.count_handshake();
        }
        Err(_) => {
            tracing::debug!("A TLS handshake took too long");
            return service.guard.count_handshake();
        }
    };
    phase.set(Step::Idle);
    service.peer = service.peer.with_certificate(secured.certificate);
    serve_one(secured.stream, service, stopped).await;
}

/// Serves one connection, request after request.
async fn serve_one(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: GuardedService,
    mut stopped: watch::Receiver<bool>,
) {
    let phase = service.phase.clone();
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "A connection broke off");
                }
                return;
            }
            () = phase.ends() => return,
            () = stop(&mut stopped), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_says_its_length() {
        let text = std::str::from_utf8(TURNED_AWAY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{}", body.len());
    }
}
