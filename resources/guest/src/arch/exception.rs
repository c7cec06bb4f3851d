//! The end of the road: exceptions, panics, reset.

use crate::serial;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};
use tvmm_guest::text::Text;

use super::{port, trap};

static DYING: AtomicBool = AtomicBool::new(false);

/// Every exception but the trap call lands here, at CPL3 on the exception stack (boot.s).
#[unsafe(no_mangle)]
extern "C" fn exception_main(vector: u64, error: u64, rip: u64, cr2: u64) -> ! {
    die(format_args!("vec={vector} err={error:#x} rip={rip:#x} cr2={cr2:#x}"))
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    match info.location() {
        Some(at) => die(format_args!("{} at {}:{}", info.message(), at.file(), at.line())),
        None => die(format_args!("{}", info.message())),
    }
}

/// Prints `panic <what>` and resets the machine.
pub fn die(what: core::fmt::Arguments<'_>) -> ! {
    if DYING.swap(true, Ordering::Relaxed) {
        // Another CPU is at it, or printing failed.
        trap::triple_fault();
    }
    serial::panic_write(Text::<512>::of(format_args!("panic {what}")).as_str());
    reset()
}

/// Pulses the CPU's reset line through the i8042 (command 0xFE), as Linux's `reboot=k`.
fn reset() -> ! {
    port::write(0x64, 0xfe);
    for _ in 0..1 << 20 {
        core::hint::spin_loop();
    }
    trap::triple_fault()
}
