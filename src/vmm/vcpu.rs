//! One vCPU: its run loop, and the thread that runs it.

use crate::memory::ending::{Ending, EndingSignal};
use crate::vmm::kvm_error::KvmError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::buses::Buses;
use super::console_ring::ConsoleRing;
use super::error::Error;
use super::exit_counters::ExitCounters;
use crate::memory::promote::InPlace;
use crate::memory::promote::fault;
use crate::memory::promote::fault::{Cause, Resolution, StoppedVcpu};
use crate::memory::stall;
use crate::sys::errors::chain;
use crate::sys::guest_memory::Memory;
use crate::sys::kick;
use crate::sys::kick::{Alarm, ImmediateExit};
use crate::sys::lost;
use crate::sys::seccomp;
use crate::sys::timeline::Moments;

/// A vCPU, and the objects that its exits need.
pub struct Vcpu {
    pub index: u8,
    pub fd: VcpuFd,
    pub buses: Arc<Buses>,
    pub counters: Arc<ExitCounters>,
    pub moments: Arc<Moments>,
    /// Console bytes that KVM collected; taken before every exit is handled, which keeps the order.
    pub console: Option<Arc<ConsoleRing>>,
    /// True if interrupts of the 8259 may reach it: the boot vCPU of a machine without ACPI.
    pub has_pic: bool,
    /// Guest memory, to read the instruction before RIP of a kicked guest. Its owner outlives the vCPU's thread. A
    /// repurposed machine changes it and `in_place` while the thread is parked.
    pub memory: Memory,
    /// Pages that the guest can write only after their promotion.
    pub in_place: Option<Arc<InPlace>>,
}

/// Times that a kicked vCPU is sent on because of a trap; after that the guest does nothing but trap.
const TRAP_RETRIES: u32 = 20;

/// Time that KVM may refuse to enter the guest for want of a resource.
const ENTER_TIMEOUT: Duration = Duration::from_secs(2);

enum RunEnd {
    Kicked,
    Ended(Ending),
}

