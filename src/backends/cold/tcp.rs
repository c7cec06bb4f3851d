//! The client of the page service (`docs/remote.md`): requests are pipelined, answers come in order.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

use crate::backends::cold::wire;
use crate::backends::cold::wire::{Header, Kind, Opened, RefusalReason};
use crate::snapshot::{Digest, SnapshotId};
use crate::sys::bounded_wait::Wait;
use crate::tiering::cold::{Broken, ChunkSource, EachChunk, Flow, Index, MAX_INDEX_LEN, Place, SourceCounters};

/// Stored bytes requested at once.
const READ_BYTES: u64 = 1 << 20;
/// Stored bytes requested and not yet received: enough for 10 Gbit/s over 3 ms.
const WINDOW_BYTES: u64 = 4 << 20;
/// Concurrent requests; all of them fit a socket's buffer.
const WINDOW_REQUESTS: usize = 256;
/// Bytes taken from the socket at once: a few chunks, which stay in the CPU's cache until they are used.
const READ_AT_ONCE: usize = 512 << 10;
/// A piece of an index.
const INDEX_PIECE: u32 = 1 << 20;
/// Interval of the probes of idle connections, by which a vanished server is noticed.
const KEEPALIVE: Duration = Duration::from_secs(15);
/// Time for one attempt at a connection; attempts are repeated within the patience.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// Interval at which a waiting thread looks whether its bytes are still wanted.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

pub struct TcpPlace {
    name: String,
    server: String,
    /// Time for a server to send one unit: an answer, a piece of an index, a chunk.
    patience: Duration,
}

impl TcpPlace {
    pub fn new(server: String, patience: Duration) -> TcpPlace {
        TcpPlace { name: format!("tcp:{server}"), server, patience }
    }

    /// Opens a connection and sends greeting and `Open` without waiting for the answers.
    pub(crate) fn connect(&self, snapshot: SnapshotId, counters: &Arc<SourceCounters>) -> Result<Connection, Broken> {
        // A name may have many addresses; they share this time.
        let mut wait = Wait::new(format!("a connection to {}", self.name), self.patience);
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in self.addresses(&mut wait)? {
            if wait.is_over() {
                break;
            }
            match TcpStream::connect_timeout(&address, self.patience.min(CONNECT_TIME)) {
                Ok(stream) => {
                    counters.connections.fetch_add(1, Ordering::Relaxed);
                    counters.round_trips.fetch_add(1, Ordering::Relaxed);
                    let wait = Wait::new(self.name.as_str(), self.patience);
                    let mut connection = Connection { stream, wait, next_id: 1, counters: counters.clone() };
                    connection.begin(snapshot).map_err(|error| connection.lost(error))?;
                    return Ok(connection);
                }
                Err(error) => last = error,
            }
        }
        Err(Broken::Transient(format!("it cannot be connected to: {last}")))
    }

    /// The addresses of the server. A name is looked up on its own thread, because getaddrinfo(3) has no time limit.
    fn addresses(&self, wait: &mut Wait) -> Result<Vec<SocketAddr>, Broken> {
        if let Ok(address) = self.server.parse() {
            return Ok(vec![address]);
        }
        let failed = |error: io::Error| Broken::Transient(format!("its address cannot be found: {error}"));
        let (found, answer) = channel();
        let server = self.server.clone();
        let look_up = move || {
            // If the receiver is gone, the answer has come too late.
            let _ = found.send(server.to_socket_addrs().map(Iterator::collect));
        };
        std::thread::Builder::new().name("resolver".into()).spawn(look_up).map_err(failed)?;
        loop {
            match answer.recv_timeout(wait.step()) {
                Ok(addresses) => return addresses.map_err(failed),
                Err(RecvTimeoutError::Timeout) if !wait.is_over() => {}
                Err(_) => {
                    let what = format!("no answer within {} s", wait.limit().as_secs_f64());
                    return Err(failed(io::Error::new(io::ErrorKind::TimedOut, what)));
                }
            }
        }
    }
}

impl Place for TcpPlace {
    fn name(&self) -> &str {
        &self.name
    }

