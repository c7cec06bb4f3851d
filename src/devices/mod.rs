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
use std::path::PathBuf;

/// What can go wrong with a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An eventfd could not be made or used.
    #[error("Cannot {doing} for the {device}")]
    Event { doing: &'static str, device: &'static str, source: io::Error },
    /// Two devices want the same addresses.
    #[error("The address range {base:#x}+{len:#x} is taken already")]
    Overlap { base: u64, len: u64 },
    /// A pmem image cannot be opened or asked about.
    #[error("Cannot {doing} {} for pmem device `{id}`", path.display())]
    PmemFile { doing: &'static str, id: String, path: PathBuf, source: io::Error },
    /// A file that cannot be this pmem image.
    #[error("{} cannot be pmem device `{id}`: {what}", path.display())]
    Pmem { id: String, path: PathBuf, what: String },
    /// A balloon that the guest cannot fill.
    #[error("A balloon of {amount_mib} MiB is larger than the guest, which has {ram_mib} MiB")]
    BalloonTooLarge { amount_mib: u32, ram_mib: u64 },
    /// Saved state that the device cannot have had.
    #[error("The saved state of the {device} is not valid: {what}")]
    State { device: &'static str, what: &'static str },
}