impl Vcpu {
    /// Runs the guest until it is kicked or ends. Returns with no I/O half done: KVM completes what is pending before
    /// it looks at `immediate_exit` (KVM API 5, `immediate_exit`).
    fn run(&mut self) -> RunEnd {
        self.moments.guest_entered();
        self.look_for_interrupts();
        let mut retries = 0;
        let mut refused = None;
        loop {
            let generation = self.in_place.as_ref().map_or(0, |in_place| in_place.generation());
            let exit = self.fd.run();
            note_exit(&self.moments, &exit);
            collect_console(self.console.as_deref(), &exit);
            if !matches!(&exit, Err(error) if error.errno() == libc::EAGAIN) {
                refused = None;
            }
            let mut ending = None;
            let mut is_interrupted = false;
            match exit {
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.counters.io_out.count(self.buses.pio.write(u64::from(port), data));
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.counters.io_in.count(self.buses.pio.read(u64::from(port), data));
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    if let Some(in_place) = &self.in_place
                        && in_place.take_emulated(&self.memory, address, data)
                    {
                        continue;
                    }
                    let is_claimed = self.buses.mmio.write(address, data);
                    self.counters.mmio_write.count(is_claimed);
                    ending = emulated_in_vain(is_claimed, address);
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    let is_claimed = self.buses.mmio.read(address, data);
                    self.counters.mmio_read.count(is_claimed);
                    ending = emulated_in_vain(is_claimed, address);
                }
                Ok(VcpuExit::Shutdown) => ending = Some(self.shut_down()),
                Ok(VcpuExit::Intr) => is_interrupted = true,
                Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                    ending = self.promote(Cause::Page { gpa }, generation, "a page cannot be accessed").err();
                }
                Ok(VcpuExit::InternalError) => {
                    ending = self.promote(Cause::Emulation, generation, "InternalError").err();
                }
                Ok(other) => {
                    let what = format!("{other:?}");
                    ending = Some(self.failed(&what));
                }
                Err(error) => match error.errno() {
                    libc::EINTR => is_interrupted = true,
                    libc::EAGAIN => {
                        if let Some(left) = self.wait_to_enter(&mut refused) {
                            return left;
                        }
                    }
                    libc::EFAULT | libc::EHWPOISON => {
                        ending = self.promote(Cause::UnknownPage, generation, &error.to_string()).err();
                    }
                    _ => ending = Some(self.failed(&error.to_string())),
                },
            }
            if is_interrupted && !self.goes_on(&mut retries) {
                return RunEnd::Kicked;
            }
            if let Some(ending) = ending {
                return RunEnd::Ended(ending);
            }
        }
    }

    /// Waits when KVM refuses to enter the guest for now, longer each time. `refused` is the time of the first refusal.
    /// Ends the guest after [`ENTER_TIMEOUT`].
    fn wait_to_enter(&mut self, refused: &mut Option<Instant>) -> Option<RunEnd> {
        if ImmediateExit::of(&mut self.fd).get() {
            return Some(RunEnd::Kicked);
        }
        // The guest has not started this vCPU yet: KVM has waited until it was woken (`kvm_arch_vcpu_ioctl_run`).
        if self.fd.get_mp_state().is_ok_and(|state| state.mp_state == KVM_MP_STATE_UNINITIALIZED) {
            return None;
        }
        let since = refused.get_or_insert_with(Instant::now).elapsed();
        if since >= ENTER_TIMEOUT {
            let what = format!(
                "KVM cannot enter the guest: it lacks a resource (EAGAIN) since {} s, most likely a kernel thread \
                 beyond the limit of processes. Raise pids.max of the cgroup or RLIMIT_NPROC",
                ENTER_TIMEOUT.as_secs()
            );
            return Some(RunEnd::Ended(self.failed(&what)));
        }
        std::thread::sleep((since / 4).clamp(Duration::from_micros(100), Duration::from_millis(50)));
        None
    }

    /// Promotes the page that the guest could not write, if that stopped it; otherwise ends the guest because of
    /// `what`.
    fn promote(&self, cause: Cause, generation: u64, what: &str) -> Result<(), Ending> {
        let failed = |error: Error| self.failed(&chain(&error));
        let Some(in_place) = &self.in_place else {
            let lost = fault::lost_memory(&self.fd, &self.memory, cause).map_err(|error| failed(error.into()))?;
            return Err(lost.map_or_else(|| self.failed(what), Ending::MemoryLost));
        };
        let start = Instant::now();
        let stopped = StoppedVcpu { vcpu: &self.fd, memory: &self.memory, in_place, generation };
        let resolution = stopped.resolve(cause).map_err(|error| failed(error.into()))?;
        in_place.counts().add_time(start.elapsed());
        match resolution {
            Resolution::Promoted => Ok(()),
            Resolution::Lost(why) => Err(Ending::MemoryLost(why)),
            Resolution::Unknown => Err(self.failed(what)),
        }
    }

    /// Returns the ending for a triple fault: the guest's own doing, lost page tables or stacks, or an event that KVM
    /// could not deliver (see `promote::ahead`).
    fn shut_down(&self) -> Ending {
        if let Ok(Some(lost)) = fault::lost_memory(&self.fd, &self.memory, Cause::Emulation) {
            return Ending::MemoryLost(lost);
        }
        let Some(in_place) = &self.in_place else { return Ending::TripleFault };
        let stopped = StoppedVcpu { vcpu: &self.fd, memory: &self.memory, in_place, generation: 0 };
        match stopped.is_stack_in_place() {
            Ok(true) => self.failed(
                "an interrupt or exception was lost: its stack lies in place on a tier that is not written, and this \
                 kind of KVM delivers events by writing there",
            ),
            _ => Ending::TripleFault,
        }
    }

    /// Returns whether a kicked guest must go on, because it cannot be stopped here; it is kicked again.
    fn goes_on(&mut self, retries: &mut u32) -> bool {
        *retries += 1;
        let goes_on = *retries <= TRAP_RETRIES && self.trap_may_be_queued();
        if goes_on {
            ImmediateExit::of(&mut self.fd).set(false);
        }
        goes_on
    }

    /// Returns whether the guest stands right behind an `int3` or `int n` that KVM may have queued and not delivered
    /// yet. `KVM_GET_VCPU_EVENTS` does not report such software exceptions and interrupts, because RIP still stands at
    /// the instruction and will raise it again (Linux `kvm_vcpu_ioctl_x86_get_vcpu_events`). KVM_PVM has moved RIP on
    /// by then: a state saved here would lose the trap.
    fn trap_may_be_queued(&self) -> bool {
        const INT3: u8 = 0xcc;
        const INT_N: u8 = 0xcd;
        let (Ok(events), Ok(regs)) = (self.fd.get_vcpu_events(), self.fd.get_regs()) else { return false };
        let before = |distance| {
            let place = self.fd.translate_gva(regs.rip.wrapping_sub(distance)).ok().filter(|place| place.valid != 0)?;
            self.memory.read_obj::<u8>(GuestAddress(place.physical_address)).ok()
        };
        let queued_int_n = || before(2) == Some(INT_N) && before(1) == Some(events.interrupt.nr);
        events.exception.nr == 3 && before(1) == Some(INT3) || queued_int_n()
    }

    /// Makes KVM look for interrupts of the 8259. One that came while the guest had LINT0 masked waits for ever, and
    /// all later ones behind it: KVM does not look again when LINT0 is unmasked (Linux `kvm_lapic_reg_write`), but does
    /// when any MP state is set.
    fn look_for_interrupts(&self) {
        if !self.has_pic {
            return;
        }
        if let Ok(state) = self.fd.get_mp_state() {
            // A refused call leaves the state as it was.
            let _ = self.fd.set_mp_state(state);
        }
    }

    fn failed(&self, what: &str) -> Ending {
        let place = self.fd.get_regs().map_or_else(|_| "unknown".to_string(), |regs| format!("{:#x}", regs.rip));
        Ending::Failed(format!("vCPU {} stopped at RIP {place}: {what}", self.index))
    }
}

