//! A virtual machine, and the states it can be in.
//!
//! ```text
//!   boot ──┐                 start            pause
//!          ├─► Machine<Built> ────► Machine<Running> ◄──► Machine<Paused> ──► capture
//! restore ─┘        └─────────────── start_paused ──────────────►┘    resume
//! ```
//!
//! Boot and restore build the machine by one path, [`Machine::build`]; then one loads a kernel and the other applies
//! saved state. Only a paused machine can be captured: saving a running one does not compile.

use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY,
    kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::arch::template::Decider;
use super::arch::{Platform, cpuid, layout, msr, registers, template};
use super::boot;
use super::buses::Buses;
use super::console_ring::ConsoleRing;
use super::devices;
use super::devices::VirtioDevices;
use super::error::Error;
use super::exit_counters::ExitCounters;
use super::host;
use super::interrupts::connect;
use super::lineage::Lineage;
use super::origin::{Origin, PageServer};
use super::own_memory::{MemoryChange, NotItsOwn};
use super::state::{self, MachineState, VcpuState, VmState};
use super::vcpu::{Order, Vcpu, VcpuThread};
use crate::config::patch::DevicePatch;
use crate::config::refusal::Refused;
use crate::config::{DeviceConfigs, VmConfig};
use crate::devices::virtio::VirtioDevice;
use crate::devices::{FwCfg, FwCfgState, I8042, Serial, SleepRegisters, VmGenId, VmGenIdState};
use crate::memory::access::Access;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::fault_batches::FaultBatch;
use crate::memory::fault_service::FaultCounts;
use crate::memory::guest_ram::GuestRam;
use crate::memory::promote::ahead;
use crate::memory::services::MemoryServices;
use crate::snapshot::MemoryLayout;
use crate::sys::coalesced::CoalescedRing;
use crate::sys::dirty_log;
use crate::sys::held;
use crate::sys::output::ConsoleOutput;
use crate::sys::timeline::{Moments, Slice, Timeline};
use crate::vmm::boot::BootError;
use crate::vmm::kvm_error::KvmError;
use crate::vmm::pmem::PmemMemory;
use crate::vmm::restore::StateError;

/// The construction parameters of a machine, booted or restored.
#[derive(Clone, Debug)]
pub struct Shape {
    pub vcpu_count: u8,
    pub mem_size_mib: u64,
    pub track_dirty_pages: bool,
}

impl Shape {
    /// The guest RAM ranges of this shape.
    pub fn layout(&self) -> Result<MemoryLayout, Error> {
        if self.mem_size_mib < 2 {
            return Err(BootError::TooSmall { mib: self.mem_size_mib }.into());
        }
        Ok(MemoryLayout::from_gpa_ranges(&layout::ram_ranges(self.mem_size_mib << 20))?)
    }
}

/// The serial port of a machine. The main loop passes input to it.
pub type SerialPort = Arc<Serial>;

/// The machine's connections to the rest of the process.
#[derive(Clone)]
pub struct Environment {
    /// Output of the serial port.
    pub output: Arc<ConsoleOutput>,
    /// Longest wait of a restored guest for a page before it is ended.
    pub fault_timeout: Duration,
    /// Records moments of the guest.
    pub moments: Arc<Moments>,
}

/// The devices of a machine: the built-in ones, and those of its config.
pub struct Devices {
    pub serial: Arc<Serial>,
    pub i8042: Arc<I8042>,
    /// The metadata device, through which the host passes data to the guest.
    pub fw_cfg: Arc<FwCfg>,
    /// `None` without ACPI: the guest could not find it.
    pub vmgenid: Option<VmGenId>,
    pub virtio: VirtioDevices,
}

/// The devices that differ between machines, and the configs of the virtio ones.
#[derive(Default)]
pub struct DeviceSet {
    pub virtio: Vec<Box<dyn VirtioDevice>>,
    pub configs: DeviceConfigs,
    pub fw_cfg: FwCfgState,
}

