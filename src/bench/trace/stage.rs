//! Functions and snapshots of a trace in a service, made once and used by all policies.

use std::ops::Range;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::outcome::{LivingVms, Pages};
use super::policy::{Rules, Set};
use super::service::Service;
use super::workload::{Workload, Workloads};
use crate::sys::api_client::ClientError;
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::idle::Step;

/// The most functions of a replay: each has a snapshot of its own.
pub(super) const MAX_FUNCTIONS: usize = 256;
/// Time for VMs to stand by before the first request.
const READY: Duration = Duration::from_secs(120);
/// Time without one more VM that stands by, after which there is no room for more.
const STILL: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(10);
/// Restores of each function after all snapshots were made. The first one may leave a part of the files uncached.
const WARM_UPS: usize = 2;

/// The service's name of a function.
pub(super) fn name(function: usize) -> String {
    format!("f{function}")
}

/// The body of an invocation of a function.
pub(super) fn invocation(function: usize, workload: &Workload) -> Map<String, Value> {
    let mut body = Map::new();
    body.insert("func_name".to_string(), json!(name(function)));
    body.insert("params".to_string(), json!(workload.params));
    body
}

/// Adds or replaces a function.
pub(super) fn put(
    service: &Service,
    function: usize,
    workload: &Workload,
    settings: Map<String, Value>,
) -> Result<(), BoxError> {
    let Workload { mem_mib, prepare, call, policy, .. } = workload;
    let mut body = json!({ "func_name": name(function), "mem_size": mem_mib, "prepare": prepare, "call": call });
    if let Some(body) = body.as_object_mut() {
        body.extend(policy.map(|policy| ("policy".to_string(), json!(policy.name()))));
        body.extend(settings);
    }
    service.ask("POST", "/functions", Some(&body)).map(drop)
}

/// Makes each function, its snapshot, and the profile of one run, and restores each of them.
pub(super) fn prepare(service: &Service, workloads: &Workloads, told: impl Fn(usize)) -> Result<(), BoxError> {
    for function in 0..workloads.of.len() {
        let Some(workload) = workloads.workload(function) else { continue };
        put(service, function, workload, Map::new())?;
        let vm = service.ask("POST", "/vms", Some(&json!({ "func_name": name(function) })))?;
        let Some(id) = vm["vmId"].as_str() else { return refuse("tvmm serve has answered without `vmId`") };
        let snapshot = name(function);
        service.ask("POST", "/snapshots", Some(&json!({ "vmId": id, "ssId": snapshot })))?;
        service.ask("DELETE", &format!("/vms/{id}"), None)?;
        let run = json!({ "params": workload.params });
        service.ask("POST", &format!("/snapshots/{snapshot}/profile"), Some(&run))?;
        // The first restore makes the files that the policy derives from the snapshot.
        restore(service, function, workload)?;
        told(function + 1);
    }
    // The first policy finds the files in the page cache, as the others do.
    for _ in 0..WARM_UPS {
        for function in 0..workloads.of.len() {
            let Some(workload) = workloads.workload(function) else { continue };
            restore(service, function, workload)?;
        }
    }
    Ok(())
}

/// Restores a VM of a function for one request.
fn restore(service: &Service, function: usize, workload: &Workload) -> Result<(), BoxError> {
    let mut body = invocation(function, workload);
    body.insert("keep".to_string(), json!(false));
    service.ask("POST", "/invocations", Some(&Value::Object(body))).map(drop)
}

/// Gives all functions the settings of a policy, and waits until as many VMs stand by as there is room for.
pub(super) fn set_policy(service: &Service, workloads: &Workloads, rules: &Rules) -> Result<(), BoxError> {
    for function in 0..workloads.of.len() {
        let Some(workload) = workloads.workload(function) else { continue };
        put(service, function, workload, rules.of_function())?;
    }
    let Some(Set { min, .. }) = rules.standby else { return Ok(()) };
    let wanted = min * workloads.of.len();
    let mut wait = Wait::new("VMs that stand by", READY);
    let mut still = Wait::new("one more VM that stands by", STILL);
    let mut most = 0;
    loop {
        let ready = standing_by(service)?;
        if ready > most {
            most = ready;
            still.restart();
        }
        if ready >= wanted || still.is_over() {
            return Ok(());
        }
        if wait.is_over() {
            return refuse(format!("{ready} of {wanted} VMs stand by after {} s", READY.as_secs()));
        }
        std::thread::sleep(LOOK);
    }
}

