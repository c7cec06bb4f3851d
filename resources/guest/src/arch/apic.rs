//! Interrupt controllers: local APIC (Intel SDM vol. 3 ch. 10), IOAPIC (82093AA datasheet), and the
//! two 8259 that only need to be silenced.

use super::{port, trap};

/// Vectors with a stub of their own in boot.s.
pub const VECTOR_SERIAL: u32 = 0x24;
pub const VECTOR_TIMER: u32 = 0x40;
pub const VECTOR_WAKE: u32 = 0x41;
const VECTOR_SPURIOUS: u32 = 0xff;

const BASE: u64 = 0xfee0_0000;
const IA32_APIC_BASE: u32 = 0x1b;
const BASE_MASK: u64 = 0xf_ffff_ffff_f000;
const BASE_ENABLED: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;

const ID: u64 = 0x20;
const TPR: u64 = 0x80;
const SVR: u64 = 0xf0;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_CURRENT: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3e0;

const SVR_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
const LVT_PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0xb;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_INIT: u32 = 5 << 8;
const ICR_STARTUP: u32 = 6 << 8;
const ICR_ALL_BUT_SELF: u32 = 3 << 18;

const IOAPIC_SELECT: u64 = 0xfec0_0000;
const IOAPIC_WINDOW: u64 = 0xfec0_0010;
const IOAPIC_REDIRECTION: u32 = 0x10;

fn store(address: u64, value: u32) {
    // SAFETY: only called for the register blocks of the two APICs, which are mapped and no RAM.
    unsafe { (address as *mut u32).write_volatile(value) }
}

fn load(address: u64) -> u32 {
    // SAFETY: as in `store`.
    unsafe { (address as *const u32).read_volatile() }
}

/// Checks that the local APIC is where and how this kernel uses it; the error is for a panic.
pub fn check() -> Result<(), &'static str> {
    // SAFETY: every x86-64 CPU has this MSR.
    match unsafe { trap::read_msr(IA32_APIC_BASE) } {
        b if b & BASE_ENABLED == 0 => Err("the local APIC is off"),
        b if b & BASE_X2APIC != 0 => Err("the local APIC is in x2APIC mode"),
        b if b & BASE_MASK != BASE => Err("the local APIC is not at 0xfee00000"),
        _ => Ok(()),
    }
}

/// Makes this CPU's local APIC accept interrupts.
pub fn init_local() {
    store(BASE + SVR, SVR_ENABLE | VECTOR_SPURIOUS);
    store(BASE + TPR, 0);
    store(BASE + LVT_TIMER, LVT_MASKED);
    store(BASE + LVT_LINT0, LVT_MASKED);
}

/// Masks every line of the two 8259.
pub fn mask_pics() {
    port::write(0x21, 0xff);
    port::write(0xa1, 0xff);
}

/// Routes an ISA interrupt line to this CPU: edge-triggered, active high.
pub fn route_isa(line: u32, vector: u32) {
    let entry = IOAPIC_REDIRECTION + 2 * line;
    for (register, value) in [(entry + 1, id() << 24), (entry, vector)] {
        store(IOAPIC_SELECT, register);
        store(IOAPIC_WINDOW, value);
    }
}

/// This CPU's APIC id.
pub fn id() -> u32 {
    load(BASE + ID) >> 24
}

/// Interrupts another CPU with [`VECTOR_WAKE`]. Callers run with IF=0, so nothing comes in between
/// the two writes.
pub fn wake(apic_id: u32) {
    store(BASE + ICR_HIGH, apic_id << 24);
    store(BASE + ICR_LOW, ICR_ASSERT | VECTOR_WAKE);
}

/// INIT to all other CPUs.
pub fn init_others() {
    store(BASE + ICR_LOW, ICR_ALL_BUT_SELF | ICR_ASSERT | ICR_INIT);
}

/// Start-up interrupt to all other CPUs; those that run already ignore it.
pub fn start_others(trampoline: u32) {
    store(BASE + ICR_LOW, ICR_ALL_BUT_SELF | ICR_ASSERT | ICR_STARTUP | trampoline >> 12);
}

/// Starts this CPU's timer: [`VECTOR_TIMER`] every `count` ticks.
pub fn start_timer(count: u32) {
    store(BASE + TIMER_DIVIDE, DIVIDE_BY_1);
    store(BASE + LVT_TIMER, LVT_PERIODIC | VECTOR_TIMER);
    store(BASE + TIMER_INITIAL, count);
}

/// Stops this CPU's timer.
pub fn stop_timer() {
    store(BASE + TIMER_INITIAL, 0);
    store(BASE + LVT_TIMER, LVT_MASKED);
}

/// Starts counting down from the top without interrupts, to measure the timer's speed.
pub fn start_count() {
    store(BASE + TIMER_DIVIDE, DIVIDE_BY_1);
    store(BASE + LVT_TIMER, LVT_MASKED);
    store(BASE + TIMER_INITIAL, u32::MAX);
}

/// Ticks since [`start_count`].
pub fn counted() -> u32 {
    u32::MAX - load(BASE + TIMER_CURRENT)
}