fn note_exit(moments: &Moments, exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) {
    moments.guest_exited();
    if is_by_guest(exit) {
        moments.guest_acted();
    }
}

/// Returns whether an instruction of the guest has caused an exit; other exits are interruptions and refusals.
fn is_by_guest(exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) -> bool {
    !matches!(exit, Ok(VcpuExit::Intr) | Err(_))
}

/// Takes what the guest has written out of the console's ring, after an exit.
fn collect_console(console: Option<&ConsoleRing>, exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) {
    let Some(console) = console else { return };
    console.drain();
    // A guest that was only interrupted wrote nothing because of that.
    if is_by_guest(exit) {
        console.expect_bytes();
    }
}

/// Returns the ending if an access that no device claimed was one to lost memory: KVM's emulator takes memory that it
/// cannot reach for a device's.
fn emulated_in_vain(is_claimed: bool, address: u64) -> Option<Ending> {
    if is_claimed { None } else { lost::at_gpa(address).map(Ending::MemoryLost) }
}

/// The order that the thread of a vCPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Run,
    Park,
    Exit,
}

struct GateState {
    order: Order,
    /// The thread is out of the guest, and stays out until its order is to run.
    is_parked: bool,
}

/// The place where the thread gets its orders.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU on its own thread. While parked, the vCPU can be borrowed with [`vcpu`](Self::vcpu).
pub struct VcpuThread {
    index: u8,
    vcpu: Arc<Mutex<Vcpu>>,
    gate: Arc<Gate>,
    // Points into the kvm_run mapping that `vcpu` owns; `vcpu` is in this struct, so it lives as long.
    immediate_exit: Arc<ImmediateExit>,
    thread: Option<JoinHandle<()>>,
}

pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that an interrupt of the 8259 stays unnoticed: see [`Vcpu::look_for_interrupts`].
const PIC_PERIOD: Duration = Duration::from_millis(100);
/// A kick is repeated if the thread has not parked by then; one is enough unless it was in a system call of tvmm.
const KICK_AGAIN: Duration = Duration::from_millis(20);

