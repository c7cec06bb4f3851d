//! Restore of a machine: its state comes from the snapshot, its memory from a plan.

pub(in crate::vmm) mod drives;
mod error;
mod prefault;
pub(in crate::vmm) mod rescue;

pub use error::StateError;

use crate::memory::services::CloseCold;
use std::path::Path;
use std::sync::Arc;

use super::devices;
use super::error::Error;
use super::host;
use super::lineage::Lineage;
use super::machine::{Built, Core, DeviceSet, Environment, Machine, Shape, open_kvm};
use super::origin::{Origin, PageServer};
use super::saved_state::SavedState;
use super::state::MachineState;
use crate::config;
use crate::config::overrides::Overrides;
use crate::devices::virtio::id;
use crate::devices::{VmGenId, VmGenIdState};
use crate::memory::stall::Stalls;
use crate::snapshot::{InPlaceMapping, Verify};
use crate::snapshot::{MemoryLayout, PageSet, RestorePlan};
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

/// The shape of the saved machine, if it has the memory of the manifest's `layout`.
pub(in crate::vmm) fn shape_of(
    saved: &SavedState,
    layout: &MemoryLayout,
    track_dirty_pages: bool,
) -> Result<Shape, Error> {
    let MachineState { vcpu_count, mem_size_mib, .. } = saved.machine;
    let shape = Shape { vcpu_count, mem_size_mib, track_dirty_pages };
    let is_possible = mem_size_mib <= config::MAX_MEM_SIZE_MIB;
    if !is_possible || !shape.layout().is_ok_and(|own| own == *layout) {
        let what = format!("{mem_size_mib} MiB of memory do not fit the manifest's layout");
        return Err(StateError::Section { section: "Machine".into(), what }.into());
    }
    Ok(shape)
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
        let mut saved = SavedState::read(tip)?;
        let layout = tip.layout();
        let shape = shape_of(&saved, layout, spec.track_dirty_pages)?;
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
        let serves = PageServer::of(spec.handler, spec.observer.as_ref());
        let is_ours = serves == PageServer::Own;
        let exact = if is_ours { crate::memory::engine::writable_when_written(spec.plan) } else { PageSet::new() };
        let mut filled = built.filled;
        let single_pages = if spec.single_pages { built.ram.map_single_pages()? } else { None };
        let (placed, overrides) = PlacedDrives::make(tip, spec.overrides)?;
        let (virtio, configs) = devices::from_saved(&saved.virtio, &overrides, &built.ram, spec.stalls)?;
        saved.fw_cfg.metadata.extend(spec.overrides.metadata.clone());
        let set = DeviceSet { virtio, configs: configs.clone(), fw_cfg: saved.fw_cfg.clone() };
        let mut machine = Machine::build(kvm, built.ram, shape, set, environment, timeline)?;
        machine.core.services.single_pages = single_pages;
        machine.core.services.cold = files.cold().cloned().map(CloseCold);
        machine.core.services.tiers_held = files.tiers().to_vec();
        let rescue = Rescue::prepare(filled.lazy.as_ref().map(|(uffd, _)| uffd), &machine.core);
        // Before state is applied, because KVM may touch guest memory while applying it.
        match (spec.handler, filled.lazy) {
            (Some(socket), Some((uffd, _))) => machine.core.hand_over(socket, uffd, spec.stalls)?,
            (None, Some(served)) => machine.core.serve(served, &files, spec.plan, spec.observer, spec.stalls)?,
            _ => {}
        }
        machine.take_on(&saved, spec.clock_realtime)?;
        machine.core.lineage = Lineage::restored(files.chain().clone(), exact);
        timeline.lap(Slice::StateLoad);
        if is_ours {
            filled.report.prefault = machine.core.prefault(machine.boot_vcpu(), spec.plan)?;
            timeline.lap(Slice::Preload);
        }
        machine.core.start_background(&files, spec.plan, spec.stalls)?;
        if let Some(verifier) = &verifier {
            verifier.wait_checked(&files, &machine.core.ending)?;
        }
        machine.core.services.verifier = verifier;
        let placed_drives = placed.keep();
        let clock_realtime = spec.clock_realtime;
        let origin = Origin { files, saved, configs, placed_drives, clock_realtime, serves };
        machine.core.origin = Some(Box::new(origin));
        rescue.finish()?;
        timeline.lap(Slice::StateLoad);
        Ok((machine, filled.report))
    }

    /// Takes on the saved state of vCPUs, VM and devices.
    fn take_on(&mut self, saved: &SavedState, clock_realtime: bool) -> Result<(), Error> {
        self.apply(&saved.vm, &saved.vcpus, clock_realtime)?;
        self.serial().restore(&saved.serial)?;
        self.virtio().restore(&saved.virtio)?;
        saved.vmgenid.map_or(Ok(()), |vmgenid| self.core.renew_vmgenid(vmgenid))
    }
}

impl Core {
    /// Starts the fault service.
    pub(in crate::vmm) fn serve(
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

    pub(in crate::vmm) fn start_background(
        &mut self,
        files: &Files,
        plan: &RestorePlan,
        stalls: &Stalls,
    ) -> Result<(), Error> {
        let services = &self.services;
        let told = (self.ending.clone(), stalls.activity());
        let lazy = services.uffd.clone().map(|uffd| (uffd, services.counters.clone()));
        self.services.background = BackgroundWork::start(plan, files, &self.ram, lazy, told)?;
        Ok(())
    }
}
