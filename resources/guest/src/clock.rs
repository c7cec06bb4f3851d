//! Time, from kvmclock alone where there is one (KVM Documentation/virt/kvm/x86/msr.rst): after a
//! restore the TSC may have jumped, and KVM describes the new one in each CPU's structure.
//!
//! Without kvmclock the TSC is measured once against the 8254 and described in the
//! same structure, so that there is one way to read the time.

use crate::arch::{cpuid, port, trap};
use crate::smp::MAX_CPUS;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
const SYSTEM_TIME_ENABLE: u64 = 1;
/// A slower TSC means that there is no 8254: ports without a device read as ones, "done" at once.
const HERTZ_MIN: u64 = 10_000_000;

/// `struct pvclock_vcpu_time_info`, alone in its cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct PvClock {
    version: u32,
    pad0: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad: [u8; 2],
}

/// `struct pvclock_wall_clock`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct WallClock {
    version: u32,
    sec: u32,
    nsec: u32,
}

/// Memory that the hypervisor writes behind Rust's back: volatile accesses only.
struct Shared<T>(UnsafeCell<T>);
// SAFETY: all accesses are volatile copies of the whole value, checked by its version.
unsafe impl<T> Sync for Shared<T> {}

static CLOCKS: [Shared<PvClock>; MAX_CPUS] = [const {
    Shared(UnsafeCell::new(PvClock {
        version: 0,
        pad0: 0,
        tsc_timestamp: 0,
        system_time: 0,
        tsc_to_system_mul: 0,
        tsc_shift: 0,
        flags: 0,
        pad: [0; 2],
    }))
}; MAX_CPUS];
static WALL: Shared<WallClock> = Shared(UnsafeCell::new(WallClock { version: 0, sec: 0, nsec: 0 }));
/// The latest time that each CPU has read.
static LAST: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static KVMCLOCK: AtomicBool = AtomicBool::new(false);

/// Chooses the source and starts the boot CPU's clock. The error is for a panic.
pub fn init() -> Result<(), &'static str> {
    if cpuid::has_kvmclock() {
        KVMCLOCK.store(true, Ordering::Relaxed);
        enable(0);
        return Ok(());
    }
    let clock = describe_tsc(measure_tsc().ok_or("no kvmclock, and the PIT does not count")?);
    for shared in &CLOCKS {
        // SAFETY: no CPU reads it yet; the hypervisor was not told of this memory.
        unsafe { shared.0.get().write_volatile(clock) };
    }
    Ok(())
}

/// Starts the clock of the CPU in `slot`, on that CPU.
pub fn enable(slot: usize) {
    if KVMCLOCK.load(Ordering::Relaxed) {
        let address = CLOCKS[slot].0.get() as u64;
        // SAFETY: CPUID offers this MSR; the structure is set aside for the hypervisor for ever.
        unsafe { trap::write_msr(MSR_SYSTEM_TIME, address | SYSTEM_TIME_ENABLE) };
    }
}

/// The source of the time.
pub fn source() -> &'static str {
    if KVMCLOCK.load(Ordering::Relaxed) { "kvmclock" } else { "tsc-pit" }
}

/// The structure of the CPU in `slot`, for the assembly loop of `spin`.
pub fn structure(slot: usize) -> *const PvClock {
    CLOCKS[slot].0.get()
}

/// Nanoseconds since some start, on the CPU in `slot`; never less than before on that CPU.
pub fn now_ns(slot: usize) -> u64 {
    let now = loop {
        if let Some(now) = try_read(structure(slot)) {
            break now;
        }
        core::hint::spin_loop();
    };
    LAST[slot].fetch_max(now, Ordering::Relaxed).max(now)
}

fn try_read(clock: *const PvClock) -> Option<u64> {
    // SAFETY: `clock` is one of CLOCKS. The fences of `read_tsc` and volatile keep the order:
    // version, values and TSC, version.
    let (c, tsc, version) = unsafe {
        let before = (&raw const (*clock).version).read_volatile();
        let c = clock.read_volatile();
        let tsc = read_tsc();
        (PvClock { version: before, ..c }, tsc, (&raw const (*clock).version).read_volatile())
    };
    if c.version != version || version & 1 != 0 {
        return None;
    }
    let delta = tsc.saturating_sub(c.tsc_timestamp);
    let shift = u32::from(c.tsc_shift.unsigned_abs()) & 63;
    let scaled = if c.tsc_shift < 0 { delta >> shift } else { delta << shift };
    let ns = (u128::from(scaled) * u128::from(c.tsc_to_system_mul)) >> 32;
    Some(c.system_time.wrapping_add(ns as u64))
}

fn read_tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: CR4.TSD is clear. Memory accesses stay on their side of the fences.
    unsafe {
        asm!("lfence", "rdtsc", "lfence", out("eax") low, out("edx") high,
             options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Nanoseconds since 1970, or 0 where there is no kvmclock. The hypervisor writes the wall time of
/// kvmclock's zero whenever the MSR is written; asked anew each time, it is right after a restore.
pub fn wall_ns(slot: usize) -> u64 {
    if !KVMCLOCK.load(Ordering::Relaxed) {
        return 0;
    }
    let address = WALL.0.get();
    // SAFETY: the MSR comes with the one of `enable`; the structure is set aside, 4-byte aligned.
    let wall = unsafe {
        trap::write_msr(MSR_WALL_CLOCK, address as u64);
        address.read_volatile()
    };
    let start = u64::from(wall.sec) * 1_000_000_000 + u64::from(wall.nsec);
    start.wrapping_add(now_ns(slot))
}

/// Hertz of the TSC: cycles while the 8254 counts 50 ms down (Intel 8254 datasheet, mode 0 and the
/// read-back command). Channel 0, whose gate is always open: channel 2 needs port 0x61, which QEMU's
/// microvm does not have. Its interrupt line is masked everywhere.
fn measure_tsc() -> Option<u64> {
    const PIT_HZ: u64 = 1_193_182;
    const COUNT: u16 = (PIT_HZ / 20) as u16;
    const CYCLES_MAX: u64 = 20_000_000_000;
    const CHANNEL: u16 = 0x40;
    const CONTROL: u16 = 0x43;
    const MODE_0_BOTH_BYTES: u8 = 0x30;
    const READ_STATUS: u8 = 0xe2;
    const STATUS_OUT: u8 = 0x80;
    port::write(CONTROL, MODE_0_BOTH_BYTES);
    COUNT.to_le_bytes().iter().for_each(|b| port::write(CHANNEL, *b));
    let start = read_tsc();
    loop {
        port::write(CONTROL, READ_STATUS);
        let cycles = read_tsc().saturating_sub(start);
        if port::read(CHANNEL) & STATUS_OUT != 0 {
            let hertz = cycles.checked_mul(PIT_HZ)? / u64::from(COUNT);
            return (hertz > HERTZ_MIN).then_some(hertz);
        }
        if cycles > CYCLES_MAX {
            return None;
        }
    }
}

fn describe_tsc(hertz: u64) -> PvClock {
    let (mut scaled, mut shift) = (hertz, 0);
    while scaled <= 1_000_000_000 {
        scaled *= 2;
        shift += 1;
    }
    PvClock {
        version: 2,
        pad0: 0,
        tsc_timestamp: read_tsc(),
        system_time: 0,
        tsc_to_system_mul: ((1_000_000_000 << 32) / scaled) as u32,
        tsc_shift: shift,
        flags: 0,
        pad: [0; 2],
    }
}
