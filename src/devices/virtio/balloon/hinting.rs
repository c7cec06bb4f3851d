//! Free page hinting (VIRTIO 1.2, 5.5.6.6): when the host begins a round, the driver sets the guest's free pages aside
//! and names them; it keeps them aside until the host ends the round.

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::Broken;
use crate::sys::guest_memory::Memory;

/// As a command of the driver: it has named all free pages. (VIRTIO 1.2, 5.5.6.6)
const STOP: u32 = 0;
/// As a command of the host: the pages may be used again.
const DONE: u32 = 1;
/// The first number of a round.
const FIRST: u32 = 2;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HintingState {
    /// The command in the configuration space: `STOP` before the first round, a round's number, `DONE`.
    pub host_cmd: u32,
    /// The driver's last command: a round's number, then `STOP`.
    pub guest_cmd: Option<u32>,
    last_round: u32,
    acknowledge_on_stop: bool,
}

#[derive(Debug)]
pub struct Hinting(HintingState);

impl Hinting {
    pub fn new(state: HintingState) -> Self {
        Hinting(state)
    }

    pub fn state(&self) -> HintingState {
        self.0
    }

    pub fn start(&mut self, acknowledge_on_stop: bool) {
        // The number must differ from the last, and from those with a meaning of their own.
        let round = self.0.last_round.wrapping_add(1).max(FIRST);
        (self.0.host_cmd, self.0.last_round, self.0.acknowledge_on_stop) = (round, round, acknowledge_on_stop);
    }

    pub fn stop(&mut self) {
        self.0.host_cmd = DONE;
    }

    /// True if the driver is in the round that the host has begun. Late hints are of pages that the driver may have
    /// begun to use.
    pub fn is_round(&self) -> bool {
        self.0.host_cmd >= FIRST && self.0.guest_cmd == Some(self.0.host_cmd)
    }

    /// Takes the driver's command from guest memory. Returns whether the host answers with a command of its own.
    pub fn command(&mut self, at: u64, len: u32, memory: &Memory) -> Result<bool, Broken> {
        if len < 4 {
            return Err(Broken::Chain("a command of free page hinting has less than four bytes"));
        }
        let command = u32::from_le(memory.read_obj(GuestAddress(at))?);
        let ends = command == STOP && self.is_round() && self.0.acknowledge_on_stop;
        self.0.guest_cmd = Some(command);
        if ends {
            self.stop();
        }
        Ok(ends)
    }
}
