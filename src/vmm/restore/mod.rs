//! Restore of a machine: its state comes from the snapshot, its memory from a plan.

mod drives;
mod error;
mod prefault;
mod rescue;

pub use error::StateError;

use crate::memory::services::CloseCold;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::arch::layout;
use super::devices;
use super::devices::SavedDevice;
use super::error::Error;
use super::host;
use super::lineage::Lineage;
use super::machine::{Built, Core, DeviceSet, Environment, Machine, Shape, open_kvm};
use super::state::{self, MachineState, VcpuState, VmState};
use crate::config;
use crate::config::overrides::Overrides;
use crate::devices::virtio::id;
use crate::devices::{FwCfgState, I8042State, SerialState, VmGenId, VmGenIdState};
use crate::memory::stall::Stalls;
use crate::snapshot::{InPlaceMapping, Verify};
use crate::snapshot::{PageSet, RestorePlan, SectionInfo, SectionKind, Snapshot};
use crate::sys::timeline::{Slice, Timeline};
use crate::sys::uffd::Uffd;

pub use crate::memory::engine::EngineReport;

use crate::memory::background::BackgroundWork;
use crate::memory::engine::{BuildOptions, Served};
use crate::memory::external_handler::ExternalHandler;
use crate::memory::fault_service::Observer;
use crate::memory::fault_service::{FaultService, FaultWork};
use crate::memory::files::{Files, Sources};
use crate::memory::verify::Verifier;
use drives::PlacedDrives;
use rescue::Rescue;

/// The parameters of a restore.
pub struct RestoreSpec<'a> {
    pub sources: Sources,
    pub plan: &'a RestorePlan,
    /// Log the pages the guest writes from now on.
    pub track_dirty_pages: bool,
    /// Told of every first touch; memory is then served page by page, whatever the plan says.
    pub observer: Option<Observer>,
    /// True: the kernel maps only pages that are touched, not their neighbours, if it can.
    pub single_pages: bool,
    /// Mapping of pages in place on a tier that allows more than one.
    pub in_place_mapping: InPlaceMapping,
    /// The time at which the sources of memory are compared with the snapshot's checksums.
    pub verify: Verify,
    /// The socket of a page-fault handler outside that serves all memory (Firecracker's `mem_backend: Uffd`).
    pub handler: Option<&'a Path>,
    /// The host-side settings of this clone's devices.
    pub overrides: &'a Overrides,
    /// The watch for memory that does not come.
    pub stalls: &'a Stalls,
    /// True: the guest's clock is moved to the present.
    pub clock_realtime: bool,
}

/// The state of a snapshot, decoded.
struct SavedState {
    machine: MachineState,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    serial: SerialState,
    /// Machines without ACPI, and those of tvmm 0.1, have none.
    vmgenid: Option<VmGenIdState>,
    virtio: Vec<SavedDevice>,
    fw_cfg: FwCfgState,
}

impl SavedState {
    /// The shape of the machine, if it has the memory of the manifest's `layout`.
    fn shape(&self, layout: &crate::snapshot::MemoryLayout, track_dirty_pages: bool) -> Result<Shape, Error> {
        let MachineState { vcpu_count, mem_size_mib, .. } = self.machine;
        let shape = Shape { vcpu_count, mem_size_mib, track_dirty_pages };
        let is_possible = mem_size_mib <= config::MAX_MEM_SIZE_MIB;
        if !is_possible || !shape.layout().is_ok_and(|own| own == *layout) {
            let what = format!("{mem_size_mib} MiB of memory do not fit the manifest's layout");
            return Err(StateError::Section { section: "Machine".into(), what }.into());
        }
        Ok(shape)
    }

    /// Returns whether the guest has a virtio device of this type.
    fn has_device(&self, device_type: u32) -> bool {
        self.virtio.iter().any(|device| device.device_type == device_type)
    }

