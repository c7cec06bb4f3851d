//! A device as it is written into the snapshot.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::{MmioDevice, TransportState};
use crate::vmm::error::Error;
use crate::vmm::restore::StateError;

/// One virtio device. Its place is its section's instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// VIRTIO 1.2, 5: which device's state follows.
    pub device_type: u32,
    pub transport: TransportState,
    /// The device's own state, by its own encoding.
    pub device: Vec<u8>,
}

impl SavedDevice {
    pub fn of(device: &MmioDevice) -> Result<Self, Error> {
        let (transport, state) = device.save()?;
        Ok(SavedDevice { device_type: device.device_type(), transport, device: state })
    }

    /// The device's own state; bytes left over are an error.
    pub fn decode<T: serde::de::DeserializeOwned>(&self) -> Result<T, Error> {
        let section = || format!("Virtio (device type {})", self.device_type);
        let invalid = |what: String| Error::from(StateError::Section { section: section(), what });
        match postcard::take_from_bytes(&self.device) {
            Ok((state, [])) => Ok(state),
            Ok((_, rest)) => Err(invalid(format!("{} bytes are left over", rest.len()))),
            Err(error) => Err(invalid(error.to_string())),
        }
    }
}
