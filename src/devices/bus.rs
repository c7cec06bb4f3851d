//! An address space of devices: port I/O or MMIO.

use std::sync::Arc;

use super::Error;

/// A device on a bus. vCPU threads call it, several at once: the device does its own locking.
pub trait BusDevice: Send + Sync {
    /// Called for a guest read of `data.len()` bytes (1, 2, 4 or 8) at `offset` from the device's base. Bytes of `data`
    /// that the device does not write read as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Called for a guest write of `data` at `offset` from the device's base.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Entry {
    base: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address. Filled while the machine is built, then only read.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl Bus {
    /// Puts `device` at `[base, base + len)`. An overlap with another device is an error.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let at = self.entries.partition_point(|entry| entry.base < base);
        let clear_before =
            at.checked_sub(1).is_none_or(|prev| self.entries[prev].base + self.entries[prev].len <= base);
        let end = base.checked_add(len).ok_or(Error::Overlap { base, len })?;
        let clear_after = self.entries.get(at).is_none_or(|next| end <= next.base);
        if len == 0 || !clear_before || !clear_after {
            return Err(Error::Overlap { base, len });
        }
        self.entries.insert(at, Entry { base, len, device });
        Ok(())
    }

    /// Reads from the device at `address`; returns false, with `data` all ones, if there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((entry, offset)) = self.find(address) else { return false };
        entry.device.read(offset, data);
        true
    }

    /// Writes to the device at `address`; returns false if there is none.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((entry, offset)) = self.find(address) else { return false };
        entry.device.write(offset, data);
        true
    }

    fn find(&self, address: u64) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|entry| entry.base <= address).checked_sub(1)?;
        let entry = &self.entries[at];
        let offset = address - entry.base;
        (offset < entry.len).then_some((entry, offset))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_covers_the_address() {
        let mut bus = Bus::default();
        let low = Arc::new(Recorder::default());
        let high = Arc::new(Recorder::default());
        bus.insert(0x60, 8, low.clone()).unwrap();
        bus.insert(0x3f8, 8, high.clone()).unwrap();
        let mut data = [0u8; 2];
        assert!(bus.read(0x64, &mut data));
        assert_eq!(data, [4, 0xff]);
        assert!(bus.write(0x3ff, &[9]));
        assert_eq!(*high.0.lock().unwrap(), [(7, vec![9])]);
        for nothing in [0u64, 0x5f, 0x68, 0x3f7, 0x400, u64::MAX] {
            assert!(!bus.read(nothing, &mut data), "{nothing:#x}");
            assert_eq!(data, [0xff; 2]);
            assert!(!bus.write(nothing, &data));
        }
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let mut bus = Bus::default();
        let device: Arc<dyn BusDevice> = Arc::new(Recorder::default());
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        for (base, len) in [(0x100, 1), (0x10f, 2), (0xff, 2), (0x80, 0x200), (0x200, 0), (u64::MAX, 2)] {
            assert!(bus.insert(base, len, device.clone()).is_err(), "{base:#x}+{len:#x}");
        }
        bus.insert(0x110, 1, device.clone()).unwrap();
        bus.insert(0xf0, 0x10, device).unwrap();
    }
}
