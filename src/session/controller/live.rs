//! Live snapshots of the controller's machine. Each step of the capture is an event of the main loop, so that other
//! commands and the console are served in between.

use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use super::{Controller, Phase};
use crate::config::control::Respond;
use crate::config::refusal::Refused;
use crate::session::live::{Job, LiveOrder, Purpose, taken};
use crate::vmm;
use crate::vmm::capture::live::Next;

impl Controller {
    /// Readable when the next step of a live snapshot is due: call [`step_live`](Self::step_live).
    pub fn live_event(&self) -> &EventFd {
        &self.live.event
    }

    /// Begins to capture the running machine.
    pub(super) fn begin_live(&mut self, order: LiveOrder, respond: Respond) {
        let LiveOrder { target, kind, copy_drives, purpose } = order;
        let begun = self.check_no_live().and_then(|()| {
            let Phase::Running(machine) = &mut self.phase else { return Err(Refused::before_start()) };
            let begun = machine.begin_live(target, kind, self.live.event.clone());
            begun.map_err(|error| Refused::bad_request_because(&error))
        });
        match begun {
            Ok(capture) => {
                self.live.job = Some(Job { capture, copy_drives, purpose, respond });
                self.wake_live();
            }
            Err(refused) => {
                drop(purpose);
                respond(Err(refused));
            }
        }
    }

    /// Does a part of a live snapshot.
    pub fn step_live(&mut self) {
        let _ = self.live.event.read();
        let Some(job) = &mut self.live.job else { return };
        let next = match &mut self.phase {
            Phase::NotStarted => return self.abandon_live(),
            Phase::Running(machine) => machine.step_live(&mut job.capture),
            Phase::Paused(machine) => machine.step_live(&mut job.capture),
        };
        match next {
            Ok(Next::Step) => self.wake_live(),
            Ok(Next::Wait) => {}
            Ok(Next::Pause) => self.finish_live(),
            Err(error) => self.fail_live(Refused::bad_request_because(&error)),
        }
    }

    /// Stops the machine for the rest of the snapshot. It runs afterwards if it ran before.
    fn finish_live(&mut self) {
        let stopped = Instant::now();
        let was_running = matches!(self.phase, Phase::Running(_));
        if let Err(refused) = self.pause() {
            return self.fail_live(refused);
        }
        let (Phase::Paused(machine), Some(job)) = (&mut self.phase, self.live.job.take()) else { return };
        let Job { capture, copy_drives, purpose, respond } = job;
        let captured = machine.finish_live(capture, copy_drives, stopped);
        if was_running && let Err(refused) = self.resume() {
            // The snapshot may be good nonetheless, and the machine is still paused; both are reported.
            tracing::error!(fault = %refused.message, "The machine could not be resumed after its capture");
        }
        let stood_still = stopped.elapsed();
        self.stop_logging();
        let captured = captured.map_err(|error| Refused::bad_request_because(&error));
        let begun = captured.and_then(|captured| match purpose {
            Purpose::Snapshot { verify } => self.spawn_seal(captured, verify, None).map(|()| &mut self.seal_reply),
            Purpose::Fork(fork) => {
                let live = captured.live.map(taken);
                fork.hand_over(captured, stood_still, live);
                Ok(self.forks.reply_mut())
            }
        });
        match begun {
            Ok(reply) => *reply = Some(respond),
            Err(refused) => respond(Err(refused)),
        }
    }

    fn fail_live(&mut self, refused: Refused) {
        self.stop_logging();
        if let Some(job) = self.live.job.take() {
            job.give_up(refused);
        }
    }

    /// Answers a live snapshot whose machine ends.
    pub(super) fn abandon_live(&mut self) {
        if let Some(job) = self.live.job.take() {
            job.give_up(Refused::bad_request("Cannot take the snapshot: the machine ended before it was taken."));
        }
    }

    /// Refuses what cannot be done while a live snapshot is taken.
    pub(in crate::session) fn check_no_live(&self) -> Result<(), Refused> {
        let there = vmm::Error::SnapshotInProgress;
        if self.live.job.is_some() { Err(Refused::bad_request_because(&there)) } else { Ok(()) }
    }

    /// Ends the log of written pages that the live snapshot needed. A log that goes on costs time and nothing else.
    fn stop_logging(&mut self) {
        let stopped = match &mut self.phase {
            Phase::NotStarted => Ok(()),
            Phase::Running(machine) => machine.end_live(),
            Phase::Paused(machine) => machine.end_live(),
        };
        if let Err(error) = stopped {
            tracing::warn!(%error, "The log of written pages goes on after a live snapshot");
        }
    }

    fn wake_live(&self) {
        // A counter that is full is readable as well.
        let _ = self.live.event.write(1);
    }
}
