//! Port I/O. CPL3 may do it because of IOPL=3, and where that is lost (KVM_PVM) because of the I/O bitmap in the task
//! state segment (boot.s).

use core::arch::asm;

/// Writes a byte to one of the ports 0..=0x51f.
pub fn write(port: u16, value: u8) {
    // SAFETY: the instruction touches no memory and no register but its operands. The device's reaction is outside
    // Rust's model; no device of this machine is ever programmed to do DMA.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags));
    }
}

/// Writes two bytes to one of the ports 0..=0x51e.
pub fn write_word(port: u16, value: u16) {
    // SAFETY: as in `write`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags));
    }
}

/// Reads a byte from one of the ports 0..=0x51f.
pub fn read(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write`.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags));
    }
    value
}
