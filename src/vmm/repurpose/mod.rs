//! Repurposing: a restored machine becomes that of another snapshot, in place. Process, KVM VM, memslots, vCPU threads
//! and interrupt lines stay. Guest memory, the back ends of devices and all state are the other snapshot's.
//!
//! [`Machine::prepare`] makes every check that can refuse the request, and changes nothing. [`Machine::repurpose`]
//! first ends the former guest's devices and the services of its memory. From there on it does what a restore does: the
//! mappings of a plan cover all of guest memory, and take the place of the former ones.

mod error;
mod fit;

pub use error::NotRepurposable;

use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::devices;
use super::error::Error;
use super::host;
use super::lineage::Lineage;
use super::machine::{Core, EmulationFailure, Machine, Paused, set_emulation_exits};
use super::origin::{Origin, PageServer};
use super::own_memory::MemoryChange;
use super::restore::drives::PlacedDrives;
use super::restore::rescue::Rescue;
use super::restore::{RestoreSpec, shape_of};
use super::saved_state::SavedState;
use super::vcpu::STOP_TIMEOUT;
use crate::config::overrides::Overrides;
use crate::memory;
use crate::memory::engine::{self, BuildOptions, EngineReport, Filled, writable_when_written};
use crate::memory::files::Files;
use crate::memory::services::{CloseCold, MemoryServices};
use crate::memory::stall::Stalls;
use crate::memory::verify::Verifier;
use crate::snapshot::{InPlaceMapping, RestorePlan};
use crate::sys::lost;
use crate::sys::timeline::Timeline;

/// A snapshot that the machine may become: opened, checked, its plan valid.
pub struct Prepared<'a> {
    plan: &'a RestorePlan,
    in_place: InPlaceMapping,
    stalls: &'a Stalls,
    clock_realtime: bool,
    saved: SavedState,
    files: Files,
    verifier: Option<Verifier>,
    placed: PlacedDrives,
    overrides: Overrides,
}

/// The times and counts of a machine that became another.
#[derive(Debug)]
pub struct Repurposed {
    pub engine: EngineReport,
    /// Time to end devices and memory services.
    pub release: Duration,
    /// Time to map memory over the former guest's, which goes away, and to fill it.
    pub memory: Duration,
    /// Time for devices, vCPUs and interrupt controllers.
    pub state: Duration,
}

