//! VMs that are restored before the clock starts, and wait for a request: they stand by, or were rewound.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::flow::{Ready, Waiting};
use super::measure::{Study, scratch_of};
use super::stage::remove;
use super::store::{Key, Values};
use super::subject::Subject;
use crate::bench::cache::evict;
use crate::bench::guest::{Guest, GuestAnswer, TIMEOUT};
use crate::sys::api_client::{Client, ClientError};
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// Interval of the questions for a VM's state.
const POLL: Duration = Duration::from_millis(1);

/// A restored VM that waits for a request.
pub(super) struct WaitingVm {
    pub(super) guest: Guest,
    client: Client,
}

impl WaitingVm {
    /// Waits until the restore is over but for the guest's first instruction.
    fn wait_for_standby(&mut self) -> Result<(), BoxError> {
        let mut wait = Wait::new("a VM to stand by", TIMEOUT);
        loop {
            match self.client.request("GET", "/", None, TIMEOUT) {
                Ok((_, Some(info))) if info["state"] == "Paused" => return Ok(()),
                Ok(_) | Err(ClientError::NoSocket { .. } | ClientError::NotServed { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            if self.guest.has_ended()? {
                return refuse(format!("The VMM ended before it stood by: {}", self.guest.last_error()));
            }
            if wait.is_over() {
                return refuse(format!("The VM does not stand by after {TIMEOUT:?}"));
            }
            std::thread::sleep(POLL);
        }
    }

    /// Takes the VM back to its snapshot. Returns the rewind's own time and the number of pages taken back.
    fn rewind(&self) -> Result<Values, BoxError> {
        let (_, answer) = self.client.request("PUT", "/tvmm/rewind", Some(&json!({})), TIMEOUT)?;
        let answer = answer.ok_or("A rewind was answered without its counts")?;
        let number = |name: &str| answer[name].as_f64().ok_or_else(|| format!("The answer to a rewind has no {name}"));
        let mut pages = 0.0;
        for name in ["pages_copied", "pages_cleared", "pages_dropped", "pages_returned"] {
            pages += number(name)?;
        }
        Ok(Values::from([
            ("rewind_ms".to_string(), number("total_us")? / 1000.0),
            ("rewound_pages".to_string(), pages),
        ]))
    }

    fn report(&self) -> Result<Value, BoxError> {
        let (_, report) = self.client.request("GET", "/tvmm/report", None, TIMEOUT)?;
        Ok(report.ok_or("A report was asked for, and nothing answered")?)
    }
}

impl Study {
    /// A VM that waits for the request of `subject`. `scratch` is a directory for its socket alone.
    pub(super) fn waiting_vm(
        &mut self,
        subject: &Subject,
        ready: Ready,
        scratch: PathBuf,
    ) -> Result<WaitingVm, BoxError> {
        let trial = self.trial(subject, ready.restore, scratch)?;
        let socket = trial.scratch.join("api.sock");
        remove(&socket)?;
        let mut command = trial.command(ready.restore.policy);
        command.arg("--api-sock").arg(&socket);
        if ready.waiting == Waiting::Standby {
            command.arg("--standby");
        }
        let mut vm = WaitingVm { guest: Guest::start(command)?, client: Client::new(socket) };
        match ready.waiting {
            Waiting::Standby => vm.wait_for_standby()?,
            Waiting::Rewound => drop(self.serve_and_rewind(&mut vm, subject)?),
        }
        Ok(vm)
    }

    /// Lets the VM answer the request of the recorded run, and rewinds it. Returns the numbers of the rewind.
    fn serve_and_rewind(&mut self, vm: &mut WaitingVm, subject: &Subject) -> Result<Values, BoxError> {
        let answered = vm.guest.call(&subject.recorded)?;
        self.stage.check_digest(&subject.snapshot, &subject.recorded, answered.digest())?;
        vm.rewind()
    }

    /// The flow `standby` once: a VM stands by, gets its first request, and ends.
    pub(super) fn ask_standby(&mut self, subject: &Subject, ready: Ready) -> Result<Values, BoxError> {
        if !ready.restore.cached {
            evict(&subject.snapshot)?;
        }
        let scratch = self.scratch.path().to_owned();
        let mut vm = self.waiting_vm(subject, ready, scratch)?;
        self.ask_waiting(subject, &mut vm)
    }

    /// The flow `rewound`: one VM answers A, is rewound, and is asked for B, once a round. The first round is not
    /// counted: the next ones find the pages of both inputs in local memory, as those of `warm` do.
    pub(super) fn ask_rewound(
        &mut self,
        subject: &Subject,
        ready: Ready,
        key: impl Fn(u32) -> Key,
    ) -> Result<(), BoxError> {
        let runs = self.settings.runs;
        let scratch = self.scratch.path().to_owned();
        let mut vm = self.waiting_vm(subject, ready, scratch).and_then(|mut vm| {
            vm.guest.call(&subject.asked)?;
            Ok(vm)
        });
        for round in 0..runs {
            self.measure(key(round), |study| {
                let vm = vm.as_mut().map_err(|error| error.to_string())?;
                // The VM is no longer in the snapshot's state: it has answered the request of the last round.
                vm.rewind()?;
                let mut values = study.serve_and_rewind(vm, subject)?;
                values.extend(study.ask_waiting(subject, vm)?);
                Ok(values)
            })?;
        }
        Ok(())
    }

    /// Asks a waiting VM. Returns the time from the request to the answer, and the VM's memory.
    fn ask_waiting(&mut self, subject: &Subject, vm: &mut WaitingVm) -> Result<Values, BoxError> {
        let start = Instant::now();
        let answered = vm.guest.call(&subject.asked)?;
        self.stage.check_digest(&subject.snapshot, &subject.asked, answered.digest())?;
        let mut values = values_since(start, &answered);
        let report = vm.report()?;
        for (field, name) in [("guest_private_kib", "local_dram_kib"), ("guest_vmas", "vmas")] {
            values.extend(report["memory"][field].as_f64().map(|number| (name.to_string(), number)));
        }
        Ok(values)
    }

    /// VMs of `subjects` in turn, `count` in all, that wait for their requests.
    pub(super) fn waiting_vms(
        &mut self,
        subjects: &[Subject],
        ready: Ready,
        count: u32,
    ) -> Result<Vec<WaitingVm>, BoxError> {
        let mut vms = Vec::new();
        for index in 0..count as usize {
            let scratch = scratch_of(self.scratch.path(), &index.to_string())?;
            vms.push(self.waiting_vm(&subjects[index % subjects.len()], ready, scratch)?);
        }
        Ok(vms)
    }

    /// Asks all `vms` at once. Returns each one's time from the first request to its answer.
    pub(super) fn ask_together(&mut self, subject: &Subject, vms: &mut [WaitingVm]) -> Result<Vec<f64>, BoxError> {
        let mut ids = Vec::new();
        let begun = Instant::now();
        for vm in &mut *vms {
            ids.push(vm.guest.ask(&subject.asked)?);
        }
        let mut times = Vec::new();
        for (vm, id) in vms.iter().zip(&ids) {
            let answered = vm.guest.answer(id)?;
            // Copies of a snapshot have the same contents, so their answers must be the same.
            self.stage.check_digest(&subject.snapshot, &subject.asked, answered.digest())?;
            times.push((answered.at - begun).as_secs_f64() * 1000.0);
        }
        Ok(times)
    }
}

/// The numbers of a request that was made at `start`.
pub(super) fn values_since(start: Instant, answered: &GuestAnswer) -> Values {
    let mut values = Values::from([("answer_ms".to_string(), (answered.at - start).as_secs_f64() * 1000.0)]);
    values.extend(answered.guest_ms().map(|ms| ("guest_ms".to_string(), ms)));
    values
}
