//! The unit of a disk, and the limits of a request: told to the driver, and checked.

/// The unit of sizes and offsets, whatever the block size (VIRTIO 1.2, 5.2.4).
pub const SECTOR: u64 = 512;
/// Data buffers in one request: the queue without header and status.
pub const SEGMENTS_MAX: u32 = 254;
/// Ranges in one discard or write-zeroes request.
pub const RANGES_MAX: usize = 16;
/// Sectors in one such range: 1 GiB, so that a request does not take for ever.
pub const RANGE_SECTORS_MAX: u32 = 1 << 21;
