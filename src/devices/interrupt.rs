//! The interrupt line of a device.

use std::io;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An edge-triggered interrupt line: an eventfd that the machine connects to the interrupt controller.
#[derive(Debug)]
pub struct InterruptLine(EventFd);

impl InterruptLine {
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(InterruptLine)
    }

    /// The descriptor the machine registers as irqfd.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