/// The part of a machine that all states share. Fields drop in this order: the VM before the memory under its slots.
pub(crate) struct Core {
    /// Dropped before `ram`, which both use. Devices first: they may be blocked on a fault that `services` answers.
    pub devices: Devices,
    pub services: MemoryServices,
    pub kvm: Kvm,
    pub vm: Arc<VmFd>,
    pub ram: GuestRam,
    /// Kept while the VM has slots over it.
    _pmem: Vec<PmemMemory>,
    pub shape: Shape,
    /// KVM logs the pages that are written: always if the shape says so, otherwise during a live capture.
    pub logs_writes: bool,
    pub lineage: Lineage,
    pub counters: Arc<ExitCounters>,
    /// Console bytes that KVM collects, if this KVM can.
    pub console: Option<Arc<ConsoleRing>>,
    pub ending: Arc<EndingSignal>,
    /// MSRs that KVM refused at the restore and that the guest does without.
    pub msrs_refused: Vec<u32>,
    /// The snapshot that the machine was restored from; `None` if it was booted.
    pub origin: Option<Box<Origin>>,
    /// True: the machine has given its guest up, and can only be repurposed.
    pub is_vacant: bool,
    /// Touches of memory since the last barrier; `None`: nothing has asked for them since the restore, or a rewind.
    pub access: Option<Access>,
}

/// vCPUs exist, and no thread runs them.
pub struct Built {
    vcpus: Vec<Vcpu>,
}

/// vCPU threads are in the guest.
pub struct Running {
    threads: Vec<VcpuThread>,
}

/// vCPU threads are parked outside the guest.
pub struct Paused {
    pub(crate) threads: Vec<VcpuThread>,
}

/// A machine in state `S`.
pub struct Machine<S> {
    // Dropped before `core`: threads must end before memory and VM go.
    pub(crate) state: S,
    pub(crate) core: Core,
}

/// Opens /dev/kvm and checks that tvmm can use this KVM.
pub fn open_kvm() -> Result<Kvm, Error> {
    let opened = match held::get(held::KVM) {
        Some(device) => device.try_clone().map_err(Into::into).map(|device| {
            // SAFETY: the descriptor is open, is of /dev/kvm, and has no other owner.
            unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
        }),
        None => Kvm::new(),
    };
    let kvm = opened.map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Denied,
        _ => KvmError::Call { doing: "open /dev/kvm", source: error },
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        // The ioctl failed: the device does not speak KVM.
        -1 => Err(KvmError::NoDevice(kind_of_kvm()).into()),
        other => Err(KvmError::Version(other).into()),
    }
}

/// Describes the file at /dev/kvm.
fn kind_of_kvm() -> &'static str {
    match std::fs::metadata("/dev/kvm").map(|metadata| metadata.file_type()) {
        Ok(kind) if kind.is_file() => "an ordinary file",
        Ok(kind) if kind.is_char_device() => "another device",
        _ => "something else",
    }
}