    fn index(&self, snapshot: SnapshotId, counters: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken> {
        let mut connection = self.connect(snapshot, counters)?;
        let opened = connection.opened()?;
        if opened.index_len > MAX_INDEX_LEN {
            return Err(Broken::Refused(format!("its index would have {} bytes", opened.index_len)));
        }
        // One round trip for greeting and `Open`, one for the pieces.
        counters.round_trips.fetch_add(2, Ordering::Relaxed);
        let piece = |offset: u64| (opened.index_len - offset).min(u64::from(INDEX_PIECE)) as u32;
        let offsets = (0..opened.index_len).step_by(INDEX_PIECE as usize);
        let first = connection.next_id;
        let mut requests = Vec::new();
        for offset in offsets.clone() {
            let payload = wire::read_index(offset, piece(offset));
            requests.extend(wire::frame(Kind::ReadIndex, connection.take_id(), &payload));
            counters.requests.fetch_add(1, Ordering::Relaxed);
        }
        connection.send(&requests)?;
        let mut bytes = vec![0; opened.index_len as usize];
        for (number, offset) in offsets.enumerate() {
            let header = connection.header(Kind::IndexBytes, first + number as u64)?;
            let part = &mut bytes[offset as usize..][..piece(offset) as usize];
            connection.payload(header, part)?;
        }
        if opened.index_digest.0 == *blake3::hash(&bytes).as_bytes() {
            Ok(bytes)
        } else {
            Err(Broken::Damaged("its index does not have its digest".to_string()))
        }
    }

    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken> {
        let connection = self.connect(index.snapshot(), &counters)?;
        let index = index.clone();
        let buffer = Vec::new();
        Ok(Box::new(TcpSource { connection, digest, is_open: false, index, counters, buffer }))
    }
}

/// A connection, up to the point where chunks are requested.
pub(crate) struct Connection {
    stream: TcpStream,
    /// The time limit of the next unit.
    wait: Wait,
    next_id: u64,
    counters: Arc<SourceCounters>,
}

/// The id of the `Open` that goes out with the greeting.
const OPEN_ID: u64 = 0;

impl Connection {
    fn begin(&mut self, snapshot: SnapshotId) -> io::Result<()> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(Some(LOOK.min(self.wait.limit() / 4)))?;
        self.stream.set_write_timeout(Some(self.wait.limit()))?;
        SockRef::from(&self.stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))?;
        self.stream.write_all(&[&wire::greeting()[..], &wire::frame(Kind::Open, OPEN_ID, &snapshot.0)].concat())
    }

    #[cfg(feature = "rdma")]
    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(crate) fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    pub(crate) fn lost(&self, error: io::Error) -> Broken {
        Broken::Transient(match error.kind() {
            io::ErrorKind::UnexpectedEof => "it has closed the connection".to_string(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                format!("it has not answered for {:.1} s", self.wait.elapsed().as_secs_f64())
            }
            _ => format!("the connection is lost: {error}"),
        })
    }

    /// Sends requests. The time limit of their answers begins.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        self.wait.restart();
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.lost(error)),
            }
            self.check_time()?;
        }
        Ok(())
    }

    /// Starts the time limit of the next unit anew.
    #[cfg(feature = "rdma")]
    pub(crate) fn restart(&mut self) {
        self.wait.restart();
    }

    /// Returns an error if the time is up or the pool is closed.
    pub(crate) fn check_time(&mut self) -> Result<(), Broken> {
        if self.wait.is_over() || self.counters.closed.load(Ordering::Relaxed) {
            Err(self.lost(io::ErrorKind::TimedOut.into()))
        } else {
            Ok(())
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), Broken> {
        let mut done = 0;
        while done < bytes.len() {
            done += self.read_some(&mut bytes[done..])?;
        }
        Ok(())
    }

    /// Reads available bytes, at least one. The time limit is the unit's: a server that sends a byte now and then gets
    /// no more time than a silent one.
    fn read_some(&mut self, bytes: &mut [u8]) -> Result<usize, Broken> {
        loop {
            self.check_time()?;
            match self.stream.read(bytes) {
                Ok(0) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => return Ok(read),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => return Err(self.lost(error)),
            }
        }
    }

    /// Reads the answers to greeting and `Open`.
    pub(crate) fn opened(&mut self) -> Result<Opened, Broken> {
        self.wait.restart();
        let mut answer = [0; wire::GREETING_LEN];
        self.read(&mut answer)?;
        wire::check_answer(&answer).map_err(Broken::Refused)?;
        let header = self.header(Kind::Opened, OPEN_ID)?;
        let mut payload = vec![0; header.len as usize];
        self.payload(header, &mut payload)?;
        Opened::parse(&payload).ok_or_else(|| Broken::Damaged("its answer to an open makes no sense".to_string()))
    }

    /// Reads the header of the next answer, which must have this kind and id. The time limit of the whole answer
    /// begins.
    pub(crate) fn header(&mut self, kind: Kind, id: u64) -> Result<Header, Broken> {
        self.wait.restart();
        let mut bytes = [0; wire::HEADER_LEN];
        self.read(&mut bytes)?;
        let header = Header::parse(&bytes).map_err(Broken::Damaged)?;
        if header.kind == Kind::Refused {
            return Err(self.refusal(header));
        }
        if (header.kind, header.id) != (kind, id) {
            let what = format!("it answers {:?} {} to a request for {kind:?} {id}", header.kind, header.id);
            return Err(Broken::Damaged(what));
        }
        Ok(header)
    }

    fn refusal(&mut self, header: Header) -> Broken {
        let mut payload = vec![0; (header.len as usize).min(wire::MAX_TEXT + 2)];
        if let Err(broken) = self.payload(Header { len: payload.len() as u32, ..header }, &mut payload) {
            return broken;
        }
        match wire::parse_refusal(&payload) {
            Some((Some(RefusalReason::Busy | RefusalReason::Failed), text)) => Broken::Transient(text),
            Some((Some(RefusalReason::Damaged), text)) => Broken::Damaged(text),
            Some((_, text)) => Broken::Refused(text),
            None => Broken::Damaged("its refusal makes no sense".to_string()),
        }
    }

    /// Reads a payload whose length is that of `bytes`.
    pub(crate) fn payload(&mut self, header: Header, bytes: &mut [u8]) -> Result<(), Broken> {
        if header.len as usize != bytes.len() {
            return Err(Broken::Damaged(format!("it answers {} bytes instead of {}", header.len, bytes.len())));
        }
        self.read(bytes)?;
        if crc32c::crc32c(bytes) == header.checksum {
            Ok(())
        } else {
            Err(Broken::Damaged("an answer does not have its checksum".to_string()))
        }
    }
}

