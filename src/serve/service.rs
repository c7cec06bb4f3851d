//! The life of the service: it opens its sockets, serves until a signal, lets invocations finish and ends all VMs.

use std::io::Write;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::blocking::blocking;
use super::daemon::{Daemon, START_TIMEOUT};
use super::error::ServeError;
use super::fault::Fault;
use super::guard::Guard;
use super::idle;
use super::load;
use super::options::Options;
use super::routes;
use super::server::Server;
use super::snapshots;
use super::standby;
use super::vm::process::run_tool;
use crate::sys::limits::raise_open_files;
use crate::sys::signals::{EndSignals, HANG_UP};
use crate::sys::unix_socket;
use crate::sys::watched;
use crate::sys::worker;
use crate::tiering::cold::store::MANIFEST;

/// Longest wait for a collector at the end.
const FLUSH: Duration = Duration::from_secs(2);
/// Longest wait for the disk at the end, for each step.
const DISK: Duration = Duration::from_secs(10);

/// Serves until SIGTERM or SIGINT, or SIGHUP if that does not open files again; then lets invocations finish, and ends
/// all VMs.
pub fn run(options: Options) -> Result<(), ServeError> {
    // Taken before any thread exists, so that none of them gets the signals.
    let signals = EndSignals::take().map_err(ServeError::os("take signals"))?;
    // Each VM has four descriptors here, each connection one.
    raise_open_files(64 + 8 * options.limits.max_vms as u64 + 2 * options.limits.max_connections as u64 + 8192);
    let runtime = worker::runtime(tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(16));
    let runtime = runtime.map_err(ServeError::os("start the runtime"))?;
    let served = runtime.block_on(serve(options, signals));
    // Threads still waiting for a disk are left: the important ones have been waited for.
    runtime.shutdown_background();
    served
}

async fn serve(options: Options, signals: EndSignals) -> Result<(), ServeError> {
    let listen = options.listen;
    let listen_unix = options.listen_unix.clone();
    let grace = options.limits.grace;
    let daemon = Arc::new(Daemon::open(options)?);
    daemon.vms.set_suspends(idle::RoomBySuspension::of(&daemon));
    snapshots::sweep(&daemon).map_err(ServeError::os("remove unfinished snapshots"))?;
    check_pools(&daemon).await?;
    let (stop, stopped) = watch::channel(false);
    let guard = Arc::new(Guard::open(&daemon.options, daemon.access.clone())?);
    let server = Server::new(daemon.clone(), routes::router(daemon.clone()), guard.clone(), stopped);
    let mut told = String::new();
    if let Some(address) = listen {
        let failed = |source| ServeError::Listen { address, source };
        let tls = guard.tls();
        if tls.is_none() && !address.ip().to_canonical().is_loopback() {
            tracing::warn!(%address, "Tokens and answers can be read on the network: give --tls-cert, or use a proxy");
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = tokio::net::TcpListener::from_std(listen_tcp(address).map_err(failed)?).map_err(failed)?;
        told += &format!("tvmm serve: listening on {scheme}://{}\n", listener.local_addr().map_err(failed)?);
        tokio::spawn(server.clone().serve(listener, tls));
    }
    let mut _socket = None;
    if let Some(path) = &listen_unix {
        unix_socket::remove_stale(path);
        let (listener, file) = unix_socket::bind(path)?;
        let listener = tokio::net::UnixListener::from_std(listener).map_err(ServeError::os("listen"))?;
        told += &format!("tvmm serve: listening on {}\n", path.display());
        tokio::spawn(server.clone().serve(listener, None));
        _socket = Some(file);
    }
    let mut chores = tokio::task::JoinSet::new();
    chores.spawn(daemon.shells.clone().keep_ready());
    chores.spawn(standby::keep_ready(daemon.clone()));
    chores.spawn(idle::descend_all(daemon.clone()));
    chores.spawn(write_vms(daemon.clone()));
    // Best effort: the parent process may have closed the output.
    let _ = std::io::stdout().write_all(told.as_bytes()).and_then(|()| std::io::stdout().flush());
    let mut signals = Signals::new(signals).map_err(ServeError::os("wait for signals"))?;
    signals.wait_for_end(&guard).await?;
    tracing::info!("The service is stopping");
    daemon.gate.close();
    let _ = stop.send(true);
    let finished = async {
        tokio::select! {
            () = finish(&daemon, &server, grace) => Ok(()),
            // A second signal ends everything at once.
            signalled = signals.wait_for_end(&guard) => signalled,
        }
    };
    finished.await?;
    chores.shutdown().await;
    daemon.shells.clear();
    daemon.vms.clear_spares();
    // Cancels drive copies: the VMs that they were for will not start.
    daemon.copies.stop();
    end_all(&daemon).await;
    if tokio::time::timeout(DISK, save_vms(&daemon)).await.is_err() {
        tracing::warn!("Cannot write the list of VMs that lived: the disk takes too long");
    }
    // The last traces are sent meanwhile. A thread for that may not be free.
    let flushed = daemon.clone();
    let flush = blocking(move || flushed.traces.exporter.as_ref().map(|exporter| exporter.finish(FLUSH)));
    let _ = tokio::time::timeout(2 * FLUSH, flush).await;
    clear_run(&daemon).await;
    let _ = tokio::time::timeout(DISK, blocking(move || guard.finish(Instant::now() + DISK))).await;
    Ok(())
}

/// Removes sockets and images of ended VMs, whose own tasks may not run any more. A path that cannot be removed is
/// removed at the next start.
async fn clear_run(daemon: &Arc<Daemon>) {
    let daemon = daemon.clone();
    match tokio::time::timeout(DISK, blocking(move || daemon.store.clear_run())).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(error))) => {
            let error = Fault::of(&error).message;
            tracing::warn!(error, "Cannot remove the files that VMs have left");
        }
        Ok(Err(_)) | Err(_) => tracing::warn!("Cannot remove the files that VMs have left: the disk takes too long"),
    }
}

