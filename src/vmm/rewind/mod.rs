//! Rewind: a restored machine goes back to its snapshot in place. Process, KVM VM, mappings and threads stay.
//!
//! Devices go back first: afterwards nothing of theirs writes guest memory. Memory comes before the state of vCPUs and
//! interrupt controllers, because KVM reads guest memory while some of it is set (page directory pointers).

mod drives;
mod error;

pub use drives::FreshDrives;
pub use error::NotRewindable;

use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use crate::devices::VmGenId;
use crate::memory::rewind::{Rewind, TakenBack};
use crate::snapshot::{PageSet, RestorePlan};
use crate::vmm::error::Error;
use crate::vmm::lineage::Lineage;
use crate::vmm::machine::{Core, Machine, Paused};
use crate::vmm::origin::Origin;
use crate::vmm::own_memory::{MemoryChange, NotItsOwn};
use crate::vmm::state::{self, VcpuState, VmState};

/// A machine that went back.
#[derive(Clone, Copy, Debug)]
pub struct Rewound {
    pub pages: TakenBack,
    /// Time for devices (their drives were copied before the guest stood still), vCPUs and interrupt controllers.
    pub state: Duration,
    /// Time for guest memory.
    pub memory: Duration,
}

/// The error of a machine that has no snapshot to go back to.
fn not_restored() -> Error {
    NotRewindable::from(NotItsOwn::Booted(MemoryChange::Rewind)).into()
}

impl<S> Machine<S> {
    /// Checks that the machine can be rewound now, and copies its own drives again.
    ///
    /// # Errors
    /// The reason why it cannot. Nothing has changed.
    pub fn prepare_rewind(&self) -> Result<FreshDrives, Error> {
        self.check_rewindable()?.copy_drives()
    }

    fn check_rewindable(&self) -> Result<&Origin, NotRewindable> {
        let core = &self.core;
        let origin = core.own_memory(MemoryChange::Rewind)?;
        if core.lineage.is_sealing() {
            return Err(NotRewindable::Sealing);
        }
        let is_tracked = core.shape.track_dirty_pages && core.lineage.is_relative_to_origin();
        if !is_tracked && core.ram.can_find_own_pages().is_err() {
            return Err(NotRewindable::Untracked);
        }
        let is_shared = |id: &String| !origin.placed_drives.iter().any(|placed| placed.id == *id);
        let configs = core.devices.virtio.configs();
        let drives = configs.drives.iter().filter(|drive| !drive.is_read_only).map(|drive| &drive.drive_id);
        if let Some(id) = drives.into_iter().find(|id| is_shared(id)) {
            return Err(NotRewindable::Drive { id: id.clone() });
        }
        match configs.pmem.iter().find(|pmem| !pmem.read_only) {
            Some(pmem) => Err(NotRewindable::Pmem { id: pmem.id.clone() }),
            None => Ok(origin),
        }
    }
}

impl Machine<Paused> {
    /// Goes back to the snapshot that the machine was restored from by `plan`. `keep_pages`: pages of guest memory that
    /// may stay local. `drives`: what [`prepare_rewind`](Self::prepare_rewind) has made.
    ///
    /// # Errors
    /// The machine is then between two states, and must not run again.
    pub fn rewind(&mut self, plan: &RestorePlan, keep_pages: u64, drives: FreshDrives) -> Result<Rewound, Error> {
        let start = Instant::now();
        let copying = drives.took;
        drives.place()?;
        let Some(origin) = self.core.origin.take() else { return Err(not_restored()) };
        let result = self.rewind_to(&origin, plan, keep_pages);
        self.core.origin = Some(origin);
        let (pages, memory) = result?;
        Ok(Rewound { pages, state: copying + start.elapsed().saturating_sub(memory), memory })
    }

