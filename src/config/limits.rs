//! The limits of a config, which errors name.

/// A config file larger than this is not a config file.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 20;
/// The most vCPUs a machine may have (Firecracker's limit).
pub const MAX_VCPU_COUNT: u8 = 32;
/// The most guest memory, 1 TiB: a larger value is a wrong unit, and the page bitmaps are sized for this.
pub const MAX_MEM_SIZE_MIB: u64 = 1 << 20;
/// The most virtio devices a machine can have: one interrupt line of the IOAPIC each.
pub const MAX_DEVICES: usize = 19;
