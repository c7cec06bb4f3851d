//! Devices the guest sees, and the bus it reaches them by.
//!
//! A device knows an interrupt line, its own registers and, later, guest memory. It knows nothing of KVM, of tiers, or
//! of how it is asked. What it must not lose over a snapshot is a `…State` next to it.

mod bus;
mod fw_cfg;
mod i8042;
mod interrupt;
mod output;
mod serial;
mod sleep;
pub mod virtio;
mod vmgenid;

pub use bus::{Bus, BusDevice};
pub use fw_cfg::{FwCfg, FwCfgState, Metadata};
pub use i8042::{I8042, I8042State, PULSE_RESET};
pub use interrupt::InterruptLine;
pub use output::{ConsoleOutput, FdSink, Sink};
pub use serial::{Serial, SerialState};
pub use sleep::{SLEEP_TYPE_OFF, SleepRegisters};
pub use vmgenid::{VmGenId, VmGenIdState};

use std::io;

/// What can go wrong with a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An eventfd could not be made or used.
    #[error("Cannot {doing} for the {device}")]
    Event { doing: &'static str, device: &'static str, source: io::Error },
    /// Two devices want the same addresses.
    #[error("The address range {base:#x}+{len:#x} is taken already")]
    Overlap { base: u64, len: u64 },
    /// A tap device that cannot be had; `why` says what to do.
    #[error("Network interface `{id}` cannot use the tap `{tap}`: {why}")]
    Tap { id: String, tap: String, why: String, source: io::Error },
    /// A MAC address for a guest that cannot learn of it.
    #[error(
        "Network interface `{id}` cannot have another MAC address: it had no guest_mac, so the guest chose its own; give it one before it boots"
    )]
    NoMac { id: String },
    /// Saved state that the device cannot have had.
    #[error("The saved state of the {device} is not valid: {what}")]
    State { device: &'static str, what: &'static str },
}
