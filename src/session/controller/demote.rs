//! Demotion of the controller's machine, and barriers for it. Each step is an event of the main loop, so that requests
//! and the console are served in between.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::{Controller, Phase};
use crate::config::control::{BarrierSet, Demoted, Reply, Respond};
use crate::config::refusal::Refused;
use crate::config::request::{BarrierRequest, DemoteRequest};
use crate::memory::ChangeError;
use crate::memory::ending::{Ending, EndingSignal};
use crate::session::demotion::{Job, Work};
use crate::sys::errors::chain;
use crate::vmm;
use crate::vmm::demote::barrier::Barrier;
use crate::vmm::demote::{DemotedPages, Demotion, DemotionOrder, NotDemotable};

impl Controller {
    /// Readable when the next step of a demotion or of a barrier is due: call
    /// [`step_demotion`](Self::step_demotion).
    pub fn demotion_timer(&self) -> &TimerFd {
        &self.demotion.timer
    }

    /// Begins to give local memory back. Answers after the last step.
    pub(super) fn begin_demotion(&mut self, request: &DemoteRequest, respond: Respond) {
        let rate = request.rate_mib_s;
        let start = Instant::now();
        let begun = self.try_begin_demotion(request);
        self.begin_work(begun.map(|demotion| Work::Demote { demotion, rate }), start, respond);
    }

    /// Sets a barrier. Answers after the last step.
    pub(super) fn begin_barrier(&mut self, request: BarrierRequest, respond: Respond) {
        let start = Instant::now();
        let begun = self.try_begin_barrier(request);
        self.begin_work(begun.map(Work::SetBarrier), start, respond);
    }

    fn begin_work(&mut self, begun: Result<Work, Refused>, start: Instant, respond: Respond) {
        match begun {
            Ok(work) => {
                let job = Job { work, respond, start, steps: 0, longest_pause: Duration::ZERO };
                if job.is_done() { self.end_work(job) } else { self.go_on_demoting(job) }
            }
            Err(refused) => respond(Err(refused)),
        }
    }

    fn try_begin_demotion(&mut self, request: &DemoteRequest) -> Result<Demotion, Refused> {
        let spill_to = request.spill_to()?;
        let cold = request.cold_buckets()?;
        self.check_no_demotion()?;
        if cold.is_some() {
            // Both read KVM's log of written pages.
            self.check_no_live()?;
        }
        let activity = self.stalls.as_ref().map(|watch| watch.stalls().activity()).unwrap_or_default();
        let plan = self.restored.as_ref().map(|restored| &restored.carried_out);
        let most_pages = request.most_pages.map(NonZeroU64::get);
        let order = DemotionOrder { spill_to, cold, most_pages, plan, activity };
        let begun = match &mut self.phase {
            Phase::NotStarted => return Err(Refused::before_start()),
            Phase::Running(machine) => machine.begin_demotion(order),
            Phase::Paused(machine) => machine.begin_demotion(order),
        };
        begun.map_err(|error| Refused::bad_request_because(&error))
    }

    fn try_begin_barrier(&mut self, request: BarrierRequest) -> Result<Barrier, Refused> {
        request.check()?;
        self.check_no_demotion()?;
        self.check_no_live()?;
        let plan = self.restored.as_ref().map(|restored| &restored.carried_out);
        let begun = match &mut self.phase {
            Phase::NotStarted => return Err(Refused::before_start()),
            Phase::Running(machine) => machine.begin_barrier(request, plan),
            Phase::Paused(machine) => machine.begin_barrier(request, plan),
        };
        begun.map_err(|error| Refused::bad_request_because(&error))
    }

    fn check_no_demotion(&self) -> Result<(), Refused> {
        let there = vmm::Error::from(NotDemotable::UnderWay);
        if self.demotion.job.is_some() { Err(Refused::bad_request_because(&there)) } else { Ok(()) }
    }

    fn go_on_demoting(&mut self, job: Job) {
        if let Err(error) = self.demotion.go_on(job) {
            self.abandon_demotion(&chain(&error));
        }
    }