impl Machine<Built> {
    /// Builds the machine around its memory: VM, memslots, interrupt controllers, timer, vCPUs, devices. Memslots come
    /// before the interrupt controller: after it each costs an RCU grace period.
    pub fn build(
        kvm: Kvm,
        ram: GuestRam,
        shape: Shape,
        set: DeviceSet,
        environment: Environment,
        timeline: &mut Timeline,
    ) -> Result<Self, Error> {
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("create a VM"))?);
        if ram.in_place().is_some() {
            set_emulation_exits(&vm, EmulationFailure::Exit)?;
        }
        if shape.track_dirty_pages {
            dirty_log::enable_manual_protect(&vm).map_err(Error::kvm("enable the dirty log"))?;
        }
        let pmem = devices::pmem_images(&set.virtio).iter().map(PmemMemory::map).collect::<Result<Vec<_>, _>>()?;
        set_memslots(&vm, &ram, &pmem, shape.track_dirty_pages)?;
        vm.set_tss_address(layout::KVM_TSS as usize).map_err(Error::kvm("set the TSS address"))?;
        vm.create_irq_chip().map_err(Error::kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(Error::kvm("create the PIT"))?;
        let ending = Arc::new(EndingSignal::new().map_err(Error::os("make an eventfd"))?);
        let (devices, buses) = build_devices(&vm, &ram, set, environment.output, &ending)?;
        let counters = Arc::new(ExitCounters::default());
        let moments = environment.moments;
        let mut vcpus = Vec::with_capacity(usize::from(shape.vcpu_count));
        for index in 0..shape.vcpu_count {
            let fd = vm.create_vcpu(u64::from(index)).map_err(|source| vcpu_error("create", index, source))?;
            let buses = buses.clone();
            let counters = counters.clone();
            let moments = moments.clone();
            let memory = ram.view().clone();
            let in_place = ram.in_place().cloned();
            let console = None;
            let has_pic = false;
            vcpus.push(Vcpu { index, fd, buses, counters, moments, console, has_pic, memory, in_place });
        }
        let console = coalesce_console(&kvm, &vm, &mut vcpus)?;
        timeline.lap(Slice::VmCreate);
        let lineage = Lineage::default();
        let msrs_refused = Vec::new();
        let services = MemoryServices::default();
        let core = Core {
            devices,
            services,
            kvm,
            vm,
            ram,
            _pmem: pmem,
            logs_writes: shape.track_dirty_pages,
            shape,
            lineage,
            counters,
            console,
            ending,
            msrs_refused,
            origin: None,
            is_vacant: false,
            access: None,
        };
        Ok(Machine { state: Built { vcpus }, core })
    }

    /// Builds a machine and loads the kernel of `config` into it.
    pub fn boot(config: &VmConfig, environment: Environment, timeline: &mut Timeline) -> Result<Self, Error> {
        let machine_config = &config.machine;
        let shape = Shape {
            vcpu_count: machine_config.vcpu_count,
            mem_size_mib: machine_config.mem_size_mib,
            track_dirty_pages: machine_config.track_dirty_pages,
        };
        let kvm = open_kvm()?;
        let ram = GuestRam::anonymous(&shape.layout()?)?;
        timeline.lap(Slice::Map);
        let configs = config.devices.clone();
        let fw_cfg = FwCfgState::new(config.tvmm.metadata.clone());
        let set = DeviceSet { virtio: devices::from_configs(&configs, &ram)?, configs, fw_cfg };
        let mut machine = Machine::build(kvm, ram, shape, set, environment, timeline)?;
        let slots = machine.virtio().slots();
        let platform = Platform { vcpu_count: machine_config.vcpu_count, virtio: &slots, acpi: config.tvmm.acpi };
        let boot_source = config.boot_source.with_args(&devices::root_args(&config.devices));
        let boot_source = boot_source.with_args(devices::pmem_root_args(&config.devices));
        let entry = boot::load(&boot_source, &config.tvmm, platform, &machine.core.ram)?;
        if platform.acpi {
            let state = VmGenIdState { gpa: layout::VMGENID, gsi: layout::VMGENID_GSI };
            machine.core.attach_vmgenid(state)?;
        }
        timeline.lap(Slice::KernelLoad);
        let kvm = &machine.core.kvm;
        let mut supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("ask for the supported CPUID"))?;
        if let Some(template) = &config.cpu {
            template::check_host(template, kvm, &state::msr_indices(kvm)?)?;
            template::apply_cpuid(template, &mut supported)?;
        }
        for vcpu in &machine.state.vcpus {
            let table = set_boot_state(vcpu, &supported, platform, entry)?;
            if let Some(template) = &config.cpu {
                template::check_cpuid(template, &table, Decider::Machine)?;
                template::check_cpuid(template, &vcpu_cpuid(vcpu)?, Decider::Kvm)?;
                template::apply_msrs(template, &vcpu.fd, vcpu.index)?;
            }
        }
        timeline.lap(Slice::StateLoad);
        Ok(machine)
    }

    /// Applies the saved state of a machine of the same shape.
    pub(crate) fn apply(&mut self, vm: &VmState, vcpus: &[VcpuState], clock_realtime: bool) -> Result<(), Error> {
        self.core.promote_ahead(vcpus)?;
        for (vcpu, state) in self.state.vcpus.iter().zip(vcpus) {
            state.restore_cpuid(&vcpu.fd, vcpu.index)?;
        }
        let fds: Vec<&VcpuFd> = self.state.vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        self.core.msrs_refused = self.core.load(&fds, vm, vcpus, clock_realtime)?;
        Ok(())
    }

    /// The boot vCPU, while no thread has it.
    pub(crate) fn boot_vcpu(&self) -> Option<&VcpuFd> {
        self.state.vcpus.first().map(|vcpu| &vcpu.fd)
    }

    /// Lets the vCPUs into the guest.
    pub fn start(mut self) -> Result<Machine<Running>, Error> {
        self.core.devices.virtio.start()?;
        self.core.devices.virtio.go_on();
        let threads = self.core.spawn(self.state.vcpus, Order::Run)?;
        Ok(Machine { state: Running { threads }, core: self.core })
    }

    /// Makes the vCPU threads, parked.
    pub fn start_paused(mut self) -> Result<Machine<Paused>, Error> {
        self.core.devices.virtio.start()?;
        let threads = self.core.spawn(self.state.vcpus, Order::Park)?;
        let machine = Machine { state: Paused { threads }, core: self.core };
        machine.state.threads.iter().try_for_each(VcpuThread::wait_parked)?;
        Ok(machine)
    }
}

