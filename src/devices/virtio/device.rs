//! The interface between a device and its transport.

use std::any::Any;
use std::os::fd::RawFd;

use super::broken::Broken;
use super::io::Io;

/// Device ids (VIRTIO 1.2, 5).
pub mod id {
    pub const NET: u32 = 1;
    pub const BLOCK: u32 = 2;
    pub const ENTROPY: u32 = 4;
    pub const BALLOON: u32 = 5;
    pub const VSOCK: u32 = 19;
    pub const PMEM: u32 = 27;
}

/// A descriptor of the device's own that the device thread waits for, edge-triggered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub fd: RawFd,
    /// Passed to [`VirtioDevice::process_event`].
    pub token: u32,
}

/// A virtio device behind its transport. The transport calls it with its lock held, so one call at a time: from vCPU
/// threads (`read_config`, `write_config`, `activate`, `reset`), from the device thread (`process_…`) and, while no
/// vCPU runs, from the main thread (`quiesce`, `save`).
pub trait VirtioDevice: Any + Send {
    /// The device id, see [`id`].
    fn device_type(&self) -> u32;

    /// The name in errors and metrics: the id in the config.
    fn name(&self) -> &str;

    /// The largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific features offered; the transport adds its own.
    fn features(&self) -> u64;

    /// Reads the configuration space. `data` comes zeroed; the device leaves bytes outside of the space alone.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space. Most devices have no writable field.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Called when the driver is ready: for the first time, after a reset, or in a restored snapshot. Earlier events of
    /// the device's own are lost, so the device must look at its sources itself.
    fn activate(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// Called when the driver resets the device, which must not touch its buffers any more.
    fn reset(&mut self);

    /// Called when the driver has made chains available in `queue`, or may have: the device must look at all of them.
    fn process_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), Broken>;

    /// Returns the descriptors to wait for. Called once, when the device thread starts.
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Called when a source is readable, or may be, while the driver is ready.
    fn process_event(&mut self, _token: u32, _io: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// Must end all requests in flight: until the next call nothing writes guest memory. Called while no vCPU runs.
    fn quiesce(&mut self, _io: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    /// Returns the device's own state, encoded; the transport saves queues and registers. Called after `quiesce`.
    fn save(&self) -> Result<Vec<u8>, postcard::Error>;

    /// Returns counters for the metrics file.
    fn metrics(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}
