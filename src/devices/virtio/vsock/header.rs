//! The header of a vsock packet (VIRTIO 1.2, 5.10.6).

use super::super::{Broken, Buffers};

/// Bytes of a header.
pub const LEN: usize = 44;

/// The context id of the host (VIRTIO 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;

/// Stream sockets, the only kind supported here.
pub const TYPE_STREAM: u16 = 1;

/// Operations (VIRTIO 1.2, 5.10.6).
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of SHUTDOWN (VIRTIO 1.2, 5.10.6.5): operations that the sender of the packet will not do any more.
pub mod shut {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A packet's header. All fields are little-endian and packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes of payload that the sender of the packet has room for.
    pub buf_alloc: u32,
    /// Bytes of payload that have left that room so far.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header at the beginning of `buffers`.
    pub fn read(buffers: &Buffers<'_>) -> Result<Self, Broken> {
        let mut bytes = [0; LEN];
        if buffers.read_at(0, &mut bytes) != LEN {
            return Err(Broken::Chain("it is too short for a packet header"));
        }
        Ok(Header::from_bytes(&bytes))
    }

    pub fn from_bytes(bytes: &[u8; LEN]) -> Self {
        let mut rest = &bytes[..];
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub fn to_bytes(self) -> [u8; LEN] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; LEN];
        let mut at = 0;
        for field in fields {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        }
        bytes
    }

    /// The connection of a packet of the guest's.
    pub fn ports(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }

    /// A packet from the host's end of `ports`, without payload; the sender sets the context ids.
    pub fn to_guest(ports: Ports, op: u16) -> Self {
        Header { src_port: ports.host, dst_port: ports.guest, kind: TYPE_STREAM, op, ..Header::default() }
    }

    /// The reset that answers this packet (VIRTIO 1.2, 5.10.6.4.1: of the same type).
    pub fn reset(&self) -> Self {
        Header { kind: self.kind, ..Header::to_guest(self.ports(), op::RST) }
    }
}

/// Takes the first `N` bytes of `rest`, which must have them.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let (head, tail) = rest.split_at(N);
    field.copy_from_slice(head);
    *rest = tail;
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_44_packed_little_endian_bytes() {
        let bytes: [u8; LEN] = std::array::from_fn(|at| at as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!((header.len, header.kind, header.op), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.to_bytes(), bytes);
    }
}
