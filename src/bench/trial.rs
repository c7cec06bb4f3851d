//! One measured restore: a `tvmm restore` in a separate process, and the numbers of its report.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::cache::{Cache, evict};
use super::{child, guest};
use crate::sys::clock;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::policy::Policy;

/// The policies of these names; `all` means all of them.
pub(super) fn policies(names: &[String]) -> Result<Vec<Policy>, BoxError> {
    match names {
        [all] if all == "all" => Ok(Policy::ALL.to_vec()),
        names => Ok(names.iter().map(|name| name.parse()).collect::<Result<_, _>>()?),
    }
}

/// One restore to measure, in a separate process.
#[derive(Clone)]
pub(super) struct Trial {
    pub(super) exe: PathBuf,
    pub(super) snapshot: PathBuf,
    pub(super) profile: Option<PathBuf>,
    /// The pool that serves memory; `None`: the snapshot's files.
    pub(super) pool: Option<PathBuf>,
    pub(super) function: String,
    /// The vsock port on which the guest takes requests; `None`: the serial line.
    pub(super) run_port: Option<u32>,
    pub(super) with_api: bool,
    /// Additional arguments.
    pub(super) more: Vec<String>,
    pub(super) scratch: PathBuf,
}

impl Trial {
    /// The restore command, without a request.
    pub(super) fn command(&self, policy: Policy) -> Command {
        let mut command = Command::new(&self.exe);
        command.arg("restore").arg("--snapshot").arg(&self.snapshot);
        command.args(["--policy", policy.name()]).args(&self.more);
        if let Some(profile) = self.profile.as_ref().filter(|_| policy.needs_profile()) {
            command.arg("--profile").arg(profile);
        }
        if let Some(pool) = &self.pool {
            command.arg("--pool").arg(pool);
        }
        command
    }

    /// Restores once. Returns the process's report with the time measured from outside added.
    pub(super) fn run(&self, policy: Policy, cache: Cache) -> Result<Value, BoxError> {
        if cache == Cache::Evicted {
            evict(&self.snapshot)?;
        }
        let report_path = self.scratch.join("report.json");
        let mut command = self.command(policy);
        command.args(["--run", &self.function]).arg("--report").arg(&report_path);
        if let Some(port) = self.run_port {
            command.args(["--run-port", &port.to_string(), "--vsock"]).arg(self.scratch.join("v.sock"));
        }
        if self.with_api {
            command.arg("--api-sock").arg(self.scratch.join("api.sock"));
        }
        let start = clock::monotonic_ns();
        command.arg("--start-time-us").arg((start / 1000).to_string());
        let output = child::output(&mut command, guest::TIMEOUT)?;
        let end = clock::monotonic_ns();
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return refuse(format!("Cannot restore by {policy}: {}", said.trim()));
        }
        let mut report: Value = serde_json::from_slice(&std::fs::read(&report_path)?)?;
        report["outside_us"] = json!((end - start) as f64 / 1000.0);
        Ok(report)
    }
}

/// The end of a slice, µs since process start.
pub(super) fn end_of(report: &Value, name: &str) -> Option<f64> {
    let slice = report["slices"].as_array()?.iter().find(|slice| slice["slice"] == name)?;
    Some(slice["start_us"].as_f64()? + slice["length_us"].as_f64()?)
}

/// The middle one of sorted numbers, the lower one of two.
pub(super) fn median(sorted: &[f64]) -> Option<f64> {
    sorted.get((sorted.len().max(1) - 1) / 2).copied()
}
