//! Forks of the controller's machine: the capture. The children are started on a thread of their own.

use std::time::{Duration, Instant};

use super::{Controller, Phase, SealNews};
use crate::config::control::Respond;
use crate::config::fork::ForkRequest;
use crate::config::refusal::Refused;
use crate::session::fork::{Fork, ForkParent};
use crate::session::live::{LiveOrder, Purpose, taken};
use crate::snapshot::SnapshotKind;
use crate::vmm::capture::Captured;

impl Controller {
    /// Captures the machine into a fork point and starts the children. The request is answered when they answer.
    pub(super) fn begin_fork(&mut self, request: &ForkRequest, respond: Respond) {
        let fork = match self.prepare_fork(request) {
            Ok(fork) => fork,
            Err(refused) => return respond(Err(refused)),
        };
        if request.live && matches!(self.phase, Phase::Running(_)) {
            let order = LiveOrder {
                target: fork.target(),
                kind: SnapshotKind::Full,
                copy_drives: fork.copies_drives(),
                purpose: Purpose::Fork(Box::new(fork)),
            };
            return self.begin_live(order, respond);
        }
        let begin = Instant::now();
        let captured = self.capture_fork(&fork);
        let started = captured.and_then(|captured| self.start_children(fork, captured, begin.elapsed()));
        match started {
            Ok(()) => *self.forks.reply_mut() = Some(respond),
            Err(refused) => respond(Err(refused)),
        }
    }

    fn prepare_fork(&self, request: &ForkRequest) -> Result<Fork, Refused> {
        self.forks.check_free()?;
        self.check_no_live()?;
        if matches!(self.phase, Phase::NotStarted) {
            return Err(Refused::before_start());
        }
        let fault_timeout = self.environment.fault_timeout;
        Fork::prepare(request, &ForkParent { id: &self.id, config: &self.config, fault_timeout })
    }

    /// Captures the machine, which runs on if it ran.
    fn capture_fork(&mut self, fork: &Fork) -> Result<Captured, Refused> {
        let was_running = matches!(self.phase, Phase::Running(_));
        self.pause()?;
        let Phase::Paused(machine) = &mut self.phase else {
            return Err(Refused::internal("The machine to fork is gone."));
        };
        let captured = machine.capture(fork.target(), SnapshotKind::Full, fork.copies_drives());
        if was_running && let Err(refused) = self.resume() {
            // The children are good nonetheless, and the parent is still paused; both are reported.
            tracing::error!(fault = %refused.message, "The machine could not be resumed after its fork");
        }
        captured.map_err(|error| Refused::bad_request_because(&error))
    }

    /// Seals the fork point and starts the children, on a thread that then waits for their ends.
    pub(super) fn start_children(
        &mut self,
        mut fork: Fork,
        captured: Captured,
        stood_still: Duration,
    ) -> Result<(), Refused> {
        fork.stood_still = stood_still;
        fork.live = captured.live.map(taken);
        let teller = self.seal_teller();
        let spawned = fork.spawn(captured, move |news| teller.tell(SealNews::Fork(news)));
        spawned.inspect_err(|_| self.with_machine(None))
    }
}
