//! Devices the guest sees, and the bus it reaches them by.
//!
//! Owns: serial port, i8042, sleep registers, VM generation id, fw_cfg, the virtio devices and their transport, and the
//! state of each that a snapshot keeps (the `…State` next to the device).
//! Must not know: KVM, tiers, config files, or how it is asked. A device has an interrupt line, its registers and guest
//! memory as `sys::guest_memory` shows it.
//! Start reading: `virtio/device.rs` (the trait of a device), `virtio/mmio.rs` (its transport), then one small device:
//! `virtio/entropy.rs`.

mod bus;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod doors;
mod error;
mod fw_cfg;
mod i8042;
mod interrupt;
mod serial;
mod sleep;
pub mod virtio;
mod vmgenid;

pub use bus::{Bus, BusDevice};
pub use error::Error;
pub use fw_cfg::{FwCfg, FwCfgState, Metadata};
pub use i8042::{I8042, I8042State, PULSE_RESET};
pub use interrupt::InterruptLine;
pub use serial::{Serial, SerialState};
pub use sleep::{SLEEP_TYPE_OFF, SleepRegisters};
pub use vmgenid::{VmGenId, VmGenIdState};
