//! Forks of the controller's machine: the capture. A thread of the fork's own starts the children.

use std::time::Instant;

use super::{Controller, Phase, SealNews};
use crate::config::control::Respond;
use crate::config::fork::ForkRequest;
use crate::config::refusal::Refused;
use crate::session::fork::{Fork, ForkParent};
use crate::session::live::{LiveOrder, Purpose};
use crate::snapshot::{PageSet, SnapshotKind};
use crate::vmm::capture::Captured;

impl Controller {
    /// Begins to start the children and captures the machine into a fork point. The request is answered when all
    /// children are restored.
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
        match self.capture_fork(&fork) {
            Ok(captured) => {
                fork.hand_over(captured, begin.elapsed(), None);
                *self.forks.reply_mut() = Some(respond);
            }
            Err(refused) => {
                drop(fork);
                respond(Err(refused));
            }
        }
    }

    fn prepare_fork(&self, request: &ForkRequest) -> Result<Fork, Refused> {
        self.forks.check_free()?;
        self.check_no_live()?;
        if matches!(self.phase, Phase::NotStarted) {
            return Err(Refused::before_start());
        }
        let fault_timeout = self.environment.fault_timeout;
        let own_pages = if request.dram_mib > 0 { self.own_pages()? } else { PageSet::new() };
        let parent = ForkParent { id: &self.id, config: &self.config, fault_timeout, own_pages };
        let teller = self.seal_teller();
        Fork::begin(request, parent, move |news| teller.tell(SealNews::Fork(news)))
    }

    /// The pages that this process has copies of.
    fn own_pages(&self) -> Result<PageSet, Refused> {
        let parts = self.machine_parts().ok_or_else(Refused::before_start)?;
        parts.ram.own_pages().map_err(|error| Refused::bad_request_because(&error))
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
}
