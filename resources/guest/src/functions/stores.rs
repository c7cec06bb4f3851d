//! `stores`: writes to filled pages by every kind of instruction, each kind to two pages of its own, and checks that
//! exactly the right bytes have changed. For monitors that decode the guest's write from its instruction.

use super::{Ctx, Reply};
use crate::alloc::address;
use crate::arch::{apic, cpuid, cpuid::Simd, port, trap};
use crate::paging;
use core::arch::asm;
use tvmm_guest::args::{Args, Message};
use tvmm_guest::{PAGE_SIZE, message};

const PAIR: usize = 2 * PAGE_SIZE as usize;
const PAGE: usize = PAGE_SIZE as usize;
/// In the task state segment of the first CPU (boot.s): its stack for interrupts from CPL3.
const TSS_RSP0: *mut u64 = 0x10_2004 as *mut u64;
/// The descriptor of user data in boot.s, the byte with its type.
const USER_DATA_TYPE: usize = 0x28 + 5;
const ACCESSED: u8 = 1;
const UDATA: u16 = 0x28 | 3;
/// The scratch register of COM1 (16550): reads as it was written.
const SCRATCH: u16 = 0x3ff;

unsafe extern "C" {
    static mut gdt: u8;
    static irq_timer: u64;
}

type Pair = [u8; PAIR];

/// Two pages as they are, and as they should be.
pub struct State {
    expected: Pair,
    found: Pair,
}

impl State {
    pub const fn new() -> Self {
        Self { expected: [0; PAIR], found: [0; PAIR] }
    }
}

/// One run of `stores`: the pages not written yet, and the results of the others.
struct Run<'a> {
    state: &'a mut State,
    next: u64,
    end: u64,
    /// The pages of the last kind.
    last: *mut u8,
    kinds: u64,
    bad: u64,
    first_bad: &'static str,
}

impl Run<'_> {
    /// Lets `store` write to fresh pages. `expect` turns the old bytes into the expected ones; bytes that it cannot
    /// know it takes from the pages.
    fn kind(&mut self, name: &'static str, store: impl FnOnce(*mut u8), expect: impl FnOnce(&mut Pair, &Pair)) {
        if self.next + PAIR as u64 > self.end {
            (self.bad, self.first_bad) = (self.bad + 1, "pages");
            return;
        }
        let page = self.next as *mut Pair;
        self.last = self.next as *mut u8;
        self.next += PAIR as u64;
        self.kinds += 1;
        // SAFETY: two filled pages without references into them.
        unsafe { core::ptr::copy_nonoverlapping(page, &mut self.state.expected, 1) };
        store(page.cast());
        // SAFETY: as above.
        unsafe { core::ptr::copy_nonoverlapping(page, &mut self.state.found, 1) };
        expect(&mut self.state.expected, &self.state.found);
        if self.state.expected != self.state.found {
            self.bad += 1;
            if self.bad == 1 {
                self.first_bad = name;
            }
        }
    }
}

impl Run<'_> {
    /// Zeroes bytes of the last kind that differ from run to run.
    fn forget(&mut self, at: usize, len: usize) {
        // SAFETY: inside the two pages of the last kind.
        unsafe { core::ptr::write_bytes(self.last.add(at), 0, len) };
    }
}

