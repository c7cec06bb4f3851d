//! Cold pools that are read by RDMA. The page service (`docs/remote.md`) tells over TCP which objects there are and at
//! which address of the server's memory; the chunks are read from there by one-sided reads, without the server's CPU.

pub mod serve;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::tcp::{Connection, LOOK, TcpPlace};
use crate::backends::cold::wire;
use crate::backends::cold::wire::{Attached, Kind};
use crate::backends::verbs::{Port, Reader, Waited, devices};
use crate::snapshot::{Digest, PAGE_SIZE, SnapshotId};
use crate::tiering::cold::{Broken, ChunkSource, EachChunk, Flow, Index, Place, SourceCounters};

/// Bytes of one read, unless a chunk is longer.
const READ_BYTES: u64 = 256 << 10;
/// Concurrent reads: 2 MiB, enough for 100 Gbit/s over 0.1 ms.
const DEPTH: usize = 8;

/// A page server that is read by RDMA.
struct RdmaPlace {
    name: String,
    /// The page service that tells the address of the bytes.
    service: TcpPlace,
    patience: Duration,
}

/// The places of `servers` (`HOST:PORT` each).
///
/// # Errors
/// This host cannot read by RDMA.
pub fn places(servers: &[String], patience: Duration) -> Result<Vec<Box<dyn Place>>, String> {
    devices().map_err(|error| error.to_string())?;
    let place = |server: &String| {
        let service = TcpPlace::new(server.clone(), patience);
        Box::new(RdmaPlace { name: format!("rdma:{server}"), service, patience }) as Box<dyn Place>
    };
    Ok(servers.iter().map(place).collect())
}

fn transient(error: io::Error) -> Broken {
    Broken::Transient(error.to_string())
}

impl RdmaPlace {
    /// Sends this end's queue pair on the connection, and takes the server's.
    fn attach(&self, connection: &mut Connection, index: &Index, digest: Digest) -> Result<Reader, Broken> {
        let stream = connection.stream();
        let (here, there) = stream.local_addr().and_then(|here| Ok((here, stream.peer_addr()?))).map_err(transient)?;
        let port = Port::at(here.ip()).map_err(|error| match error.kind() {
            io::ErrorKind::NetworkDown => transient(error),
            _ => Broken::Refused(error.to_string()),
        })?;
        let mut reader = Reader::new(&port, DEPTH).map_err(transient)?;
        let id = connection.take_id();
        connection.send(&wire::frame(Kind::Attach, id, &reader.endpoint().to_bytes()))?;
        if connection.opened()?.index_digest != digest {
            return Err(Broken::Refused("it holds another packing of the snapshot".to_string()));
        }
        let header = connection.header(Kind::Attached, id)?;
        let mut payload = vec![0; header.len as usize];
        connection.payload(header, &mut payload)?;
        let attached = Attached::parse(&payload).filter(|attached| attached.len == index.data_len());
        let attached = attached
            .ok_or_else(|| Broken::Damaged("what it says of its memory makes no sense for the snapshot".to_string()))?;
        reader.connect(there.ip(), attached).map_err(transient)?;
        Ok(reader)
    }
}

impl Place for RdmaPlace {
    fn name(&self) -> &str {
        &self.name
    }

    fn index(&self, snapshot: SnapshotId, counters: &Arc<SourceCounters>) -> Result<Vec<u8>, Broken> {
        self.service.index(snapshot, counters)
    }

    fn open(
        &self,
        index: &Arc<Index>,
        digest: Digest,
        counters: Arc<SourceCounters>,
    ) -> Result<Box<dyn ChunkSource>, Broken> {
        let mut connection = self.service.connect(index.snapshot(), &counters)?;
        // One round trip for greeting, `Open` and `Attach` together.
        counters.round_trips.fetch_add(1, Ordering::Relaxed);
        let mut reader = self.attach(&mut connection, index, digest)?;
        let longest = index.chunks().iter().map(|chunk| u64::from(chunk.stored_len)).max().unwrap_or(0);
        let longest = longest.max(READ_BYTES).next_multiple_of(PAGE_SIZE) as usize;
        // Registered now, so that the first fault does not wait for it.
        reader.prepare(1, longest).map_err(transient)?;
        let index = index.clone();
        let patience = self.patience;
        Ok(Box::new(RdmaSource { reader, connection, patience, longest, index, counters }))
    }
}

struct RdmaSource {
    reader: Reader,
    /// Carries no more requests; its end means that the server has ended.
    connection: Connection,
    patience: Duration,
    /// Bytes of the longest read.
    longest: usize,
    index: Arc<Index>,
    counters: Arc<SourceCounters>,
}

impl RdmaSource {
    /// Waits for the oldest read.
    fn wait(&mut self) -> Result<(), Broken> {
        self.connection.restart();
        loop {
            match self.reader.wait(self.connection.stream().as_fd(), LOOK.min(self.patience / 4)).map_err(transient)? {
                Waited::Read => return Ok(()),
                Waited::Other => return Err(self.connection.lost(io::ErrorKind::UnexpectedEof.into())),
                Waited::Neither => self.connection.check_time()?,
            }
        }
    }
}

impl ChunkSource for RdmaSource {
    fn fetch(&mut self, wanted: &[u32], each: &mut EachChunk) -> Result<(), Broken> {
        let index = self.index.clone();
        let spans = index.spans(wanted, READ_BYTES);
        let slots = self.reader.prepare(spans.len(), self.longest).map_err(transient)?;
        self.counters.round_trips.fetch_add(1, Ordering::Relaxed);
        let mut begun = 0;
        for (at, span) in spans.iter().enumerate() {
            for next in &spans[begun..spans.len().min(at + slots)] {
                self.reader.begin(&index.span(next.clone())).map_err(transient)?;
                self.counters.requests.fetch_add(1, Ordering::Relaxed);
                begun += 1;
            }
            self.wait()?;
            let range = index.span(span.clone());
            let bytes = self.reader.bytes((range.end - range.start) as usize);
            let bytes = bytes.ok_or_else(|| Broken::Damaged("a chunk is longer than any in the index".to_string()))?;
            let flow = index.deliver(span.clone(), bytes, each)?;
            self.reader.free();
            if flow == Flow::Stop {
                return Ok(());
            }
        }
        Ok(())
    }
}
