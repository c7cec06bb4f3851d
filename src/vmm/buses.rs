//! The buses of a machine.

use crate::devices::Bus;

/// The buses that a vCPU's exits go to.
#[derive(Default)]
pub struct Buses {
    pub pio: Bus,
    pub mmio: Bus,
}
