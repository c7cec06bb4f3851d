//! The experiments: their restores, in order.

use std::time::Instant;

use super::door::Door;
use super::flow::{Flow, Kept};
use super::foreign::Foreign;
use super::measure::Study;
use super::settings::{Experiment, Settings};
use super::stage::Stage;
use super::store::{Key, Values};
use super::subject::Subject;
use super::waiting::values_since;
use super::workload::{Inputs, Workload};
use crate::sys::errors::BoxError;
use crate::tiering::profile::RecorderKind;

/// Shares of the read set that fit local memory in addition to the write set (E7), percent.
const BUDGETS: [u64; 5] = [0, 25, 50, 75, 100];

/// Number of measurements, for the progress bar.
pub fn trials(settings: &Settings) -> u64 {
    let each = settings.workloads.len() as u64;
    let flows = settings.flows.len() as u64;
    let rounds = u64::from(settings.runs);
    let restored = settings.flows.iter().filter(|flow| flow.restore().is_some()).count() as u64;
    let many = settings.flows.iter().filter(|flow| flow.many().is_some()).count() as u64;
    let of = |experiment: &Experiment| match experiment {
        Experiment::E1 | Experiment::E4 => each * flows * rounds,
        Experiment::E2 => settings.workloads.iter().map(|w| w.sizes.len() as u64).sum::<u64>() * flows * rounds,
        Experiment::E3 => each * many * rounds * settings.parallel.len() as u64 * 2,
        Experiment::E5 => each * restored,
        Experiment::E6 => each * many * settings.vms.len() as u64,
        Experiment::E7 => each * rounds * BUDGETS.len() as u64 * restored,
        Experiment::Burst => each * flows * rounds * settings.parallel.len() as u64,
    };
    settings.experiments.iter().map(of).sum()
}

impl Study {
    /// Measures one experiment for every function.
    pub fn experiment(&mut self, experiment: Experiment) -> Result<(), BoxError> {
        for workload in self.settings.workloads.clone() {
            match experiment {
                Experiment::E1 => self.record_one_ask_another(experiment, workload)?,
                Experiment::E2 => self.sizes(workload)?,
                Experiment::E3 => self.at_once(workload)?,
                Experiment::E4 => self.on_slow_medium(workload)?,
                Experiment::E5 => self.fault_ins(workload)?,
                Experiment::E6 => self.alive(workload)?,
                Experiment::E7 => self.budgets(workload)?,
                Experiment::Burst => self.bursts(workload)?,
            }
        }
        Ok(())
    }

    /// The workload's snapshot, asked for input B after a recording of input A.
    pub fn subject(&self, workload: &'static Workload) -> Result<Subject, BoxError> {
        let snapshot = self.stage.snapshot(workload, Inputs::Two, Door::Console)?;
        Ok(Subject {
            workload,
            snapshot,
            inputs: Inputs::Two,
            door: Door::Console,
            runtime_mib: self.settings.runtime_mib,
            recorded: workload.a(),
            asked: workload.b(),
            more: Vec::new(),
        })
    }

    fn record_one_ask_another(&mut self, experiment: Experiment, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        let flows = self.settings.flows.clone();
        let runs = self.settings.runs;
        self.rounds(experiment, workload.name, &subject, &flows, runs)
    }

    fn sizes(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let Some(&recorded) = workload.sizes.get(2) else { return Ok(()) };
        let flows = self.settings.flows.clone();
        let runs = self.settings.runs;
        let snapshot = self.stage.snapshot(workload, Inputs::Sizes, Door::Console)?;
        for &size in workload.sizes {
            let recorded = workload.of_size(recorded);
            let asked = workload.of_size(size);
            let subject = Subject {
                workload,
                snapshot: snapshot.clone(),
                inputs: Inputs::Sizes,
                door: Door::Console,
                runtime_mib: self.settings.runtime_mib,
                recorded,
                asked,
                more: Vec::new(),
            };
            self.rounds(Experiment::E2, &format!("{} {size}", workload.name), &subject, &flows, runs)?;
        }
        Ok(())
    }

    fn on_slow_medium(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let Some(dir) = self.settings.slow_dir.clone() else { return Ok(()) };
        // Profiles and derived files lie beside the snapshot, so all of them are on the slow medium.
        let slow = Stage::new(&self.exe, &dir.join("tvmm-bench"), self.scratch.path(), self.settings.runtime_mib)?;
        let usual = std::mem::replace(&mut self.stage, slow);
        let result = self.record_one_ask_another(Experiment::E4, workload);
        let slow = std::mem::replace(&mut self.stage, usual);
        if !self.settings.keep {
            let used = slow.dir_of(workload);
            std::fs::remove_dir_all(&used).map_err(|error| format!("Cannot remove {}: {error}", used.display()))?;
        }
        result
    }

