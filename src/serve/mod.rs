//! `tvmm serve`: functions, VMs, snapshots and invocations over HTTP, in FaaSnap's resources.
//!
//! Owns: the daemon's store, its VMs (each a `tvmm` process of its own), snapshots, drives, networks, traces, metrics, and what
//! clients may do. It is single-threaded but for the threads that spawn processes, wait for disks and write traces.
//! Must not know: KVM, guest memory, how a restore is carried out.
//! Start reading: `routes.rs`, `invocations.rs` (a request from start to end), `vm/process.rs` (what a VM is to the daemon).

mod allowed;
mod body;
mod daemon;
mod drives;
mod error;
mod fault;
mod functions;
mod gate;
mod guard;
mod invocations;
mod load;
mod metrics;
mod networks;
mod otlp;
mod routes;
mod server;
mod snapshots;
mod store;

mod traceparent;
mod traces;
mod vm;
mod vms;
mod working_set;

use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use self::daemon::{Daemon, START_TIMEOUT, blocking};
pub use self::error::ServeError;
pub use self::routes::openapi;
use self::server::Server;
use self::vm::process::run_tool;
use crate::config::restore::RestoreOptions;
use crate::snapshot::ColdSpec;
use crate::sys::limits::raise_open_files;
use crate::sys::signals::EndSignals;
use crate::sys::unix_socket;
use crate::sys::watched;
use crate::sys::worker;
use crate::tiering::cold::store::MANIFEST;

/// How long the end waits for a collector.
const FLUSH: Duration = Duration::from_secs(2);
/// How long the end waits for the disk, for each thing.
const DISK: Duration = Duration::from_secs(10);

/// What handlers share.
type Shared = Arc<Daemon>;

/// How much there may be of everything.
#[derive(Clone, Debug)]
pub struct Limits {
    /// VMs that live at once.
    pub max_vms: usize,
    /// Guest memory that they may have together, MiB.
    pub memory_mib: u64,
    /// Invocations and starts of VMs that run at once.
    pub max_running: usize,
    /// Invocations that wait for their turn.
    pub max_queue: usize,
    /// Connections that are open at once.
    pub max_connections: usize,
    /// How long an invocation may take that sets no limit.
    pub timeout: Duration,
    /// How long a VM that an invocation has left behind may be idle.
    pub idle_timeout: Duration,
    /// Bytes that a guest may write before it answers.
    pub max_output_bytes: u64,
    /// VM processes that are kept ready.
    pub shells: usize,
    /// How long invocations may go on when the service is told to stop.
    pub grace: Duration,
}

/// What to serve, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where state is kept.
    pub dir: PathBuf,
    /// A TCP address to listen on.
    pub listen: Option<SocketAddr>,
    /// A Unix socket to listen on.
    pub listen_unix: Option<PathBuf>,
    /// Limits.
    pub limits: Limits,
    /// Where restores take memory from that do not say.
    pub load: RestoreOptions,
    /// Where all traces go, in Chrome's trace format.
    pub trace: Option<PathBuf>,
    /// The OpenTelemetry collector that all traces go to, `http://HOST:PORT`.
    pub otlp: Option<String>,
    /// Names besides those of loopback by which clients call the service, and by which pages of it are known.
    pub hosts: Vec<String>,
    /// Directories and files of the host that clients may name, besides those of `dir` and `load`.
    pub allow_paths: Vec<PathBuf>,
    /// Cold pools of other hosts that clients may name, besides those of `load`.
    pub allow_cold: Vec<ColdSpec>,
}

/// Serves until SIGTERM, SIGINT or SIGHUP; then lets invocations finish, and ends all VMs.
pub fn run(options: Options) -> Result<(), ServeError> {
    // Before any thread exists, so that none of them takes the signals.
    let signals = EndSignals::take().map_err(ServeError::os("take signals"))?;
    // Each VM has four descriptors here, each connection one.
    raise_open_files(64 + 8 * options.limits.max_vms as u64 + 2 * options.limits.max_connections as u64 + 8192);
    let runtime = worker::runtime(tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(16));
    let runtime = runtime.map_err(ServeError::os("start the runtime"))?;
    let served = runtime.block_on(serve(options, signals));
    // Threads that wait for a disk are not waited for: all that matters was.
    runtime.shutdown_background();
    served
}

async fn serve(options: Options, signals: EndSignals) -> Result<(), ServeError> {
    let (listen, listen_unix, idle) = (options.listen, options.listen_unix.clone(), options.limits.idle_timeout);
    let grace = options.limits.grace;
    let daemon = Arc::new(Daemon::open(options)?);
    snapshots::sweep(&daemon).map_err(ServeError::os("remove unfinished snapshots"))?;
    check_pools(&daemon).await?;
    let (stop, stopped) = watch::channel(false);
    let server = Server::new(daemon.clone(), routes::router(daemon.clone()), stopped);
    let mut told = String::new();
    if let Some(address) = listen {
        let failed = |source| ServeError::Listen { address, source };
        let listener = tokio::net::TcpListener::from_std(listen_tcp(address).map_err(failed)?).map_err(failed)?;
        told += &format!("tvmm serve: listening on http://{}\n", listener.local_addr().map_err(failed)?);
        tokio::spawn(server.clone().serve(listener));
    }
    let mut _socket = None;
    if let Some(path) = &listen_unix {
        remove_stale(path);
        let (listener, file) = unix_socket::bind(path)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(ServeError::os("listen"))?;
        told += &format!("tvmm serve: listening on {}\n", path.display());
        tokio::spawn(server.clone().serve(listener));
        _socket = Some(file);
    }
    let mut chores = tokio::task::JoinSet::new();
    chores.spawn(daemon.shells.clone().keep_ready());
    chores.spawn(end_idle(daemon.clone(), idle));
    chores.spawn(write_vms(daemon.clone()));
    // Whoever started us may not want to know.
    let _ = std::io::stdout().write_all(told.as_bytes()).and_then(|()| std::io::stdout().flush());
    let mut signals = Signals::new(signals).map_err(ServeError::os("wait for signals"))?;
    signals.wait().await?;
    tracing::info!("The service is stopping");
    daemon.gate.close();
    let _ = stop.send(true);
    let finished = async {
        tokio::select! {
            () = finish(&daemon, &server, grace) => Ok(()),
            // A second signal means at once.
            signalled = signals.wait() => signalled,
        }
    };
    finished.await?;
    chores.shutdown().await;
    daemon.shells.clear();
    // Nobody waits for the VMs any more that they are for.
    daemon.copies.stop();
    end_all(&daemon).await;
    if tokio::time::timeout(DISK, save_vms(&daemon)).await.is_err() {
        tracing::warn!("The VMs that lived are not written down: the disk takes too long");
    }
    // The rest of what is to be told of the last invocations goes on meanwhile. A thread for it may not be free.
    let flushed = daemon.clone();
    let flush = blocking(move || flushed.traces.exporter.as_ref().map(|exporter| exporter.finish(FLUSH)));
    let _ = tokio::time::timeout(2 * FLUSH, flush).await;
    clear_run(&daemon).await;
    Ok(())
}

