//! `PUT /tvmm/repurpose`: the machine becomes that of another snapshot, in place.

use std::time::Instant;

use super::controller::{Controller, Phase};
use super::facts::{Opened, Restored};
use super::planning;
use super::sources::{self, Sources};
use crate::config::control::Repurposed;
use crate::config::refusal::Refused;
use crate::config::request::RepurposeRequest;
use crate::config::restore::Start;
use crate::memory::ending::Ending;
use crate::memory::files;
use crate::memory::stall::StallWatch;
use crate::session::Error;
use crate::snapshot::RestorePlan;
use crate::sys::errors;
use crate::sys::timeline::Timeline;
use crate::tiering;
use crate::vmm;
use crate::vmm::machine::{Machine, Paused};
use crate::vmm::repurpose::Prepared;
use crate::vmm::restore::RestoreSpec;

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
    pub(super) fn repurpose(&mut self, request: &RepurposeRequest) -> Result<Repurposed, Refused> {
        let start = Instant::now();
        let was_running = matches!(self.phase, Phase::Running(_));
        self.check_no_live()?;
        self.pause()?;
        let stop_us = start.elapsed().as_micros() as u64;
        let mut done = match self.become_other(request) {
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
            self.resume()?;
        }
        Ok(done)
    }

    /// Makes the paused machine that of another snapshot.
    fn become_other(&mut self, request: &RepurposeRequest) -> Result<Repurposed, Failure> {
        let start = Instant::now();
        let load = &request.load;
        let Phase::Paused(machine) = &mut self.phase else { return Err(Failure::refused(Error::NoMachine)) };
        let watch = StallWatch::start(self.environment.fault_timeout).map_err(Failure::refused)?;
        let stalls = watch.stalls().clone();
        let opened = sources::open(load, self.environment.fault_timeout, &stalls).map_err(Failure::refused)?;
        let planned = planning::choose(&opened, load).map_err(Failure::refused)?;
        let Sources { chain, tiers, pools, cold, fork_point } = opened;
        let facts = Opened::of(&chain, &pools, fork_point);
        let snapshot = chain.tip().manifest().id.to_string();
        let spec = RestoreSpec {
            sources: files::Sources { chain, tiers, cold },
            plan: &planned.plan,
            track_dirty_pages: load.track_dirty_pages,
            observer: None,
            single_pages: false,
            in_place_mapping: load.in_place_mapping,
            verify: load.verify,
            handler: load.handler(),
            overrides: &load.overrides,
            stalls: &stalls,
            clock_realtime: load.clock_realtime,
        };
        let prepared = machine.prepare(spec).map_err(Failure::refused)?;
        let prepare_us = start.elapsed().as_micros() as u64;
        // From here on the machine changes.
        let former = self.stalls.replace(watch);
        let repurposed = change(machine, prepared, &planned.plan, request);
        stalls.restored(machine.ending().clone());
        drop(former);
        let noted = repurposed.and_then(|repurposed| {
            let planned = &repurposed.engine.planned;
            pools.iter().try_for_each(|pool| pool.note_plan(planned)).map_err(tiering::Error::from)?;
            Ok(repurposed)
        });
        let repurposed = noted.map_err(|error| {
            machine.ending().end(Ending::Failed(format!("cannot repurpose: {}", errors::chain(&error))));
            Failure::Ended(Refused::internal_because(&error))
        })?;
        self.config.devices = machine.virtio().configs().clone();
        let count = self.restored.as_ref().map_or(0, |restored| restored.repurposed) + 1;
        let restored = Restored::new(load, planned, facts, repurposed.engine.clone());
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
