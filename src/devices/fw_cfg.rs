//! The firmware configuration device (QEMU `docs/specs/fw_cfg.rst`), with one file: metadata that the host gives this
//! VM, and after a restore this clone. Linux shows it as `/sys/firmware/qemu_fw_cfg/by_name/opt/tvmm/metadata/raw`;
//! other guests read two I/O ports.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{BusDevice, Error};

/// The file: a JSON object of strings, filled up with blanks to [`FILE_LEN`], because drivers learn a file's length
/// once.
pub const FILE_NAME: &str = "opt/tvmm/metadata";
pub const FILE_LEN: usize = 4096;

/// The host's metadata: keys and values.
pub type Metadata = BTreeMap<String, String>;

const DEVICE: &str = "metadata device";
const SELECTOR: u64 = 0;
const DATA: u64 = 1;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
const KEY_DIRECTORY: u16 = 0x19;
const KEY_FIRST_FILE: u16 = 0x20;
/// The traditional interface alone, no DMA.
const ID_TRADITIONAL: u32 = 1;

/// The item that the guest last selected, its read position, and the metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    selected: u16,
    offset: u32,
    pub metadata: Metadata,
}

impl FwCfgState {
    /// The state of a machine that boots: nothing is selected yet.
    pub fn new(metadata: Metadata) -> Self {
        FwCfgState { metadata, ..FwCfgState::default() }
    }
}

/// The device, at two ports.
#[derive(Debug)]
pub struct FwCfg {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    state: FwCfgState,
    /// The content of the selected item.
    item: Vec<u8>,
}

impl FwCfg {
    /// The device of a machine that boots, or in a saved state. Fails if the metadata do not fit their file.
    pub fn new(state: FwCfgState) -> Result<Self, Error> {
        file(&state.metadata)?;
        let mut inner = Inner { item: Vec::new(), state };
        inner.item = inner.select(inner.state.selected);
        Ok(FwCfg { inner: Mutex::new(inner) })
    }

    /// Takes on a saved state. Fails if the metadata do not fit their file.
    pub fn restore(&self, state: FwCfgState) -> Result<(), Error> {
        let FwCfg { inner } = FwCfg::new(state)?;
        *self.lock() = inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(())
    }

    pub fn save(&self) -> FwCfgState {
        self.lock().state.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn select(&self, key: u16) -> Vec<u8> {
        match key {
            KEY_SIGNATURE => b"QEMU".to_vec(),
            KEY_ID => ID_TRADITIONAL.to_le_bytes().to_vec(),
            KEY_DIRECTORY => directory(),
            // The length was checked when the metadata came.
            KEY_FIRST_FILE => file(&self.state.metadata).unwrap_or_default(),
            _ => Vec::new(),
        }
    }
}

/// One file: count, then length, key, a reserved word and a name of 56 bytes, big-endian.
fn directory() -> Vec<u8> {
    let mut bytes = 1_u32.to_be_bytes().to_vec();
    bytes.extend((FILE_LEN as u32).to_be_bytes());
    bytes.extend(KEY_FIRST_FILE.to_be_bytes());
    bytes.extend([0; 2]);
    bytes.extend(FILE_NAME.as_bytes());
    bytes.resize(4 + 64, 0);
    bytes
}

fn file(metadata: &Metadata) -> Result<Vec<u8>, Error> {
    let invalid = |what| Error::State { device: DEVICE, what };
    let mut bytes = serde_json::to_vec(metadata).map_err(|_| invalid("the metadata are no JSON"))?;
    if bytes.len() >= FILE_LEN {
        return Err(invalid("the metadata are longer than 4095 bytes as JSON"));
    }
    bytes.resize(FILE_LEN - 1, b' ');
    bytes.push(b'\n');
    Ok(bytes)
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Past the end of an item everything reads as zero.
        data.fill(0);
        if offset != DATA {
            return;
        }
        let mut inner = self.lock();
        let rest = inner.item.get(inner.state.offset as usize..).unwrap_or_default();
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
        inner.state.offset = inner.state.offset.saturating_add(len as u32);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == SELECTOR && data.len() == 2 {
            let key = u16::from_le_bytes([data[0], data[1]]);
            let mut inner = self.lock();
            inner.item = inner.select(key);
            inner.state.selected = key;
            inner.state.offset = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(device: &FwCfg, key: u16, len: usize) -> Vec<u8> {
        device.write(SELECTOR, &key.to_le_bytes());
        let mut data = vec![0xff; len];
        let (first, rest) = data.split_at_mut(len.min(1));
        device.read(DATA, first);
        device.read(DATA, rest);
        data
    }

    fn metadata(len: usize) -> Metadata {
        [("key".to_owned(), "v".repeat(len))].into()
    }

    #[test]
    fn driver_finds_signature_directory_and_file() {
        let device = FwCfg::new(FwCfgState::new(metadata(3))).unwrap();
        assert_eq!(read(&device, 0, 5), *b"QEMU\0");
        assert_eq!(read(&device, 1, 4), [1, 0, 0, 0]);
        let directory = read(&device, 0x19, 68);
        assert_eq!(directory[..8], [0, 0, 0, 1, 0, 0, 0x10, 0]);
        assert_eq!(directory[8..12], [0, 0x20, 0, 0]);
        assert!(directory[12..].starts_with(b"opt/tvmm/metadata\0"));
        let file = read(&device, 0x20, FILE_LEN);
        assert_eq!(serde_json::from_slice::<Metadata>(&file).unwrap(), metadata(3));
        assert_eq!(read(&device, 0x21, 2), [0, 0]);
    }

    #[test]
    fn reading_goes_on_in_a_restored_device_where_it_stopped() {
        let device = FwCfg::new(FwCfgState::new(metadata(30))).unwrap();
        let begun = read(&device, 0x20, 10);
        let restored = FwCfg::new(device.save()).unwrap();
        let mut rest = vec![0; FILE_LEN - 10];
        restored.read(DATA, &mut rest);
        assert_eq!(serde_json::from_slice::<Metadata>(&[begun, rest].concat()).unwrap(), metadata(30));
    }

    #[test]
    fn metadata_that_do_not_fit_are_refused() {
        let fits = |len| FwCfg::new(FwCfgState::new(metadata(len))).is_ok();
        assert!(fits(FILE_LEN - 11) && !fits(FILE_LEN - 10));
    }

    proptest! {
        #[test]
        fn no_driver_makes_fw_cfg_panic_or_its_state_unusable(
            acts in proptest::collection::vec((any::<bool>(), 0u64..4, 0u16..0x30, 0usize..9000), 1..60),
        ) {
            let mut device = FwCfg::new(FwCfgState::new(metadata(30))).unwrap();
            for (is_read, offset, key, len) in acts {
                if is_read {
                    device.read(offset, &mut vec![0; len]);
                } else {
                    device.write(offset, &key.to_le_bytes()[..len % 3]);
                }
                device = FwCfg::new(device.save()).unwrap();
            }
            prop_assert_eq!(read(&device, 0, 4), b"QEMU");
        }
    }
}
