//! The page service's protocol as bytes on the wire. `docs/remote.md` specifies it.
//!
//! A client greets with [`greeting`], a server answers with [`answer`]; then frames go both ways, each a header of
//! [`HEADER_LEN`] bytes and a payload. A connection serves one object at a time, the one opened last.

use crate::snapshot::{Digest, SnapshotId};
use crate::tiering::cold::index::Index;

const MAGIC: &[u8; 8] = b"TVMMPAGE";
/// The versions of the protocol that this build speaks.
pub const VERSION: u16 = 1;
/// Bytes of a greeting and of its answer.
pub const GREETING_LEN: usize = 16;
/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 24;
/// Longest payload of a request, bytes.
pub const MAX_REQUEST: u32 = 64;
/// Longest payload of an answer, bytes. A read of more stored bytes is refused, unless it is of one chunk.
pub const MAX_ANSWER: u32 = 2 << 20;
/// The longest text of a refusal, bytes.
pub const MAX_TEXT: usize = 512;

/// The type of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Names a snapshot: its 32-byte id.
    Open = 1,
    /// Asks for bytes of the index: offset (u64), length (u32).
    ReadIndex = 2,
    /// Asks for stored chunks: the first (u32), their number (u32).
    Read = 3,
    /// Asks to read the data by RDMA from a queue pair: an [`Endpoint`].
    Attach = 4,
    /// Answers `Open`: length of the index (u64), of the data (u64), BLAKE3 of the index (32 bytes).
    Opened = 0x81,
    /// Answers `ReadIndex`: the bytes.
    IndexBytes = 0x82,
    /// Answers `Read`: the stored bytes of the chunks, one after the other.
    Chunks = 0x83,
    /// Answers `Attach`: [`Attached`].
    Attached = 0x84,
    /// Answers any request: a reason (u16) and a text.
    Refused = 0xff,
}

pub(super) const KINDS: [Kind; 9] = [
    Kind::Open,
    Kind::ReadIndex,
    Kind::Read,
    Kind::Attach,
    Kind::Opened,
    Kind::IndexBytes,
    Kind::Chunks,
    Kind::Attached,
    Kind::Refused,
];

/// The reason for refusing a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum RefusalReason {
    /// Too many connections; the client may try again.
    Busy = 1,
    /// The snapshot is not there.
    NotHeld = 2,
    /// The request is malformed.
    BadRequest = 3,
    /// The snapshot's object is damaged.
    Damaged = 4,
    /// The server could not read the object.
    Failed = 5,
    /// The server does not support the request.
    Never = 6,
}

impl RefusalReason {
    pub fn from_number(number: u16) -> Option<RefusalReason> {
        [
            RefusalReason::Busy,
            RefusalReason::NotHeld,
            RefusalReason::BadRequest,
            RefusalReason::Damaged,
            RefusalReason::Failed,
            RefusalReason::Never,
        ]
        .into_iter()
        .find(|why| *why as u16 == number)
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    /// Chosen by the client, repeated in the answer.
    pub id: u64,
    /// Bytes of the payload.
    pub len: u32,
    /// CRC32C of the payload.
    pub checksum: u32,
}

impl Header {
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&self.len.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.id.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..20]);
        bytes[20..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// # Errors
    /// The defect of the bytes.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, String> {
        let [l0, l1, l2, l3, k0, k1, z0, z1, id @ .., c0, c1, c2, c3, h0, h1, h2, h3] = *bytes;
        if crc32c::crc32c(&bytes[..20]) != u32::from_le_bytes([h0, h1, h2, h3]) {
            return Err("the header of a frame does not have its checksum".to_string());
        }
        let number = u16::from_le_bytes([k0, k1]);
        let Some(kind) = KINDS.into_iter().find(|kind| *kind as u16 == number) else {
            return Err(format!("a frame is of kind {number:#x}"));
        };
        if [z0, z1] != [0, 0] {
            return Err("reserved fields of a frame's header are not zero".to_string());
        }
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let limit = if kind as u16 & 0x80 == 0 { MAX_REQUEST } else { MAX_ANSWER };
        if len > limit {
            return Err(format!("a frame of {len} bytes is longer than {limit}"));
        }
        Ok(Header { kind, id: u64::from_le_bytes(id), len, checksum: u32::from_le_bytes([c0, c1, c2, c3]) })
    }
}

