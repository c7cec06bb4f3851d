//! The steps of an idle VM, down and up again, as far as its process is concerned.
//!
//! A step down is taken while no request uses the VM. A request that comes meanwhile waits for the step, and takes the
//! VM back up. The last step, suspension, is given up if a request has come before its end.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::MutexGuard;

use super::control::ControlError;
use super::offloading::{GivenBack, Offloading};
use super::{Duty, RequestGuard, Vm};
use crate::config::bodies::WantedState;
use crate::config::control::Demoted;
use crate::config::request::{DemoteRequest, DemotedTo};
use crate::tiering::idle::{Descended, Step};

/// Time within which a VM stops or resumes its vCPUs, and says so. A VM that does not is ended.
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// Stops or resumes the vCPUs.
async fn set_vcpus(vm: &Vm, state: WantedState) -> Result<(), ControlError> {
    // A window's demotion may be under way, and takes as long as its snapshot's disk does.
    vm.shell()?.control.is_free().await;
    let slow = |_| ControlError::Gone(format!("it did not answer within {} s", ANSWER_TIME.as_secs()));
    tokio::time::timeout(ANSWER_TIME, vm.set_state(state)).await.map_err(slow)?
}

/// The file to which a VM is spilled.
#[derive(Clone, Copy, Debug)]
pub struct SpillFile<'a> {
    pub dir: &'a Path,
    /// Its most MiB.
    pub mib: NonZeroU64,
}

impl SpillFile<'_> {
    fn request(&self) -> DemoteRequest {
        DemoteRequest {
            to: DemotedTo::Spilled,
            spill_dir: Some(self.dir.to_path_buf()),
            spill_mib: Some(self.mib),
            ..DemoteRequest::default()
        }
    }
}

/// A VM that takes a step down. Requests wait until this is dropped.
pub struct Descent<'a> {
    vm: &'a Vm,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Descent<'_> {
    fn drop(&mut self) {
        self.vm.lock().is_stepping = false;
    }
}

impl Vm {
    /// Lets the VM take a step down, if it is idle and takes none.
    pub fn descend(&self) -> Option<Descent<'_>> {
        let turn = self.step_turn.try_lock().ok()?;
        let mut usage = self.lock();
        if usage.requests > 0 || usage.duty != Duty::Serves {
            return None;
        }
        usage.is_stepping = true;
        drop(usage);
        Some(Descent { vm: self, _turn: turn })
    }

    /// The space of its spill file, bytes: what it had after its last spill, or may have while it is spilled.
    pub fn spill_bytes(&self) -> u64 {
        self.lock().spill_bytes
    }

    /// Notes the space of its spill file.
    pub fn note_spill(&self, bytes: u64) {
        self.lock().spill_bytes = bytes;
    }

    /// Returns whether the VM takes a step down at present.
    pub fn is_stepping(&self) -> bool {
        self.lock().is_stepping
    }

    /// The step that the VM is at.
    pub fn step(&self) -> Option<Step> {
        self.lock().descended.step
    }

    /// The step that the VM is at, and those that it has refused since its last request.
    pub fn descended(&self) -> Descended {
        self.lock().descended
    }

    /// Notes the number of spilled pages that have come back to local memory, as the VM's report has it. Returns those
    /// since the last note.
    pub fn note_pages_back(&self, pages_back: u64) -> u64 {
        let before = std::mem::replace(&mut self.lock().pages_back, pages_back);
        // A rewind drops the file, and another one begins to count.
        if pages_back < before { pages_back } else { pages_back - before }
    }

    /// The time since its last request.
    pub fn since_used(&self) -> Duration {
        self.lock().since.elapsed()
    }

    /// Returns whether the VM's process ends because it was suspended.
    pub fn is_suspending(&self) -> bool {
        self.lock().duty == Duty::Suspends
    }

    /// Waits while the VM takes a step down.
    pub async fn stepped(&self) {
        drop(self.step_turn.lock().await);
    }

    /// Called when the VM's end was recorded, and its files are gone.
    pub fn settle(&self) {
        self.settled.send_replace(true);
    }
}