impl Machine<Running> {
    /// See [`Machine::<Paused>::stop`].
    pub fn stop(self, patience: Duration) -> Result<(), Error> {
        Machine { state: Paused { threads: self.state.threads }, core: self.core }.stop(patience)
    }

    /// Stops all vCPUs, with no I/O half done. If one does not stop, the machine runs on and comes back with the error.
    pub fn pause(self) -> Result<Machine<Paused>, Box<(Machine<Running>, Error)>> {
        let threads = &self.state.threads;
        threads.iter().for_each(VcpuThread::ask_to_park);
        if let Err(error) = threads.iter().try_for_each(VcpuThread::wait_parked) {
            threads.iter().for_each(VcpuThread::resume);
            return Err(Box::new((self, error)));
        }
        // vCPUs have stopped before: their requests to devices are finished, and no new ones come.
        self.core.devices.virtio.quiesce();
        Ok(Machine { state: Paused { threads: self.state.threads }, core: self.core })
    }
}

impl Machine<Paused> {
    /// Ends the vCPU threads and the services of guest memory, then frees VM and memory. If one of the threads does not
    /// end within `patience`, VM and memory stay, because the thread still uses them; the caller should end the process
    /// at once.
    pub fn stop(self, patience: Duration) -> Result<(), Error> {
        // A guest whose memory is no longer served does not stop, however long the wait.
        let patience = if self.core.services.have_failed() { Duration::ZERO } else { patience };
        let deadline = Instant::now() + patience;
        let threads = &self.state.threads;
        threads.iter().for_each(VcpuThread::ask_to_exit);
        let parked = threads.iter().try_for_each(|thread| thread.wait_parked_until(deadline));
        // Devices before the services that they may be waiting for.
        let stopped = parked.and_then(|()| self.core.devices.virtio.finish(deadline));
        let stopped = stopped.and_then(|()| Ok(self.core.services.finish(deadline)?));
        if stopped.is_err() {
            std::mem::forget(self);
        }
        stopped
    }

    /// Lets all vCPUs go on and tells the guest's clock that they were stopped. On an error the machine comes back with
    /// it.
    pub fn resume(self) -> Result<Machine<Running>, Box<(Machine<Paused>, Error)>> {
        for thread in &self.state.threads {
            let vcpu = thread.vcpu();
            if let Err(error) = state::notify_clock(&vcpu.fd, vcpu.index) {
                drop(vcpu);
                return Err(Box::new((self, error)));
            }
        }
        self.core.devices.virtio.go_on();
        self.state.threads.iter().for_each(VcpuThread::resume);
        Ok(Machine { state: Running { threads: self.state.threads }, core: self.core })
    }
}

impl<S> Machine<S> {
    pub fn shape(&self) -> &Shape {
        &self.core.shape
    }

    pub fn ram(&self) -> &GuestRam {
        &self.core.ram
    }

    pub fn serial(&self) -> &Arc<Serial> {
        &self.core.devices.serial
    }

    /// The virtio devices.
    pub fn virtio(&self) -> &VirtioDevices {
        &self.core.devices.virtio
    }

    /// Changes a device. Returns the new configs of all devices.
    pub fn patch_device(&mut self, patch: DevicePatch) -> Result<&DeviceConfigs, Refused> {
        self.core.devices.virtio.patch(patch, self.core.ram.layout())?;
        Ok(self.core.devices.virtio.configs())
    }

    pub fn counters(&self) -> &Arc<ExitCounters> {
        &self.core.counters
    }

    /// Console bytes that KVM collects.
    pub fn console(&self) -> Option<&Arc<ConsoleRing>> {
        self.core.console.as_ref()
    }

