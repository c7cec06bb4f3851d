//! `spin`: a long computation whose registers and clock a snapshot must not disturb.

use super::{Ctx, Reply};
use crate::arch::cpuid::Simd;
use crate::arch::{apic, trap};
use crate::clock::{self, PvClock};
use crate::smp::MAX_CPUS;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::digest::mix2;
use tvmm_guest::message;

core::arch::global_asm!(include_str!("spin.s"), options(att_syntax));

const MS_MAX: u64 = 3_600_000;
const TIMER_US_MIN: u64 = 50;
const TIMER_US_MAX: u64 = 1_000_000;
const CALIBRATION_NS: u64 = 2_000_000;
const REGISTERS: usize = 32;
const REGISTER_WORDS: usize = 8;

type Registers = [[u64; REGISTER_WORDS]; REGISTERS];

/// Inputs and results of one CPU's loop; spin.s knows this layout.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Loop {
    clock: *const PvClock,
    deadline_ns: u64,
    last_ns: u64,
    backwards: u64,
    rounds: u64,
    gpr_bad: u64,
    pad: [u64; 2],
    before: Registers,
    after: Registers,
}

const _: () = assert!(core::mem::offset_of!(Loop, before) == 64);
const _: () = assert!(core::mem::offset_of!(Loop, after) == 64 + 2048);

impl Loop {
    const fn new() -> Self {
        Self {
            clock: core::ptr::null(),
            deadline_ns: 0,
            last_ns: 0,
            backwards: 0,
            rounds: 0,
            gpr_bad: 0,
            pad: [0; 2],
            before: [[0; REGISTER_WORDS]; REGISTERS],
            after: [[0; REGISTER_WORDS]; REGISTERS],
        }
    }
}

/// Kept between calls.
pub struct State {
    loops: [Loop; MAX_CPUS],
    /// Measured at the first call.
    timer_ticks_per_ms: Option<u64>,
}

// SAFETY: the pointers in it are to static clock structures.
unsafe impl Send for Loop {}

impl State {
    pub const fn new() -> Self {
        Self { loops: [const { Loop::new() }; MAX_CPUS], timer_ticks_per_ms: None }
    }
}

unsafe extern "C" {
    // Each runs until the deadline with the patterns in all of its registers.
    fn spin_sse(state: *mut Loop);
    fn spin_avx(state: *mut Loop);
    fn spin_avx512(state: *mut Loop);
    static irq_timer: u64;
}

/// `spin ms=N [cpus=all|one] [timer_us=T]`
pub fn spin(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let ms = args.number_in("ms", 0..=MS_MAX, 0)?;
    let cpus = match args.get("cpus") {
        None | Some("one") => 1,
        Some("all") => ctx.cpus.count(),
        Some(_) => return Err(message!("cpus= is all or one")),
    };
    let timer_us = match args.number("timer_us")?.unwrap_or(1000) {
        0 => 0,
        _ => args.number_in("timer_us", TIMER_US_MIN..=TIMER_US_MAX, 1000)?,
    };
    let count = timer_count(&mut ctx.spin, timer_us);
    let simd = Simd::detect();
    let ticks_before = ticks();
    let jobs = &mut ctx.spin.loops;
    let mut index = 0;
    let mut jobs = jobs.each_mut().map(|state| {
        index += 1;
        let seed = index;
        move |slot| one_cpu(state, slot, seed, ms, count, simd)
    });
    match cpus {
        1 => jobs[0](0),
        n => ctx.cpus.run_on_all(&mut jobs[..n]),
    }
    let ticks = ticks() - ticks_before;
    let loops = &ctx.spin.loops[..cpus];
    let simd_bad: usize = loops.iter().map(|l| wrong_words(l, simd)).sum();
    let gpr_bad: u64 = loops.iter().map(|l| l.gpr_bad).sum();
    let backwards: u64 = loops.iter().map(|l| l.backwards).sum();
    let rounds: u64 = loops.iter().map(|l| l.rounds).sum();
    let keys = format_args!(
        "simd_bad={simd_bad} gpr_bad={gpr_bad} backwards={backwards} ticks={ticks} cpus={cpus} \
         rounds={rounds} simd={}",
        simd.name()
    );
    Ok(Reply::named("spin", keys))
}

fn one_cpu(state: &mut Loop, slot: usize, seed: u64, ms: u64, timer_count: u32, simd: Simd) {
    for (i, word) in state.before.as_flattened_mut().iter_mut().enumerate() {
        *word = mix2(seed, i as u64);
    }
    state.clock = clock::structure(slot);
    state.last_ns = clock::now_ns(slot);
    state.deadline_ns = state.last_ns + ms * 1_000_000;
    if timer_count > 0 {
        apic::start_timer(timer_count);
        trap::enable_interrupts();
    }
    // SAFETY: `state` has the layout that spin.s knows and is this CPU's alone; `simd` selects registers that exist.
    // The functions keep to the System V ABI.
    unsafe {
        match simd {
            Simd::Sse => spin_sse(state),
            Simd::Avx => spin_avx(state),
            Simd::Avx512 => spin_avx512(state),
        }
    }
    if timer_count > 0 {
        apic::stop_timer();
        trap::disable_interrupts();
    }
}

/// Words that did not survive in the registers.
fn wrong_words(state: &Loop, simd: Simd) -> usize {
    let (registers, words) = match simd {
        Simd::Sse => (16, 2),
        Simd::Avx => (16, 4),
        Simd::Avx512 => (32, 8),
    };
    let pairs = state.before.iter().zip(&state.after).take(registers);
    pairs.map(|(b, a)| b.iter().zip(a).take(words).filter(|(b, a)| b != a).count()).sum()
}

/// Timer ticks of all CPUs so far.
fn ticks() -> u64 {
    // SAFETY: an aligned counter that only interrupt stubs write, atomically.
    unsafe { (&raw const irq_timer).read_volatile() }
}

/// The local APIC timer's count for a period; its speed differs between hypervisors.
fn timer_count(state: &mut State, period_us: u64) -> u32 {
    if period_us == 0 {
        return 0;
    }
    let ticks_per_ms = *state.timer_ticks_per_ms.get_or_insert_with(|| {
        let start_ns = clock::now_ns(0);
        apic::start_count();
        while clock::now_ns(0) - start_ns < CALIBRATION_NS {
            core::hint::spin_loop();
        }
        let ticks = u64::from(apic::counted());
        let ns = clock::now_ns(0) - start_ns;
        apic::stop_timer();
        (ticks * 1_000_000 / ns).max(1)
    });
    (ticks_per_ms * period_us / 1000).clamp(1, u64::from(u32::MAX)) as u32
}
