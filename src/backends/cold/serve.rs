//! `tvmm serve-pages`: a read-only server of a cold pool's objects (`docs/remote.md`). Each connection has a thread.
//! Page bytes do not pass through this process: chunks go from the page cache to the socket. All waits for a client
//! have a limit (`bounded.rs`).

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
#[cfg(feature = "rdma")]
use socket2::{SockRef, TcpKeepalive};

use super::bounded::{STEP, answered_by, read_by, send_file_by, write_by};
#[cfg(feature = "rdma")]
use super::rdma::serve::{Lender, Loan, Registered};
use crate::backends::Error;
use crate::backends::cold::wire;
use crate::backends::cold::wire::{Header, Kind, Opened, RefusalReason};
use crate::snapshot::{Digest, SnapshotId};
use crate::sys::signals::EndSignals;
use crate::sys::wait::either_readable;
use crate::tiering;
use crate::tiering::cold::store::Store;
use crate::tiering::cold::{ChunkError, Index};

/// Time for a client to send its whole greeting.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Time for a client to send a request, from its first byte on.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// Connections whose clients have not greeted. With one more, the oldest is closed: silent clients do not keep out
/// others.
const MAX_SILENT: usize = 64;
/// Threads in addition to the serving ones: for clients that have not greeted, and for those being turned away.
const MORE_THREADS: usize = 2 * MAX_SILENT;
const STACK: usize = 256 << 10;
/// A client that reads by RDMA sends nothing: the interval of the probes of its host, and how many may fail.
#[cfg(feature = "rdma")]
const PROBES: (Duration, u32) = (Duration::from_secs(10), 3);

const NOT_BY_RDMA: &str = "this page server cannot be read by RDMA: it listens at a tcp: address";

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Bytes of indexes held at once.
    pub index_bytes: usize,
    /// Longest time that a connection may be idle.
    pub idle: Duration,
}

/// A server that listens.
pub struct PageServer {
    listener: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    limits: Limits,
    connections: AtomicUsize,
    threads: AtomicUsize,
    silent: Mutex<Silent>,
    /// Objects that a connection has open.
    objects: Mutex<HashMap<SnapshotId, Weak<Object>>>,
    /// Set if clients may read by RDMA.
    #[cfg(feature = "rdma")]
    lender: Option<Lender>,
}

/// An object that is served.
struct Object {
    index: Index,
    index_bytes: Vec<u8>,
    digest: Digest,
    data: File,
    #[cfg(feature = "rdma")]
    registered: Registered,
}

