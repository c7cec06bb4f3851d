//! The configuration space of a block device (VIRTIO 1.2, 5.2.4).

use super::limits::{RANGE_SECTORS_MAX, RANGES_MAX, SECTOR, SEGMENTS_MAX};

/// Bytes up to and with `write_zeroes_may_unmap`.
const LEN: usize = 57;
/// The largest buffer of a request.
const SEGMENT_BYTES_MAX: u32 = 4 << 20;
/// The block size of the host's page cache, as a power of two of sectors. A constant, because a guest that moves to
/// another host must find it again.
const PHYSICAL_BLOCK_EXP: u8 = 3;
const SECTORS_PER_BLOCK: u32 = 1 << PHYSICAL_BLOCK_EXP;

/// The whole space for a disk of `bytes`.
fn space(bytes: u64) -> [u8; LEN] {
    let mut space = [0; LEN];
    let mut put = |at: usize, value: &[u8]| space[at..at + value.len()].copy_from_slice(value);
    put(0, &(bytes / SECTOR).to_le_bytes());
    put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXP]);
    put(26, &(SECTORS_PER_BLOCK as u16).to_le_bytes());
    put(28, &SECTORS_PER_BLOCK.to_le_bytes());
    for at in [36, 48] {
        put(at, &RANGE_SECTORS_MAX.to_le_bytes());
        put(at + 4, &(RANGES_MAX as u32).to_le_bytes());
    }
    put(44, &SECTORS_PER_BLOCK.to_le_bytes());
    put(56, &[1]);
    space
}

/// Reads the space at `offset`; bytes of `data` outside of it stay as they are.
pub fn read(bytes: u64, offset: u64, data: &mut [u8]) {
    let space = space(bytes);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_gives_the_fields_where_the_specification_has_them() {
        let field = |offset, len: usize| {
            let mut data = [0; 8];
            read(5 * SECTOR, offset, &mut data[..len]);
            u64::from_le_bytes(data)
        };
        let fields = [(0, 8), (8, 4), (12, 4), (20, 4), (24, 1), (36, 4), (40, 4), (44, 4), (48, 4), (52, 4), (56, 1)];
        let values = fields.map(|(offset, len)| field(offset, len));
        assert_eq!(values, [5, 4 << 20, 254, 512, 3, 1 << 21, 16, 8, 1 << 21, 16, 1]);
        assert_eq!((field(57, 8), field(u64::MAX, 8), field(56, 8)), (0, 0, 1));
    }
}
