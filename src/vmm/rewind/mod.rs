//! Rewind: a restored machine goes back to its snapshot in place. Process, KVM VM, mappings and threads stay.
//!
//! Devices go back first: afterwards nothing of theirs writes guest memory. Memory comes before the state of vCPUs and
//! interrupt controllers, because KVM reads guest memory while some of it is set (page directory pointers).

mod error;

pub use error::NotRewindable;

use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use crate::devices::VmGenId;
use crate::memory::engine::writable_when_written;
use crate::memory::rewind::{Rewind, TakenBack};
use crate::snapshot::{PageSet, RestorePlan, copy_drive};
use crate::vmm::error::Error;
use crate::vmm::lineage::Lineage;
use crate::vmm::machine::{Core, Machine, Paused};
use crate::vmm::origin::{Origin, PageServer};
use crate::vmm::state::{self, VcpuState, VmState};

/// A machine that went back.
#[derive(Clone, Copy, Debug)]
pub struct Rewound {
    pub pages: TakenBack,
    /// Time for devices, vCPUs and interrupt controllers.
    pub state: Duration,
    /// Time for guest memory.
    pub memory: Duration,
}

impl<S> Machine<S> {
    /// Returns whether the machine can be rewound now.
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn check_rewindable(&self) -> Result<(), NotRewindable> {
        let core = &self.core;
        let Some(origin) = &core.origin else { return Err(NotRewindable::Booted) };
        match origin.serves {
            PageServer::Own => {}
            PageServer::Recorder => return Err(NotRewindable::Observed),
            PageServer::Handler => return Err(NotRewindable::Handler),
        }
        if core.lineage.is_sealing() {
            return Err(NotRewindable::Sealing);
        }
        if core.services.have_failed() {
            return Err(NotRewindable::Unserved);
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
            None => Ok(()),
        }
    }
}

impl Machine<Paused> {
    /// Goes back to the snapshot that the machine was restored from by `plan`. `keep_pages`: pages of guest memory that
    /// may stay local. Call [`check_rewindable`](Self::check_rewindable) first.
    ///
    /// # Errors
    /// The machine is then between two states, and must not run again.
    pub fn rewind(&mut self, plan: &RestorePlan, keep_pages: u64) -> Result<Rewound, Error> {
        let start = Instant::now();
        let Some(origin) = self.core.origin.take() else { return Err(Error::Rewind(NotRewindable::Booted)) };
        let result = self.rewind_to(&origin, plan, keep_pages);
        self.core.origin = Some(origin);
        let (pages, memory) = result?;
        Ok(Rewound { pages, state: start.elapsed().saturating_sub(memory), memory })
    }

    fn rewind_to(
        &mut self,
        origin: &Origin,
        plan: &RestorePlan,
        keep_pages: u64,
    ) -> Result<(TakenBack, Duration), Error> {
        origin.renew_drives()?;
        let saved = &origin.saved;
        self.core.devices.virtio.rewind(&saved.virtio, &origin.configs)?;
        self.core.devices.serial.output().end_line();
        self.core.devices.serial.restore(&saved.serial)?;
        self.core.devices.fw_cfg.restore(saved.fw_cfg.clone())?;
        self.core.settle_interrupts()?;
        for (thread, saved) in self.state.threads.iter().zip(&saved.vcpus) {
            let vcpu = thread.vcpu();
            saved.rewind_wall_clock(&vcpu.fd, vcpu.index)?;
        }
        let start = Instant::now();
        let written = self.core.take_written_since_restore()?;
        let pages = self.core.rewinding(origin, plan, written, keep_pages).take_back()?;
        let memory = start.elapsed();
        let vcpus: Vec<_> = self.state.threads.iter().map(|thread| thread.vcpu()).collect();
        let fds: Vec<&VcpuFd> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        self.core.load(&fds, &saved.vm, &saved.vcpus, origin.clock_realtime)?;
        let exact = writable_when_written(plan);
        self.core.lineage = Lineage::restored(origin.files.chain().clone(), exact);
        Ok((pages, memory))
    }

    /// Compares memory and state with the snapshot. Called after [`rewind`](Self::rewind), before
    /// [`raise_events`](Self::raise_events).
    ///
    /// # Errors
    /// [`Error::NotAsSaved`] with the first differences.
    pub fn compare(&self, plan: &RestorePlan) -> Result<(), Error> {
        let Some(origin) = &self.core.origin else { return Err(Error::Rewind(NotRewindable::Booted)) };
        let saved = &origin.saved;
        let mut differences = Vec::new();
        let indices = state::msr_indices(&self.core.kvm)?;
        for (thread, saved) in self.state.threads.iter().zip(&saved.vcpus) {
            let vcpu = thread.vcpu();
            let now = VcpuState::save(&vcpu.fd, vcpu.index, &indices)?;
            let parts = now.differences(saved)?;
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

impl Origin {
    /// Puts fresh copies in the place of the machine's own copies of drives.
    fn renew_drives(&self) -> Result<(), Error> {
        let tip = self.files.chain().tip();
        for drive in &self.placed_drives {
            let Some((image, len)) = tip.open_drive_copy(&drive.id)? else { continue };
            let fresh = drive.path.with_extension("img.rewound");
            // A copy left by a process that was killed.
            let _ = std::fs::remove_file(&fresh);
            copy_drive(&image, len, &fresh)?;
            std::fs::rename(&fresh, &drive.path).map_err(|source| Error::File {
                doing: "replace the drive",
                path: drive.path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}
