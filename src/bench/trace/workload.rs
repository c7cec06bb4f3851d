//! The guest's work for a request of a trace: a trace names functions, and says nothing of their memory.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::arrivals::Trace;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::policy::Policy;

/// The name of the workload of all functions that have none of their own.
pub(super) const OTHERS: &str = "*";

/// A function's machine and its requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Workload {
    /// Guest memory, MiB.
    pub(super) mem_mib: u64,
    /// The request of the booted VM before its snapshot.
    pub(super) prepare: String,
    /// The guest's name of the function.
    pub(super) call: String,
    pub(super) params: String,
    /// The restore policy. None: `tiered`, by the profile of one run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) policy: Option<Policy>,
}

impl Default for Workload {
    /// A runtime of 32 MiB, of which each request touches 8 and writes a quarter of these.
    fn default() -> Self {
        Workload {
            mem_mib: 128,
            prepare: "fill pages=8192 seed=1".to_string(),
            call: "touch".to_string(),
            params: "pages=2048 write=25 seed=1".to_string(),
            policy: None,
        }
    }
}

/// The workloads of a trace's functions.
#[derive(Debug)]
pub(super) struct Workloads {
    /// By name; only those that functions of the trace have.
    pub(super) all: BTreeMap<String, Workload>,
    /// The name of each function's workload, by the function's index.
    pub(super) of: Vec<String>,
}

impl Workloads {
    /// Those of `trace`, from a file or by default.
    ///
    /// # Errors
    /// The file is no JSON object of workloads, or the trace has a function that it does not name.
    pub(super) fn of(trace: &Trace, file: Option<&Path>) -> Result<Workloads, BoxError> {
        let known = match file {
            None => BTreeMap::from([(OTHERS.to_string(), Workload::default())]),
            Some(path) => read(path)?,
        };
        let mut of = Vec::with_capacity(trace.functions.len());
        for function in &trace.functions {
            let name = [function.as_str(), OTHERS].into_iter().find(|name| known.contains_key(*name));
            match (name, file) {
                (Some(name), _) => of.push(name.to_string()),
                (None, Some(path)) => {
                    return refuse(format!(
                        "Cannot replay function `{function}` of the trace: {} has no workload of this name. Add it, or \
                         one named `{OTHERS}` for all others",
                        path.display()
                    ));
                }
                (None, None) => return refuse(format!("Cannot replay function `{function}`: it has no workload")),
            }
        }
        let all = known.into_iter().filter(|(name, _)| of.contains(name)).collect();
        Ok(Workloads { all, of })
    }

    /// # Errors
    /// All VMs together may have less guest memory than one of them needs.
    pub(super) fn check_room(&self, memory_mib: u64) -> Result<(), BoxError> {
        let Some((name, largest)) = self.all.iter().max_by_key(|(_, workload)| workload.mem_mib) else { return Ok(()) };
        if largest.mem_mib > memory_mib {
            return refuse(format!(
                "Cannot run workload `{name}`: its guest has {} MiB, and all VMs together may have {memory_mib} \
                 (--memory). Give more",
                largest.mem_mib
            ));
        }
        Ok(())
    }

    /// The workload of a function.
    pub(super) fn workload(&self, function: usize) -> Option<&Workload> {
        self.all.get(self.of.get(function)?)
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Workload>, BoxError> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("Cannot read {}: {error}", path.display()))?;
    Ok(serde_json::from_str(&text)
        .map_err(|error| format!("Cannot use the workloads of {}: {error}", path.display()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_have_their_own_workload_or_that_of_all_others() {
        let trace = Trace { functions: vec!["a".to_string(), "b".to_string()], ..Trace::default() };
        let all = Workloads::of(&trace, None).unwrap();
        assert_eq!((all.of.as_slice(), all.all.len()), (&["*".to_string(), "*".to_string()][..], 1));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.json");
        std::fs::write(&path, r#"{"a": {"mem_mib": 64}, "c": {}}"#).unwrap();
        let error = Workloads::of(&trace, Some(&path)).unwrap_err().to_string();
        assert!(error.contains("Cannot replay function `b`"), "{error}");
        std::fs::write(&path, r#"{"a": {"mem_mib": 64}, "*": {}, "c": {}}"#).unwrap();
        let all = Workloads::of(&trace, Some(&path)).unwrap();
        assert_eq!(all.workload(0).map(|workload| workload.mem_mib), Some(64));
        assert_eq!(all.workload(1), Some(&Workload::default()));
        assert_eq!(all.all.len(), 2, "a workload that no function has is dropped");
        std::fs::write(&path, r#"{"*": {"memory": 1}}"#).unwrap();
        assert!(Workloads::of(&trace, Some(&path)).is_err());
    }
}
