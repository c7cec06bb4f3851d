//! `PUT /tvmm/repurpose`: the machine becomes that of another snapshot, in place.

use std::time::Instant;

use super::console::Input;
use super::controller::{Controller, Phase};
use super::facts::Restored;
use super::opened_request::OpenedRequest;
use super::watch::Watch;
use crate::config::control::Repurposed;
use crate::config::refusal::Refused;
use crate::config::request::{Command, RepurposeRequest};
use crate::config::restore::Start;
use crate::memory::ending::Ending;
use crate::memory::stall::StallWatch;
use crate::session::Error;
use crate::snapshot::RestorePlan;
use crate::sys::errors;
use crate::sys::timeline::Timeline;
use crate::vmm;
use crate::vmm::machine::{Machine, Paused};
use crate::vmm::repurpose::Prepared;

/// A machine that did not become another's.
enum Failure {
    /// It is as it was.
    Refused(Refused),
    /// It is between two guests and has been ended.
    Ended(Refused),
}

impl Failure {
    fn refused(error: impl Into<Error>) -> Failure {
        Failure::Refused(Refused::bad_request_because(&error.into()))
    }
}

impl Controller {
    /// Makes the machine that of the snapshot in `request`. A machine that is refused is as it was; one that fails
    /// half-way has parts of two guests, so it ends.
    pub(super) fn repurpose(&mut self, request: &RepurposeRequest, input: &mut Input) -> Result<Repurposed, Refused> {
        let start = Instant::now();
        let was_running = matches!(self.phase, Phase::Running(_));
        self.check_no_live()?;
        self.abandon_demotion("the machine became that of another snapshot");
        self.pause()?;
        let stop_us = start.elapsed().as_micros() as u64;
        let mut done = match self.become_other(request, input) {
            Ok(done) => done,
            Err(Failure::Ended(why)) => return Err(why),
            Err(Failure::Refused(why)) => {
                if was_running {
                    self.resume()?;
                }
                return Err(why);
            }
        };
        done.stop_us = stop_us;
        done.total_us += stop_us;
        if let Some(restored) = &mut self.restored {
            restored.last_repurpose = Some(done.clone());
        }
        self.stands_by = request.load.start == Start::Standby;
        if request.load.start == Start::Running {
            self.environment.moments.forget_request();
            self.resume()?;
        } else {
            self.environment.moments.await_request();
        }
        Ok(done)
    }

    /// Gives the guest up. A machine that is refused is as it was; one that fails half-way ends.
    pub(super) fn vacate(&mut self) -> Result<(), Refused> {
        let was_running = matches!(self.phase, Phase::Running(_));
        self.check_no_live()?;
        self.abandon_demotion("the machine gave its guest up");
        self.pause()?;
        let Phase::Paused(machine) = &mut self.phase else { return Err(Refused::before_start()) };
        let Err(error) = machine.vacate() else {
            self.stands_by = false;
            return Ok(());
        };
        if machine.is_vacant() {
            machine.ending().end(Ending::Failed(format!("cannot give the guest up: {}", errors::chain(&error))));
            return Err(Refused::internal_because(&error));
        }
        if was_running {
            self.resume()?;
        }
        Err(Refused::bad_request_because(&error))
    }

    /// Refuses commands that need a guest, if the machine has given its guest up.
    pub(super) fn check_has_guest(&self, command: &Command) -> Result<(), Refused> {
        let is_vacant = matches!(&self.phase, Phase::Paused(machine) if machine.is_vacant());
        let needs_none = matches!(
            command,
            Command::InstanceInfo
                | Command::Version
                | Command::GetMachineConfig
                | Command::GetVmConfig
                | Command::Pause
                | Command::Vacate
                | Command::Repurpose(_)
        );
        if needs_none || !is_vacant {
            return Ok(());
        }
        Err(Refused::bad_request(
            "The VM has given its guest up, and can only become another one: PUT /tvmm/repurpose.",
        ))
    }

    /// Makes the paused machine that of another snapshot.
    fn become_other(&mut self, request: &RepurposeRequest, input: &mut Input) -> Result<Repurposed, Failure> {
        let start = Instant::now();
        let load = &request.load;
        let Phase::Paused(machine) = &mut self.phase else { return Err(Failure::refused(Error::NoMachine)) };
        let watch = StallWatch::start(self.environment.fault_timeout).map_err(Failure::refused)?;
        let stalls = watch.stalls().clone();
        let opened = OpenedRequest::open(load, self.environment.fault_timeout, &stalls).map_err(Failure::refused)?;
        let prepared = machine.prepare(opened.spec(Watch::default())).map_err(Failure::refused)?;
        let prepare_us = start.elapsed().as_micros() as u64;
        // From here on the machine changes.
        let former = self.stalls.replace(watch);
        let repurposed = change(machine, prepared, opened.plan(), request);
        stalls.restored(machine.ending().clone());
        drop(former);
        let noted = repurposed.and_then(|repurposed| {
            opened.note_plan(&repurposed.engine)?;
            if request.discard_console {
                input.discard().map_err(Error::os("read standard input"))?;
                self.environment.output.discard();
            }
            Ok(repurposed)
        });
        let repurposed = noted.map_err(|error| {
            machine.ending().end(Ending::Failed(format!("cannot repurpose: {}", errors::chain(&error))));
            Failure::Ended(Refused::internal_because(&error))
        })?;
        self.config.devices = machine.virtio().configs().clone();
        let count = self.restored.as_ref().map_or(0, |restored| restored.repurposed) + 1;
        let restored = opened.restored(repurposed.engine.clone());
        let snapshot = restored.snapshot.clone();
        self.restored = Some(Restored { repurposed: count, ..restored });
        let release_us = repurposed.release.as_micros() as u64;
        let memory_us = repurposed.memory.as_micros() as u64;
        let state_us = repurposed.state.as_micros() as u64;
        let total_us = prepare_us + release_us + memory_us + state_us;
        Ok(Repurposed { snapshot, stop_us: 0, prepare_us, release_us, memory_us, state_us, total_us })
    }
}

/// Makes `machine` that of `prepared`, and compares it with the snapshot if `request` says so.
fn change(
    machine: &mut Machine<Paused>,
    prepared: Prepared<'_>,
    plan: &RestorePlan,
    request: &RepurposeRequest,
) -> Result<vmm::repurpose::Repurposed, Error> {
    let mut timeline = Timeline::begin(None);
    let repurposed = machine.repurpose(prepared, &mut timeline)?;
    if request.compare {
        machine.compare(plan)?;
    }
    machine.raise_events()?;
    Ok(repurposed)
}
