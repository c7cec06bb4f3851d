//! Saved state of KVM's half of the machine, in the form of the snapshot's sections.
//!
//! KVM's structs are kept as the bytes of the kernel ABI. Every length is checked when they are read back: a struct of
//! another size is refused, never padded or cut.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::arch::msr;
use super::error::Error;
use crate::memory::promote::ahead::{VcpuAhead, kernel_written};
use crate::snapshot::{Extent, Section, SectionKind, Snapshot};
use crate::vmm::kvm_error::KvmError;
use crate::vmm::restore::StateError;

/// Version of the section payloads written here. Readers accept no other.
const VERSION: u32 = 1;
/// Entries a CPUID or MSR table can have, by KVM's own limits.
const TABLE_MAX: usize = 256;
const IRQCHIPS: usize = 3;
/// The pins of the I/O APIC that KVM routes the PIT's IRQ 0 to, over the 8259 and directly.
const IO_APIC_PIT_PINS: [usize; 2] = [0, 2];
/// One part in 4000, 250 ppm: the guest's own clock discipline absorbs such a difference between two TSC frequencies
/// (Linux' tolerance for a steady TSC).
const TSC_TOLERANCE: u32 = 4000;

/// The construction parameters of the machine, checked against limits before anything is allocated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    pub vcpu_count: u8,
    pub mem_size_mib: u64,
}

/// Interrupt controllers, timer, clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    irqchips: Vec<Vec<u8>>,
    pit: Vec<u8>,
    /// kvmclock, ns since the guest booted, when the vCPUs stopped.
    pub clock_ns: u64,
    /// Host wall clock at the same moment, ns since the epoch; 0 in old snapshots of hosts whose KVM did not report it.
    pub realtime_ns: u64,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: Vec<u8>,
    regs: Vec<u8>,
    sregs: Vec<u8>,
    xcrs: Vec<u8>,
    xsave: Vec<u8>,
    debug_regs: Vec<u8>,
    lapic: Vec<u8>,
    events: Vec<u8>,
    cpuid: Vec<u8>,
    msrs: Vec<u8>,
    tsc_khz: u32,
}

/// Encodes `state` as a section.
pub fn section<T: Serialize>(kind: SectionKind, instance: u32, state: &T) -> Result<Section, Error> {
    let payload = postcard::to_stdvec(state)
        .map_err(|error| StateError::Section { section: format!("{kind:?} {instance}"), what: error.to_string() })?;
    Ok(Section { kind, instance, version: VERSION, payload })
}

/// Decodes a section of `snapshot`'s state; bytes left over are an error.
pub fn decode<T: DeserializeOwned>(snapshot: &Snapshot, kind: SectionKind, instance: u32) -> Result<T, Error> {
    let invalid = |what: String| Error::from(StateError::Section { section: format!("{kind:?} {instance}"), what });
    let version = snapshot.section_info(kind, instance)?.version;
    if version != VERSION {
        return Err(invalid(format!("it has version {version}, this build reads version {VERSION}")));
    }
    let payload = snapshot.section(kind, instance)?;
    let (state, rest) = postcard::take_from_bytes(payload).map_err(|error| invalid(error.to_string()))?;
    if !rest.is_empty() {
        return Err(invalid(format!("{} bytes are left over", rest.len())));
    }
    Ok(state)
}

fn raw<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

fn unraw<T: FromBytes>(name: &'static str, bytes: &[u8]) -> Result<T, Error> {
    let what = || format!("it is {} bytes long, not {}", bytes.len(), size_of::<T>());
    let invalid = |_| Error::from(StateError::Section { section: name.to_string(), what: what() });
    T::read_from_bytes(bytes).map_err(invalid)
}

fn unraw_table<T: FromBytes>(name: &'static str, bytes: &[u8]) -> Result<Vec<T>, Error> {
    let invalid = |what: String| Error::from(StateError::Section { section: name.to_string(), what });
    if !bytes.len().is_multiple_of(size_of::<T>()) || bytes.len() / size_of::<T>() > TABLE_MAX {
        return Err(invalid(format!("{} bytes are no table of at most {TABLE_MAX} entries", bytes.len())));
    }
    bytes.chunks_exact(size_of::<T>()).map(|entry| unraw(name, entry)).collect()
}

