//! The flow `repurposed`: a VM that was another function's becomes this one's, and gets its first request.

use serde_json::json;

use super::door::Door;
use super::flow::Restore;
use super::measure::Study;
use super::store::{Key, Values};
use super::subject::Subject;
use super::waiting::WaitingVm;
use super::workload::{Inputs, Workload};
use crate::bench::cache::{Cache, prepare};
use crate::bench::guest::TIMEOUT;
use crate::sys::errors::BoxError;

impl Study {
    /// One VM answers A of another function, is repurposed, is asked for B, and becomes the other function's again,
    /// once a round. The first round is not counted.
    pub(super) fn ask_repurposed(
        &mut self,
        subject: &Subject,
        restore: Restore,
        key: impl Fn(u32) -> Key,
    ) -> Result<(), BoxError> {
        let other = self.other(subject)?;
        for snapshot in [&subject.snapshot, &other.snapshot] {
            prepare(snapshot, Cache::Warm)?;
        }
        let scratch = self.scratch.path().to_owned();
        let mut vm = self.restored_vm(&other, restore, scratch, &["--standby"]).and_then(|mut vm| {
            vm.wait_for_standby()?;
            Ok(vm)
        });
        if let Ok(vm) = &mut vm {
            // Failures also show in the rounds that count.
            let _ = self.live_twice(vm, &other, subject, restore);
        }
        for round in 0..self.settings.runs {
            self.measure(key(round), |study| {
                let vm = vm.as_mut().map_err(|error| error.to_string())?;
                study.live_twice(vm, &other, subject, restore)
            })?;
        }
        Ok(())
    }

    /// The function whose VM is repurposed: another one than that of `subject`.
    fn other(&self, subject: &Subject) -> Result<Subject, BoxError> {
        let workload = Workload::other_than(subject.workload);
        let snapshot = self.stage.snapshot(workload, Inputs::Two, Door::Console)?;
        let recorded = workload.a();
        let asked = workload.b();
        Ok(Subject { workload, snapshot, inputs: Inputs::Two, recorded, asked, ..subject.clone() })
    }

    /// Lets the VM, which is that of `other`, answer; makes it that of `subject`, asks it, and gives it back.
    fn live_twice(
        &mut self,
        vm: &mut WaitingVm,
        other: &Subject,
        subject: &Subject,
        restore: Restore,
    ) -> Result<Values, BoxError> {
        self.serve_recorded(vm, other)?;
        let mut values = self.repurpose(vm, subject, restore)?;
        let asked = self.ask_waiting(subject, vm);
        // The next round asks the other function, whatever became of this one.
        self.repurpose(vm, other, restore)?;
        values.extend(asked?);
        Ok(values)
    }

    /// Makes the VM that of `subject`. Returns the times.
    fn repurpose(&mut self, vm: &WaitingVm, subject: &Subject, restore: Restore) -> Result<Values, BoxError> {
        let trial = self.trial(subject, restore, self.scratch.path().to_owned())?;
        let absolute = std::path::absolute(&trial.snapshot)?;
        let profile = trial.profile.map(std::path::absolute).transpose()?;
        let body = json!({
            "snapshot_path": absolute,
            "resume_vm": true,
            "tvmm": { "policy": restore.policy.name(), "profile": profile },
        });
        let (_, answer) = vm.client.request("PUT", "/tvmm/repurpose", Some(&body), TIMEOUT)?;
        let answer = answer.ok_or("A repurposing was answered without its times")?;
        let ms = |name: &str| {
            let us = answer[name].as_f64().ok_or_else(|| format!("The answer to a repurposing has no {name}"))?;
            Ok::<f64, BoxError>(us / 1000.0)
        };
        Ok(Values::from([("repurpose_ms".to_string(), ms("total_us")?), ("release_ms".to_string(), ms("release_us")?)]))
    }
}