impl Machine<Paused> {
    /// Opens the snapshot of `spec` and checks that the machine can become its machine. Nothing changes.
    ///
    /// # Errors
    /// [`NotRepurposable`], and the errors of a restore before it builds anything.
    pub fn prepare<'a>(&self, spec: RestoreSpec<'a>) -> Result<Prepared<'a>, Error> {
        self.check_repurposable(&spec)?;
        let chain = spec.sources.chain.clone();
        let tip = chain.tip();
        let mut saved = SavedState::read(tip)?;
        let layout = tip.layout();
        let shape = shape_of(&saved, layout, spec.track_dirty_pages)?;
        self.check_fit(&saved, &shape)?;
        let boot = &saved.vcpus[0];
        host::check(&tip.manifest().host, &boot.cpuid()?, boot.xcr0()?, &self.core.kvm)?;
        let files = Files::open(spec.sources, spec.plan)?;
        spec.plan.validate(layout, &chain.layer_file_lens())?;
        spec.stalls.name_sources(files.paths());
        let verifier = Verifier::start(&files, spec.plan, spec.verify, true)?;
        let (placed, overrides) = PlacedDrives::make(tip, spec.overrides)?;
        saved.fw_cfg.metadata.extend(spec.overrides.metadata.clone());
        devices::check_saved(&saved.virtio, &overrides, &self.core.devices.virtio)?;
        if let Some(verifier) = &verifier {
            verifier.wait(&files)?;
        }
        Ok(Prepared {
            plan: spec.plan,
            in_place: spec.in_place_mapping,
            stalls: spec.stalls,
            clock_realtime: spec.clock_realtime,
            saved,
            files,
            verifier,
            placed,
            overrides,
        })
    }

    fn check_repurposable(&self, spec: &RestoreSpec<'_>) -> Result<(), NotRepurposable> {
        self.check_may_leave()?;
        if spec.handler.is_some() { Err(NotRepurposable::ToHandler) } else { Ok(()) }
    }

    /// Checks that the guest can be given up, and the machine be that of another snapshot then.
    fn check_may_leave(&self) -> Result<(), NotRepurposable> {
        let core = &self.core;
        core.own_memory(MemoryChange::Repurpose)?;
        if core.lineage.is_sealing() {
            return Err(NotRepurposable::Sealing);
        }
        if core.ending.has_come() { Err(NotRepurposable::Ended) } else { Ok(()) }
    }

    /// Gives the guest up: its devices end, and its memory goes back to the host, so that a repurposing need not wait
    /// for that. From now on the machine must not run, until it is repurposed.
    ///
    /// # Errors
    /// [`NotRepurposable`], and nothing has changed; after any other error the machine must not run again.
    pub fn vacate(&mut self) -> Result<(), Error> {
        if self.core.is_vacant {
            return Ok(());
        }
        self.check_may_leave()?;
        self.core.devices.serial.output().end_line();
        self.core.is_vacant = true;
        self.core.take_guest_away()?;
        self.core.ram.vacate()?;
        Ok(())
    }

    /// Becomes the machine of `prepared`. Afterwards call [`raise_events`](Self::raise_events).
    ///
    /// # Errors
    /// The machine is then between two guests, and must not run again.
    pub fn repurpose(&mut self, prepared: Prepared<'_>, timeline: &mut Timeline) -> Result<Repurposed, Error> {
        let start = Instant::now();
        if !self.core.is_vacant {
            self.core.devices.serial.output().end_line();
            self.core.take_guest_away()?;
        }
        self.core.origin = None;
        let away = start.elapsed();
        for (thread, saved) in self.state.threads.iter().zip(&prepared.saved.vcpus) {
            let vcpu = thread.vcpu();
            // KVM writes the time to guest memory then: not to a file that the former guest's memory was mapped from.
            let ram = &self.core.ram;
            let written = saved.kernel_written()?.into_iter().filter(|page| ram.layout().contains(*page));
            written.into_iter().try_for_each(|page| ram.map_anon(page))?;
            saved.rewind_wall_clock(&vcpu.fd, vcpu.index)?;
            saved.reset_memory_types(&vcpu.fd, vcpu.index)?;
        }
        let options = BuildOptions { observed: false, in_place: prepared.in_place };
        let filled = engine::fill(&mut self.core.ram, &prepared.files, prepared.plan, options, timeline)?;
        let has_memory = start.elapsed();
        self.take_views()?;
        // The former guest's pages. Those that loading the state writes count as changed, as after a restore.
        let log = self.core.read_dirty_log()?;
        self.core.clear_dirty_log(&log)?;
        let engine = self.take_on_other(prepared, filled)?;
        self.core.is_vacant = false;
        let state = start.elapsed().saturating_sub(has_memory);
        Ok(Repurposed { engine, release: away, memory: has_memory.saturating_sub(away), state })
    }

    /// Gives the vCPUs the views of the new memory.
    fn take_views(&self) -> Result<(), Error> {
        let ram = &self.core.ram;
        let effect = if ram.in_place().is_some() { EmulationFailure::Exit } else { EmulationFailure::Exception };
        set_emulation_exits(&self.core.vm, effect)?;
        for thread in &self.state.threads {
            let mut vcpu = thread.vcpu();
            vcpu.memory = ram.view().clone();
            vcpu.in_place = ram.in_place().cloned();
        }
        Ok(())
    }

    /// Starts the services of the new memory and takes on the state.
    fn take_on_other(&mut self, prepared: Prepared<'_>, filled: Filled) -> Result<EngineReport, Error> {
        let Prepared { plan, stalls, clock_realtime, saved, files, verifier, placed, overrides, .. } = prepared;
        let mut report = filled.report;
        let core = &mut self.core;
        core.services.cold = files.cold().cloned().map(CloseCold);
        core.services.tiers_held = files.tiers().to_vec();
        let rescue = Rescue::prepare(filled.lazy.as_ref().map(|(uffd, _)| uffd), core);
        if let Some(served) = filled.lazy {
            core.serve(served, &files, plan, None, stalls)?;
        }
        let (virtio, configs) = devices::from_saved(&saved.virtio, &overrides, &core.ram, stalls)?;
        core.devices.virtio.renew(virtio, core.ram.view(), &saved.virtio, configs.clone())?;
        core.devices.serial.restore(&saved.serial)?;
        core.devices.fw_cfg.restore(saved.fw_cfg.clone())?;
        core.promote_ahead(&saved.vcpus)?;
        let vcpus: Vec<_> = self.state.threads.iter().map(|thread| thread.vcpu()).collect();
        let fds: Vec<&VcpuFd> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        core.msrs_refused = core.load(&fds, &saved.vm, &saved.vcpus, clock_realtime)?;
        core.lineage = Lineage::restored(files.chain().clone(), writable_when_written(plan));
        report.prefault = core.prefault(fds.first().copied(), plan)?;
        core.start_background(&files, plan, stalls)?;
        if let Some(verifier) = &verifier {
            verifier.attach(&core.ending)?;
        }
        core.services.verifier = verifier;
        let placed_drives = placed.keep();
        let serves = PageServer::Own;
        core.origin = Some(Box::new(Origin { files, saved, configs, placed_drives, clock_realtime, serves }));
        rescue.finish()?;
        Ok(report)
    }
}

impl<S> Machine<S> {
    /// Returns whether the machine has given its guest up.
    pub fn is_vacant(&self) -> bool {
        self.core.is_vacant
    }
}

impl Core {
    /// Ends everything that works for the guest and its memory.
    fn take_guest_away(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        // Devices before the services that they may be waiting for.
        self.devices.virtio.retire(deadline)?;
        self.services.finish(deadline)?;
        self.forget_access()?;
        self.services = MemoryServices::default();
        self.lineage = Lineage::default();
        self.ram.forget();
        if let Some(why) = lost::touched() {
            return Err(memory::Error::Lost(why).into());
        }
        // The last reports of those services were about the former guest's memory.
        drop(self.ending.take());
        Ok(())
    }
}