impl VmState {
    /// Reads the state of a VM whose vCPUs are all out of the guest.
    pub fn save(vm: &VmFd) -> Result<Self, Error> {
        let clock = vm.get_clock().map_err(Error::kvm("read the clock"))?;
        let beside = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut irqchips = Vec::with_capacity(IRQCHIPS);
        for chip_id in 0..IRQCHIPS as u32 {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(Error::kvm("read an interrupt controller"))?;
            irqchips.push(raw(&chip));
        }
        let pit = raw(&vm.get_pit2().map_err(Error::kvm("read the PIT"))?);
        // KVM returns the two times together only while the TSC is its master clock (KVM API 4.29), which it is not
        // always. Otherwise the host's clock is read after the guest's, later by the time of a system call.
        let together = clock.flags & KVM_CLOCK_REALTIME != 0;
        let realtime_ns = if together { clock.realtime } else { beside.as_nanos() as u64 };
        Ok(VmState { irqchips, pit, clock_ns: clock.clock, realtime_ns })
    }

    /// Sets interrupt controllers and PIT. Called before the vCPUs' state is set.
    pub fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        if self.irqchips.len() != IRQCHIPS {
            let what = format!("{} interrupt controllers, not {IRQCHIPS}", self.irqchips.len());
            return Err(StateError::Section { section: "Vm".into(), what }.into());
        }
        for (index, bytes) in self.irqchips.iter().enumerate() {
            let chip: kvm_irqchip = unraw("interrupt controller", bytes)?;
            if chip.chip_id as usize != index {
                let what = format!("interrupt controller {index} says it is {}", chip.chip_id);
                return Err(StateError::Section { section: "Vm".into(), what }.into());
            }
            vm.set_irqchip(&chip).map_err(Error::kvm("set an interrupt controller"))?;
        }
        let pit: kvm_pit_state2 = unraw("PIT", &self.pit)?;
        vm.set_pit2(&pit).map_err(Error::kvm("set the PIT"))
    }

    /// Starts kvmclock from the time at which it stopped, or, with `to_present`, from the time it would have reached
    /// (`KVM_CLOCK_REALTIME`, KVM API 4.30: the host adds the wall-clock time since the save). Called after the vCPUs'
    /// state.
    pub fn restore_clock(&self, vm: &VmFd, to_present: bool) -> Result<(), Error> {
        let mut clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        if to_present {
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = self.realtime_ns;
        }
        vm.set_clock(&clock).map_err(Error::kvm("set the clock"))
    }

    /// The vectors that the PIT's interrupt has at the LAPICs, by the I/O APIC's table (`struct kvm_ioapic_state`: 8
    /// bytes for each pin, from offset 24 on, the vector first).
    pub fn pit_vectors(&self) -> Vec<u8> {
        let io_apic = self.irqchips.get(KVM_IRQCHIP_IOAPIC as usize);
        let table = io_apic.and_then(|chip| chip.get(8 + 24..)).unwrap_or_default();
        IO_APIC_PIT_PINS.iter().filter_map(|pin| table.get(pin * 8)).copied().collect()
    }

    /// The names of the parts that differ from `saved`, but for clocks and the PIT's own interrupt, which time may have
    /// raised since.
    pub fn differences(&self, saved: &VmState) -> Result<Vec<String>, Error> {
        let mut differing = Vec::new();
        for (index, (now, saved)) in self.irqchips.iter().zip(&saved.irqchips).enumerate() {
            if without_pit_line(index, now) != without_pit_line(index, saved) {
                differing.push(format!("interrupt controller {index}"));
            }
        }
        let without_times = |bytes: &[u8]| -> Result<kvm_pit_state2, Error> {
            let mut pit: kvm_pit_state2 = unraw("PIT", bytes)?;
            pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
            Ok(pit)
        };
        if raw(&without_times(&self.pit)?) != raw(&without_times(&saved.pit)?) {
            differing.push("PIT".into());
        }
        Ok(differing)
    }

    /// The wall-clock time since the state was saved; none if the host's clock is behind that. An error if the host of
    /// the snapshot could not read the time together with the guest's.
    pub fn time_since_saved(&self) -> Result<Duration, Error> {
        if self.realtime_ns == 0 {
            return Err(StateError::NoRealtime.into());
        }
        let saved = UNIX_EPOCH + Duration::from_nanos(self.realtime_ns);
        Ok(SystemTime::now().duration_since(saved).unwrap_or_default())
    }
}