impl VcpuThread {
    /// Starts the thread; its first order is `order`.
    pub fn spawn(mut vcpu: Vcpu, order: Order, ending: &Arc<EndingSignal>) -> Result<Self, Error> {
        let index = vcpu.index;
        let immediate_exit = Arc::new(ImmediateExit::of(&mut vcpu.fd));
        let has_pic = vcpu.has_pic;
        let state = Mutex::new(GateState { order, is_parked: false });
        let gate = Arc::new(Gate { state, changed: Condvar::new() });
        let vcpu = Arc::new(Mutex::new(vcpu));
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(256 * 1024)
            .spawn({
                let vcpu = vcpu.clone();
                let gate = gate.clone();
                let flag = immediate_exit.clone();
                let ending = ending.clone();
                move || {
                    seccomp::enter_thread();
                    let alarm = has_pic.then(|| Alarm::for_this_thread(PIC_PERIOD)).transpose();
                    if let Err(error) = &alarm {
                        tracing::warn!(%error, "No timer can be made: the guest may lose interrupts of the 8259.");
                    }
                    if let Some(console) = &vcpu.lock().unwrap_or_else(PoisonError::into_inner).console {
                        console.add_this_thread();
                    }
                    run_thread(&vcpu, &gate, &flag, &ending);
                }
            })
            .map_err(|source| KvmError::VcpuThread { vcpu: index, source })?;
        Ok(VcpuThread { index, vcpu, gate, immediate_exit, thread: Some(thread) })
    }

    /// Asks the thread to leave the guest; [`wait_parked`](Self::wait_parked) waits for it.
    pub fn ask_to_park(&self) {
        self.ask(Order::Park);
    }

    /// Asks the thread to leave the guest and end; [`wait_parked_until`](Self::wait_parked_until) waits for it.
    pub fn ask_to_exit(&self) {
        self.ask(Order::Exit);
    }

    /// Waits until the thread is out of the guest.
    pub fn wait_parked(&self) -> Result<(), Error> {
        self.wait_parked_until(Instant::now() + STOP_TIMEOUT)
    }

    /// Waits until the thread is out of the guest, or `deadline` is past.
    pub fn wait_parked_until(&self, deadline: Instant) -> Result<(), Error> {
        let mut state = self.gate.lock();
        while !state.is_parked {
            if Instant::now() > deadline {
                return Err(KvmError::VcpuStuck(self.index).into());
            }
            let (guard, wait) =
                self.gate.changed.wait_timeout(state, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if wait.timed_out() && !state.is_parked {
                self.kick();
            }
        }
        Ok(())
    }

    /// Lets a parked thread enter the guest again.
    pub fn resume(&self) {
        let mut state = self.gate.lock();
        *state = GateState { order: Order::Run, is_parked: false };
        self.gate.changed.notify_all();
    }

    /// Borrows the vCPU. Blocks while the guest runs, so park it first.
    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, order: Order) {
        self.gate.lock().order = order;
        self.gate.changed.notify_all();
        self.kick();
    }

    fn kick(&self) {
        self.immediate_exit.set(true);
        if let Some(thread) = &self.thread {
            kick::signal(thread);
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.ask(Order::Exit);
        if let Err(error) = self.wait_parked() {
            // The memory that the thread runs in is about to be unmapped.
            stall::give_up(&error.to_string());
        }
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

fn run_thread(vcpu: &Mutex<Vcpu>, gate: &Gate, immediate_exit: &ImmediateExit, ending: &EndingSignal) {
    loop {
        let mut state = gate.lock();
        loop {
            match state.order {
                Order::Run => break,
                Order::Park => {}
                Order::Exit => {
                    state.is_parked = true;
                    gate.changed.notify_all();
                    return;
                }
            }
            state.is_parked = true;
            gate.changed.notify_all();
            state = gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_parked = false;
        drop(state);
        let end = vcpu.lock().unwrap_or_else(PoisonError::into_inner).run();
        immediate_exit.set(false);
        if let RunEnd::Ended(reason) = end {
            let mut state = gate.lock();
            if state.order == Order::Run {
                state.order = Order::Park;
            }
            drop(state);
            ending.end(reason);
        }
    }
}