    /// Does a part of a demotion or of a barrier. A running guest stands still for it.
    pub fn step_demotion(&mut self) {
        let _ = self.demotion.timer.wait();
        let Some(mut job) = self.demotion.job.take() else { return };
        let step = Instant::now();
        let was_running = matches!(self.phase, Phase::Running(_));
        let result = self.pause().and_then(|()| self.work_some(&mut job.work));
        let may_run = self.machine_parts().is_some_and(|parts| !parts.ending.has_come());
        let resumed = if was_running && may_run { self.resume() } else { Ok(()) };
        if was_running {
            job.longest_pause = job.longest_pause.max(step.elapsed());
        }
        job.steps += 1;
        let written = self.write_spilled();
        let stepped = result.and_then(|is_left| resumed.and(written).map(|stayed| (is_left, stayed)));
        if let (Ok((_, stayed @ 1..)), Work::Demote { demotion, .. }) = (&stepped, &mut job.work) {
            demotion.note_spill_full(*stayed);
        }
        match stepped {
            Ok((true, _)) => self.go_on_demoting(job),
            Ok((false, _)) => self.end_work(job),
            Err(refused) => {
                // Pages that have left stay in the file.
                self.settle_spilled();
                (job.respond)(Err(refused));
            }
        }
    }

    fn work_some(&mut self, work: &mut Work) -> Result<bool, Refused> {
        let (Phase::Paused(machine), Some(restored)) = (&mut self.phase, &self.restored) else {
            return Err(Refused::internal("The machine to demote is gone."));
        };
        let _work = self.stalls.as_ref().map(|watch| watch.stalls().main_thread_does("demotion"));
        let stepped = match work {
            Work::Demote { demotion, .. } => machine.step_demotion(demotion, &restored.carried_out),
            Work::SetBarrier(barrier) => machine.step_barrier(barrier),
        };
        stepped.map_err(|error| failed_step(error, machine.ending()))
    }

    /// Returns the number of pages for which the spill file has no room.
    fn write_spilled(&self) -> Result<u64, Refused> {
        let _work = self.stalls.as_ref().map(|watch| watch.stalls().main_thread_does("demotion"));
        match &self.phase {
            Phase::NotStarted => Ok(0),
            Phase::Running(machine) => machine.write_spilled().map_err(|error| failed_step(error, machine.ending())),
            Phase::Paused(machine) => machine.write_spilled().map_err(|error| failed_step(error, machine.ending())),
        }
    }

    fn end_work(&mut self, job: Job) {
        let reply = match &job.work {
            Work::Demote { demotion, .. } => {
                let demoted = demoted(&job, demotion, self.settle_spilled());
                if let Some(restored) = &mut self.restored {
                    restored.demotions += 1;
                    restored.last_demotion = Some(demoted);
                }
                Reply::Demoted(demoted)
            }
            Work::SetBarrier(barrier) => {
                let set = BarrierSet {
                    buckets: barrier.pages,
                    pages_unmapped: barrier.unmapped,
                    steps: job.steps,
                    longest_pause_us: job.longest_pause.as_micros() as u64,
                    total_us: job.start.elapsed().as_micros() as u64,
                };
                if let Some(restored) = self.restored.as_mut().filter(|_| barrier.is_new) {
                    restored.barriers += 1;
                    restored.last_barrier = Some(set);
                }
                Reply::Barrier(set)
            }
        };
        (job.respond)(Ok(reply));
    }

    /// Returns the length of the spill file, bytes.
    fn settle_spilled(&self) -> u64 {
        match &self.phase {
            Phase::NotStarted => 0,
            Phase::Running(machine) => machine.settle_spilled(),
            Phase::Paused(machine) => machine.settle_spilled(),
        }
    }

    /// Answers a demotion or a barrier that comes to no end, because of `why`. Pages already given back stay so.
    pub(in crate::session) fn abandon_demotion(&mut self, why: &str) {
        if let Some(job) = self.demotion.job.take() {
            let what = match job.work {
                Work::Demote { .. } => "demotion",
                Work::SetBarrier(_) => "barrier",
            };
            (job.respond)(Err(Refused::bad_request(format!("The {what} was given up: {why}."))));
        }
    }
}

/// The answer to a demotion that is over.
fn demoted(job: &Job, demotion: &Demotion, spill_file_len: u64) -> Demoted {
    let DemotedPages { dropped, mapped, spilled, written, kept, skipped } = demotion.counts;
    Demoted {
        pages_dropped: dropped,
        pages_mapped: mapped,
        pages_spilled: spilled,
        spill_file_len,
        is_spill_full: demotion.is_spill_full(),
        pages_written: written,
        pages_kept: kept,
        pages_left: demotion.pages_left(),
        pages_skipped: skipped,
        steps: job.steps,
        longest_pause_us: job.longest_pause.as_micros() as u64,
        total_us: job.start.elapsed().as_micros() as u64,
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
