//! The sizes of a frame.

/// `struct virtio_net_hdr_v1` (VIRTIO 1.2, 5.1.6): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset,
/// num_buffers.
pub const HEADER_LEN: usize = 12;
/// The largest frame with its header: 64 KiB of IP, Ethernet with a VLAN tag, and the rounding of VIRTIO 1.2,
/// 5.1.6.3.1.
pub const FRAME_MAX: usize = 65_562 + 4;