fn bind(address: &str) -> Result<TcpListener, Error> {
    let failed = |source| Error::Listen { address: address.to_string(), source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl PageServer {
    /// Listens at `address` (`HOST:PORT`).
    pub fn listen(store: Store, address: &str, limits: Limits) -> Result<PageServer, Error> {
        let listener = bind(address)?;
        Ok(PageServer { listener, shared: Arc::new(Shared::new(store, limits)) })
    }

    /// Listens at `address`, which must belong to an RDMA device, and lets clients read the pool by RDMA, up to
    /// `registered` bytes of it at once.
    #[cfg(feature = "rdma")]
    pub fn listen_rdma(store: Store, address: &str, limits: Limits, registered: u64) -> Result<PageServer, Error> {
        let failed = |source| Error::Listen { address: address.to_string(), source };
        let listener = bind(address)?;
        let lender = listener.local_addr().and_then(|local| Lender::new(local.ip(), registered)).map_err(failed)?;
        let shared = Shared { lender: Some(lender), ..Shared::new(store, limits) };
        Ok(PageServer { listener, shared: Arc::new(shared) })
    }

    /// Returns the address that it listens at, with the port that the system chose.
    pub fn address(&self) -> Result<SocketAddr, Error> {
        self.listener.local_addr().map_err(Error::os("ask for the address of the server"))
    }

    /// Serves until a signal ends it; returns the signal's number.
    pub fn run(&self, signals: &mut EndSignals) -> Result<i32, Error> {
        loop {
            either_readable(&self.listener, signals).map_err(Error::os("wait for connections"))?;
            if let Some(signal) = signals.take_one() {
                return Ok(signal);
            }
            match self.listener.accept() {
                Ok((stream, peer)) => self.start(stream, peer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Out of descriptors, or the client has gone already: other connections go on.
                Err(error) => {
                    tracing::warn!(%error, "A connection cannot be accepted");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn start(&self, stream: TcpStream, peer: SocketAddr) {
        let most = self.shared.limits.connections + MORE_THREADS;
        let Some(thread) = Share::take(&self.shared, |shared| &shared.threads, most) else {
            tracing::info!(%peer, "A connection is closed: too many clients say nothing, or are being turned away");
            return;
        };
        let greeting = match Greeting::begin(&self.shared, &stream) {
            Ok(greeting) => greeting,
            Err(error) => {
                tracing::warn!(%peer, %error, "A connection cannot be served");
                return;
            }
        };
        let serve = move || {
            if let Err(error) = Connection::serve(stream, greeting, &thread.shared) {
                tracing::info!(%peer, %error, "A connection has ended");
            }
        };
        let thread = std::thread::Builder::new().name("pages".into()).stack_size(STACK).spawn(serve);
        if let Err(error) = thread {
            tracing::warn!(%error, "A connection cannot be served");
        }
    }
}

/// A slot among a bounded number.
struct Share {
    shared: Arc<Shared>,
    counter: fn(&Shared) -> &AtomicUsize,
}

impl Share {
    /// Takes a slot if fewer than `most` are taken.
    fn take(shared: &Arc<Shared>, counter: fn(&Shared) -> &AtomicUsize, most: usize) -> Option<Share> {
        let share = Share { shared: shared.clone(), counter };
        // If none was free, dropping the share takes the count back.
        (counter(shared).fetch_add(1, Ordering::Relaxed) < most).then_some(share)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        (self.counter)(&self.shared).fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connections whose clients have not greeted, the oldest first.
#[derive(Default)]
struct Silent {
    next: u64,
    streams: VecDeque<(u64, TcpStream)>,
}

/// A connection while its client has not greeted.
struct Greeting {
    shared: Arc<Shared>,
    number: u64,
    deadline: Instant,
}

impl Greeting {
    /// Registers a connection. If there are too many, the oldest is closed.
    fn begin(shared: &Arc<Shared>, stream: &TcpStream) -> io::Result<Greeting> {
        let stream = stream.try_clone()?;
        let mut silent = shared.silent.lock().unwrap_or_else(PoisonError::into_inner);
        if silent.streams.len() >= MAX_SILENT
            && let Some((_, oldest)) = silent.streams.pop_front()
        {
            // The oldest's thread reads the end of its stream and ends. A failure means that it is closed already.
            let _ = oldest.shutdown(Shutdown::Both);
        }
        let number = silent.next;
        silent.next += 1;
        silent.streams.push_back((number, stream));
        Ok(Greeting { shared: shared.clone(), number, deadline: Instant::now() + GREETING_TIME })
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        let mut silent = self.shared.silent.lock().unwrap_or_else(PoisonError::into_inner);
        silent.streams.retain(|(number, _)| *number != self.number);
    }
}

impl Shared {
    fn new(store: Store, limits: Limits) -> Shared {
        Shared {
            store,
            limits,
            connections: AtomicUsize::new(0),
            threads: AtomicUsize::new(0),
            silent: Mutex::default(),
            objects: Mutex::default(),
            #[cfg(feature = "rdma")]
            lender: None,
        }
    }

    fn object(&self, snapshot: SnapshotId) -> Result<Arc<Object>, (RefusalReason, String)> {
        let mut objects = self.objects.lock().unwrap_or_else(PoisonError::into_inner);
        objects.retain(|_, object| object.strong_count() > 0);
        if let Some(object) = objects.get(&snapshot).and_then(Weak::upgrade) {
            return Ok(object);
        }
        let held: usize = objects.values().filter_map(Weak::upgrade).map(|object| object.index_bytes.len()).sum();
        let object = Object::load(&self.store, snapshot).map_err(|error| {
            let why = match &error {
                ChunkError::NotHeld { .. } => RefusalReason::NotHeld,
                ChunkError::Index { .. } | ChunkError::IndexContainer { .. } | ChunkError::OtherSnapshot { .. } => {
                    RefusalReason::Damaged
                }
                _ => RefusalReason::Failed,
            };
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
            (why, format!("{error}{cause}"))
        })?;
        if held + object.index_bytes.len() > self.limits.index_bytes {
            return Err((RefusalReason::Busy, "too many snapshots are open".to_string()));
        }
        let object = Arc::new(object);
        objects.insert(snapshot, Arc::downgrade(&object));
        Ok(object)
    }
}

impl Object {
    fn load(store: &Store, snapshot: SnapshotId) -> Result<Object, ChunkError> {
        let index_bytes = store.index_bytes(snapshot)?;
        let digest = Digest(*blake3::hash(&index_bytes).as_bytes());
        let index = Index::parse(&format!("the index of {snapshot}"), index_bytes.clone(), snapshot)?;
        let data = store.open_data(&index)?;
        Ok(Object {
            index,
            index_bytes,
            digest,
            data,
            #[cfg(feature = "rdma")]
            registered: Registered::default(),
        })
    }
}

/// One client.
struct Connection<'a> {
    stream: TcpStream,
    shared: &'a Shared,
    /// The client's RDMA connection, while it reads so. Dropped before the object.
    #[cfg(feature = "rdma")]
    loan: Option<Loan>,
    open: Option<Arc<Object>>,
}

/// Serves one connection on this thread, until its client closes it.
///
/// # Errors
/// The reason for any other end.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn answer_one(stream: TcpStream, store: Store, limits: Limits) -> io::Result<()> {
    let shared = Arc::new(Shared::new(store, limits));
    let greeting = Greeting::begin(&shared, &stream)?;
    Connection::serve(stream, greeting, &shared)
}

impl<'a> Connection<'a> {
    /// Serves until the client closes the connection. The error is the reason for any other end.
    fn serve(stream: TcpStream, greeting: Greeting, shared: &'a Arc<Shared>) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(STEP))?;
        let mut connection = Connection {
            stream,
            shared,
            #[cfg(feature = "rdma")]
            loan: None,
            open: None,
        };
        let mut greeted = [0; wire::GREETING_LEN];
        read_by(&connection.stream, &mut greeted, greeting.deadline)?;
        drop(greeting);
        let Some((answer, is_spoken)) = wire::answer(&greeted) else {
            return Err(io::Error::other("it does not speak the page service's protocol"));
        };
        connection.send(&answer)?;
        if !is_spoken {
            return Err(io::Error::other("it speaks no version of the protocol that this build does"));
        }
        let Some(_held) = Share::take(shared, |shared| &shared.connections, shared.limits.connections) else {
            connection.refuse(0, RefusalReason::Busy, "the page server has too many connections")?;
            return Err(io::Error::other("there are too many"));
        };
        connection.stream.set_read_timeout(Some(shared.limits.idle))?;
        while connection.request()? {}
        Ok(())
    }

    /// Answers the next request. Returns false if there is none.
    fn request(&mut self) -> io::Result<bool> {
        let mut bytes = [0; wire::HEADER_LEN];
        // Between requests a client may be idle; a request that has begun must arrive in time.
        let begun = loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(false),
                Ok(count) => break count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        let deadline = Instant::now() + REQUEST_TIME;
        read_by(&self.stream, &mut bytes[begun..], deadline)?;
        let header = match Header::parse(&bytes) {
            Ok(header) => header,
            // The start of the next frame is unknown.
            Err(what) => return self.refuse(0, RefusalReason::BadRequest, &what).and(Err(io::Error::other(what))),
        };
        let mut payload = vec![0; header.len as usize];
        read_by(&self.stream, &mut payload, deadline)?;
        if crc32c::crc32c(&payload) != header.checksum {
            let what = "a request does not have its checksum";
            return self.refuse(header.id, RefusalReason::BadRequest, what).and(Err(io::Error::other(what)));
        }
        self.answer(header, &payload).map(|()| true)
    }

    fn answer(&mut self, header: Header, payload: &[u8]) -> io::Result<()> {
        let bad = "the request makes no sense";
        match header.kind {
            Kind::Open => match wire::parse_open(payload).map(|snapshot| self.shared.object(snapshot)) {
                Some(Ok(object)) => {
                    let opened = Opened {
                        index_len: object.index_bytes.len() as u64,
                        data_len: object.index.data_len(),
                        index_digest: object.digest,
                    };
                    self.open(object)?;
                    self.send(&wire::frame(Kind::Opened, header.id, &opened.to_bytes()))
                }
                Some(Err((why, what))) => self.refuse(header.id, why, &what),
                None => self.refuse(header.id, RefusalReason::BadRequest, bad),
            },
            Kind::ReadIndex => {
                let object = self.open.clone();
                let part = wire::parse_read_index(payload).and_then(|(offset, len)| {
                    let start = usize::try_from(offset).ok()?;
                    let range = start..start.checked_add(len as usize)?;
                    object.as_ref()?.index_bytes.get(range).filter(|_| len <= wire::MAX_ANSWER)
                });
                match part {
                    Some(part) => self.send(&wire::frame(Kind::IndexBytes, header.id, part)),
                    None => self.refuse(header.id, RefusalReason::BadRequest, bad),
                }
            }
            Kind::Read => {
                let object = self.open.clone();
                let asked = wire::parse_read(payload).zip(object);
                let found = asked.and_then(|((first, count), object)| {
                    let (len, checksum) = wire::chunks_checksum(&object.index, first, count)?;
                    Some((Header { kind: Kind::Chunks, id: header.id, len, checksum }, first, object))
                });
                match found {
                    Some((answer, first, object)) => self.send_chunks(answer, first, &object),
                    None => self.refuse(header.id, RefusalReason::BadRequest, bad),
                }
            }
            Kind::Attach => self.attach(header.id, payload),
            Kind::Opened | Kind::IndexBytes | Kind::Chunks | Kind::Attached | Kind::Refused => {
                self.refuse(header.id, RefusalReason::BadRequest, bad)
            }
        }
    }

    fn open(&mut self, object: Arc<Object>) -> io::Result<()> {
        #[cfg(feature = "rdma")]
        self.end_loan()?;
        self.open = Some(object);
        Ok(())
    }

    /// Ends the client's RDMA connection: from now on it must send requests in time again.
    #[cfg(feature = "rdma")]
    fn end_loan(&mut self) -> io::Result<()> {
        self.loan = None;
        self.stream.set_read_timeout(Some(self.shared.limits.idle))
    }

    #[cfg(not(feature = "rdma"))]
    fn attach(&mut self, id: u64, _: &[u8]) -> io::Result<()> {
        self.refuse(id, RefusalReason::Never, NOT_BY_RDMA)
    }

    /// Lets the client read the open object by RDMA until it opens another or disconnects.
    #[cfg(feature = "rdma")]
    fn attach(&mut self, id: u64, payload: &[u8]) -> io::Result<()> {
        let Some(lender) = &self.shared.lender else { return self.refuse(id, RefusalReason::Never, NOT_BY_RDMA) };
        let (Some(reader), Some(object)) = (wire::Endpoint::parse(payload), self.open.clone()) else {
            return self.refuse(id, RefusalReason::BadRequest, "the request makes no sense");
        };
        // A client has one RDMA connection at a time.
        self.end_loan()?;
        let peer = self.stream.peer_addr()?;
        match lender.lend(&object.data, object.index.data_len(), &object.registered, peer, reader) {
            Ok((loan, attached)) => {
                self.loan = Some(loan);
                // The server does not see RDMA reads, so the client counts as present while its host answers.
                self.stream.set_read_timeout(None)?;
                let probes = TcpKeepalive::new().with_time(PROBES.0).with_interval(PROBES.0).with_retries(PROBES.1);
                SockRef::from(&self.stream).set_tcp_keepalive(&probes)?;
                self.send(&wire::frame(Kind::Attached, id, &attached.to_bytes()))
            }
            Err((why, what)) => self.refuse(id, why, &what),
        }
    }

    /// Sends chunks straight from the page cache: the client compares the bytes with the checksums of its index.
    fn send_chunks(&mut self, header: Header, first: u32, object: &Object) -> io::Result<()> {
        let deadline = answered_by(header.len as usize);
        write_by(&self.stream, &header.to_bytes(), SendFlags::MORE, deadline)?;
        let offset = object.index.span(first..first + 1).start;
        send_file_by(&self.stream, (&object.data, offset), header.len as usize, deadline)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        write_by(&self.stream, bytes, SendFlags::empty(), answered_by(bytes.len()))
    }

    fn refuse(&mut self, id: u64, why: RefusalReason, what: &str) -> io::Result<()> {
        self.send(&wire::frame(Kind::Refused, id, &wire::refusal(why, what)))
    }
}

/// Opens the pool to serve.
pub fn open_store(dir: &std::path::Path) -> Result<Store, Error> {
    Ok(Store::open(dir).map_err(tiering::Error::from)?)
}
