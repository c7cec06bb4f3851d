//! The other CPUs: start them, then lend them work.
//!
//! boot.s picks stack and TSS by slot: the APIC id, XORed with the boot CPU's, so that slot 0 is the
//! boot CPU. To the host, the CPUs that run are numbered in the order of their APIC ids.

use crate::arch::{apic, cpuid, mem, trap};
use crate::clock;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, Ordering};

/// Also CPUS in boot.s.
pub const MAX_CPUS: usize = 8;
/// The address of the copied start-up code: the SIPI vector can name pages below 1 MiB only.
const TRAMPOLINE: u32 = 0x8000;
const START_NS_MAX: u64 = 1_000_000_000;
const SIPI_AGAIN_NS: u64 = 10_000_000;

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static mut boot_apic_id: u64;
}

/// Work for a CPU; the argument is its slot.
type Job = *mut (dyn FnMut(usize) + Send);

const ABSENT: u32 = 0;
const IDLE: u32 = 1;
const POSTED: u32 = 2;
const DONE: u32 = 3;
/// The CPU came after the boot CPU had stopped waiting.
const TOO_LATE: u32 = 4;

/// Hands jobs from the boot CPU to the CPU of a slot: `state` says which of the two owns `job`.
struct Mailbox {
    state: AtomicU32,
    apic_id: AtomicU32,
    job: UnsafeCell<Option<Job>>,
}

// SAFETY: `job` is written by the boot CPU in state IDLE and read by the slot's CPU in state POSTED;
// the state changes with release and is read with acquire.
unsafe impl Sync for Mailbox {}

static MAILBOXES: [Mailbox; MAX_CPUS] =
    [const { Mailbox { state: AtomicU32::new(ABSENT), apic_id: AtomicU32::new(0), job: UnsafeCell::new(None) } };
        MAX_CPUS];

/// The CPUs that run, for the boot CPU's use.
pub struct Cpus {
    /// Slots by CPU number.
    slots: [usize; MAX_CPUS],
    count: usize,
}

impl Cpus {
    pub const fn new() -> Self {
        Self { slots: [0; MAX_CPUS], count: 0 }
    }

    /// Starts all CPUs that CPUID reports (at most [`MAX_CPUS`]), and counts those that answer.
    pub fn start(&mut self) {
        let expected = (cpuid::processors() as usize).clamp(1, MAX_CPUS);
        MAILBOXES[0].apic_id.store(apic::id(), Ordering::Relaxed);
        if expected > 1 {
            start_others(expected);
        }
        let mut found = 1;
        for (slot, mailbox) in MAILBOXES.iter().enumerate().skip(1) {
            let late = mailbox.state.compare_exchange(ABSENT, TOO_LATE, Ordering::AcqRel, Ordering::Acquire);
            if late.is_err() {
                self.slots[found] = slot;
                found += 1;
            }
        }
        self.count = found;
        self.slots[..found].sort_unstable_by_key(|s| MAILBOXES[*s].apic_id.load(Ordering::Relaxed));
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Runs `job` on CPU `number` and waits for it. `number` must be below [`Self::count`].
    pub fn run_on(&mut self, number: usize, job: &mut (dyn FnMut(usize) + Send)) {
        match self.slots[..self.count][number] {
            0 => job(0),
            slot => {
                // SAFETY: `finish` below waits until the CPU is done with the job.
                unsafe { post(slot, job) };
                finish(slot);
            }
        }
    }

    /// Runs `jobs[i]` on CPU `i`, all at once, and waits for all.
    pub fn run_on_all<J: FnMut(usize) + Send>(&mut self, jobs: &mut [J]) {
        let mut own = None;
        for (slot, job) in self.slots[..self.count].iter().zip(jobs.iter_mut()) {
            match slot {
                0 => own = Some(job),
                // SAFETY: `finish` below waits until every CPU is done; `jobs` are disjoint.
                slot => unsafe { post(*slot, job) },
            }
        }
        if let Some(job) = own {
            job(0);
        }
        self.slots[..self.count].iter().filter(|s| **s != 0).for_each(|s| finish(*s));
    }
}

/// INIT, SIPI, SIPI to all others (Intel SDM vol. 3 section 8.4.4.1), until they are all there.
fn start_others(expected: usize) {
    let start = &raw const trampoline_start;
    let len = (&raw const trampoline_end) as usize - start as usize;
    // SAFETY: page 0x8000 is ordinary memory in both boot protocols, and the VMM's data there is not needed any more
    // (boot.rs copied all that is).
    unsafe { mem::memcpy(TRAMPOLINE as *mut u8, start, len) };
    // SAFETY: no other CPU runs yet.
    unsafe { (&raw mut boot_apic_id).write_volatile(u64::from(apic::id())) };
    let begin = clock::now_ns(0);
    apic::init_others();
    apic::start_others(TRAMPOLINE);
    let mut again = true;
    loop {
        let here = MAILBOXES.iter().filter(|m| m.state.load(Ordering::Acquire) == IDLE).count();
        let waited_ns = clock::now_ns(0) - begin;
        if here + 1 >= expected || waited_ns > START_NS_MAX {
            return;
        }
        if waited_ns > SIPI_AGAIN_NS && core::mem::take(&mut again) {
            apic::start_others(TRAMPOLINE);
        }
        core::hint::spin_loop();
    }
}

/// # Safety
/// The caller must [`finish`] the slot before `job` goes out of scope.
unsafe fn post(slot: usize, job: &mut (dyn FnMut(usize) + Send)) {
    let mailbox = &MAILBOXES[slot];
    // SAFETY: the state is IDLE, so the job is ours to write. The lifetime that is lost here is kept
    // by the caller.
    unsafe { *mailbox.job.get() = Some(core::mem::transmute::<*mut (dyn FnMut(usize) + Send + '_), Job>(job)) };
    mailbox.state.store(POSTED, Ordering::Release);
    apic::wake(mailbox.apic_id.load(Ordering::Relaxed));
}

fn finish(slot: usize) {
    let state = &MAILBOXES[slot].state;
    while state.load(Ordering::Acquire) != DONE {
        trap::halt();
    }
    state.store(IDLE, Ordering::Release);
}

/// The entry of an application processor, called by boot.s.
#[unsafe(no_mangle)]
extern "C" fn ap_main(slot: usize) -> ! {
    let mailbox = &MAILBOXES[slot];
    apic::init_local();
    clock::enable(slot);
    mailbox.apic_id.store(apic::id(), Ordering::Relaxed);
    let welcome = mailbox.state.compare_exchange(ABSENT, IDLE, Ordering::AcqRel, Ordering::Acquire);
    loop {
        if welcome.is_ok() && mailbox.state.load(Ordering::Acquire) == POSTED {
            // SAFETY: in state POSTED the job is ours and alive.
            if let Some(job) = unsafe { (*mailbox.job.get()).take() } {
                // SAFETY: the boot CPU waits and leaves the job alone until DONE.
                unsafe { (*job)(slot) };
            }
            mailbox.state.store(DONE, Ordering::Release);
            apic::wake(MAILBOXES[0].apic_id.load(Ordering::Relaxed));
        }
        trap::halt();
    }
}