    fn read(snapshot: &Snapshot) -> Result<Self, Error> {
        let machine: MachineState = state::decode(snapshot, SectionKind::Machine, 0)?;
        let count = machine.vcpu_count;
        if !(1..=config::MAX_VCPU_COUNT).contains(&count) {
            return Err(StateError::Section { section: "Machine".into(), what: format!("it has {count} vCPUs") }.into());
        }
        let vcpus = (0..u32::from(count)).map(|index| state::decode(snapshot, SectionKind::Vcpu, index));
        let devices = snapshot.sections().iter().filter(|section| section.kind == SectionKind::Virtio).count();
        let virtio = (0..devices as u32).map(|index| state::decode(snapshot, SectionKind::Virtio, index));
        let state = SavedState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: state::decode(snapshot, SectionKind::Vm, 0)?,
            serial: state::decode(snapshot, SectionKind::Serial, 0)?,
            vmgenid: decode_vmgenid(snapshot)?,
            virtio: virtio.collect::<Result<_, _>>()?,
            fw_cfg: optional(snapshot, SectionKind::Metadata)?.unwrap_or_default(),
            machine,
        };
        let I8042State {} = state::decode(snapshot, SectionKind::I8042, 0)?;
        snapshot.sections().iter().try_for_each(|section| check_known(section, count))?;
        Ok(state)
    }
}

fn decode_vmgenid(snapshot: &Snapshot) -> Result<Option<VmGenIdState>, Error> {
    let Some(state) = optional::<VmGenIdState>(snapshot, SectionKind::VmGenId)? else { return Ok(None) };
    let known = state.gsi < layout::GSI_COUNT;
    let what = format!("the interrupt controller has no input {}", state.gsi);
    if known { Ok(Some(state)) } else { Err(StateError::Section { section: "VmGenId".into(), what }.into()) }
}

/// The section of an optional kind, of which a snapshot has at most one.
fn optional<T: DeserializeOwned>(snapshot: &Snapshot, kind: SectionKind) -> Result<Option<T>, Error> {
    let there = snapshot.sections().iter().any(|section| section.kind == kind);
    if there { state::decode(snapshot, kind, 0).map(Some) } else { Ok(None) }
}

/// Refuses a section that this build does not know: it may be a device that the guest depends on.
fn check_known(section: &SectionInfo, vcpu_count: u8) -> Result<(), Error> {
    let known = match section.kind {
        SectionKind::Machine
        | SectionKind::Vm
        | SectionKind::Serial
        | SectionKind::I8042
        | SectionKind::VmGenId
        | SectionKind::Metadata => section.instance == 0,
        SectionKind::Vcpu => section.instance < u32::from(vcpu_count),
        SectionKind::Virtio => section.instance < config::MAX_DEVICES as u32,
        _ => false,
    };
    let what = "this build of tvmm does not know it; restore with the version that wrote it".to_string();
    let name = || format!("{:?} {}", section.kind, section.instance);
    if known { Ok(()) } else { Err(StateError::Section { section: name(), what }.into()) }
}

