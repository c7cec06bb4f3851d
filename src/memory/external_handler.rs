//! A page-fault handler outside the VMM, by Firecracker's protocol
//! (`docs/snapshotting/handling-page-faults-on-snapshot-resume.md`): tvmm connects to the handler's Unix socket and
//! sends one message, a JSON array that says where guest memory is mapped, with the userfaultfd as SCM_RIGHTS.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use socket2::{Domain, SockAddr, Socket, Type};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::memory::Error;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::guest_ram::GuestRam;
use crate::memory::stall::{HandlerProbe, Stalls};
use crate::snapshot::PAGE_SIZE;
use crate::sys::handshake::Mapping;
use crate::sys::uffd::Uffd;
use crate::sys::worker::Worker;

/// A handler that serves this VM's memory. Its process is watched: if it ends, the guest is ended too, because it would
/// wait for ever.
pub struct ExternalHandler {
    has_failed: Arc<AtomicBool>,
    /// Its thread ends first.
    _watch: Worker,
    /// Kept open: the handler sees the end of this stream when the VM has ended.
    _stream: UnixStream,
}

impl ExternalHandler {
    /// Hands `ram` behind `uffd` to the handler that listens at `socket`.
    pub fn connect(
        socket: &Path,
        ram: &GuestRam,
        uffd: Arc<Uffd>,
        (ending, stalls): (Arc<EndingSignal>, &Stalls),
    ) -> Result<Self, Error> {
        let failed = |doing| move |source| Error::File { doing, path: socket.to_owned(), source };
        let stream = connect_within(stalls.limit(), socket).map_err(failed("connect to the page-fault handler at"))?;
        let mappings: Vec<Mapping> = ram
            .slots()
            .map(|(range, host)| Mapping {
                base_host_virt_addr: host as u64,
                size: range.len as usize,
                offset: range.file_offset,
                page_size: PAGE_SIZE as usize,
                page_size_kib: PAGE_SIZE as usize,
            })
            .collect();
        let message = serde_json::to_vec(&mappings)
            .map_err(|error| failed("describe memory to the page-fault handler at")(io::Error::other(error)))?;
        let sent = stream.send_with_fd(&message[..], uffd.as_raw_fd());
        let sent = sent.map_err(io::Error::from).map_err(failed("hand memory to the page-fault handler at"))?;
        if sent != message.len() {
            let short = io::Error::from(io::ErrorKind::WriteZero);
            return Err(failed("hand memory to the page-fault handler at")(short));
        }
        let peer = rustix::net::sockopt::socket_peercred(&stream)
            .map_err(io::Error::from)
            .map_err(failed("find the process of the page-fault handler at"))?;
        let process = peer.pid.as_raw_nonzero().get();
        stalls.watch_handler(HandlerProbe::new(uffd, socket.to_owned(), process, ram.slots()), ending.clone());
        Self::watch(peer.pid, stream, socket, ending)
    }

    /// Ends the guest when the handler's process ends.
    fn watch(pid: Pid, stream: UnixStream, socket: &Path, ending: Arc<EndingSignal>) -> Result<Self, Error> {
        let failed = |source| Error::File { doing: "watch the page-fault handler at", path: socket.to_owned(), source };
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(failed)?;
        let asked = stop.try_clone().map_err(failed)?;
        let what = format!("The page-fault handler at {} (process {pid}) has ended", socket.display());
        let has_failed = Arc::new(AtomicBool::new(false));
        let failed_now = has_failed.clone();
        let watch = move || {
            if crate::sys::wait::either_readable(&pidfd, &asked).is_ok() && asked.read().is_err() {
                failed_now.store(true, Ordering::SeqCst);
                ending.end(Ending::Failed(what));
            }
        };
        let stop = move || drop(stop.write(1));
        let watch = Worker::start(Builder::new().name("handler-watch".into()), stop, watch).map_err(failed)?;
        Ok(ExternalHandler { has_failed, _watch: watch, _stream: stream })
    }

    /// Returns whether the handler's process has ended: threads that wait for its pages wait for ever.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst)
    }
}

/// Pause between two attempts at a full socket.
const CONNECT_AGAIN: Duration = Duration::from_millis(10);

/// Connects to a Unix socket. If the listener does not accept and its backlog is full, connect(2) would wait for ever.
fn connect_within(limit: Duration, path: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + limit;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let address = SockAddr::unix(path)?;
    loop {
        match socket.connect(&address) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(CONNECT_AGAIN);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let what = format!("it accepts no connection within {} s (--fault-timeout)", limit.as_secs_f64());
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            Err(error) => return Err(error),
        }
    }
    socket.set_nonblocking(false)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}
