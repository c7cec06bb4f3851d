//! The interrupt of a virtio device over MMIO (VIRTIO 1.2, 4.2.2).

use std::sync::atomic::{AtomicU32, Ordering};

use vm_superio::Trigger;

use crate::devices::InterruptLine;

const INTERRUPT_USED_BUFFER: u32 = 1;
const INTERRUPT_CONFIG_CHANGE: u32 = 2;

/// The interrupt line and the causes of the last interrupt.
#[derive(Debug, Default)]
pub struct Interrupt {
    line: InterruptLine,
    causes: AtomicU32,
}

impl Interrupt {
    pub fn line(&self) -> &InterruptLine {
        &self.line
    }

    pub fn used_buffer(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    pub fn config_change(&self) {
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    fn raise(&self, causes: u32) {
        self.causes.fetch_or(causes, Ordering::SeqCst);
        // It can only fail when the machine is being taken down.
        let _ = self.line.trigger();
    }

    /// Raises the interrupt again if the driver has not acknowledged all causes.
    pub fn raise_pending(&self) {
        if self.causes() != 0 {
            self.raise(0);
        }
    }

    /// The causes that the driver has not acknowledged: the register `InterruptStatus`.
    pub fn causes(&self) -> u32 {
        self.causes.load(Ordering::SeqCst)
    }

    pub fn set_causes(&self, causes: u32) {
        self.causes.store(causes, Ordering::SeqCst);
    }

    /// The driver has seen `causes`.
    pub fn acknowledge(&self, causes: u32) {
        self.causes.fetch_and(!causes, Ordering::SeqCst);
    }
}
