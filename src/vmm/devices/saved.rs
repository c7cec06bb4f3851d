//! The saved form of a device in a snapshot.

use serde::{Deserialize, Serialize};

use crate::devices::virtio::{MmioDevice, TransportState, id};
use crate::vmm::error::Error;
use crate::vmm::restore::StateError;

/// One virtio device. The section's instance is the device's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// The device type by VIRTIO 1.2, 5.
    pub device_type: u32,
    pub transport: TransportState,
    /// The device's own state in the device's own encoding.
    pub device: Vec<u8>,
}

impl SavedDevice {
    pub fn of(device: &MmioDevice) -> Result<Self, Error> {
        let (transport, state) = device.save()?;
        Ok(SavedDevice { device_type: device.device_type(), transport, device: state })
    }

    /// Returns whether this is the state `saved`, but for an interrupt that announces the restore, and for paths and
    /// addresses of the host, which a restore may have replaced.
    pub fn is_as(&self, saved: &SavedDevice) -> bool {
        let has_paths = matches!(self.device_type, id::BLOCK | id::NET | id::PMEM | id::VSOCK);
        let is_same_device = has_paths || self.device == saved.device;
        self.device_type == saved.device_type && self.transport.is_as(&saved.transport) && is_same_device
    }

    /// Decodes the device's own state; bytes left over are an error.
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
