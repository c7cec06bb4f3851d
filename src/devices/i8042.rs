//! The part of the i8042 keyboard controller that PC guests need: the CPU reset line, and a status register that says
//! "nothing here" (IBM PS/2 Technical Reference; Linux `reboot=k` writes 0xFE to port 0x64).

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::BusDevice;

const COMMAND_STATUS: u64 = 4;
/// The command that pulses the reset line.
pub const PULSE_RESET: u8 = 0xfe;

/// The controller has no state that outlives an access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {}

/// Ports 0x60–0x64. A pulse on the reset line writes the eventfd it was built with.
#[derive(Debug)]
pub struct I8042 {
    reset: EventFd,
}

impl I8042 {
    pub fn new(reset: EventFd) -> Self {
        I8042 { reset }
    }

    pub fn save(&self) -> I8042State {
        I8042State {}
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status: output buffer empty, input buffer empty. Data: nothing was received.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND_STATUS && data == [PULSE_RESET] {
            // A full eventfd counter means that a reset is requested already.
            let _ = self.reset.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn only_the_reset_command_pulses_the_line() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = I8042::new(event.try_clone().unwrap());
        for (offset, data) in [(0, &[0xfe][..]), (4, &[0xaa]), (4, &[0xfe, 0xfe]), (4, &[])] {
            device.write(offset, data);
            assert!(event.read().is_err());
        }
        device.write(4, &[0xfe]);
        assert_eq!(event.read().unwrap(), 1);
    }
}
