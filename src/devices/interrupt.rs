//! The interrupt line of a device.

use std::fmt;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::Trigger;

/// Gives an edge to an input of the interrupt controller. On return the edge has arrived.
type Input = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// An edge-triggered interrupt line, which the machine connects to the interrupt controller.
///
/// The controller takes an edge on the thread that gives it. An irqfd would pass it on from a thread of the kernel (KVM
/// does so for all inputs of the I/O APIC): later, and also after the device and the machine have been stopped.
#[derive(Default)]
pub struct InterruptLine {
    input: OnceLock<Input>,
    /// Edges given before the line was connected.
    unconnected: AtomicU64,
}

impl InterruptLine {
    /// Connects the line, once.
    pub fn connect(&self, input: Input) {
        // A second input would get nothing.
        let _ = self.input.set(input);
    }

    /// Takes the number of edges given before the line was connected.
    pub fn take_unconnected(&self) -> u64 {
        self.unconnected.swap(0, Ordering::SeqCst)
    }
}

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.input.get() {
            Some(input) => input(),
            None => {
                self.unconnected.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        }
    }
}

impl fmt::Debug for InterruptLine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("InterruptLine").field("is_connected", &self.input.get().is_some()).finish()
    }
}