/// A whole frame.
pub fn frame(kind: Kind, id: u64, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind, id, len: payload.len() as u32, checksum: crc32c::crc32c(payload) };
    [&header.to_bytes()[..], payload].concat()
}

fn greet(first: u16, second: u16) -> [u8; GREETING_LEN] {
    let mut bytes = [0; GREETING_LEN];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..10].copy_from_slice(&first.to_le_bytes());
    bytes[10..12].copy_from_slice(&second.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn parse_greeting(bytes: &[u8; GREETING_LEN]) -> Option<(u16, u16)> {
    let [m0, m1, m2, m3, m4, m5, m6, m7, a0, a1, b0, b1, c0, c1, c2, c3] = *bytes;
    let is_ours = [m0, m1, m2, m3, m4, m5, m6, m7] == *MAGIC;
    let is_whole = crc32c::crc32c(&bytes[..12]) == u32::from_le_bytes([c0, c1, c2, c3]);
    (is_ours && is_whole).then(|| (u16::from_le_bytes([a0, a1]), u16::from_le_bytes([b0, b1])))
}

/// A client's first bytes: the lowest and the highest version that it speaks.
pub fn greeting() -> [u8; GREETING_LEN] {
    greet(VERSION, VERSION)
}

/// A server's answer: the version spoken from now on, or 0 and true if it will close. `None`: the peer is no client.
pub fn answer(greeting: &[u8; GREETING_LEN]) -> Option<([u8; GREETING_LEN], bool)> {
    let (lowest, highest) = parse_greeting(greeting)?;
    let spoken = (lowest..=highest).contains(&VERSION);
    Some((greet(if spoken { VERSION } else { 0 }, VERSION), spoken))
}

/// # Errors
/// The reason why this server cannot be used.
pub fn check_answer(bytes: &[u8; GREETING_LEN]) -> Result<(), String> {
    match parse_greeting(bytes) {
        Some((VERSION, _)) => Ok(()),
        Some((_, highest)) => Err(format!("it speaks version {highest} of the page service's protocol, not {VERSION}")),
        None => Err("it does not speak the page service's protocol".to_string()),
    }
}

/// The payload of [`Kind::Opened`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    pub index_len: u64,
    pub data_len: u64,
    pub index_digest: Digest,
}

impl Opened {
    pub fn to_bytes(self) -> Vec<u8> {
        [&self.index_len.to_le_bytes()[..], &self.data_len.to_le_bytes(), &self.index_digest.0].concat()
    }

    pub fn parse(bytes: &[u8]) -> Option<Opened> {
        let (lens, digest) = bytes.split_first_chunk::<16>()?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, b @ ..] = *lens;
        let index_len = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let index_digest = Digest(digest.try_into().ok()?);
        Some(Opened { index_len, data_len: u64::from_le_bytes(b), index_digest })
    }
}

/// The payload of [`Kind::Open`].
pub fn parse_open(payload: &[u8]) -> Option<SnapshotId> {
    Some(SnapshotId(payload.try_into().ok()?))
}

/// The payload of [`Kind::ReadIndex`].
pub fn read_index(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &len.to_le_bytes()].concat()
}

pub fn parse_read_index(payload: &[u8]) -> Option<(u64, u32)> {
    let (offset, len) = payload.split_first_chunk::<8>()?;
    Some((u64::from_le_bytes(*offset), u32::from_le_bytes(len.try_into().ok()?)))
}

/// The payload of [`Kind::Read`].
pub fn read(first: u32, count: u32) -> Vec<u8> {
    [first.to_le_bytes(), count.to_le_bytes()].concat()
}

pub fn parse_read(payload: &[u8]) -> Option<(u32, u32)> {
    let (first, count) = payload.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*first), u32::from_le_bytes(count.try_into().ok()?)))
}

