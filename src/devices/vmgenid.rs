//! The VM generation id: 16 random bytes in guest memory that change whenever the guest's past stops being its own, so
//! that clones of one snapshot do not share random numbers (Microsoft, "Virtual Machine Generation ID", 2012; Linux
//! `drivers/virt/vmgenid.c`).

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vm_superio::Trigger;

use super::virtio::Memory;
use super::{Error, InterruptLine};

const DEVICE: &str = "VM generation id";
/// Its specification wants 8; 16 keep it in one page.
const ALIGN: u64 = 16;

/// The address of the id that the guest was given. The id itself is new after every restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmGenIdState {
    pub gpa: u64,
    pub gsi: u32,
}

/// The id's address, and the line of the event that it has changed.
pub struct VmGenId {
    state: VmGenIdState,
    line: InterruptLine,
}

impl VmGenId {
    pub fn new(state: VmGenIdState) -> Result<Self, Error> {
        if !state.gpa.is_multiple_of(ALIGN) {
            return Err(Error::State { device: DEVICE, what: "its address is not aligned" });
        }
        Ok(VmGenId { state, line: InterruptLine::default() })
    }

    /// The line to connect to `save().gsi`.
    pub fn interrupt_line(&self) -> &InterruptLine {
        &self.line
    }

    pub fn save(&self) -> VmGenIdState {
        self.state
    }

    /// Writes a new id. The caller then tells the guest by [`notify`](Self::notify).
    pub fn renew(&self, memory: &Memory) -> Result<(), Error> {
        let failed = |source| Error::Event { doing: "get random bytes", device: DEVICE, source };
        let mut id = [0_u8; 16];
        // 16 bytes are delivered whole (getrandom(2): up to 256 are never cut short).
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| failed(error.into()))?;
        let outside = |_| Error::State { device: DEVICE, what: "its address is not guest memory" };
        memory.write_slice(&id, GuestAddress(self.state.gpa)).map_err(outside)
    }

    /// Tells the guest that the id has changed.
    pub fn notify(&self) -> Result<(), Error> {
        let failed = |source| Error::Event { doing: "raise the interrupt", device: DEVICE, source };
        self.line.trigger().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_changes_each_time_and_the_line_is_raised() {
        let memory = crate::devices::virtio::testing::memory();
        let device = VmGenId::new(VmGenIdState { gpa: 0x1000, gsi: 3 }).unwrap();
        let id = || memory.read_obj::<u128>(GuestAddress(0x1000)).unwrap();
        device.renew(&memory).unwrap();
        let first = id();
        device.renew(&memory).unwrap();
        assert!(first != 0 && first != id());
        assert_eq!(device.interrupt_line().take_unconnected(), 0);
        device.notify().unwrap();
        assert_eq!(device.interrupt_line().take_unconnected(), 1);
    }

    #[test]
    fn saved_places_that_cannot_be_are_refused() {
        let memory = crate::devices::virtio::testing::memory();
        assert!(VmGenId::new(VmGenIdState { gpa: 0x1008, gsi: 3 }).is_err());
        for gpa in [0x40_0000, 0xd000_0000, u64::MAX - 15] {
            assert!(VmGenId::new(VmGenIdState { gpa, gsi: 3 }).unwrap().renew(&memory).is_err(), "{gpa:#x}");
        }
    }
}