    fn fault_ins(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        let flows: Vec<Flow> = self.settings.flows.iter().copied().filter(|flow| flow.restore().is_some()).collect();
        self.rounds(Experiment::E5, workload.name, &subject, &flows, 1)
    }

    fn budgets(&mut self, workload: &'static Workload) -> Result<(), BoxError> {
        let subject = self.subject(workload)?;
        let profile = self.stage.profile(&subject, RecorderKind::Uffd)?;
        let (read, written) = self.working_set_mib(&profile)?;
        let flows: Vec<Flow> = self.settings.flows.iter().copied().filter(|flow| flow.restore().is_some()).collect();
        for share in BUDGETS {
            let mib = (written + read * share as f64 / 100.0).ceil() as u64;
            let more = vec!["--dram".to_string(), mib.to_string()];
            let case = format!("{} +{share} %", workload.name);
            self.rounds(Experiment::E7, &case, &Subject { more, ..subject.clone() }, &flows, self.settings.runs)?;
        }
        Ok(())
    }

    /// MiB that a recorded run read, and MiB that it wrote.
    fn working_set_mib(&self, profile: &std::path::Path) -> Result<(f64, f64), BoxError> {
        let profile = crate::tiering::profile::Profile::load(profile)?;
        let mib = |pages: u64| pages as f64 / 256.0;
        Ok((mib(profile.read.len()), mib(profile.written.len())))
    }

    /// Runs all flows, round after round: those with nothing cached, then those with everything cached, then those
    /// that keep their VM. The first round is not counted: it makes the files that policies derive from a snapshot.
    fn rounds(
        &mut self,
        experiment: Experiment,
        case: &str,
        subject: &Subject,
        flows: &[Flow],
        runs: u32,
    ) -> Result<(), BoxError> {
        let key = |flow: Flow, round| Key {
            experiment: experiment.name().to_string(),
            case: case.to_string(),
            flow: flow.name().to_string(),
            round,
        };
        let restored: Vec<Flow> = flows.iter().filter(|flow| flow.kept().is_none()).copied().collect();
        self.forth_and_back(subject, &restored, runs, key, |study, flow| study.once(subject, flow))?;
        for &flow in flows {
            let Some(kept) = flow.kept() else { continue };
            if (0..runs).all(|round| self.store.has(&key(flow, round))) {
                self.bar.inc(u64::from(runs));
                continue;
            }
            let key = |round| key(flow, round);
            match kept {
                Kept::Warm => self.warm(subject, key, runs)?,
                Kept::Rewound(ready) => self.ask_rewound(subject, ready, key)?,
                Kept::Forked(restore) => self.ask_forked(subject, restore, key)?,
                Kept::Repurposed(restore) => self.ask_repurposed(subject, restore, key)?,
            }
        }
        Ok(())
    }

    fn once(&mut self, subject: &Subject, flow: Flow) -> Result<Values, BoxError> {
        if let Some(restore) = flow.restore() {
            return self.restore(subject, flow, restore);
        }
        if let Some(ready) = flow.ready() {
            let subject = self.behind(subject, flow.door())?;
            return self.ask_standby(&subject, ready);
        }
        match flow.backend().zip(self.settings.firecracker.clone()) {
            Some((backend, vmm)) => {
                let foreign = Foreign::new(&vmm, subject)?;
                let (values, digest) = foreign.restore(&subject.asked, backend, flow.cache())?;
                self.stage.check_digest(subject, &subject.asked, &digest)?;
                Ok(values)
            }
            None => Err(format!("{flow} needs --firecracker PATH").into()),
        }
    }

    /// Runs the function again in the VM that has run it.
    fn warm(&mut self, subject: &Subject, key: impl Fn(u32) -> Key, runs: u32) -> Result<(), BoxError> {
        let socket = self.scratch.path().join("warm.sock");
        let mut guest = self.stage.booted(subject.workload, subject.inputs, Door::Console, &socket)?;
        for round in 0..runs {
            self.measure(key(round), |study| {
                guest.call(&subject.recorded)?;
                let start = Instant::now();
                let answered = guest.call(&subject.asked)?;
                study.stage.check_digest(subject, &subject.asked, answered.digest())?;
                Ok(values_since(start, &answered))
            })?;
        }
        Ok(())
    }
}
