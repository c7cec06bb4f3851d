//! VMs that serve requests give memory back that no request has touched, between requests (`tiering::window`).

use std::sync::Arc;

use super::daemon::Daemon;
use super::idle;
use super::idle_counts::WindowOutcome;
use super::standby;
use super::vm::Vm;
use super::vm::control::ControlError;
use super::vm::shrinking::AfterRequest;

/// Called after an answer, off the request's path: gives back what the requests of the present window have not touched,
/// if the VM's function has the policy `ladder`, a window is over, and memory is short or the function gives it back at
/// any time. Requests that come meanwhile are served.
pub(super) async fn shrink(daemon: &Arc<Daemon>, vm: &Arc<Vm>) {
    // A booted VM has no snapshot that its pages could equal.
    let Some(rule) = idle::rule_of(daemon, vm).filter(|_| vm.restore.is_some()) else { return };
    let gives_back = rule.gives_back(|| standby::shortage(daemon).is_some());
    let func_name = &vm.function.func_name;
    let window = match vm.end_window(gives_back) {
        AfterRequest::Nothing => return,
        AfterRequest::PutOff => return daemon.idle.shrunk(func_name, WindowOutcome::PutOff),
        AfterRequest::End(window) => window,
    };
    match window.shrink().await {
        Ok(shrunk) => daemon.idle.shrunk(func_name, WindowOutcome::Done(shrunk)),
        Err(ControlError::Refused { message, .. }) => {
            tracing::warn!(vm = vm.id, message, "A VM does not give untouched memory back");
            daemon.idle.shrunk(func_name, WindowOutcome::Refused);
        }
        // Its process has ended, or is about to be found not to answer.
        Err(ControlError::Gone(why)) => tracing::debug!(vm = vm.id, why, "A VM ended while it gave memory back"),
    }
}