struct TcpSource {
    connection: Connection,
    digest: Digest,
    /// True: greeting and `Open` have been answered.
    is_open: bool,
    index: Arc<Index>,
    counters: Arc<SourceCounters>,
    buffer: Vec<u8>,
}

impl TcpSource {
    /// Sends requests for spans from `*sent` on, as many as may be under way; `ahead` counts their bytes.
    fn request(&mut self, spans: &[Range<u32>], sent: &mut usize, at: usize, ahead: &mut u64) -> Result<(), Broken> {
        let mut requests = Vec::new();
        while let Some(span) = spans.get(*sent) {
            let bytes = self.index.span(span.clone());
            let len = bytes.end - bytes.start;
            if *sent > at && (*ahead + len > WINDOW_BYTES || *sent - at >= WINDOW_REQUESTS) {
                break;
            }
            let payload = wire::read(span.start, span.end - span.start);
            requests.extend(wire::frame(Kind::Read, self.connection.take_id(), &payload));
            *ahead += len;
            *sent += 1;
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
        }
        if requests.is_empty() { Ok(()) } else { self.connection.send(&requests) }
    }

    fn check_open(&mut self) -> Result<(), Broken> {
        if self.is_open {
            return Ok(());
        }
        if self.connection.opened()?.index_digest != self.digest {
            return Err(Broken::Refused("it holds another packing of the snapshot".to_string()));
        }
        self.is_open = true;
        Ok(())
    }

    /// Takes the answer for one span.
    fn take(&mut self, span: Range<u32>, id: u64, each: &mut EachChunk) -> Result<Flow, Broken> {
        let header = self.connection.header(Kind::Chunks, id)?;
        let first = span.start;
        let count = span.end - span.start;
        // Each chunk is compared with the same index, so the payload's checksum need not be computed from its bytes.
        if wire::chunks_checksum(&self.index, first, count) != Some((header.len, header.checksum)) {
            let what = format!("what it answers for chunks {first} to {} is not what was stored", span.end - 1);
            return Err(Broken::Damaged(what));
        }
        let mut left = header.len as usize;
        let mut ready = 0..0;
        for number in span {
            let len = self.index.chunks()[number as usize].stored_len as usize;
            while ready.len() < len {
                // Moves the part of the chunk that has arrived to the front, and reads available bytes behind it.
                self.buffer.copy_within(ready.clone(), 0);
                ready = 0..ready.len();
                if self.buffer.len() < len.max(READ_AT_ONCE) {
                    self.buffer.resize(len.max(READ_AT_ONCE), 0);
                }
                let room = (self.buffer.len() - ready.end).min(left);
                let read = self.connection.read_some(&mut self.buffer[ready.end..ready.end + room])?;
                (left, ready.end) = (left - read, ready.end + read);
            }
            let bytes = &self.buffer[ready.start..ready.start + len];
            if each(number, bytes)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
            ready.start += len;
            self.connection.wait.restart();
        }
        Ok(Flow::Continue)
    }
}

impl ChunkSource for TcpSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        let spans = self.index.spans(wanted, READ_BYTES);
        let first = self.connection.next_id;
        let mut sent = 0;
        let mut ahead = 0;
        self.counters.round_trips.fetch_add(1, Ordering::Relaxed);
        for (at, span) in spans.iter().enumerate() {
            // Refills half a window at a time, so that many requests go out at once.
            if sent <= at || ahead <= WINDOW_BYTES / 2 {
                self.request(&spans, &mut sent, at, &mut ahead)?;
            }
            self.check_open()?;
            let bytes = self.index.span(span.clone());
            if self.take(span.clone(), first + at as u64, each)? == Flow::Stop {
                return Ok(());
            }
            ahead -= bytes.end - bytes.start;
        }
        Ok(())
    }
}