impl VcpuState {
    /// Reads the state of vCPU `index`, which is out of the guest with no I/O pending. `msr_indices` is KVM's list of
    /// MSRs that can be saved.
    pub fn save(vcpu: &VcpuFd, index: u8, msr_indices: &[u32]) -> Result<Self, Error> {
        let failed = |doing| move |source| KvmError::Vcpu { doing, vcpu: index, source };
        // Read first: reading the MP state lets KVM accept pending INIT and SIPI, which changes the rest.
        let mp_state = raw(&vcpu.get_mp_state().map_err(failed("read the MP state"))?);
        let cpuid = vcpu.get_cpuid2(TABLE_MAX).map_err(failed("read the CPUID"))?;
        Ok(VcpuState {
            mp_state,
            regs: raw(&vcpu.get_regs().map_err(failed("read the registers"))?),
            sregs: raw(&vcpu.get_sregs().map_err(failed("read the special registers"))?),
            xcrs: raw(&vcpu.get_xcrs().map_err(failed("read XCR0"))?),
            // 4 KiB hold every state component a guest can have without arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM),
            // which tvmm never calls.
            xsave: raw(&vcpu.get_xsave().map_err(failed("read the XSAVE area"))?),
            debug_regs: raw(&vcpu.get_debug_regs().map_err(failed("read the debug registers"))?),
            lapic: raw(&vcpu.get_lapic().map_err(failed("read the LAPIC"))?),
            cpuid: cpuid.as_slice().iter().flat_map(raw).collect(),
            msrs: save_msrs(vcpu, msr_indices).map_err(failed("read the MSRs"))?,
            events: raw(&vcpu.get_vcpu_events().map_err(failed("read the pending events"))?),
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        })
    }

