//! Fuzz doors of the page service (`docs/fuzzing.md`): a server with a hostile client, and a client with a hostile
//! server, over real connections of this host. The input is a list of frames, whose checksums are right, and of bytes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Unstructured;
use socket2::SockRef;

use super::serve::{Limits, answer_one};
use super::tcp::TcpPlace;
use super::wire::{self, KINDS, Kind};
use crate::snapshot::doors::OwnDir;
use crate::snapshot::{Digest, MemoryLayout, PAGE_SIZE, SnapshotId};
use crate::tiering::cold::index::NewChunk;
use crate::tiering::cold::store::{Manifest, Store, object_names};
use crate::tiering::cold::{Broken, Compression, Flow, Index, Place, SourceCounters};

/// The most frames of one input, so that all answers fit into the buffers of a connection.
const FRAMES: usize = 16;
/// Pages that the object of the doors has, one in each chunk.
const PAGES: u32 = 2;
const SNAPSHOT: SnapshotId = SnapshotId([5; 32]);

/// A cold pool with one object.
struct Pool {
    _dir: OwnDir,
    store: Store,
    index: Arc<Index>,
    digest: Digest,
    listener: TcpListener,
}

impl Pool {
    fn new(dir: OwnDir) -> Option<Pool> {
        let layout = MemoryLayout::from_gpa_ranges(&[(0, 64 * PAGE_SIZE)]).ok()?;
        let chunk = |window| NewChunk {
            window,
            mask: vec![1],
            compression: Compression::Raw,
            checksum: crc32c::crc32c(&[7; PAGE_SIZE as usize]),
            stored_len: PAGE_SIZE as u32,
        };
        let chunks: Vec<NewChunk> = (0..PAGES).map(chunk).collect();
        let data = vec![7; PAGES as usize * PAGE_SIZE as usize];
        let data_digest = Digest(*blake3::hash(&data).as_bytes());
        let index = Index::of(SNAPSHOT, &layout, 16, &chunks, data_digest, None).ok()?;
        let bytes = index.to_bytes().ok()?;
        let store = Store::create(dir.path(), Manifest::new(64, 500).ok()?).ok()?;
        let (index_name, data_name) = object_names(SNAPSHOT);
        std::fs::write(dir.path().join(index_name), &bytes).ok()?;
        std::fs::write(dir.path().join(data_name), &data).ok()?;
        let digest = Digest(*blake3::hash(&bytes).as_bytes());
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        Some(Pool { _dir: dir, store, index: Arc::new(index), digest, listener })
    }
}

thread_local! {
    /// The pool of this thread. Its directory goes with it.
    static POOL: Option<Pool> = OwnDir::new().and_then(Pool::new);
}

/// The bytes that a peer sends.
fn frames(input: &mut Unstructured) -> Vec<u8> {
    let mut sent = Vec::new();
    for _ in 0..FRAMES {
        if input.is_empty() || add_frame(input, &mut sent).is_err() {
            break;
        }
    }
    sent
}

fn add_frame(input: &mut Unstructured, sent: &mut Vec<u8>) -> arbitrary::Result<()> {
    let what: u8 = input.arbitrary()?;
    let id = u64::from(input.arbitrary::<u8>()?);
    let payload = match what >> 4 {
        0..4 => wire::read(u32::from(input.arbitrary::<u8>()? & 3), u32::from(input.arbitrary::<u8>()? & 3)),
        4..6 => SNAPSHOT.0.to_vec(),
        6 | 7 => wire::read_index(u64::from(input.arbitrary::<u8>()?), u32::from(input.arbitrary::<u16>()?)),
        8 => vec![7; PAGE_SIZE as usize * usize::from(input.arbitrary::<u8>()? & 3)],
        _ => {
            let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
            input.bytes(len)?.to_vec()
        }
    };
    match KINDS.get(usize::from(what & 15)) {
        Some(kind) => sent.extend(wire::frame(*kind, id, &payload)),
        None => sent.extend(payload),
    }
    Ok(())
}

/// A connection whose end leaves nothing behind, so that ports are not used up.
fn connect(pool: &Pool) -> std::io::Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(pool.listener.local_addr()?)?;
    SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    let (server, _) = pool.listener.accept()?;
    SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
    Ok((client, server))
}

/// A page server whose client sends the input.
pub fn page_server(data: &[u8]) {
    POOL.with(|pool| {
        if let Some(pool) = pool {
            serve_hostile(pool, data);
        }
    });
}

fn serve_hostile(pool: &Pool, data: &[u8]) {
    let mut input = Unstructured::new(data);
    let greeting = match input.arbitrary::<u8>() {
        Ok(0..250) => wire::greeting().to_vec(),
        _ => input.bytes(wire::GREETING_LEN.min(input.len())).unwrap_or_default().to_vec(),
    };
    let Ok((mut client, server)) = connect(pool) else { return };
    if client.write_all(&[greeting, frames(&mut input)].concat()).is_err() || client.shutdown(Shutdown::Write).is_err()
    {
        return;
    }
    let limits = Limits { connections: 1, index_bytes: 1 << 20, idle: Duration::from_secs(5) };
    // The error is the reason for the end of the connection.
    let _ = answer_one(server, pool.store.clone(), limits);
    let mut answers = Vec::new();
    let _ = client.set_nonblocking(true);
    let _ = client.read_to_end(&mut answers);
}

/// A client whose page server sends the input.
pub fn page_client(data: &[u8]) {
    POOL.with(|pool| {
        if let Some(pool) = pool {
            ask_hostile(pool, data);
        }
    });
}

fn ask_hostile(pool: &Pool, data: &[u8]) {
    let Ok(address) = pool.listener.local_addr() else { return };
    let mut input = Unstructured::new(data);
    let place = TcpPlace::new(address.to_string(), Duration::from_secs(5));
    let Ok(mut source) = place.open(&pool.index, pool.digest, Arc::new(SourceCounters::default())) else { return };
    let Ok((mut server, _)) = pool.listener.accept() else { return };
    let mut sent = wire::greeting().to_vec();
    if input.arbitrary::<u8>().is_ok_and(|how| how >= 16) {
        let index_len = pool.index.to_bytes().map_or(0, |bytes| bytes.len() as u64);
        let opened = wire::Opened { index_len, data_len: pool.index.data_len(), index_digest: pool.digest };
        sent.extend(wire::frame(Kind::Opened, 0, &opened.to_bytes()));
    }
    sent.extend(frames(&mut input));
    // Without lingering: the client's end is closed after this one.
    let _ = SockRef::from(&server).set_linger(Some(Duration::ZERO));
    if server.write_all(&sent).is_err() || server.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let mut number = 0;
    let fetched = source.fetch(&[0, 1], &mut |chunk, bytes| {
        assert_eq!((chunk, bytes.len()), (number, PAGE_SIZE as usize), "another chunk comes than was requested");
        number += 1;
        if bytes == [7; PAGE_SIZE as usize] { Ok(Flow::Continue) } else { Err(Broken::Damaged("other bytes".into())) }
    });
    assert!(fetched.is_err() || number == PAGES, "a fetch that succeeds has not brought all chunks");
    drop(server);
}