/// One end of an RDMA connection (reliable connected queue pairs over RoCE v2): the payload of [`Kind::Attach`]. Its IP
/// address is not included: it is that of the TCP connection that carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Number of the queue pair, 24 bits.
    pub queue_pair: u32,
    /// The first packet sequence number it sends, 24 bits.
    pub sequence: u32,
    /// Bytes of a packet that its path carries: 256 to 4096, a power of two.
    pub mtu: u32,
    /// Number of concurrent reads that it makes, or answers: 1 to 255.
    pub reads: u8,
}

/// Bytes of an [`Endpoint`].
pub const ENDPOINT_LEN: usize = 16;

impl Endpoint {
    pub fn to_bytes(self) -> [u8; ENDPOINT_LEN] {
        let mut bytes = [0; ENDPOINT_LEN];
        for (place, field) in [self.queue_pair, self.sequence, self.mtu, u32::from(self.reads)].into_iter().enumerate()
        {
            bytes[place * 4..][..4].copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// `None` for values that no queue pair can have.
    pub fn parse(bytes: &[u8]) -> Option<Endpoint> {
        let ([queue_pair, sequence, mtu, reads], []) = bytes.as_chunks::<4>() else { return None };
        let [queue_pair, sequence, mtu, reads] =
            [queue_pair, sequence, mtu, reads].map(|field| u32::from_le_bytes(*field));
        let reads = u8::try_from(reads).ok().filter(|reads| *reads > 0)?;
        let is_mtu = mtu.is_power_of_two() && (256..=4096).contains(&mtu);
        (queue_pair < 1 << 24 && sequence < 1 << 24 && is_mtu).then_some(Endpoint { queue_pair, sequence, mtu, reads })
    }
}

/// The payload of [`Kind::Attached`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    pub endpoint: Endpoint,
    /// Start address of the data object for RDMA reads.
    pub address: u64,
    /// Its length, bytes.
    pub len: u64,
    /// The remote key of its memory.
    pub key: u32,
}

impl Attached {
    pub fn to_bytes(self) -> Vec<u8> {
        let key = self.key.to_le_bytes();
        [&self.endpoint.to_bytes()[..], &self.address.to_le_bytes(), &self.len.to_le_bytes(), &key].concat()
    }

    /// `None` for impossible values, such as memory that reaches past the end of the address space.
    pub fn parse(bytes: &[u8]) -> Option<Attached> {
        let (endpoint, rest) = bytes.split_first_chunk::<ENDPOINT_LEN>()?;
        let ([address, len], key) = rest.as_chunks::<8>() else { return None };
        let address = u64::from_le_bytes(*address);
        let len = u64::from_le_bytes(*len);
        address.checked_add(len)?;
        let key = u32::from_le_bytes(key.try_into().ok()?);
        Some(Attached { endpoint: Endpoint::parse(endpoint)?, address, len, key })
    }
}

/// The payload of [`Kind::Refused`].
pub fn refusal(why: RefusalReason, text: &str) -> Vec<u8> {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    [&(why as u16).to_le_bytes()[..], &text.as_bytes()[..end]].concat()
}

pub fn parse_refusal(payload: &[u8]) -> Option<(Option<RefusalReason>, String)> {
    let (why, text) = payload.split_first_chunk::<2>()?;
    let text = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect();
    Some((RefusalReason::from_number(u16::from_le_bytes(*why)), text))
}

/// The checksum of the payload that answers a read of chunks `[first, first + count)`. It is computed from the
/// checksums of the chunks, so a server need not touch the bytes. `None` if the index lacks some of them, or they are
/// too many for one answer.
pub fn chunks_checksum(index: &Index, first: u32, count: u32) -> Option<(u32, u32)> {
    let chunks = index.chunks().get(first as usize..first.checked_add(count)? as usize)?;
    let mut len = 0_u64;
    let mut checksum = 0;
    for chunk in chunks {
        checksum = crc32c::crc32c_combine(checksum, chunk.checksum, chunk.stored_len as usize);
        len += u64::from(chunk.stored_len);
    }
    (count > 0 && len <= u64::from(MAX_ANSWER)).then_some((len as u32, checksum))
}

#[cfg(test)]
mod tests {
    use crate::backends::cold::wire;

