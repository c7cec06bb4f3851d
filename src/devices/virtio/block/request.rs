//! A request of the driver (VIRTIO 1.2, 5.2.6), taken from guest memory once and checked.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

use super::limits::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR};
use super::sys::Direction;
use crate::devices::virtio::{Broken, Buffers, Chain};

/// The status of a request (VIRTIO 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// A run of sectors to discard or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub len: u64,
    pub may_unmap: bool,
}

/// The requested operation.
#[derive(Debug)]
pub enum Operation<'m> {
    Transfer {
        direction: Direction,
        offset: u64,
        data: Buffers<'m>,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    GetId(Buffers<'m>),
    /// A refused request, with its status.
    Refused(Status),
}

/// A request.
#[derive(Debug)]
pub struct Request<'m> {
    pub head: u16,
    /// The address of its status.
    pub status: GuestAddress,
    pub operation: Operation<'m>,
}

/// The properties of the disk that a request is checked against.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    pub bytes: u64,
    pub read_only: bool,
    pub can_flush: bool,
}

impl<'m> Request<'m> {
    /// Parses a chain. One without a whole header or room for the status cannot be answered and is an error.
    pub fn parse(chain: &Chain<'m>, disk: Disk) -> Result<Self, Broken> {
        let mut header = [0; HEADER_BYTES];
        if chain.readable.read_at(0, &mut header) != HEADER_BYTES {
            return Err(Broken::Chain("it is too short for the header of a block request"));
        }
        let Some(status) = chain.last_writable else {
            return Err(Broken::Chain("it has no place for the status of a block request"));
        };
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let sent = || chain.readable.part(HEADER_BYTES, usize::MAX);
        let wanted = || chain.writable.part(0, chain.writable.len() - 1);
        let operation = match kind {
            VIRTIO_BLK_T_IN => disk.transfer(Direction::Read, sector, wanted()),
            VIRTIO_BLK_T_OUT => disk.transfer(Direction::Write, sector, sent()),
            VIRTIO_BLK_T_FLUSH if disk.can_flush => Operation::Flush,
            VIRTIO_BLK_T_DISCARD => disk.ranges(&sent(), false).map_or_else(Operation::Refused, Operation::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES => {
                disk.ranges(&sent(), true).map_or_else(Operation::Refused, Operation::WriteZeroes)
            }
            VIRTIO_BLK_T_GET_ID => Operation::GetId(wanted()),
            _ => Operation::Refused(Status::Unsupported),
        };
        Ok(Request { head: chain.head, status, operation })
    }

    /// The bytes that a rate limiter counts.
    pub fn bytes(&self) -> u64 {
        match &self.operation {
            Operation::Transfer { data, .. } => data.len() as u64,
            _ => 0,
        }
    }
}

impl Disk {
    fn transfer<'m>(self, direction: Direction, sector: u64, data: Buffers<'m>) -> Operation<'m> {
        let denied = direction == Direction::Write && self.read_only;
        match self.offset(sector, data.len() as u64) {
            Some(offset) if !denied => Operation::Transfer { direction, offset, data },
            _ => Operation::Refused(Status::IoError),
        }
    }

    /// The byte offset of `sector`, if `len` bytes from there on are whole sectors of the disk.
    fn offset(self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.bytes).then_some(offset)
    }

    /// The ranges of a discard or write-zeroes request (VIRTIO 1.2, 5.2.6.2).
    fn ranges(self, sent: &Buffers<'_>, zeroes: bool) -> Result<Vec<Range>, Status> {
        let count = sent.len() / RANGE_BYTES;
        if self.read_only || count == 0 || count > RANGES_MAX || !sent.len().is_multiple_of(RANGE_BYTES) {
            return Err(Status::IoError);
        }
        let mut bytes = [0; RANGE_BYTES * RANGES_MAX];
        sent.read_at(0, &mut bytes[..sent.len()]);
        let (ranges, _) = bytes[..sent.len()].as_chunks::<RANGE_BYTES>();
        ranges.iter().map(|range| self.range(range, zeroes)).collect()
    }

    fn range(self, bytes: &[u8; RANGE_BYTES], zeroes: bool) -> Result<Range, Status> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let sector = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
        let sectors = u32_at(8);
        let flags = u32_at(12);
        let allowed = if zeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > RANGE_SECTORS_MAX {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = self.offset(sector, len).ok_or(Status::IoError)?;
        Ok(Range { offset, len, may_unmap: flags != 0 })
    }
}