    /// Sets CPUID and TSC frequency, which must come before all other state.
    pub fn restore_cpuid(&self, vcpu: &VcpuFd, index: u8) -> Result<(), Error> {
        let failed = |doing| move |source| KvmError::Vcpu { doing, vcpu: index, source };
        let entries: Vec<kvm_cpuid_entry2> = unraw_table("CPUID", &self.cpuid)?;
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|error| StateError::Section { section: "CPUID".into(), what: format!("{error:?}") })?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("set the CPUID"))?;
        if !self.fits_tsc(vcpu.get_tsc_khz().unwrap_or(0)) {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(failed("set the TSC frequency"))?;
        }
        Ok(())
    }

    /// Sets all other state, in the order in which KVM's pieces depend on each other. Returns the MSRs that KVM refused
    /// and that the guest can do without. The TSC is advanced by the time `slept`.
    pub fn restore(&self, vcpu: &VcpuFd, index: u8, slept: Duration) -> Result<Vec<u32>, Error> {
        let failed = |doing| move |source| KvmError::Vcpu { doing, vcpu: index, source };
        let mp_state: kvm_mp_state = unraw("MP state", &self.mp_state)?;
        let sregs: kvm_sregs = unraw("special registers", &self.sregs)?;
        let regs: kvm_regs = unraw("registers", &self.regs)?;
        let xcrs: kvm_xcrs = unraw("XCR0", &self.xcrs)?;
        let xsave: kvm_xsave = unraw("XSAVE area", &self.xsave)?;
        let debug_regs: kvm_debugregs = unraw("debug registers", &self.debug_regs)?;
        let lapic: kvm_lapic_state = unraw("LAPIC", &self.lapic)?;
        let events: kvm_vcpu_events = unraw("pending events", &self.events)?;
        vcpu.set_mp_state(mp_state).map_err(failed("set the MP state"))?;
        vcpu.set_sregs(&sregs).map_err(failed("set the special registers"))?;
        vcpu.set_regs(&regs).map_err(failed("set the registers"))?;
        vcpu.set_xcrs(&xcrs).map_err(failed("set XCR0"))?;
        // SAFETY: KVM reads at most the 4 KiB of `kvm_xsave` unless the process asked for larger state components with
        // arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which tvmm never does.
        unsafe { vcpu.set_xsave(&xsave) }.map_err(failed("set the XSAVE area"))?;
        vcpu.set_debug_regs(&debug_regs).map_err(failed("set the debug registers"))?;
        vcpu.set_lapic(&lapic).map_err(failed("set the LAPIC"))?;
        let refused = restore_msrs(vcpu, index, self.msrs_after(slept)?)?;
        vcpu.set_vcpu_events(&events).map_err(failed("set the pending events"))?;
        Ok(refused)
    }

    /// The state that tells which pages KVM writes for this vCPU.
    pub fn ahead(&self) -> Result<VcpuAhead, Error> {
        let regs = unraw("registers", &self.regs)?;
        let sregs = unraw("special registers", &self.sregs)?;
        Ok(VcpuAhead { regs, sregs, msrs: self.msrs()? })
    }

    /// Sets the MSRs of the wall clock, which [`restore`](Self::restore) leaves out because KVM then writes the time to
    /// guest memory. Called before guest memory is taken back.
    pub fn rewind_wall_clock(&self, vcpu: &VcpuFd, index: u8) -> Result<(), Error> {
        let entries: Vec<_> = self.msrs()?.into_iter().filter(|entry| msr::is_wall_clock(entry.index)).collect();
        set_msrs(vcpu, index, &entries).map(drop)
    }

    /// The pages that KVM itself writes for this vCPU: clocks, steal time.
    pub fn kernel_written(&self) -> Result<Vec<Extent>, Error> {
        Ok(kernel_written(&self.msrs()?))
    }

    /// The names of the parts that differ from `saved`, but for those that change with time: the TSC, the count of the
    /// local timer, and the waiting interrupts of the timers (the local one, and the PIT's by `pit_vectors`). The
    /// LAPIC's processor priority is left out too, because it follows from other registers.
    pub fn differences(&self, saved: &VcpuState, pit_vectors: &[u8]) -> Result<Vec<String>, Error> {
        let parts = [
            ("MP state", self.mp_state == saved.mp_state),
            ("registers", self.regs == saved.regs),
            ("special registers", self.sregs == saved.sregs),
            ("XCR0", self.xcrs == saved.xcrs),
            ("XSAVE area", self.xsave == saved.xsave),
            ("debug registers", self.debug_regs == saved.debug_regs),
            ("pending events", self.events == saved.events),
        ];
        let mut differing: Vec<String> =
            parts.into_iter().filter(|(_, is_equal)| !is_equal).map(|(name, _)| name.to_owned()).collect();
        let lapic = comparable_lapic(&self.lapic, pit_vectors);
        let saved_lapic = comparable_lapic(&saved.lapic, pit_vectors);
        differing.extend(differing_registers(&lapic, &saved_lapic));
        let saved = saved.msrs()?;
        let is_saved = |now: &kvm_msr_entry| {
            let entry = saved.iter().find(|entry| entry.index == now.index);
            msr::changes_with_time(now.index) || entry.is_none_or(|entry| entry.data == now.data)
        };
        let msrs = self.msrs()?;
        differing.extend(msrs.iter().filter(|now| !is_saved(now)).map(|now| format!("MSR {:#x}", now.index)));
        Ok(differing)
    }

    /// Returns an MSR that the vCPU has and whose value was not saved, if there is one.
    pub fn missing_msr(&self, vcpu: &VcpuFd, index: u8, msr_indices: &[u32]) -> Result<Option<u32>, Error> {
        let failed = |source| KvmError::Vcpu { doing: "read the MSRs", vcpu: index, source };
        let has: Vec<kvm_msr_entry> = unraw_table("MSRs", &save_msrs(vcpu, msr_indices).map_err(failed)?)?;
        let saved = self.msrs()?;
        let is_saved = |entry: &kvm_msr_entry| saved.iter().any(|saved| saved.index == entry.index);
        Ok(has.iter().find(|entry| !is_saved(entry)).map(|entry| entry.index))
    }

    /// Sets the memory type registers to their values after a reset, unless the saved state has them: KVM does not list
    /// them on every host, and a guest may have written them.
    pub fn reset_memory_types(&self, vcpu: &VcpuFd, index: u8) -> Result<(), Error> {
        let saved = self.msrs()?;
        let is_saved = |entry: &kvm_msr_entry| saved.iter().any(|saved| saved.index == entry.index);
        let unsaved: Vec<_> = msr::reset_memory_types().into_iter().filter(|entry| !is_saved(entry)).collect();
        set_msrs(vcpu, index, &unsaved).map(drop)
    }

    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Returns whether a vCPU whose TSC runs at `khz` needs no other frequency for this state.
    pub fn fits_tsc(&self, khz: u32) -> bool {
        self.tsc_khz == 0 || khz.abs_diff(self.tsc_khz) <= self.tsc_khz / TSC_TOLERANCE
    }

    /// The saved MSRs.
    fn msrs(&self) -> Result<Vec<kvm_msr_entry>, Error> {
        unraw_table("MSRs", &self.msrs)
    }

    /// The MSRs to set. A guest whose clock is the TSC must see the same time pass as one whose clock is kvmclock.
    fn msrs_after(&self, slept: Duration) -> Result<Vec<kvm_msr_entry>, Error> {
        let mut entries = self.msrs()?;
        let cycles = slept.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        for tsc in entries.iter_mut().filter(|entry| entry.index == msr::IA32_TSC) {
            tsc.data = tsc.data.wrapping_add(cycles as u64);
        }
        Ok(entries)
    }

    /// The state components the guest has enabled, for the host check.
    pub fn xcr0(&self) -> Result<u64, Error> {
        let xcrs: kvm_xcrs = unraw("XCR0", &self.xcrs)?;
        let used = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
        Ok(used.filter(|entry| entry.xcr == 0).map(|entry| entry.value).fold(0, |all, value| all | value))
    }

    /// The guest's CPUID table, for the host check.
    pub fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, Error> {
        unraw_table("CPUID", &self.cpuid)
    }
}