    #[test]
    fn frames_and_greetings_that_are_not_whole_are_refused() {
        let header = wire::Header { kind: wire::Kind::Read, id: 7, len: 8, checksum: 0x1234 };
        let good = header.to_bytes();
        assert_eq!(wire::Header::parse(&good), Ok(header));
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(wire::Header::parse(&bad).is_err(), "bit {bit}");
        }
        assert!(wire::Header::parse(&wire::Header { len: wire::MAX_REQUEST + 1, ..header }.to_bytes()).is_err());
        let answer = wire::Header { kind: wire::Kind::Chunks, len: wire::MAX_ANSWER, ..header };
        assert!(wire::Header::parse(&answer.to_bytes()).is_ok());
        let greeting = wire::greeting();
        let (answer, spoken) = wire::answer(&greeting).unwrap();
        assert!(spoken);
        wire::check_answer(&answer).unwrap();
        assert_eq!(wire::answer(b"GET / HTTP/1.1\r\n"), None);
        let mut later = greeting;
        later[8..12].copy_from_slice(&[9, 0, 12, 0]);
        let checksum = crc32c::crc32c(&later[..12]);
        later[12..].copy_from_slice(&checksum.to_le_bytes());
        let (answer, spoken) = wire::answer(&later).unwrap();
        assert!(!spoken);
        assert!(wire::check_answer(&answer).is_err());
    }

    #[test]
    fn ends_of_rdma_connections_that_cannot_be_are_refused() {
        let endpoint = wire::Endpoint { queue_pair: 0xff_ffff, sequence: 7, mtu: 4096, reads: 16 };
        assert_eq!(wire::Endpoint::parse(&endpoint.to_bytes()), Some(endpoint));
        let attached = wire::Attached { endpoint, address: 0x7f00_0000_1000, len: 1 << 30, key: 0x1234_5678 };
        assert_eq!(wire::Attached::parse(&attached.to_bytes()), Some(attached));
        for bad in [
            wire::Endpoint { queue_pair: 1 << 24, ..endpoint },
            wire::Endpoint { sequence: u32::MAX, ..endpoint },
            wire::Endpoint { mtu: 0, ..endpoint },
            wire::Endpoint { mtu: 1500, ..endpoint },
            wire::Endpoint { mtu: 8192, ..endpoint },
            wire::Endpoint { reads: 0, ..endpoint },
        ] {
            assert_eq!(wire::Endpoint::parse(&bad.to_bytes()), None, "{bad:?}");
            assert_eq!(
                wire::Attached::parse(&wire::Attached { endpoint: bad, ..attached }.to_bytes()),
                None,
                "{bad:?}"
            );
        }
        let past_the_end = wire::Attached { len: u64::MAX, ..attached };
        assert_eq!(wire::Attached::parse(&past_the_end.to_bytes()), None);
        let whole = attached.to_bytes();
        for len in 0..whole.len() {
            assert_eq!(wire::Attached::parse(&whole[..len]), None, "{len} bytes");
        }
        let many_reads = [&endpoint.to_bytes()[..12], &256_u32.to_le_bytes()].concat();
        assert_eq!(wire::Endpoint::parse(&many_reads), None);
        assert_eq!(wire::Endpoint::parse(&[&endpoint.to_bytes()[..], &[0; 4]].concat()), None);
    }

    #[test]
    fn checksum_of_an_answer_is_that_of_its_bytes() {
        let sample = crate::tiering::cold::sample::sample();
        for (first, count) in [(0, 1), (0, 9), (5, 7)] {
            let span = sample.index.span(first..first + count);
            let bytes = &sample.data[span.start as usize..span.end as usize];
            let expected = Some((bytes.len() as u32, crc32c::crc32c(bytes)));
            assert_eq!(wire::chunks_checksum(&sample.index, first, count), expected);
        }
        let all = sample.index.chunks().len() as u32;
        for (first, count) in [(0, 0), (0, all + 1), (all, 1), (u32::MAX, 2)] {
            assert_eq!(wire::chunks_checksum(&sample.index, first, count), None);
        }
    }
}
