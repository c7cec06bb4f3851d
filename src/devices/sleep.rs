//! The sleep registers of hardware-reduced ACPI (ACPI Specification 6.5, 4.8.3.7), by which a guest turns itself off.

use super::BusDevice;

/// `SLP_TYP` of the one state there is, power off (`\_S5`).
pub const SLEEP_TYPE_OFF: u8 = 5;
const CONTROL: u64 = 0;
const ENTER: u8 = 1 << 5;
const TYPE_SHIFT: u32 = 2;
const TYPE_MASK: u8 = 7;

/// Sleep control at offset 0, sleep status at 1. They hold nothing: control is write-only and the status of a machine
/// that never slept is zero.
pub struct SleepRegisters {
    power_off: Box<dyn Fn() + Send + Sync>,
}

impl SleepRegisters {
    /// `power_off` is called, by a vCPU's thread, when the guest turns itself off.
    pub fn new(power_off: Box<dyn Fn() + Send + Sync>) -> Self {
        SleepRegisters { power_off }
    }
}

impl BusDevice for SleepRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        if offset == CONTROL && value & ENTER != 0 && value >> TYPE_SHIFT & TYPE_MASK == SLEEP_TYPE_OFF {
            (self.power_off)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn only_entering_the_off_state_turns_the_machine_off() {
        let calls = Arc::new(AtomicU32::new(0));
        let device = SleepRegisters::new(Box::new({
            let calls = calls.clone();
            move || {
                calls.fetch_add(1, Ordering::Relaxed);
            }
        }));
        for (offset, data) in [(0, &[5 << 2][..]), (0, &[1 << 5]), (0, &[0x34, 0]), (1, &[0x34]), (0, &[])] {
            device.write(offset, data);
        }
        assert_eq!(calls.load(Ordering::Relaxed), 0);
        device.write(0, &[0x34]);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        let mut status = [0xff];
        device.read(1, &mut status);
        assert_eq!(status, [0]);
    }
}