/// The state of an interrupt controller (`struct kvm_irqchip`) without the waiting interrupt of the PIT: `last_irr` and
/// `irr` of the first 8259, `irr` of the I/O APIC.
fn without_pit_line(index: usize, chip: &[u8]) -> Vec<u8> {
    const FIRST_8259: usize = KVM_IRQCHIP_PIC_MASTER as usize;
    const IO_APIC: usize = KVM_IRQCHIP_IOAPIC as usize;
    let places: &[(usize, u8)] = match index {
        FIRST_8259 => &[(8, 1), (9, 1)],
        IO_APIC => &[(24, 1 << IO_APIC_PIT_PINS[0] | 1 << IO_APIC_PIT_PINS[1])],
        _ => &[],
    };
    without_bits(chip, places)
}

/// A LAPIC's registers without what its timer and the PIT change: the timer's count (SDM volume 3, 10.5.4: offset
/// 0x390) and their bits among the waiting interrupts (10.8.4, IRR: eight words of 32 bits from 0x200, one every 16
/// bytes). The processor priority (10.8.3.1, offset 0xa0) is also left out: it follows from the task priority and the
/// interrupts in service, and KVM_SET_LAPIC computes it with the interrupts that were in service before. KVM computes
/// it again before it uses it.
fn comparable_lapic(lapic: &[u8], pit_vectors: &[u8]) -> Vec<u8> {
    const TIMER_VECTOR: usize = 0x320;
    let numbers = (0x390..0x394).chain(0xa0..0xa4).map(|offset| (offset, 0xff));
    let vectors = lapic.get(TIMER_VECTOR).into_iter().chain(pit_vectors);
    let waiting = vectors.map(|&vector| {
        let word = 0x200 + usize::from(vector / 32) * 16;
        (word + usize::from(vector % 32 / 8), 1 << (vector % 8))
    });
    without_bits(lapic, &numbers.chain(waiting).collect::<Vec<_>>())
}

/// Describes the registers that differ between a LAPIC and a saved one.
fn differing_registers(now: &[u8], saved: &[u8]) -> Vec<String> {
    let pairs = now.as_chunks::<4>().0.iter().zip(saved.as_chunks::<4>().0);
    let differing = (0..).zip(pairs).filter(|(_, (now, saved))| now != saved);
    let value = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let describe = |(index, (now, saved)): (usize, (&[u8; 4], &[u8; 4]))| {
        format!("LAPIC register {:#x} ({:#x}, saved {:#x})", 4 * index, value(now), value(saved))
    };
    differing.map(describe).collect()
}

/// Some state without the bits `(offset, mask)`.
fn without_bits(state: &[u8], bits: &[(usize, u8)]) -> Vec<u8> {
    let mut rest = state.to_vec();
    for &(offset, mask) in bits {
        rest.get_mut(offset).into_iter().for_each(|byte| *byte &= !mask);
    }
    rest
}

/// Tells the guest that it was stopped, so that its soft-lockup watchdog does not fire (KVM API 4.71). A guest without
/// kvmclock has no place for this flag.
pub fn notify_clock(vcpu: &VcpuFd, index: u8) -> Result<(), Error> {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => Ok(()),
        Err(error) if error.errno() == libc::EINVAL => Ok(()),
        Err(source) => Err(KvmError::Vcpu { doing: "announce the pause", vcpu: index, source }.into()),
    }
}