/// Removes sockets and images of VMs that are over; who would remove each may not come to it any more. What cannot be
/// removed goes at the next start.
async fn clear_run(daemon: &Arc<Daemon>) {
    let daemon = daemon.clone();
    match tokio::time::timeout(DISK, blocking(move || daemon.store.clear_run())).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => {
            let error = fault::Fault::of(&error).message;
            tracing::warn!(error, "What VMs have left cannot be removed");
        }
        Ok(Err(_)) | Err(_) => tracing::warn!("What VMs have left is not removed: the disk takes too long"),
    }
}

/// Looks into the pools that restores are to take memory from by default: a slip is told at once, and not to each client.
async fn check_pools(daemon: &Daemon) -> Result<(), ServeError> {
    const MAX_PRINTED: usize = 64 << 20;
    for (path, is_cold) in load::on_this_host(&daemon.options.load) {
        let pool = path.to_string_lossy().into_owned();
        let args = ["pool", "ls", "--json", "--", &pool].map(String::from).into();
        let ran = run_tool(&daemon.spawner, args, MAX_PRINTED, START_TIMEOUT).await;
        let (ended, _) = ran.map_err(ServeError::os("look into a pool"))?;
        if ended.code != Some(0) {
            return Err(ServeError::Pool { pool, said: ended.said });
        }
        let said = match (is_cold, path.join(MANIFEST).exists()) {
            (true, false) => "it is no pool of compressed chunks: name it by --pool",
            (false, true) => "it is a pool of compressed chunks: name it by --cold",
            _ => continue,
        };
        return Err(ServeError::Pool { pool, said: said.into() });
    }
    Ok(())
}

/// Like the standard library's, with a longer queue, and an address that is free again at once.
fn listen_tcp(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Removes a socket that no process serves any more. A file of another kind refuses connections too, and stays.
fn remove_stale(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).is_err_and(refused) {
        // What cannot be removed is told when it is bound.
        let _ = std::fs::remove_file(path);
    }
}

/// Signals that end the service.
struct Signals {
    signals: EndSignals,
    /// A duplicate, to wait with.
    ready: AsyncFd<OwnedFd>,
}

impl Signals {
    fn new(signals: EndSignals) -> std::io::Result<Signals> {
        let ready = watched::readable(signals.as_fd().try_clone_to_owned()?)?;
        Ok(Signals { signals, ready })
    }

    async fn wait(&mut self) -> Result<(), ServeError> {
        loop {
            let mut ready = self.ready.readable().await.map_err(ServeError::os("wait for signals"))?;
            if self.signals.take_one().is_some() {
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}

/// Lets what runs finish; what takes too long is ended, and told.
async fn finish(daemon: &Arc<Daemon>, server: &Server, grace: Duration) {
    let all = u32::try_from(daemon.options.limits.max_connections).unwrap_or(u32::MAX);
    if tokio::time::timeout(grace, server.slots.acquire_many(all)).await.is_ok() {
        return;
    }
    end_all(daemon).await;
    // The answers to whoever waited for them.
    let _ = tokio::time::timeout(Duration::from_secs(1), server.slots.acquire_many(all)).await;
}

async fn end_all(daemon: &Arc<Daemon>) {
    let mut ending = tokio::task::JoinSet::new();
    for vm in daemon.vms.all() {
        ending.spawn(async move { vm.process.stop().await });
    }
    ending.join_all().await;
}

/// Ends VMs that invocations have left behind, when they have been idle too long.
async fn end_idle(daemon: Arc<Daemon>, limit: Duration) {
    let pause = (limit / 4).clamp(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        tokio::time::sleep(pause).await;
        for vm in daemon.vms.idle_longer_than(limit) {
            tracing::debug!(vm = vm.id, "An idle VM is ended");
            vm.process.stop().await;
        }
    }
}

/// Writes down which VMs live whenever that changes, so that a restart can tell what became of them.
async fn write_vms(daemon: Arc<Daemon>) {
    loop {
        daemon.vms.changed.notified().await;
        save_vms(&daemon).await;
        // Many changes, one file.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn save_vms(daemon: &Arc<Daemon>) {
    let writer = daemon.clone();
    let saved = blocking(move || writer.store.save_vms(|| writer.vms.records())).await;
    if let Ok(Err(error)) = saved {
        let error = fault::Fault::of(&error).message;
        tracing::warn!(error, "The VMs that live cannot be written down");
    }
}
