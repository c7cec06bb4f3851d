//! Maps preloaded memory into the second-stage page tables before the guest runs, if KVM can do that
//! (`KVM_PRE_FAULT_MEMORY`): the guest then takes no fault on its working set.
//!
//! Only memory that the plan preloads is mapped: its host pages are writable, so KVM maps them writable too. Pages in
//! place are mapped read-only and would fault again at the first write.

use kvm_ioctls::VcpuFd;

use crate::memory;
use crate::memory::engine::{PrefaultOutcome, PrefaultReport};

use crate::snapshot::{Extent, Placement, RestorePlan};
use crate::sys::prefault::{Progress, is_available, prefault};
use crate::vmm::error::Error;
use crate::vmm::machine::Core;

impl Core {
    /// Maps the preloaded memory of `plan` on the boot vCPU. Its state must be set: it decides which page tables KVM
    /// fills.
    pub(crate) fn prefault(&self, boot_vcpu: Option<&VcpuFd>, plan: &RestorePlan) -> Result<PrefaultReport, Error> {
        let runs = preloaded_runs(plan);
        let Some(vcpu) = boot_vcpu.filter(|_| !runs.is_empty()) else {
            return Ok(PrefaultReport::default());
        };
        let without_calls = |outcome| Ok(PrefaultReport { outcome, ..Default::default() });
        if !is_available(&self.kvm) {
            return without_calls(PrefaultOutcome::Unavailable);
        }
        if self.shape.track_dirty_pages {
            return without_calls(PrefaultOutcome::DirtyPagesTracked);
        }
        let mut progress = Progress::default();
        let mut outcome = PrefaultOutcome::Done;
        for run in runs {
            let Err(error) = prefault(vcpu, run.gpa(), run.bytes(), &mut progress) else { continue };
            outcome = match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) => PrefaultOutcome::Unsupported,
                Some(libc::EINTR) => PrefaultOutcome::Stalled,
                _ => return Err(memory::Error::Map { gpa: run.gpa(), pages: run.pages, source: error }.into()),
            };
            break;
        }
        Ok(PrefaultReport { outcome, calls: progress.calls, pages: progress.bytes / crate::snapshot::PAGE_SIZE })
    }
}

/// Preloaded extents, neighbours joined. A plan's extents lie within the RAM ranges, and ranges do not touch.
fn preloaded_runs(plan: &RestorePlan) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for planned in plan.extents.iter().filter(|planned| planned.placement == Placement::Preload) {
        match runs.last_mut() {
            Some(last) if last.end() == planned.extent.first => last.pages += planned.extent.pages,
            _ => runs.push(planned.extent),
        }
    }
    runs
}