    /// The signal by which vCPUs and devices report that the guest has ended.
    pub fn ending(&self) -> &Arc<EndingSignal> {
        &self.core.ending
    }

    /// Returns whether the kernel maps only the pages that were touched, not their neighbours.
    pub fn maps_single_pages(&self) -> bool {
        self.core.services.maps_single_pages()
    }

    pub fn vm(&self) -> &VmFd {
        &self.core.vm
    }

    /// Returns the times at which the fault service was busy.
    pub fn fault_batches(&self) -> Vec<FaultBatch> {
        self.core.services.fault_batches()
    }

    /// Faults that the fault service has answered so far.
    pub fn fault_counts(&self) -> FaultCounts {
        self.core.services.fault_counts()
    }

    /// Returns whether pages that the guest can read from images are still being compared with their checksums.
    pub fn is_comparing(&self) -> bool {
        self.core.services.is_comparing()
    }

    /// The threads and handles that work on guest memory.
    pub fn services(&self) -> &MemoryServices {
        &self.core.services
    }

    /// The share of memory that has been compared with the snapshot's checksums, for reports.
    pub fn verification(&self) -> serde_json::Value {
        self.core.services.verification()
    }

    /// MSRs that KVM refused at the restore and that the guest does without.
    pub fn msrs_refused(&self) -> &[u32] {
        &self.core.msrs_refused
    }
}

impl Core {
    /// Returns the snapshot that the machine was restored from, if `change` can be made to its memory.
    pub(super) fn own_memory(&self, change: MemoryChange) -> Result<&Origin, NotItsOwn> {
        let origin = self.origin.as_ref().ok_or(NotItsOwn::Booted(change))?;
        match origin.serves {
            PageServer::Own if self.services.have_failed() => Err(NotItsOwn::Unserved(change)),
            PageServer::Own => Ok(origin),
            PageServer::Recorder => Err(NotItsOwn::Observed(change)),
            PageServer::Handler => Err(NotItsOwn::Handler(change)),
        }
    }

    /// Promotes the pages in place that KVM writes without a report for vCPUs in these states.
    pub fn promote_ahead(&self, vcpus: &[VcpuState]) -> Result<(), Error> {
        let Some(in_place) = self.ram.in_place() else { return Ok(()) };
        let by_software = !host::has_second_stage_paging();
        vcpus.iter().try_for_each(|state| Ok(ahead::promote(in_place, self.ram.view(), &state.ahead()?, by_software)?))
    }

    /// Sets the state of interrupt controllers, timer, clock and vCPUs, whose descriptors are `fds`. No vCPU runs.
    /// Returns the MSRs that KVM refused and that the guest can do without.
    pub fn load(
        &self,
        fds: &[&VcpuFd],
        vm: &VmState,
        vcpus: &[VcpuState],
        clock_realtime: bool,
    ) -> Result<Vec<u32>, Error> {
        let slept = if clock_realtime { vm.time_since_saved()? } else { Duration::ZERO };
        let mut refused = Vec::new();
        vm.restore(&self.vm)?;
        for (index, (fd, state)) in (0..).zip(fds.iter().zip(vcpus)) {
            refused.extend(state.restore(fd, index, slept)?);
        }
        vm.restore_clock(&self.vm, clock_realtime)?;
        for (index, fd) in (0..).zip(fds) {
            state::notify_clock(fd, index)?;
        }
        Ok(refused)
    }

    /// Makes KVM log the pages that are written from now on.
    pub fn log_writes(&mut self) -> Result<(), Error> {
        if self.logs_writes {
            return Ok(());
        }
        dirty_log::enable_manual_protect(&self.vm).map_err(Error::kvm("enable the dirty log"))?;
        set_ram_slots(&self.vm, &self.ram, KVM_MEM_LOG_DIRTY_PAGES)?;
        self.logs_writes = true;
        Ok(())
    }

    /// Ends the log that [`log_writes`](Self::log_writes) began, unless the access record needs it.
    pub fn stop_logging(&mut self) -> Result<(), Error> {
        let is_needed = self.access.as_ref().is_some_and(|access| access.keeps_log);
        if self.shape.track_dirty_pages || !self.logs_writes || is_needed {
            return Ok(());
        }
        self.logs_writes = false;
        set_ram_slots(&self.vm, &self.ram, 0)
    }

