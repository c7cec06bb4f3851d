//! The interrupt lines of devices at the interrupt controllers of a VM.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use crate::devices::InterruptLine;

/// Connects a device's line to input `gsi` of the interrupt controllers of `vm`.
pub fn connect(line: &InterruptLine, vm: &Arc<VmFd>, gsi: u32) {
    let vm = vm.clone();
    line.connect(Box::new(move || {
        vm.set_irq_line(gsi, true)?;
        Ok(vm.set_irq_line(gsi, false)?)
    }));
}
