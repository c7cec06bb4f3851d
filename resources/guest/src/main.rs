//! A tiny guest kernel for tvmm's tests and benchmarks. README.md describes it.
//!
//! Reading order: boot.s (how CPL3 is reached), this file, protocol.rs, functions/.
#![no_std]
#![no_main]

mod alloc;
mod arch;
mod boot;
mod clock;
mod functions;
#[cfg(feature = "functions")]
mod heap;
mod paging;
mod protocol;
mod serial;
mod smp;
mod virtio;
mod vsock;

use crate::arch::{apic, exception::die, trap};
use crate::boot::BootInfo;
use crate::functions::Ctx;
use crate::serial::Serial;
use tvmm_guest::line::LineReader;
use tvmm_guest::text::Text;

// Stack of each CPU at CPL3, 2 to the power of this: 128 KiB, or 1 MiB for libraries that know nothing of small stacks.
#[cfg(not(feature = "functions"))]
core::arch::global_asm!(".set USTACK_SHIFT, 17");
#[cfg(feature = "functions")]
core::arch::global_asm!(".set USTACK_SHIFT, 20");
core::arch::global_asm!(include_str!("../boot.s"), options(att_syntax));

const COM1_IRQ: u32 = 4;

/// The entry of the boot CPU, called by boot.s.
#[unsafe(no_mangle)]
extern "C" fn guest_main(_slot: usize) -> ! {
    let mut serial = Serial::init();
    let boot = BootInfo::load().unwrap_or_else(|e| die(format_args!("{e}")));
    let ctx = functions::context();
    start(&boot, ctx).unwrap_or_else(|e| die(format_args!("{e}")));
    serial.send(
        Text::<96>::of(format_args!(
            "ready {} mem={} vcpus={}\n",
            env!("CARGO_PKG_VERSION"),
            ctx.mem_mib,
            ctx.cpus.count()
        ))
        .as_str(),
    );
    serve(&mut serial, ctx)
}

/// Starts everything but the serial port. The error is for a panic.
fn start(boot: &BootInfo, ctx: &mut Ctx) -> Result<(), &'static str> {
    apic::check()?;
    apic::mask_pics();
    apic::init_local();
    apic::route_isa(COM1_IRQ, apic::VECTOR_SERIAL);
    clock::init()?;
    ctx.init(boot).map_err(|_| "memory map has too many ranges")?;
    paging::init(&boot.map, boot.config.page_tables, &mut ctx.pages)?;
    ctx.cpus.start();
    Ok(())
}

/// Reads lines and answers them, for ever. The receiver is always found empty before halting, so
/// that an interrupt counted while a function ran cannot leave bytes behind.
fn serve(serial: &mut Serial, ctx: &mut Ctx) -> ! {
    let mut reader = LineReader::new();
    loop {
        let Some(received) = serial.receive() else {
            trap::halt();
            continue;
        };
        if received.damaged {
            reader.damage();
        }
        if reader.push(received.byte)
            && let Some(answer) = protocol::answer(&reader, ctx)
        {
            serial.send(answer.as_str());
        }
    }
}