impl Descent<'_> {
    fn reach(&self, step: Step) {
        self.vm.lock().descended.step = Some(step);
    }

    /// Called when the VM has refused the step, and is as it was.
    pub fn was_refused(&self, step: Step) {
        self.vm.lock().descended.refuse(step);
    }

    /// Stops the vCPUs.
    pub async fn park(&self) -> Result<(), ControlError> {
        if self.vm.step().is_none() {
            set_vcpus(self.vm, WantedState::Paused).await?;
            self.reach(Step::Parked);
        }
        Ok(())
    }

    /// Gives back local copies of pages that equal the snapshot. Called after [`park`](Self::park).
    pub async fn trim(&self) -> Result<GivenBack, ControlError> {
        let demoted = self.send(&DemoteRequest::default()).await?;
        // A spilled VM stays one.
        self.reach(self.vm.step().map_or(Step::Trimmed, |step| step.max(Step::Trimmed)));
        Ok(GivenBack::of(&demoted))
    }

    /// Also gives back pages that differ, which go to a file. Called after [`park`](Self::park).
    pub async fn spill(&self, to: SpillFile<'_>) -> Result<GivenBack, ControlError> {
        let demoted = self.send(&to.request()).await?;
        self.reach(Step::Spilled);
        Ok(GivenBack::of(&demoted))
    }

    /// Returns whether a part of the VM was offloaded since its last request.
    pub fn is_offloading(&self) -> bool {
        self.vm.lock().offloading.is_some()
    }

    /// The pages that must leave until so much of the local memory that the VM had since its last request has left;
    /// `None`: it has. `local_pages`: those that the VM has now; only the first call since the request uses it.
    pub fn pages_due(&self, percent: u8, local_pages: u64) -> Option<NonZeroU64> {
        let mut usage = self.vm.lock();
        let due = usage.offloading.get_or_insert(Offloading::of(local_pages)).pages_due(percent);
        if due.is_none() {
            usage.descended.offloaded = percent;
        }
        due
    }

    /// Gives back so many pages, with which `percent` of the local memory have left: copies of pages that equal the
    /// snapshot, and others to a file. Called after [`park`](Self::park) and [`pages_due`](Self::pages_due).
    pub async fn offload(
        &self,
        percent: u8,
        most_pages: NonZeroU64,
        to: SpillFile<'_>,
    ) -> Result<GivenBack, ControlError> {
        let demoted = self.send(&DemoteRequest { most_pages: Some(most_pages), ..to.request() }).await?;
        let given = GivenBack::of(&demoted);
        let mut usage = self.vm.lock();
        usage.descended.step = Some(Step::Spilled);
        // After a look at all pages, or without room in the file, the rest cannot leave local memory.
        let is_all = demoted.pages_left == 0 || demoted.is_spill_full;
        usage.descended.offloaded = if is_all { 100 } else { percent };
        usage.offloading = usage.offloading.map(|offloading| offloading.after(given));
        Ok(given)
    }

    /// Sends a request for a demotion, and notes the space of the spill file.
    async fn send(&self, request: &DemoteRequest) -> Result<Demoted, ControlError> {
        let demoted: Result<Demoted, ControlError> = self.vm.send("PUT", "/tvmm/demote", request).await;
        match &demoted {
            Ok(_) if request.to == DemotedTo::Trimmed => {}
            Ok(demoted) => self.vm.note_spill(demoted.spill_file_len),
            // A part of the pages may be in the file.
            Err(_) => {
                if let Ok(report) = self.vm.report().await {
                    self.vm.note_spill(report["spill"]["file_len"].as_u64().unwrap_or(0));
                }
            }
        }
        demoted
    }

    /// Takes the VM, which was saved, from clients, so that its process can end; false if a request has come.
    pub fn commit_suspension(&self) -> bool {
        self.vm.change_duty(&[Duty::Serves], Duty::Suspends)
    }

    /// Gives the VM back to clients: it is not suspended after all.
    pub fn cancel_suspension(&self) {
        self.vm.change_duty(&[Duty::Suspends], Duty::Serves);
    }

    /// Ends the process, and waits until the end was recorded.
    pub async fn end_process(&self) {
        self.vm.life.stop().await;
        // An error means that the sender, which the VM owns, is gone.
        let _ = self.vm.settled.subscribe().wait_for(|is_settled| *is_settled).await;
    }
}

impl RequestGuard {
    /// Waits until the VM takes no step down, and lets it run. Returns the step that it was taken back from.
    pub async fn rouse(&self) -> Result<Option<Step>, ControlError> {
        let vm: &Arc<Vm> = self.vm();
        let _turn = vm.step_turn.lock().await;
        let Some(step) = vm.step() else { return Ok(None) };
        set_vcpus(vm, WantedState::Resumed).await?;
        let mut usage = vm.lock();
        usage.descended = Descended::default();
        usage.offloading = None;
        Ok(Some(step))
    }

    /// The time for which the VM had been idle before this request; `None` if others use it, or it had none before.
    pub fn reuse_interval(&self) -> Option<Duration> {
        let usage = self.vm().lock();
        (usage.requests == 1 && usage.invocations > 0).then(|| usage.since.elapsed())
    }
}
