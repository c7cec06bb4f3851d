//! Connections: their number, their time limits, and their ends.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::Write;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, HeaderValue, Request, Response, Version, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};

use crate::sys::timed_stream::{ANSWER_TIME, Connections, IDLE_RIGHT, MAKE_ROOM, Phase, Step, WatchedStream};

/// Limit on concurrent connections; more are refused with 503.
pub(super) const MAX_CONNECTIONS: u32 = 64;
/// Time for a client to send the head of a request, once it has begun; then the connection is closed.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for answers under way when the server stops.
const GRACE: Duration = Duration::from_millis(500);
/// Time for the process that holds a machine's only connection to take an answer: the machine ends with the connection.
const OWNER_TIME: Duration = Duration::from_secs(3600);
/// Pause when the kernel cannot accept (no file descriptors left).
const ACCEPT_RETRY: Duration = Duration::from_millis(10);
/// Room for the head of a request and the first part of its body.
const BUFFER_BYTES: usize = 64 << 10;

const TURNED_AWAY: &str = "HTTP/1.1 503 Service Unavailable\r\nServer: tvmm API\r\nConnection: close\r\n\
                           Content-Type: application/json\r\nContent-Length: 46\r\n\r\n\
                           {\"fault_message\":\"Too many open connections.\"}";

/// The listening socket, and the settings of its connections.
pub(super) struct Acceptor {
    pub(super) listener: UnixListener,
    pub(super) router: Router,
    /// Turns true when the server must stop.
    pub(super) stopped: watch::Receiver<bool>,
    pub(super) times: Times,
}

/// Time limits for clients.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// For the head of a request, once it has begun.
    pub(super) head: Duration,
    /// For an answer ([`WatchedStream`]).
    pub(super) answer: Duration,
    /// Between requests, if another client waits for a connection.
    pub(super) idle: Duration,
}

/// The limits for ordinary clients.
pub(super) const TIMES: Times = Times { head: HEAD_TIMEOUT, answer: ANSWER_TIME, idle: IDLE_RIGHT };

impl Acceptor {
    /// Accepts and serves connections until told to stop, then lets answers under way finish.
    pub(super) async fn serve_all(self) {
        let Self { listener, router, mut stopped, times } = self;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
        let connections = Connections::default();
        let service = TowerToHyperService::new(router);
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop(&mut stopped) => break,
                accepted = listener.accept() => accepted,
            };
            let mut slot = slots.clone().try_acquire_owned().ok();
            if slot.is_none() && connections.make_room(times.idle) {
                slot = timeout(MAKE_ROOM, slots.clone().acquire_owned()).await.ok().and_then(Result::ok);
            }
            match (accepted, slot) {
                (Ok((stream, _)), Some(slot)) => {
                    let served = (service.clone(), stopped.clone());
                    let connection = serve_one(stream, served, connections.add(), times);
                    tokio::spawn(async move {
                        connection.await;
                        drop(slot);
                    });
                }
                (Ok((stream, _)), None) => turn_away(stream),
                (Err(error), _) => {
                    tracing::warn!(%error, "Cannot accept a connection to the API");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
        drop(listener);
        if timeout(GRACE, slots.acquire_many(MAX_CONNECTIONS)).await.is_err() {
            tracing::warn!("API server stopped with connections open.");
        }
    }
}

/// Waits until the server is told to stop, or the sender of that message is dropped.
async fn stop(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn turn_away(stream: UnixStream) {
    // Best effort: it fits an empty socket buffer, and the stream does not block.
    let _ = stream.into_std().and_then(|mut stream| stream.write_all(TURNED_AWAY.as_bytes()));
}

/// Serves this connection and no other, until it closes or the server is told to stop.
pub(super) async fn serve_only(stream: UnixStream, router: Router, stopped: watch::Receiver<bool>) {
    let times = Times { answer: OWNER_TIME, ..TIMES };
    serve_one(stream, (TowerToHyperService::new(router), stopped), Connections::default().add(), times).await;
}

/// Serves one connection, request after request.
async fn serve_one(
    stream: UnixStream,
    (service, mut stopped): (TowerToHyperService<Router>, watch::Receiver<bool>),
    phase: Arc<Phase>,
    times: Times,
) {
    let io = TokioIo::new(WatchedStream::new(stream, phase.clone(), times.answer));
    let service = WatchedService { service, phase: phase.clone(), stopped: stopped.clone() };
    // hyper's own head time-out also ends idle connections, which Firecracker's clients keep open, so it is not used.
    let connection =
        http1::Builder::new().header_read_timeout(None).max_buf_size(BUFFER_BYTES).serve_connection(io, service);
    let mut connection = pin!(connection);
    let mut late = HeadTimer { phase: phase.clone(), timeout: times.head, sleep: None };
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "API connection broke off.");
                }
                return;
            }
            () = late.wait() => {
                tracing::debug!("API connection was closed: its request head did not arrive in time.");
                return;
            }
            () = phase.ends() => {
                tracing::debug!("API connection was closed: it was idle, and another client wants its place.");
                return;
            }
            () = stop(&mut stopped), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Ends when a head takes too long. Runs in the connection's own task, so it sees each change of phase.
struct HeadTimer {
    phase: Arc<Phase>,
    timeout: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl HeadTimer {
    async fn wait(&mut self) {
        poll_fn(|context| {
            if self.phase.get() != Step::Head {
                self.sleep = None;
                return Poll::Pending;
            }
            self.sleep.get_or_insert_with(|| Box::pin(sleep(self.timeout))).as_mut().poll(context)
        })
        .await
    }
}

/// The API, with the headers every answer has.
struct WatchedService {
    service: TowerToHyperService<Router>,
    phase: Arc<Phase>,
    stopped: watch::Receiver<bool>,
}

impl Service<Request<Incoming>> for WatchedService {
    type Response = Response<axum::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.phase.set(Step::Busy);
        let phase = self.phase.clone();
        let is_last = request.version() < Version::HTTP_11 || asks_to_close(request.headers());
        let is_last = is_last || *self.stopped.borrow();
        let response = self.service.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            let connection = if is_last { "close" } else { "keep-alive" };
            let headers = response.headers_mut();
            headers.insert(header::SERVER, HeaderValue::from_static("tvmm API"));
            headers.insert(header::CONNECTION, HeaderValue::from_static(connection));
            phase.set(Step::Idle);
            Ok(response)
        })
    }
}

fn asks_to_close(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case("close"))
}
