//! VMs that are restored before the clock starts, and wait for a request: they stand by, or were rewound.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::door::{self, Door};
use super::flow::{Ready, Restore, Waiting};
use super::measure::{Study, scratch_of};
use super::stage::remove;
use super::stats::Summary;
use super::store::{Key, Values};
use super::subject::Subject;
use super::together::{Together, together};
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
    pub(super) client: Client,
    /// The socket of its vsock device, for a guest that is asked there and not on its console.
    socket: Option<PathBuf>,
}

impl WaitingVm {
    /// Waits until the restore is over but for the guest's first instruction.
    pub(super) fn wait_for_standby(&mut self) -> Result<(), BoxError> {
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

    /// Runs a function of the guest.
    pub(super) fn call(&mut self, function: &str) -> Result<GuestAnswer, BoxError> {
        match &self.socket {
            Some(socket) => door::call(socket, function),
            None => self.guest.call(function),
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
}

/// The report of the VM behind `client`.
fn report_of(client: &Client) -> Result<Value, BoxError> {
    let (_, report) = client.request("GET", "/tvmm/report", None, TIMEOUT)?;
    Ok(report.ok_or("A report was asked for, and nothing answered")?)
}

/// The memory of the VM behind `client`.
pub(super) fn memory_of_vm(client: &Client) -> Result<Values, BoxError> {
    Ok(numbers(&report_of(client)?, &MEMORY))
}

/// A number of a report: its part and field there, its name among the results, and the size of the results' unit.
struct Number(&'static str, &'static str, &'static str, f64);

const MEMORY: [Number; 2] =
    [Number("memory", "guest_private_kib", "local_dram_kib", 1.0), Number("memory", "guest_vmas", "vmas", 1.0)];

/// The times from the request to the guest's first instruction, of a VM that waited for it.
const WAKE: [Number; 2] = [
    Number("woken", "entered_us", "to_entry_ms", 1000.0),
    Number("woken", "first_exit_us", "to_first_exit_ms", 1000.0),
];

fn numbers(report: &Value, of: &[Number]) -> Values {
    let named =
        |Number(part, field, name, unit): &Number| Some((name.to_string(), report[part][field].as_f64()? / unit));
    of.iter().filter_map(named).collect()
}

/// The times from the request to the guest's first instruction over `vms`: median and 95th percentile. VMs that did not
/// wait for their first request have none.
pub(super) fn wakes(vms: &[WaitingVm]) -> Result<Values, BoxError> {
    let each = vms.iter().map(|vm| Ok(numbers(&report_of(&vm.client)?, &WAKE)));
    let each = each.collect::<Result<Vec<_>, BoxError>>()?;
    let mut values = Values::new();
    for name in ["to_entry", "to_first_exit"] {
        let times = each.iter().filter_map(|vm| vm.get(&format!("{name}_ms")).copied()).collect();
        if let Some(summary) = Summary::of(times) {
            values.insert(format!("{name}_ms"), summary.median);
            values.insert(format!("{name}_p95_ms"), summary.p95);
        }
    }
    Ok(values)
}

impl Study {
    /// A VM that waits for the request of `subject`. `scratch` is a directory for its socket alone.
    pub(super) fn waiting_vm(
        &mut self,
        subject: &Subject,
        ready: Ready,
        scratch: PathBuf,
    ) -> Result<WaitingVm, BoxError> {
        match ready.waiting {
            Waiting::Standby => {
                let mut vm = self.restored_vm(subject, ready.restore, scratch, &["--standby"])?;
                vm.wait_for_standby()?;
                Ok(vm)
            }
            Waiting::Rewound => {
                let mut vm = self.restored_vm(subject, ready.restore, scratch, &[])?;
                self.serve_and_rewind(&mut vm, subject)?;
                Ok(vm)
            }
        }
    }

    /// Begins a restore of `subject`, with the arguments `more`. `scratch` is a directory for its sockets alone.
    pub(super) fn restored_vm(
        &mut self,
        subject: &Subject,
        restore: Restore,
        scratch: PathBuf,
        more: &[&str],
    ) -> Result<WaitingVm, BoxError> {
        let trial = self.trial(subject, restore, scratch)?;
        let api = trial.scratch.join("api.sock");
        remove(&api)?;
        let mut command = trial.command(restore.policy);
        command.arg("--api-sock").arg(&api).args(more);
        let socket = (subject.door == Door::Vsock).then(|| trial.scratch.join(door::SOCKET));
        if let Some(socket) = &socket {
            remove(socket)?;
            command.arg("--vsock").arg(socket);
        }
        Ok(WaitingVm { guest: Guest::start(command)?, client: Client::new(api), socket })
    }

    /// Lets the VM answer the request of the recorded run, and rewinds it. Returns the numbers of the rewind.
    fn serve_and_rewind(&mut self, vm: &mut WaitingVm, subject: &Subject) -> Result<Values, BoxError> {
        self.serve_recorded(vm, subject)?;
        vm.rewind()
    }

    /// Lets the VM answer the request of the recorded run.
    pub(super) fn serve_recorded(&mut self, vm: &mut WaitingVm, subject: &Subject) -> Result<(), BoxError> {
        let answered = vm.call(&subject.recorded)?;
        self.stage.check_digest(subject, &subject.recorded, answered.digest())
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
            vm.call(&subject.asked)?;
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

    /// Asks a waiting VM. Returns the time from the request to the answer, and numbers of the VM.
    pub(super) fn ask_waiting(&mut self, subject: &Subject, vm: &mut WaitingVm) -> Result<Values, BoxError> {
        let start = Instant::now();
        let answered = vm.call(&subject.asked)?;
        self.stage.check_digest(subject, &subject.asked, answered.digest())?;
        let mut values = values_since(start, &answered);
        let report = report_of(&vm.client)?;
        values.extend(numbers(&report, &MEMORY));
        values.extend(numbers(&report, &WAKE));
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
        let Together { begun, outcomes } = match subject.door {
            Door::Console => ask_on_consoles(vms, &subject.asked)?,
            Door::Vsock => {
                let sockets: Vec<&Path> = vms.iter().filter_map(|vm| vm.socket.as_deref()).collect();
                together(sockets.len(), |index| door::call(sockets[index], &subject.asked))?
            }
        };
        let mut times = Vec::new();
        for outcome in outcomes {
            let answered = outcome?;
            // Copies of a snapshot have the same contents, so their answers must be the same.
            self.stage.check_digest(subject, &subject.asked, answered.digest())?;
            times.push((answered.at - begun).as_secs_f64() * 1000.0);
        }
        Ok(times)
    }
}

/// Writes `function` to all consoles, then waits for the answers, which the threads that read the consoles time.
fn ask_on_consoles(vms: &mut [WaitingVm], function: &str) -> Result<Together<GuestAnswer>, BoxError> {
    let mut ids = Vec::new();
    let begun = Instant::now();
    for vm in &mut *vms {
        ids.push(vm.guest.ask(function)?);
    }
    let outcomes = vms.iter().zip(&ids).map(|(vm, id)| vm.guest.answer(id)).collect();
    Ok(Together { begun, outcomes })
}

/// The numbers of a request that was made at `start`.
pub(super) fn values_since(start: Instant, answered: &GuestAnswer) -> Values {
    let mut values = Values::from([("answer_ms".to_string(), (answered.at - start).as_secs_f64() * 1000.0)]);
    values.extend(answered.guest_ms().map(|ms| ("guest_ms".to_string(), ms)));
    values
}