fn word(page: &Pair, at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn put(page: &mut Pair, at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

fn take(page: &mut Pair, from: &Pair, at: usize, len: usize) {
    page[at..at + len].copy_from_slice(&from[at..at + len]);
}

const VALUE: u64 = 0x1122_3344_5566_7788;

/// A store of one instruction: `$p` is the address of the pages, `$v` is VALUE.
macro_rules! one {
    ($run:expr, $name:literal, $code:literal, $at:expr, $len:expr) => {
        $run.kind(
            $name,
            // SAFETY: the instruction writes inside the two pages and changes no register but rax, rdx and the flags.
            |p| unsafe { asm!($code, "/* {v} */", p = in(reg) p, v = in(reg) VALUE, out("rax") _, out("rdx") _,
            options(nostack)) },
            |page, _| put(page, $at, &VALUE.to_le_bytes()[..$len]),
        )
    };
}

/// As `one`; the expected value is `$new` of the old word at `$at`.
macro_rules! modify {
    ($run:expr, $name:literal, $code:literal, $at:expr, $new:expr) => {
        $run.kind(
            $name,
            // SAFETY: as above.
            |p| unsafe { asm!($code, "/* {v} */", p = in(reg) p, v = in(reg) VALUE, out("rax") _, out("rdx") _,
            options(nostack)) },
            |page, _| {
                let new: fn(u64) -> u64 = $new;
                let old = word(page, $at);
                put(page, $at, &new(old).to_le_bytes())
            },
        )
    };
}

/// With the stack pointer at 512 bytes into the second page. The pushed value is not known; it lies in the 64 bytes
/// below, and must differ from the old bytes.
macro_rules! stack {
    ($run:expr, $name:literal, $($code:literal),+; $len:expr) => {
        $run.kind(
            $name,
            // SAFETY: the stack pointer is put back; no interrupt comes that would use it (CPL3, and IF=0).
            |p| unsafe {
                asm!("mov {s}, rsp", "lea rsp, [{p} + 4608] /* {v} */", $($code),+, "mov rsp, {s}", p = in(reg) p,
                v = in(reg) VALUE,
                     s = out(reg) _, out("rax") _)
            },
            |page, found| {
                let at = PAGE + 512 - $len;
                if page[at..at + $len] != found[at..at + $len] {
                    take(page, found, at, $len);
                } else {
                    page[at] ^= 1;
                }
            },
        )
    };
}

/// `stores [op=user | kernel | port | unmark | rsp0 | interrupts | descriptor | load]`
pub fn stores(args: &Args, ctx: &mut Ctx) -> Result<Reply, Message> {
    let Some(filled) = ctx.filled.runs().first().copied() else { return Err(message!("nothing is filled")) };
    let start = address(filled);
    let end = start + filled.pages * PAGE_SIZE;
    let mut run =
        Run { state: &mut ctx.stores, next: start, end, last: start as *mut u8, kinds: 0, bad: 0, first_bad: "none" };
    let mut last = end - PAGE_SIZE;
    match args.get("op").unwrap_or("user") {
        "user" => {
            integers(&mut run);
            read_and_written(&mut run);
            stacks(&mut run);
            strings(&mut run);
            state(&mut run);
            vectors(&mut run);
        }
        "kernel" => kernel(&mut run),
        "port" => ports(&mut run),
        "unmark" => {
            last = start;
            run.kinds = paging::unmark(start, filled.pages * PAGE_SIZE);
        }
        "rsp0" => {
            // SAFETY: the top of a filled page without any other use becomes the stack for interrupts.
            unsafe { TSS_RSP0.write_unaligned(end) };
        }
        "interrupts" => run.kinds = interrupts(),
        "descriptor" => descriptor_unmark(),
        "load" => descriptor_load(&mut run),
        _ => return Err(message!("op= is user, kernel, port, unmark, rsp0, interrupts, descriptor or load")),
    }
    let (kinds, bad, first_bad) = (run.kinds, run.bad, run.first_bad);
    let pages = (run.next - start) / PAGE_SIZE;
    Ok(Reply::named(
        "stores",
        format_args!("kinds={kinds} bad={bad} first_bad={first_bad} pages={pages} gpa={start:#x} last={last:#x}"),
    ))
}

fn integers(run: &mut Run) {
    one!(run, "mov8", "mov byte ptr [{p} + 5], {v:l}", 5, 1);
    one!(run, "mov16", "mov word ptr [{p} + 6], {v:x}", 6, 2);
    one!(run, "mov32", "mov dword ptr [{p} + 8], {v:e}", 8, 4);
    one!(run, "mov64", "mov qword ptr [{p} + 16], {v}", 16, 8);
    one!(run, "movnti", "movnti qword ptr [{p} + 24], {v}", 24, 8);
    one!(run, "mov_across", "mov qword ptr [{p} + 4093], {v}", 4093, 8);
    one!(run, "mov_indexed", "mov eax, 16; mov qword ptr [{p} + rax * 8 + 4], {v}", 132, 8);
    one!(run, "mov_imm", "mov dword ptr [{p} + 40], 0x55667788", 40, 4);
    modify!(run, "setne", "cmp {v}, 0; setne byte ptr [{p}]", 0, |old| old & !0xff | 1);
}

fn read_and_written(run: &mut Run) {
    modify!(run, "add", "add qword ptr [{p} + 8], {v}", 8, |old| old.wrapping_add(VALUE));
    modify!(run, "inc", "inc qword ptr [{p} + 8]", 8, |old| old.wrapping_add(1));
    modify!(run, "neg", "neg qword ptr [{p} + 8]", 8, |old| old.wrapping_neg());
    modify!(run, "shl", "shl qword ptr [{p} + 8], 3", 8, |old| old << 3);
    modify!(run, "xchg", "mov rax, {v}; xchg qword ptr [{p} + 8], rax", 8, |_| VALUE);
    modify!(run, "lock_xadd", "mov rax, {v}; lock xadd qword ptr [{p} + 8], rax", 8, |old| old.wrapping_add(VALUE));
    modify!(run, "lock_or", "lock or qword ptr [{p} + 8], {v}", 8, |old| old | VALUE);
    modify!(run, "lock_cmpxchg", "mov rax, [{p} + 8]; lock cmpxchg qword ptr [{p} + 8], {v}", 8, |_| VALUE);
    modify!(run, "cmpxchg_unequal", "mov rax, [{p} + 8]; not rax; lock cmpxchg qword ptr [{p} + 8], {v}", 8, |old| old);
    modify!(run, "bts", "mov eax, 33000; lock bts dword ptr [{p}], eax", 4120, |old| old | 1 << (33000 - 4120 * 8));
    modify!(run, "btc_down", "mov rax, -64; lea rdx, [{p} + 4096]; btc qword ptr [rdx], rax", 4088, |old| old ^ 1);
    if cpuid::has_cmpxchg16b() {
        run.kind(
            "lock_cmpxchg16b",
            // SAFETY: inside the pages; rbx is put back.
            |p| unsafe {
                asm!("xchg rbx, {v}", "mov rax, [{p} + 32]", "mov rdx, [{p} + 40]", "mov rcx, rbx",
                     "lock cmpxchg16b [{p} + 32]", "xchg rbx, {v}", p = in(reg) p, v = inout(reg) VALUE => _,
                     out("rax") _, out("rcx") _, out("rdx") _, options(nostack))
            },
            |page, _| [32, 40].into_iter().for_each(|at| put(page, at, &VALUE.to_le_bytes())),
        );
    }
}

fn stacks(run: &mut Run) {
    stack!(run, "push", "push {v}"; 8);
    stack!(run, "push_imm", "push 0x12345"; 8);
    stack!(run, "push16", "push {v:x}"; 2);
    stack!(run, "pushf", "pushfq"; 8);
    stack!(run, "call", "call 2f", "2:"; 8);
    stack!(run, "call_indirect", "lea rax, [rip + 2f]", "call rax", "2:"; 8);
    stack!(run, "enter", "push rbp", "enter 32, 0", "leave", "pop rbp"; 16);
    run.kind(
        "pop_memory",
        // SAFETY: the stack pointer is put back; the popped value comes from the first page and goes into the second.
        |p| unsafe {
            asm!("mov {s}, rsp", "lea rsp, [{p} + 64]", "pop qword ptr [rsp + 4096]", "mov rsp, {s}", p = in(reg) p,
                 s = out(reg) _)
        },
        |page, _| {
            let popped = word(page, 64);
            put(page, 4096 + 72, &popped.to_le_bytes());
        },
    );
}

fn strings(run: &mut Run) {
    let fill = |page: &mut Pair, from: usize, to: usize| page[from..to].fill(VALUE as u8);
    run.kind(
        "stosb",
        // SAFETY: here and below, string instructions stay inside the pages and the direction flag is put back.
        |p| unsafe { asm!("stosb", inout("rdi") p => _, in("rax") VALUE, options(nostack)) },
        |page, _| fill(page, 0, 1),
    );
    run.kind(
        "rep_stosb_up",
        // SAFETY: as above.
        |p| unsafe {
            asm!("rep stosb", inout("rdi") p.add(100) => _, inout("rcx") 8000_u64 => _, in("rax") VALUE,
                 options(nostack))
        },
        |page, _| fill(page, 100, 8100),
    );
    run.kind(
        "rep_stosb_down",
        // SAFETY: as above.
        |p| unsafe {
            asm!("std", "rep stosb", "cld", inout("rdi") p.add(8000) => _, inout("rcx") 7000_u64 => _, in("rax") VALUE,
                 options(nostack))
        },
        |page, _| fill(page, 1001, 8001),
    );
    run.kind(
        "rep_stosq_down",
        // SAFETY: as above.
        |p| unsafe {
            asm!("std", "rep stosq", "cld", inout("rdi") p.add(8000) => _, inout("rcx") 900_u64 => _,
                 in("rax") 0x8888_8888_8888_8888_u64, options(nostack))
        },
        |page, _| fill(page, 808, 8008),
    );
    run.kind(
        "rep_movsb_up",
        // SAFETY: as above.
        |p| unsafe {
            asm!("rep movsb", inout("rsi") p => _, inout("rdi") p.add(4000) => _, inout("rcx") 3000_u64 => _,
                 options(nostack))
        },
        |page, _| page.copy_within(0..3000, 4000),
    );
    run.kind(
        "rep_movsq_down",
        // SAFETY: as above.
        |p| unsafe {
            asm!("std", "rep movsq", "cld", inout("rsi") p.add(2992) => _, inout("rdi") p.add(6992) => _,
                 inout("rcx") 375_u64 => _, options(nostack))
        },
        |page, _| page.copy_within(0..3000, 4000),
    );
}

/// The CPU's own state.
fn state(run: &mut Run) {
    macro_rules! save {
        ($name:literal, $code:literal, $at:expr, $len:expr) => {
            run.kind(
                $name,
                // SAFETY: the area is inside the pages and aligned; the state that FNSAVE resets is loaded again.
                |p| unsafe { asm!($code, p = in(reg) p, in("eax") 7, in("edx") 0, options(nostack)) },
                |page, found| take(page, found, $at, $len),
            );
            run.forget($at, $len);
        };
    }
    save!("fxsave64", "fxsave64 [{p} + 3840]", 3840, 512);
    save!("fxsave", "fxsave [{p} + 64]", 64, 512);
    save!("fnstenv", "fnstenv [{p} + 4090]", 4090, 28);
    save!("fnsave", "fnsave [{p} + 4000]; frstor [{p} + 4000]", 4000, 108);
    save!("stmxcsr", "stmxcsr [{p} + 8]", 8, 4);
    save!("fstcw", "fnstcw [{p} + 8]", 8, 2);
    save!("fst", "fldz; fstp qword ptr [{p} + 4092]", 4092, 8);
    save!("fbstp", "fldz; fbstp tbyte ptr [{p} + 4092]", 4092, 10);
    if Simd::detect() != Simd::Sse {
        save!("xsave", "xsave [{p} + 3968]", 3968, 576 + 256);
        save!("xsave64", "xsave64 [{p} + 3584]", 3584, 576 + 256);
        if cpuid::has_xsaveopt() {
            save!("xsaveopt64", "xsaveopt64 [{p} + 3584]", 3584, 576 + 256);
        }
    }
}

fn vectors(run: &mut Run) {
    /// Writes the low bytes of a register full of VALUE.
    macro_rules! vector {
        ($name:literal, $code:literal, $at:expr, $len:expr) => {
            run.kind(
                $name,
                // SAFETY: inside the pages; the registers are free for the taking. VEX code clears the upper halves.
                |p| unsafe {
                    asm!("movq xmm1, {v}", "punpcklqdq xmm1, xmm1", $code, p = in(reg) p, v = in(reg) VALUE,
                    out("xmm1") _,
                         out("xmm2") _, out("xmm3") _, out("rdi") _, options(nostack))
                },
                |page, _| {
                    for (index, byte) in page[$at..$at + $len].iter_mut().enumerate() {
                        *byte = VALUE.to_le_bytes()[index % 8];
                    }
                },
            )
        };
    }
    vector!("movaps", "movaps [{p} + 16], xmm1", 16, 16);
    vector!("movups_across", "movups [{p} + 4090], xmm1", 4090, 16);
    vector!("movlps", "movlps [{p} + 8], xmm1", 8, 8);
    vector!("movd", "movd [{p} + 8], xmm1", 8, 4);
    vector!("movntdq", "movntdq [{p} + 32], xmm1", 32, 16);
    vector!("maskmovdqu", "pcmpeqb xmm2, xmm2; lea rdi, [{p} + 4090]; maskmovdqu xmm1, xmm2", 4090, 16);
    if Simd::detect() == Simd::Sse {
        return;
    }
    vector!("vmovups", "vinsertf128 ymm1, ymm1, xmm1, 1; vmovups [{p} + 4080], ymm1; vzeroupper", 4080, 32);
    vector!(
        "vmaskmovps",
        "vinsertf128 ymm1, ymm1, xmm1, 1; vpcmpeqd xmm2, xmm2, xmm2; vmaskmovps [{p} + 4080], ymm2, ymm1; vzeroupper",
        4080,
        16
    );
    vector!(
        "vextractf128",
        "vinsertf128 ymm1, ymm1, xmm1, 1; vextractf128 [{p} + 4090], ymm1, 1; vzeroupper",
        4090,
        16
    );
    if Simd::detect() != Simd::Avx512 {
        return;
    }
    vector!("vmovdqu64", "vpbroadcastq zmm1, xmm1; vmovdqu64 [{p} + 4064], zmm1; vzeroupper", 4064, 64);
    vector!(
        "vmovdqu32_masked",
        "vpbroadcastq zmm1, xmm1; mov edi, 0xff; kmovw k1, edi; vmovdqu32 [{p} + 4080] {{k1}}, zmm1; vzeroupper",
        4080,
        32
    );
    vector!(
        "vpcompressd",
        "vpbroadcastq zmm1, xmm1; mov edi, 0xff; kmovw k1, edi; vpcompressd [{p} + 4080] {{k1}}, zmm1; vzeroupper",
        4080,
        32
    );
    run.kind(
        "vpscatterqq",
        // SAFETY: two elements, 4096 bytes apart, inside the pages.
        |p| unsafe {
            asm!("vpbroadcastq zmm1, {v}", "mov edi, 3", "kmovw k1, edi", "mov edi, 512", "vmovd xmm3, edi",
                 "vpslldq xmm3, xmm3, 8", "vpscatterqq [{p} + zmm3 * 8 + 8] {{k1}}, zmm1", "vzeroupper", p = in(reg) p,
                 v = in(reg) VALUE, out("xmm1") _, out("xmm3") _, out("rdi") _, options(nostack))
        },
        |page, _| [8, PAGE + 8].into_iter().for_each(|at| put(page, at, &VALUE.to_le_bytes())),
    );
}

/// String input from a port, which every KVM emulates.
fn ports(run: &mut Run) {
    port::write(SCRATCH, 0x5a);
    run.kind(
        "rep_insb",
        // SAFETY: the string stays inside the pages; reading the scratch register changes nothing.
        |p| unsafe {
            asm!("rep insb", inout("rdi") p.add(4000) => _, inout("rcx") 300_u64 => _, in("dx") SCRATCH,
                 options(nostack))
        },
        |page, _| page[4000..4300].fill(0x5a),
    );
}

/// At CPL0: a few stores that emulators know (boot.s).
fn kernel(run: &mut Run) {
    let store = |which| {
        move |p: *mut u8| {
            // SAFETY: the stores stay inside the two pages.
            unsafe { trap::kernel_stores(p as u64, which) }
        }
    };
    run.kind("kernel_mov", store(0), |page, _| {
        put(page, 8, &VALUE.to_le_bytes());
        put(page, PAGE + 5, &VALUE.to_le_bytes()[..1]);
    });
    run.kind("kernel_locked", store(1), |page, _| {
        let counted = word(page, 8).wrapping_add(1);
        put(page, 8, &counted.to_le_bytes());
        put(page, PAGE + 8, &VALUE.to_le_bytes());
    });
    run.kind("kernel_push_and_string", store(2), |page, _| {
        put(page, PAGE - 8, &VALUE.to_le_bytes());
        page[PAGE..PAGE + 64].fill(VALUE as u8);
    });
    run.kind("kernel_state", store(3), |page, found| {
        take(page, found, 0, 512);
        take(page, found, PAGE, 16);
    });
    run.forget(0, 512);
    run.forget(PAGE, 16);
}

/// Takes timer interrupts at CPL3; returns their number.
fn interrupts() -> u64 {
    // SAFETY: a counter that the interrupt stub counts up.
    let ticks = || unsafe { (&raw const irq_timer).read_volatile() };
    let before = ticks();
    apic::start_timer(1 << 20);
    trap::enable_interrupts();
    while ticks() < before + 3 {
        core::hint::spin_loop();
    }
    trap::disable_interrupts();
    apic::stop_timer();
    ticks() - before
}

/// Clears the accessed bit of a descriptor; the CPU sets it again when the segment is loaded.
fn descriptor_unmark() {
    // SAFETY: a byte of a descriptor that is loaded already; its meaning stays the same.
    unsafe {
        let byte = (&raw mut gdt).add(USER_DATA_TYPE);
        byte.write_volatile(byte.read_volatile() & !ACCESSED);
    }
}

fn descriptor_load(run: &mut Run) {
    // SAFETY: the segment that is in the register already.
    unsafe { asm!("mov ds, {0:x}", in(reg) UDATA, options(nostack, preserves_flags)) };
    // SAFETY: as in `descriptor_unmark`.
    let is_set = unsafe { (&raw const gdt).add(USER_DATA_TYPE).read_volatile() } & ACCESSED != 0;
    (run.kinds, run.bad) = (1, u64::from(!is_set));
}
