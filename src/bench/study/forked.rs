//! The flow `forked`: a VM that has answered is forked, and its child gets its first request.

use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::door;
use super::flow::{Flow, Restore};
use super::measure::{Study, scratch_of};
use super::stage::remove;
use super::store::{Key, Values};
use super::subject::Subject;
use super::waiting::{WaitingVm, memory_of_vm, values_since};
use crate::bench::child::Grandchild;
use crate::bench::guest::TIMEOUT;
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

impl Study {
    /// One VM answers A, and is forked once a round; the child is asked for B, and ends. The first round is not
    /// counted.
    pub(super) fn ask_forked(
        &mut self,
        subject: &Subject,
        restore: Restore,
        key: impl Fn(u32) -> Key,
    ) -> Result<(), BoxError> {
        let subject = self.behind(subject, Flow::Forked.door())?;
        // A fork point has all memory of the VM, so it lies on the medium of the snapshots.
        let points = scratch_of(&self.stage.dir_of(subject.workload), "forks")?;
        let parent = self.parent(&subject, restore);
        if let Ok(parent) = &parent {
            // Failures also show in the rounds that count.
            let _ = self.ask_child(&subject, parent, &points);
        }
        for round in 0..self.settings.runs {
            self.measure(key(round), |study| {
                let parent = parent.as_ref().map_err(|error| error.to_string())?;
                study.ask_child(&subject, parent, &points)
            })?;
        }
        drop(parent);
        Ok(std::fs::remove_dir_all(&points).map_err(|error| format!("Cannot remove {}: {error}", points.display()))?)
    }

    /// A VM that has answered A.
    fn parent(&mut self, subject: &Subject, restore: Restore) -> Result<WaitingVm, BoxError> {
        let scratch = self.scratch.path().to_owned();
        let mut vm = self.restored_vm(subject, restore, scratch, &["--standby"])?;
        vm.wait_for_standby()?;
        self.serve_recorded(&mut vm, subject)?;
        Ok(vm)
    }

    /// Forks `parent`, and asks the child. Returns the time from the request to the answer, and the times of the fork.
    fn ask_child(&mut self, subject: &Subject, parent: &WaitingVm, points: &Path) -> Result<Values, BoxError> {
        let api = std::path::absolute(self.scratch.path().join("child.sock"))?;
        let socket = std::path::absolute(self.scratch.path().join("child-v.sock"))?;
        // A child that was killed leaves its sockets behind.
        remove(&api)?;
        remove(&socket)?;
        let body = json!({ "count": 1, "out_sock": api, "dir": points, "vsock_override": { "uds_path": socket } });
        let (_, answer) = parent.client.request("PUT", "/tvmm/fork", Some(&body), TIMEOUT)?;
        let answer = answer.ok_or("A fork was answered without its children")?;
        let number = |name: &str| answer[name].as_f64().ok_or_else(|| format!("The answer to a fork has no {name}"));
        let pid = answer["children"][0]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or("The answer to a fork has no child")?;
        let child =
            Grandchild::of(pid).map_err(|error| format!("Cannot find process {pid}, a child of a fork: {error}"))?;
        let start = Instant::now();
        let answered = door::call(&socket, &subject.asked)?;
        self.stage.check_digest(subject, &subject.asked, answered.digest())?;
        let mut values = values_since(start, &answered);
        values.extend(memory_of_vm(&Client::new(api))?);
        drop(child);
        values.insert("fork_ms".to_string(), number("total_us")? / 1000.0);
        values.insert("stood_still_ms".to_string(), number("stood_still_us")? / 1000.0);
        Ok(values)
    }
}