/// The MSRs KVM can save on this host.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    Ok(kvm.get_msr_index_list().map_err(Error::kvm("list the MSRs"))?.as_slice().to_vec())
}

/// Reads the MSRs in as few calls as KVM allows: it stops at the first that this vCPU does not have, which is skipped.
fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u8>, kvm_ioctls::Error> {
    let mut saved = Vec::with_capacity(indices.len() * size_of::<kvm_msr_entry>());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(TABLE_MAX)];
        let entries: Vec<kvm_msr_entry> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        let count = vcpu.get_msrs(&mut msrs)?;
        saved.extend(msrs.as_slice()[..count].iter().flat_map(raw));
        rest = &rest[(count + usize::from(count < batch.len())).min(rest.len())..];
    }
    Ok(saved)
}

fn restore_msrs(vcpu: &VcpuFd, index: u8, mut entries: Vec<kvm_msr_entry>) -> Result<Vec<u32>, Error> {
    msr::order_for_restore(&mut entries);
    set_msrs(vcpu, index, &entries)
}

/// Sets MSRs in as few calls as KVM allows. One that KVM refuses is an error unless the guest can do without it.
/// Returns the indices that were refused.
pub fn set_msrs(vcpu: &VcpuFd, index: u8, entries: &[kvm_msr_entry]) -> Result<Vec<u32>, Error> {
    let failed = |source| KvmError::Vcpu { doing: "set the MSRs", vcpu: index, source };
    let mut refused = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = Msrs::from_entries(rest).map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
        let count = vcpu.set_msrs(&batch).map_err(failed)?;
        let Some(entry) = rest.get(count) else { break };
        if !msr::may_be_refused(entry) {
            return Err(KvmError::MsrRefused { vcpu: index, index: entry.index, value: entry.data }.into());
        }
        tracing::debug!(
            vcpu = index,
            msr = format_args!("{:#x}", entry.index),
            "KVM refused an MSR the guest can do without"
        );
        refused.push(entry.index);
        rest = &rest[count + 1..];
    }
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_interrupts_of_timers_are_no_difference_and_all_others_are() {
        let mut saved = vec![0; 0x400];
        saved[0x320] = 0xec;
        let is_same = |waiting: usize| {
            let mut now = saved.clone();
            now[0x200 + waiting / 32 * 16 + waiting % 32 / 8] |= 1 << (waiting % 8);
            comparable_lapic(&now, &[0x30]) == comparable_lapic(&saved, &[0x30])
        };
        let unseen: Vec<usize> = (0..256).filter(|&vector| is_same(vector)).collect();
        assert_eq!(unseen, [0x30, 0xec]);
    }

    #[test]
    fn derived_registers_of_a_lapic_are_no_difference_and_others_are_named() {
        let saved = vec![0; 0x400];
        let mut now = saved.clone();
        // The processor priority, the timer's count, the task priority.
        for offset in [0xa0, 0x390, 0x80] {
            now[offset] = 0x20;
        }
        let named = differing_registers(&comparable_lapic(&now, &[]), &comparable_lapic(&saved, &[]));
        assert_eq!(named, ["LAPIC register 0x80 (0x20, saved 0x0)"]);
    }

    #[test]
    fn pit_line_is_no_difference_of_controllers_and_all_others_are() {
        let saved = vec![0; 512];
        let unseen = |chip: u32, bytes: std::ops::Range<usize>| -> Vec<usize> {
            let is_same = |&bit: &usize| {
                let mut now = saved.clone();
                now[bit / 8] |= 1 << (bit % 8);
                without_pit_line(chip as usize, &now) == without_pit_line(chip as usize, &saved)
            };
            (bytes.start * 8..bytes.end * 8).filter(is_same).map(|bit| bit - bytes.start * 8).collect()
        };
        assert_eq!(unseen(KVM_IRQCHIP_PIC_MASTER, 8..24), [0, 8]);
        assert_eq!(unseen(KVM_IRQCHIP_IOAPIC, 24..28), [0, 2]);
        assert!(unseen(kvm_bindings::KVM_IRQCHIP_PIC_SLAVE, 8..24).is_empty());
    }
}