    /// Drops the access record: the memory is another one now.
    pub fn forget_access(&mut self) -> Result<(), Error> {
        drop(self.services.counters.take_touched());
        self.access = None;
        self.stop_logging()
    }

    fn spawn(&self, mut vcpus: Vec<Vcpu>, order: Order) -> Result<Vec<VcpuThread>, Error> {
        // A machine with ACPI has a VM generation id, and no 8259 that its kernel knows of.
        if let Some(boot) = vcpus.first_mut() {
            boot.has_pic = self.devices.vmgenid.is_none();
        }
        vcpus.into_iter().map(|vcpu| VcpuThread::spawn(vcpu, order, &self.ending)).collect()
    }

    /// Gives the machine a VM generation id with a new value, at the place in `state`.
    pub fn attach_vmgenid(&mut self, state: VmGenIdState) -> Result<(), Error> {
        let vmgenid = VmGenId::new(state)?;
        vmgenid.renew(self.ram.view())?;
        connect(vmgenid.interrupt_line(), &self.vm, state.gsi);
        self.devices.vmgenid = Some(vmgenid);
        Ok(())
    }

    pub fn machine_state(&self) -> MachineState {
        MachineState { vcpu_count: self.shape.vcpu_count, mem_size_mib: self.shape.mem_size_mib }
    }
}

/// The effect of an instruction that KVM cannot emulate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EmulationFailure {
    /// The guest gets an exception: the default of KVM.
    Exception,
    /// KVM exits to the VMM, which promotes the pages in place that the instruction writes.
    Exit,
}

/// Tells KVM the effect of an instruction that it cannot emulate. A KVM that cannot exit then (before Linux 5.14) ends
/// the guest.
pub(super) fn set_emulation_exits(vm: &VmFd, effect: EmulationFailure) -> Result<(), Error> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
    cap.args[0] = u64::from(effect == EmulationFailure::Exit);
    match vm.enable_cap(&cap) {
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        result => result.map_err(Error::kvm("say what follows where KVM cannot emulate")),
    }
}

fn set_memslots(vm: &VmFd, ram: &GuestRam, pmem: &[PmemMemory], track: bool) -> Result<(), Error> {
    let ram_slots = ram.slots().count();
    set_ram_slots(vm, ram, if track { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
    for (index, pmem) in pmem.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: (ram_slots + index) as u32,
            flags: if pmem.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: pmem.gpa,
            memory_size: pmem.size(),
            userspace_addr: pmem.base() as u64,
        };
        // SAFETY: as above: `base` is the start of `size` bytes that `PmemMemory` owns, and `Core` drops the VM first.
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("set a memslot for a pmem device"))?;
    }
    Ok(())
}

/// Makes the memslots of guest RAM, or changes their flags.
fn set_ram_slots(vm: &VmFd, ram: &GuestRam, flags: u32) -> Result<(), Error> {
    ram.slots().enumerate().try_for_each(|(slot, (range, host))| {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags,
            guest_phys_addr: range.gpa,
            memory_size: range.len,
            userspace_addr: host as u64,
        };
        // SAFETY: `host` is the start of a reservation of exactly `range.len` bytes that `GuestRam` owns; `Core` drops
        // the VM before it, so KVM never refers to memory that is gone.
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("set a memslot"))
    })
}

/// Lets KVM collect what the guest writes to the serial port's transmit register: a 16550 driver asks for the line
/// status (or takes an interrupt, or halts) before it relies on a byte being out, and each of these is an exit.
fn coalesce_console(kvm: &Kvm, vm: &VmFd, vcpus: &mut [Vcpu]) -> Result<Option<Arc<ConsoleRing>>, Error> {
    let Some(boot) = vcpus.first() else { return Ok(None) };
    let ring = CoalescedRing::register(kvm, vm, &boot.fd, layout::COM1).map_err(Error::os("collect console writes"))?;
    let console = ring.map(|ring| ConsoleRing::new(ring, boot.buses.clone(), boot.counters.clone())).transpose();
    let console = console.map_err(Error::os("make the timer of the console"))?.map(Arc::new);
    vcpus.iter_mut().for_each(|vcpu| vcpu.console = console.clone());
    Ok(console)
}

