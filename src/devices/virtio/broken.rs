//! The faults that end the work of a device.

/// A fault after which a device cannot go on: an error of the driver, or of the host. The transport answers with
/// `DEVICE_NEEDS_RESET` (VIRTIO 1.2, 2.1.2).
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    #[error("Queue {queue} is not usable: {source}")]
    Queue { queue: usize, source: virtio_queue::Error },
    #[error("A descriptor chain is not valid: {0}")]
    Chain(&'static str),
    #[error("Guest memory cannot be reached: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("Cannot {doing}: {source}")]
    Host { doing: &'static str, source: std::io::Error },
}
