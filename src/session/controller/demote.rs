//! Demotion of the controller's machine. Each step is an event of the main loop, so that requests and the console are
//! served in between.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::{Controller, Phase};
use crate::config::control::{Demoted, Reply, Respond};
use crate::config::refusal::Refused;
use crate::config::request::DemoteRequest;
use crate::memory::ChangeError;
use crate::memory::ending::{Ending, EndingSignal};
use crate::session::demotion::Job;
use crate::sys::errors::chain;
use crate::vmm;
use crate::vmm::demote::{DemotedPages, Demotion, NotDemotable};

impl Controller {
    /// Readable when the next step of a demotion is due: call [`step_demotion`](Self::step_demotion).
    pub fn demotion_timer(&self) -> &TimerFd {
        &self.demotion.timer
    }

    /// Begins to give local memory back. Answers after the last step.
    pub(super) fn begin_demotion(&mut self, request: &DemoteRequest, respond: Respond) {
        let start = Instant::now();
        match self.try_begin_demotion(request) {
            Ok(demotion) => {
                let rate = request.rate_mib_s;
                let job = Job { demotion, respond, start, steps: 0, longest_pause: Duration::ZERO, rate };
                self.go_on_demoting(job);
            }
            Err(refused) => respond(Err(refused)),
        }
    }

    fn try_begin_demotion(&mut self, request: &DemoteRequest) -> Result<Demotion, Refused> {
        let spill_to = request.spill_to()?;
        let most_pages = request.most_pages.map(NonZeroU64::get);
        if self.demotion.job.is_some() {
            return Err(Refused::bad_request_because(&vmm::Error::from(NotDemotable::UnderWay)));
        }
        let activity = self.stalls.as_ref().map(|watch| watch.stalls().activity()).unwrap_or_default();
        let begun = match &mut self.phase {
            Phase::NotStarted => return Err(Refused::before_start()),
            Phase::Running(machine) => machine.begin_demotion(spill_to, most_pages, activity),
            Phase::Paused(machine) => machine.begin_demotion(spill_to, most_pages, activity),
        };
        begun.map_err(|error| Refused::bad_request_because(&error))
    }

    fn go_on_demoting(&mut self, job: Job) {
        if let Err(error) = self.demotion.go_on(job) {
            self.abandon_demotion(&chain(&error));
        }
    }

    /// Does a part of a demotion. A running guest stands still for it.
    pub fn step_demotion(&mut self) {
        let _ = self.demotion.timer.wait();
        let Some(mut job) = self.demotion.job.take() else { return };
        let step = Instant::now();
        let was_running = matches!(self.phase, Phase::Running(_));
        let result = self.pause().and_then(|()| self.demote_some(&mut job.demotion));
        let may_run = self.machine_parts().is_some_and(|parts| !parts.ending.has_come());
        let resumed = if was_running && may_run { self.resume() } else { Ok(()) };
        if was_running {
            job.longest_pause = job.longest_pause.max(step.elapsed());
        }
        job.steps += 1;
        let written = self.write_spilled();
        match result.and_then(|is_left| resumed.and(written).map(|()| is_left)) {
            Ok(true) => self.go_on_demoting(job),
            Ok(false) => self.end_demotion(job),
            Err(refused) => (job.respond)(Err(refused)),
        }
    }

    fn demote_some(&mut self, demotion: &mut Demotion) -> Result<bool, Refused> {
        let (Phase::Paused(machine), Some(restored)) = (&mut self.phase, &self.restored) else {
            return Err(Refused::internal("The machine to demote is gone."));
        };
        let _work = self.stalls.as_ref().map(|watch| watch.stalls().main_thread_does("demotion"));
        let stepped = machine.step_demotion(demotion, &restored.carried_out);
        stepped.map_err(|error| failed_step(error, machine.ending()))
    }

    fn write_spilled(&self) -> Result<(), Refused> {
        let _work = self.stalls.as_ref().map(|watch| watch.stalls().main_thread_does("demotion"));
        match &self.phase {
            Phase::NotStarted => Ok(()),
            Phase::Running(machine) => machine.write_spilled().map_err(|error| failed_step(error, machine.ending())),
            Phase::Paused(machine) => machine.write_spilled().map_err(|error| failed_step(error, machine.ending())),
        }
    }

    fn end_demotion(&mut self, job: Job) {
        let spill_file_len = match &self.phase {
            Phase::NotStarted => 0,
            Phase::Running(machine) => machine.settle_spilled(),
            Phase::Paused(machine) => machine.settle_spilled(),
        };
        let DemotedPages { dropped, mapped, spilled, written, kept } = job.demotion.counts;
        let demoted = Demoted {
            pages_dropped: dropped,
            pages_mapped: mapped,
            pages_spilled: spilled,
            spill_file_len,
            pages_written: written,
            pages_kept: kept,
            pages_left: job.demotion.pages_left(),
            steps: job.steps,
            longest_pause_us: job.longest_pause.as_micros() as u64,
            total_us: job.start.elapsed().as_micros() as u64,
        };
        if let Some(restored) = &mut self.restored {
            restored.demotions += 1;
            restored.last_demotion = Some(demoted);
        }
        (job.respond)(Ok(Reply::Demoted(demoted)));
    }

    /// Answers a demotion that comes to no end, because of `why`. Pages already given back stay so.
    pub(in crate::session) fn abandon_demotion(&mut self, why: &str) {
        if let Some(job) = self.demotion.job.take() {
            (job.respond)(Err(Refused::bad_request(format!("The demotion was given up: {why}."))));
        }
    }
}

/// The answer to a demotion one of whose steps failed. If bytes of the guest may be lost, `ending` ends it.
fn failed_step(error: ChangeError, ending: &EndingSignal) -> Refused {
    match error {
        ChangeError::Kept(error) => Refused::bad_request_because(&error),
        ChangeError::Lost(error) => {
            ending.end(Ending::Failed(format!("cannot demote: {}", chain(&error))));
            Refused::internal_because(&error)
        }
    }
}