    fn rewind_to(
        &mut self,
        origin: &Origin,
        plan: &RestorePlan,
        keep_pages: u64,
    ) -> Result<(TakenBack, Duration), Error> {
        let saved = &origin.saved;
        self.core.devices.virtio.rewind(&saved.virtio, &origin.configs)?;
        self.core.devices.serial.output().end_line();
        self.core.devices.serial.restore(&saved.serial)?;
        self.core.devices.fw_cfg.restore(saved.fw_cfg.clone())?;
        for (thread, saved) in self.state.threads.iter().zip(&saved.vcpus) {
            let vcpu = thread.vcpu();
            saved.rewind_wall_clock(&vcpu.fd, vcpu.index)?;
        }
        let start = Instant::now();
        let written = self.core.take_written_since_restore()?;
        // All that was spilled goes back to the snapshot: from now on the kernel alone fills that memory.
        self.core.services.spill = None;
        let pages = self.core.rewinding(origin, plan, written, keep_pages).take_back()?;
        self.core.ram.forget_spilled();
        self.core.forget_access()?;
        let memory = start.elapsed();
        let vcpus: Vec<_> = self.state.threads.iter().map(|thread| thread.vcpu()).collect();
        let fds: Vec<&VcpuFd> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        self.core.load(&fds, &saved.vm, &saved.vcpus, origin.clock_realtime)?;
        // The pages copied over are writable, and are this process's own, but equal the snapshot's.
        self.core.lineage = Lineage::restored(origin.files.chain().clone(), PageSet::new());
        Ok((pages, memory))
    }

    /// Compares memory and state with the snapshot. Called after [`rewind`](Self::rewind), before
    /// [`raise_events`](Self::raise_events).
    ///
    /// # Errors
    /// [`Error::NotAsSaved`] with the first differences.
    pub fn compare(&self, plan: &RestorePlan) -> Result<(), Error> {
        let Some(origin) = &self.core.origin else { return Err(not_restored()) };
        let saved = &origin.saved;
        let mut differences = Vec::new();
        let indices = state::msr_indices(&self.core.kvm)?;
        let pit_vectors = saved.vm.pit_vectors();
        for (thread, saved) in self.state.threads.iter().zip(&saved.vcpus) {
            let vcpu = thread.vcpu();
            let now = VcpuState::save(&vcpu.fd, vcpu.index, &indices)?;
            let parts = now.differences(saved, &pit_vectors)?;
            differences.extend(parts.into_iter().map(|part| format!("vCPU {}: {part}", vcpu.index)));
        }
        differences.extend(VmState::save(&self.core.vm)?.differences(&saved.vm)?);
        if self.core.devices.serial.save() != saved.serial {
            differences.push("serial port".into());
        }
        for (now, saved) in self.core.devices.virtio.save()?.iter().zip(&saved.virtio) {
            if !now.is_as(saved) {
                differences.push(format!("virtio device of type {}", now.device_type));
            }
        }
        let mut pages = self.core.rewinding(origin, plan, None, 0).differing()?;
        for saved in &saved.vcpus {
            saved.kernel_written()?.into_iter().for_each(|written| pages.remove_run(written));
        }
        differences.extend(pages.runs().map(|run| format!("memory at {:#x}, {} pages", run.gpa(), run.pages)));
        if differences.is_empty() { Ok(()) } else { Err(Error::NotAsSaved(differences)) }
    }

    /// Called last: raises the serial port's interrupts that were on their way when the snapshot was taken, and gives
    /// the guest a new VM generation id, because another guest may have gone on from the same snapshot.
    pub fn raise_events(&self) -> Result<(), Error> {
        if let Some(origin) = &self.core.origin {
            self.core.devices.serial.restore(&origin.saved.serial)?;
        }
        let vmgenid = self.core.devices.vmgenid.iter();
        vmgenid.clone().try_for_each(|vmgenid| vmgenid.renew(self.core.ram.view()))?;
        Ok(vmgenid.into_iter().try_for_each(VmGenId::notify)?)
    }
}

impl Core {
    fn rewinding<'a>(
        &'a self,
        origin: &'a Origin,
        plan: &'a RestorePlan,
        written: Option<PageSet>,
        keep_pages: u64,
    ) -> Rewind<'a> {
        Rewind { ram: &self.ram, files: &origin.files, plan, written, keep_pages }
    }

    /// Takes the pages written since the restore; `None` if they are not known: dirty pages are not tracked, or a
    /// snapshot taken since has taken some of the record.
    fn take_written_since_restore(&mut self) -> Result<Option<PageSet>, Error> {
        let by_devices = self.ram.take_written();
        if !self.shape.track_dirty_pages {
            return Ok(None);
        }
        let log = self.read_dirty_log()?;
        self.clear_dirty_log(&log)?;
        if !self.lineage.is_relative_to_origin() {
            return Ok(None);
        }
        Ok(Some(log.pages.union(&by_devices).union(self.lineage.changed())))
    }
}