impl Machine<Built> {
    /// Builds the machine of the chain's tip with its memory placed as the plan says.
    pub fn restore(
        spec: RestoreSpec<'_>,
        environment: Environment,
        timeline: &mut Timeline,
    ) -> Result<(Self, EngineReport), Error> {
        let chain = spec.sources.chain.clone();
        let tip = chain.tip();
        let saved = SavedState::read(tip)?;
        let layout = tip.layout();
        let shape = saved.shape(layout, spec.track_dirty_pages)?;
        let kvm = open_kvm()?;
        let boot = &saved.vcpus[0];
        host::check(&tip.manifest().host, &boot.cpuid()?, boot.xcr0()?, &kvm)?;
        let files = Files::open(spec.sources, spec.plan)?;
        spec.stalls.name_sources(files.paths());
        let verifier = match spec.handler {
            None => Verifier::start(&files, spec.plan, spec.verify, spec.observer.is_none())?,
            Some(_) => None,
        };
        timeline.lap(Slice::StateLoad);
        let mut built = match spec.handler {
            None => {
                let options = BuildOptions { observed: spec.observer.is_some(), in_place: spec.in_place_mapping };
                crate::memory::engine::build(&files, spec.plan, layout, options, timeline)?
            }
            Some(_) => crate::memory::engine::build_external(layout, saved.has_device(id::BALLOON), timeline)?,
        };
        let is_ours = spec.handler.is_none() && spec.observer.is_none();
        let exact = if is_ours { crate::memory::engine::writable_when_written(spec.plan) } else { PageSet::new() };
        let single_pages = if spec.single_pages { built.ram.map_single_pages()? } else { None };
        let (placed, overrides) = PlacedDrives::make(tip, spec.overrides)?;
        let (virtio, configs) = devices::from_saved(&saved.virtio, &overrides, &built.ram, spec.stalls)?;
        let mut fw_cfg = saved.fw_cfg;
        fw_cfg.metadata.extend(spec.overrides.metadata.clone());
        let set = DeviceSet { virtio, configs, fw_cfg };
        let mut machine = Machine::build(kvm, built.ram, shape, set, environment, timeline)?;
        machine.core.services.single_pages = single_pages;
        machine.core.services.cold = files.cold().cloned().map(CloseCold);
        machine.core.services.tiers_held = files.tiers().to_vec();
        let rescue = Rescue::prepare(built.lazy.as_ref().map(|(uffd, _)| uffd), &machine.core);
        // Before state is applied, because KVM may touch guest memory while applying it.
        match (spec.handler, built.lazy) {
            (Some(socket), Some((uffd, _))) => machine.core.hand_over(socket, uffd, spec.stalls)?,
            (None, Some(served)) => machine.core.serve(served, &files, spec.plan, spec.observer, spec.stalls)?,
            _ => {}
        }
        machine.apply(&saved.vm, &saved.vcpus, spec.clock_realtime)?;
        machine.serial().restore(&saved.serial)?;
        machine.virtio().restore(&saved.virtio)?;
        machine.core.lineage = Lineage::restored(files.chain().clone(), exact);
        if let Some(vmgenid) = saved.vmgenid {
            machine.core.renew_vmgenid(vmgenid)?;
        }
        timeline.lap(Slice::StateLoad);
        if is_ours {
            built.report.prefault = machine.prefault(spec.plan)?;
            timeline.lap(Slice::Preload);
        }
        machine.core.start_background(&files, spec.plan, spec.stalls)?;
        if let Some(verifier) = &verifier {
            verifier.wait_checked(&files, &machine.core.ending)?;
        }
        machine.core.services.verifier = verifier;
        placed.keep();
        rescue.finish()?;
        timeline.lap(Slice::StateLoad);
        Ok((machine, built.report))
    }
}

impl Core {
    /// Starts the fault service.
    fn serve(
        &mut self,
        (uffd, extents): Served,
        files: &Files,
        plan: &RestorePlan,
        observer: Option<Observer>,
        stalls: &Stalls,
    ) -> Result<(), Error> {
        let fault_pages = if observer.is_some() { 1 } else { plan.fault_pages };
        let counters = self.services.counters.clone();
        let mut reader = Box::new(files.clone());
        reader.connect()?;
        let whole_blocks = files.cold().is_some() && observer.is_none();
        self.services.uffd = Some(uffd.clone());
        let activity = stalls.activity();
        let released = self.ram.released().clone();
        let work =
            FaultWork { uffd, extents, fault_pages, whole_blocks, reader, observer, counters, released, activity };
        self.services.service = Some(FaultService::start(work, self.ending.clone())?);
        Ok(())
    }

    /// Passes all memory to a handler outside.
    fn hand_over(&mut self, socket: &Path, uffd: Arc<Uffd>, stalls: &Stalls) -> Result<(), Error> {
        let told = (self.ending.clone(), stalls);
        self.services.handler = Some(ExternalHandler::connect(socket, &self.ram, uffd, told)?);
        Ok(())
    }

    /// Gives the guest a new VM generation id, which no other restore has, and notifies the guest.
    fn renew_vmgenid(&mut self, state: VmGenIdState) -> Result<(), Error> {
        self.attach_vmgenid(state)?;
        self.devices.vmgenid.iter().try_for_each(VmGenId::notify)?;
        Ok(())
    }

    fn start_background(&mut self, files: &Files, plan: &RestorePlan, stalls: &Stalls) -> Result<(), Error> {
        let services = &self.services;
        let told = (self.ending.clone(), stalls.activity());
        let lazy = services.uffd.clone().map(|uffd| (uffd, services.counters.clone()));
        self.services.background = BackgroundWork::start(plan, files, &self.ram, lazy, told)?;
        Ok(())
    }
}
