//! The stand-in for a device that has ended, until its transport gets the next one.

use super::io::Io;
use super::{Broken, VirtioDevice};
use crate::devices::Error;

/// A device that does nothing.
pub struct Retired {
    pub device_type: u32,
    pub queue_sizes: Vec<u16>,
}

impl VirtioDevice for Retired {
    fn device_type(&self) -> u32 {
        self.device_type
    }

    fn name(&self) -> &str {
        "retired"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn reset(&mut self) {}

    fn process_queue(&mut self, _: usize, _: &mut Io<'_>) -> Result<(), Broken> {
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        Ok(Vec::new())
    }

    fn rewind(&mut self, _: &[u8]) -> Result<(), Error> {
        Err(Error::State { device: "virtio device", what: "the device has ended" })
    }
}