/// Opens the default pools of restores: a misspelt name is reported at the start, not to each client.
async fn check_pools(daemon: &Daemon) -> Result<(), ServeError> {
    for (path, is_cold) in load::on_this_host(&daemon.options.load) {
        let pool = path.to_string_lossy().into_owned();
        let args = ["pool", "ls", "--json", "--", &pool];
        let ran = run_tool(&daemon.spawner, args, START_TIMEOUT).await;
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

/// As the standard library's, with a longer queue, and an address that can be reused at once.
fn listen_tcp(address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
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

    /// Waits for a signal that ends the service. SIGHUP opens files again, if there are any.
    async fn wait_for_end(&mut self, guard: &Arc<Guard>) -> Result<(), ServeError> {
        while self.wait().await? == HANG_UP && guard.has_files() {
            let guard = guard.clone();
            if blocking(move || guard.reload()).await.is_err() {
                tracing::error!("Cannot open files again: the work was given up");
            }
        }
        Ok(())
    }

    /// Waits for a signal, and returns its number.
    async fn wait(&mut self) -> Result<i32, ServeError> {
        loop {
            let mut ready = self.ready.readable().await.map_err(ServeError::os("wait for signals"))?;
            if let Some(signal) = self.signals.take_one() {
                return Ok(signal);
            }
            ready.clear_ready();
        }
    }
}

/// Lets running invocations finish; those that take too long are ended, and logged.
async fn finish(daemon: &Arc<Daemon>, server: &Server, grace: Duration) {
    let all = u32::try_from(daemon.options.limits.max_connections).unwrap_or(u32::MAX);
    if tokio::time::timeout(grace, server.slots.acquire_many(all)).await.is_ok() {
        return;
    }
    end_all(daemon).await;
    // Time for the last answers to be sent.
    let _ = tokio::time::timeout(Duration::from_secs(1), server.slots.acquire_many(all)).await;
}

async fn end_all(daemon: &Arc<Daemon>) {
    let mut ending = tokio::task::JoinSet::new();
    for vm in daemon.vms.all() {
        ending.spawn(async move { vm.life.stop_because("the service was stopped").await });
    }
    ending.join_all().await;
}

/// Writes the list of living VMs whenever it changes, so that a restart can report their end.
async fn write_vms(daemon: Arc<Daemon>) {
    loop {
        daemon.vms.changed.notified().await;
        save_vms(&daemon).await;
        // Many changes go into one file.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn save_vms(daemon: &Arc<Daemon>) {
    let writer = daemon.clone();
    let saved = blocking(move || writer.store.save_vms(|| writer.vms.records())).await;
    if let Ok(Err(error)) = saved {
        let error = Fault::of(&error).message;
        tracing::warn!(error, "Cannot write the list of living VMs");
    }
}