fn build_devices(
    vm: &Arc<VmFd>,
    ram: &GuestRam,
    set: DeviceSet,
    output: Arc<ConsoleOutput>,
    ending: &Arc<EndingSignal>,
) -> Result<(Devices, Arc<Buses>), Error> {
    let serial = Arc::new(Serial::new(output)?);
    connect(serial.interrupt_line(), vm, layout::COM1_IRQ);
    let reset: EventFd = ending.event().try_clone().map_err(Error::os("copy an eventfd"))?;
    let i8042 = Arc::new(I8042::new(reset));
    let ending = ending.clone();
    let sleep = SleepRegisters::new(Box::new(move || ending.end(Ending::PowerOff)));
    let mut buses = Buses::default();
    buses.pio.insert(layout::COM1, layout::COM1_LEN, serial.clone())?;
    buses.pio.insert(layout::I8042, layout::I8042_LEN, i8042.clone())?;
    buses.pio.insert(layout::SLEEP, layout::SLEEP_LEN, Arc::new(sleep))?;
    let fw_cfg = Arc::new(FwCfg::new(set.fw_cfg)?);
    buses.pio.insert(layout::FW_CFG, layout::FW_CFG_LEN, fw_cfg.clone())?;
    let virtio = VirtioDevices::attach(vm, &mut buses.mmio, ram.view(), set.virtio, set.configs)?;
    Ok((Devices { serial, i8042, fw_cfg, vmgenid: None, virtio }, Arc::new(buses)))
}

/// Sets a vCPU to the state that its kernel expects at its first instruction. Returns its CPUID.
fn set_boot_state(
    vcpu: &Vcpu,
    supported: &kvm_bindings::CpuId,
    platform: Platform<'_>,
    entry: registers::Entry,
) -> Result<kvm_bindings::CpuId, Error> {
    let failed = |doing| move |source| vcpu_error(doing, vcpu.index, source);
    let fd = &vcpu.fd;
    let table = cpuid::for_vcpu(supported, vcpu.index, platform.vcpu_count).map_err(|_| StateError::Section {
        section: "CPUID".into(),
        what: "KVM supports more leaves than KVM_SET_CPUID2 takes".into(),
    })?;
    fd.set_cpuid2(&table).map_err(failed("set the CPUID"))?;
    state::set_msrs(fd, vcpu.index, &msr::boot_entries())?;
    fd.set_fpu(&registers::fpu()).map_err(failed("set the FPU"))?;
    // KVM_PVM runs guests with the host's XCR0 until it is set; on other kinds of KVM the guest's XSETBV sets it.
    let mut xcrs = fd.get_xcrs().map_err(failed("read XCR0"))?;
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0] = kvm_bindings::kvm_xcr { xcr: 0, reserved: 0, value: xcr0(&table) };
    fd.set_xcrs(&xcrs).map_err(failed("set XCR0"))?;
    if vcpu.index != 0 {
        // KVM holds application processors until INIT and SIPI.
        return Ok(table);
    }
    let mut sregs = fd.get_sregs().map_err(failed("read the special registers"))?;
    registers::special(entry, &mut sregs);
    fd.set_sregs(&sregs).map_err(failed("set the special registers"))?;
    fd.set_regs(&registers::general(entry)).map_err(failed("set the registers"))?;
    let mut lapic = fd.get_lapic().map_err(failed("read the LAPIC"))?;
    registers::set_local_interrupts(&mut lapic, platform.acpi);
    fd.set_lapic(&lapic).map_err(failed("set the LAPIC"))?;
    Ok(table)
}

fn vcpu_cpuid(vcpu: &Vcpu) -> Result<kvm_bindings::CpuId, Error> {
    let read = vcpu.fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    read.map_err(|source| vcpu_error("read the CPUID", vcpu.index, source))
}

/// x87, SSE, AVX and AVX-512 as far as the guest's CPUID.0xD lists them; x87 alone without XSAVE.
fn xcr0(table: &kvm_bindings::CpuId) -> u64 {
    const X87_SSE_AVX_AVX512: u32 = 0xe7;
    let leaf = table.as_slice().iter().find(|entry| entry.function == 0xd && entry.index == 0);
    u64::from(leaf.map_or(0, |entry| entry.eax & X87_SSE_AVX_AVX512) | 1)
}

fn vcpu_error(doing: &'static str, vcpu: u8, source: kvm_ioctls::Error) -> Error {
    KvmError::Vcpu { doing, vcpu, source }.into()
}