/// Ends all VMs that are suspended: the next service on the same directory would find them again.
pub(super) fn end_suspended(service: &Service) -> Result<(), BoxError> {
    let vms = service.ask("GET", "/vms", None)?;
    for vm in vms.as_array().into_iter().flatten().filter(|vm| vm["state"] == "suspended") {
        let id = vm["vmId"].as_str().unwrap_or_default();
        match service.send("DELETE", &format!("/vms/{id}"), None) {
            // It was ended for the disk space meanwhile.
            Ok(_) | Err(ClientError::Fault { status: 404 | 409, .. }) => {}
            Err(error) => return refuse(format!("Cannot end a suspended VM: {error}")),
        }
    }
    Ok(())
}

fn standing_by(service: &Service) -> Result<usize, BoxError> {
    let vms = service.ask("GET", "/vms", None)?;
    Ok(vms.as_array().into_iter().flatten().filter(|vm| vm["state"] == "standby").count())
}

/// The numbers of VMs that live now.
pub(super) fn living(service: &Service) -> Result<LivingVms, ClientError> {
    let vms = service.send("GET", "/vms", None)?;
    let count = |is_one: &dyn Fn(&str) -> bool| {
        let states = vms.as_array().into_iter().flatten().filter_map(|vm| vm["state"].as_str());
        states.filter(|state| is_one(state)).count()
    };
    let is_running = |state: &str| !matches!(state, "suspended" | "ended" | "lost");
    Ok(LivingVms { running: count(&is_running), suspended: count(&|state| state == "suspended") })
}

/// Counts of a service, of all functions, since it began.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Restores in the process of a finished VM.
    pub(super) repurposed: u64,
    pub(super) pages: Pages,
    /// Steps that VMs could not take.
    pub(super) refused_steps: u64,
    /// Steps that were done, and the time that they took, µs, in the order of [`Step::ALL`].
    pub(super) steps: [(u64, u64); Step::ALL.len()],
    pub(super) windows: WindowCounts,
}

/// Counts of the windows after which VMs that serve requests give memory back.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WindowCounts {
    pub(super) done: u64,
    pub(super) put_off: u64,
    pub(super) refused: u64,
    /// Memory that was given back, and what of it was touched in a later window, bytes.
    pub(super) freed: u64,
    pub(super) recalled: u64,
    /// Memory of a VM at the end of its last window, bytes.
    pub(super) local: u64,
    pub(super) away: u64,
}

impl WindowCounts {
    /// Adds those of a function, as `tvmm serve` answers them.
    fn add(&mut self, of: &Value) {
        let number = |key: &str| of[key].as_u64().unwrap_or_default();
        self.done += number("done");
        self.put_off += number("put_off");
        self.refused += number("refused");
        self.freed += number("freed_bytes");
        self.recalled += number("recalled_bytes");
        self.local += number("local_bytes");
        self.away += number("away_bytes");
    }
}

/// The counts of some functions.
pub(super) fn counts(service: &Service, functions: Range<usize>) -> Result<Counts, BoxError> {
    let mut all = Counts::default();
    for function in functions {
        let state = service.ask("GET", &format!("/functions/{}", name(function)), None)?;
        let idle = &state["idle_state"];
        let pages = |fate: &str| idle["pages"][fate].as_u64().unwrap_or_default();
        all.repurposed += state["repurposes"]["done"].as_u64().unwrap_or_default();
        all.pages.dropped += pages("dropped");
        all.pages.spilled += pages("spilled");
        all.pages.recalled += pages("recalled");
        all.pages.regretted += pages("regretted");
        all.windows.add(&idle["windows"]);
        for step in Step::ALL {
            let number = |key: &str| idle[step.name()][key].as_u64().unwrap_or_default();
            all.refused_steps += number("refused") + number("failed");
            let (done, took_us) = &mut all.steps[step as usize];
            *done += number("done");
            *took_us += number("took_us");
        }
    }
    Ok(all)
}
