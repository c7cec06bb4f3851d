//! `/invocations`: restores or boots a VM, or takes a running one; asks it; answers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::access::caller::Caller;
use super::access::role::Role;
use super::body::{Body, check_line};
use super::counters::{Counters, Origin};
use super::daemon::{Daemon, Shared};
use super::fault::{Fault, FaultBody, Reply};
use super::function::Function;
use super::load::{self, RestoreSettings};
use super::snapshot_record::SnapshotRecord;
use super::standby::{self, Next};
use super::trace::Recording;
use super::traceparent;
use super::vm::line::{GuestAnswer, LineError};
use super::vm::{Purpose, RequestGuard, StartSpec, Vm};
use super::wake::{self, Claimed};
use super::windows;
use super::working_set::{Record, Slot, check_all_layers, run_recorder};
use crate::config::NetworkOverrideBody;
use crate::config::restore::RestoreOptions;
use crate::snapshot::Policy;
use crate::sys::clock;
use crate::tiering::idle::Step;
use crate::tiering::recorder::LAYER_PAGES;

/// The longest time-out, ms.
const MAX_TIMEOUT_MS: u64 = 3_600_000;

/// An invocation. Combinations of FaaSnap's fields stand for a `policy`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct InvocationBody {
    func_name: String,
    /// A running VM.
    #[serde(rename = "vmId")]
    vm_id: Option<String>,
    /// The snapshot to restore. Neither this nor `vmId`: the function's last snapshot, or a boot if it has none.
    #[serde(rename = "ssId")]
    ss_id: Option<String>,
    /// The function's arguments, `key=value …`.
    #[serde(default)]
    params: String,
    /// The restore policy: see `GET /policies`; none: the function's, else `tiered` if the snapshot has a profile, else
    /// `firecracker`.
    #[schema(value_type = Option<String>)]
    policy: Option<Policy>,
    /// Record the run's use of memory: uffd, mincore, pagemap or dirty-log. Needs a snapshot; the VM ends with the run.
    record: Option<String>,
    /// True: the VM of this invocation lives on. It is then ended when room is needed, or after the idle time. False:
    /// it ends. None: as the function's `after` says of a VM that could stand by, and `idle` of other VMs.
    keep: Option<bool>,
    /// Time limit, ms, including the wait for its turn. A guest that has not answered by then is ended.
    timeout_ms: Option<u64>,
    /// Local memory for pages that the restore preloads, MiB; the same as `tvmm.dram_mib`.
    dram_mib: Option<u64>,
    /// Memory in the CXL tier, MiB; the same as `tvmm.cxl_mib`.
    cxl_mib: Option<u64>,
    /// The VM's restore options; missing ones have the daemon's values.
    tvmm: Option<RestoreOptions>,
    /// True (the default): the guest's clocks are moved to the present; false: they go on from the snapshot's time.
    clock_realtime: Option<bool>,
    /// True: KVM logs the pages that the guest writes, for diff snapshots; none: the function's setting.
    track_dirty_pages: Option<bool>,
    /// Other taps for network interfaces.
    #[serde(default)]
    network_overrides: Vec<NetworkOverrideBody>,
    /// Metadata of the clone: the same as `tvmm.metadata`.
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    namespace: Option<String>,
    /// FaaSnap: with a record, restore by `reap`; without one, record for it.
    #[serde(rename = "enableReap", default)]
    enable_reap: bool,
    /// FaaSnap: only -1, its default, is supported: layers are closed by size.
    mincore: Option<i64>,
    /// FaaSnap: record layers of so many pages (1,024).
    mincore_size: Option<u64>,
    /// FaaSnap: restore by `faasnap`, with these layers, which must be all existing ones, from 1.
    #[serde(rename = "loadMincore")]
    load_mincore: Option<Vec<u64>>,
    /// FaaSnap: restore by `firecracker`: the memory file mapped as it is.
    #[serde(default)]
    use_mem_file: bool,
    /// FaaSnap: restore by `faasnap`.
    #[serde(default)]
    overlay_regions: bool,
    /// FaaSnap: restore by `faasnap`.
    #[serde(default)]
    use_ws_file: bool,
    /// FaaSnap: `faasnap` always reads its working-set file in the VMM; false contradicts it.
    vmm_load_ws: Option<bool>,
    /// FaaSnap: `reap` always reads past the page cache; false contradicts it.
    #[serde(rename = "wsFileDirectIo")]
    ws_file_direct_io: Option<bool>,
    /// FaaSnap: `reap` always reads its working set in one go; false contradicts it.
    #[serde(rename = "wsSingleRead")]
    ws_single_read: Option<bool>,
}

impl InvocationBody {
    /// Refuses keys that choose files, addresses and taps of the host, or write profiles, to a client that may only
    /// invoke.
    fn check_role(&self, role: Role) -> Result<(), Fault> {
        if role >= Role::Operate {
            return Ok(());
        }
        let keys = [
            ("tvmm", self.tvmm.is_some()),
            ("network_overrides", !self.network_overrides.is_empty()),
            ("record", self.record.is_some()),
            ("enableReap", self.enable_reap),
            ("mincore_size", self.mincore_size.is_some()),
        ];
        let Some((key, _)) = keys.into_iter().find(|(_, is_used)| *is_used) else { return Ok(()) };
        let message = format!("Cannot use `{key}`: it needs the role `{}`, and the token has `{role}`.", Role::Operate);
        Err(Fault::new(StatusCode::FORBIDDEN, message))
    }

    /// Its settings of the VM that it restores.
    fn settings(&self) -> RestoreSettings {
        RestoreSettings {
            tvmm: self.tvmm.clone(),
            metadata: self.metadata.clone(),
            network_overrides: self.network_overrides.clone(),
            track_dirty_pages: self.track_dirty_pages,
            clock_realtime: self.clock_realtime,
        }
    }

    /// These options with the budgets, which may also stand beside `tvmm`.
    fn options(&self, settings: &RestoreSettings) -> Result<RestoreOptions, Fault> {
        let mut options = settings.options()?;
        let budgets =
            [("dram_mib", self.dram_mib, &mut options.dram_mib), ("cxl_mib", self.cxl_mib, &mut options.cxl_mib)];
        for (key, here, there) in budgets {
            if here.is_some() && there.is_some() {
                return Err(Fault::bad(format!("`{key}` and `tvmm.{key}` are the same: leave one out.")));
            }
            *there = here.or(*there);
        }
        load::check(&options)?;
        Ok(options)
    }
}

/// The answer to an invocation.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct InvocationAnswer {
    /// Time from the request's arrival to the guest's answer, µs.
    duration: u64,
    /// True if the function reports success (`ok`, not `err`).
    ok: bool,
    /// The function's answer after `ok` or `err`.
    result: String,
    /// The VM it ran in.
    #[serde(rename = "vmId")]
    vm_id: Option<String>,
    #[serde(rename = "traceId")]
    trace_id: String,
    /// The id of this invocation in its trace, which a caller's `traceparent` may share among several.
    #[serde(rename = "spanId")]
    span_id: String,
    /// The snapshot the VM was restored from, by this invocation or before.
    #[serde(rename = "ssId")]
    ss_id: Option<String>,
    /// `vm` (it was running already), `parked`, `trimmed`, `spilled` or `suspended` (it was idle), `standby`,
    /// `snapshot`, `boot` or `recording`.
    origin: String,
    /// The policy of this restore.
    policy: Option<String>,
}

/// Runs a function: in a running VM, in one restored from a snapshot, or in one that is booted.
#[utoipa::path(post, path = "/invocations", tag = "invocations", request_body = InvocationBody,
    params(("traceparent" = Option<String>, Header,
        description = "The caller's span (W3C Trace Context), which the invocation becomes a part of")),
    responses((status = 200, description = "The guest answered", body = InvocationAnswer),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 403, body = FaultBody,
        description = "The request names a path or an address that clients of this service may not name, or has a key \
                       that needs the role `operate`"),
        (status = 404, body = FaultBody,
        description = "The function, the VM, the snapshot or the namespace does not exist"),
        (status = 409, body = FaultBody,
        description = "The VM has ended, or the snapshot lacks the profile that the policy needs"),
        (status = 422, body = FaultBody, description = "The VM cannot be booted or restored"),
        (status = 429, body = FaultBody,
        description = "Too many invocations wait, or too many VMs live: try again after `Retry-After` seconds"),
        (status = 502, body = FaultBody,
        description = "The VM ended before its guest answered, or the guest wrote too much without an answer"),
        (status = 504, body = FaultBody, description = "The guest did not answer in time, and its VM was ended"),
        (status = 507, body = FaultBody,
        description = "The VM needs more memory than all VMs may have, or the disk is full")))]
pub(super) async fn post_invocation(
    State(daemon): State<Shared>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    Body(body): Body<InvocationBody>,
) -> Result<Reply<InvocationAnswer>, Fault> {
    body.check_role(caller.role())?;
    let running = caller.run(&daemon.access)?;
    let caller = traceparent::caller(&headers);
    // An action that has begun is finished even if the client disconnects.
    let task = tokio::spawn(async move {
        let _running = running;
        let mut recording = Recording::begin(&body.func_name, caller);
        let answer = invoke(&daemon, body, &mut recording).await;
        let status = answer.as_ref().map_or_else(|fault| fault.status.as_u16(), |_| 200);
        daemon.counters.answered(status);
        if answer.is_err() {
            recording.answered(status);
            let message = answer.as_ref().err().map(|fault| fault.message.clone());
            recording.note(0, "message", json!(message));
            daemon.traces.keep(recording.trace.clone());
            daemon.traces.complete(recording.trace);
        }
        // A VM that stood by may have to be replaced.
        daemon.standby.changed.notify_one();
        answer
    });
    task.await.unwrap_or_else(|_| Err(Fault::internal("The invocation was given up."))).map(Reply)
}

async fn invoke(
    daemon: &Arc<Daemon>,
    body: InvocationBody,
    recording: &mut Recording,
) -> Result<InvocationAnswer, Fault> {
    let function = daemon.function(&body.func_name)?;
    let plan = understand(daemon, &body, &function).await?;
    let line = function.line(&body.params);
    check_line("The function with its `params`", &line)?;
    let limit_ms = body.timeout_ms.or(function.timeout_ms);
    if limit_ms.is_some_and(|ms| ms == 0 || ms > MAX_TIMEOUT_MS) {
        return Err(Fault::bad(format!("`timeout_ms` must be 1 to {MAX_TIMEOUT_MS}.")));
    }
    let limit = limit_ms.map_or(daemon.options.limits.timeout, Duration::from_millis);
    let deadline = tokio::time::Instant::now() + limit;
    let begin_ns = clock::monotonic_ns();
    let _turn = daemon.gate.enter(limit).await?;
    recording.lap("queue", 0, begin_ns);
    let limit = Limit { total: limit, deadline };
    match plan {
        Plan::Vm(id) => ask_running(daemon, &id, &line, limit, recording).await,
        Plan::Start(spec) => start_and_ask(daemon, &spec, &line, limit, body.keep, recording).await,
        Plan::Record(record) => record_invocation(daemon, *record, &line, limit, recording).await,
    }
}

/// The time limit of an invocation.
#[derive(Clone, Copy)]
struct Limit {
    total: Duration,
    deadline: tokio::time::Instant,
}

impl Limit {
    /// The remaining time.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(tokio::time::Instant::now())
    }

    fn fault(&self, what: &str) -> Fault {
        Fault::timed_out(format!("{what} within {} ms, and its VM was ended.", self.total.as_millis()))
    }
}

/// The action that an invocation needs.
enum Plan {
    Vm(String),
    Start(Box<StartSpec>),
    Record(Box<Record>),
}

async fn understand(daemon: &Daemon, body: &InvocationBody, function: &Function) -> Result<Plan, Fault> {
    let network = body.namespace.as_deref().map(|namespace| daemon.network(namespace)).transpose()?;
    let policy = asked_policy(body)?;
    let settings = body.settings();
    if let Some(id) = &body.vm_id {
        let restores = body.ss_id.is_some() || body.policy.is_some() || body.record.is_some();
        if restores || network.is_some() || settings.is_for_restores() {
            return Err(Fault::bad("`vmId` names a VM that runs: there is nothing to restore, record or connect."));
        }
        daemon.check_vm(id)?;
        return Ok(Plan::Vm(id.clone()));
    }
    let snapshot = match &body.ss_id {
        Some(id) => Some(daemon.snapshot(id)?),
        None => daemon.latest_snapshot(&function.func_name),
    };
    let Some(snapshot) = snapshot else {
        if body.policy.is_some() || body.record.is_some() || body.enable_reap || settings.is_for_restores() {
            let message = format!("Function `{}` has no snapshot to restore or record.", function.func_name);
            return Err(Fault::conflict(message));
        }
        let function = function.clone();
        return Ok(Plan::Start(Box::new(StartSpec { function, network, restore: None, purpose: Purpose::Invocation })));
    };
    let profiles = daemon.store.profiles_dir(&snapshot.ss_id);
    if let Some((slot, recorder)) = recorder(body, &profiles)? {
        if network.is_some() {
            return Err(Fault::bad("A recorded run has no network: leave `namespace` out."));
        }
        if settings.is_for_restores() {
            let message = "A run is recorded on the snapshot's own files, of the VM as it was: leave out `tvmm`, \
                           `metadata`, `clock_realtime`, `track_dirty_pages` and `network_overrides`.";
            return Err(Fault::bad(message));
        }
        return Ok(Plan::Record(Box::new(Record { snapshot, slot, recorder, repeat: 1 })));
    }
    let options = daemon.allowances.confined(body.options(&settings)?).await?;
    let policy = if policy.is_none() && options.plan.is_none() { function.own_policy()? } else { policy };
    let restore = daemon.restore_spec(&snapshot, policy, options, settings)?;
    if let (Some(layers), Some(profile)) = (&body.load_mincore, &restore.load.tvmm.profile) {
        check_all_layers(profile, layers)?;
    }
    let function = Function { func_name: function.func_name.clone(), ..snapshot.function };
    Ok(Plan::Start(Box::new(StartSpec { function, network, restore: Some(restore), purpose: Purpose::Invocation })))
}

/// The requested recorder, by name or by FaaSnap's fields, and the slot of its profile.
fn recorder(body: &InvocationBody, profiles: &Path) -> Result<Option<(Slot, String)>, Fault> {
    let records_reap = body.enable_reap && Slot::Reap.existing(profiles).is_none();
    Ok(match (&body.record, body.mincore_size) {
        (Some(name), _) => Some((Slot::of_recorder(name)?, name.clone())),
        (None, Some(_)) => Some((Slot::Mincore, "mincore".to_string())),
        (None, None) if records_reap => Some((Slot::Reap, "uffd".to_string())),
        (None, None) => None,
    })
}

/// The requested policy, by name or by FaaSnap's fields.
fn asked_policy(body: &InvocationBody) -> Result<Option<Policy>, Fault> {
    if body.mincore.is_some_and(|mincore| mincore != -1) {
        return Err(Fault::bad("`mincore` can only be -1: layers are closed when they are large enough."));
    }
    if body.mincore_size.is_some_and(|size| size != LAYER_PAGES) {
        return Err(Fault::bad(format!("`mincore_size` can only be {LAYER_PAGES} pages, FaaSnap's.")));
    }
    for (key, value) in [
        ("vmm_load_ws", body.vmm_load_ws),
        ("wsFileDirectIo", body.ws_file_direct_io),
        ("wsSingleRead", body.ws_single_read),
    ] {
        if value == Some(false) {
            let message = format!("`{key}` cannot be false: that is how the policy works. Leave it out.");
            return Err(Fault::bad(message));
        }
    }
    let is_faasnap = body.overlay_regions || body.use_ws_file || body.load_mincore.is_some();
    let mut asked: Vec<Policy> = body.policy.into_iter().collect();
    asked.extend(body.enable_reap.then_some(Policy::Reap));
    asked.extend(is_faasnap.then_some(Policy::Faasnap));
    asked.extend(body.use_mem_file.then_some(Policy::Firecracker));
    asked.dedup();
    match asked.as_slice() {
        [] => Ok(None),
        [policy] => Ok(Some(*policy)),
        [first, second, ..] => Err(Fault::bad(format!("The fields ask for both `{first}` and `{second}`."))),
    }
}

async fn ask_running(
    daemon: &Arc<Daemon>,
    id: &str,
    line: &str,
    limit: Limit,
    recording: &mut Recording,
) -> Result<InvocationAnswer, Fault> {
    recording.trace.vm_id = Some(id.to_owned());
    let begin_ns = clock::monotonic_ns();
    let late = |_| Fault::timed_out(format!("VM `{id}` was not ready within {} ms.", limit.total.as_millis()));
    let claimed = tokio::time::timeout_at(limit.deadline, wake::claim(daemon, id)).await.map_err(late)??;
    let origin = Origin::of_idle(claimed.found_at);
    if claimed.found_at.is_some() {
        recording.lap("wake", 0, begin_ns);
    }
    let vm = claimed.using.vm().clone();
    let (answer, execute) = ask(daemon, claimed.using, line, limit, recording).await?;
    let done = answered(daemon, &vm, answer, origin, recording);
    recording.note(execute, "warm", json!(origin == Origin::Vm));
    daemon.traces.keep(recording.trace.clone());
    daemon.traces.complete(recording.trace.clone());
    let daemon = daemon.clone();
    // The client does not wait for these: the pages that came back, and those that are no longer needed.
    tokio::spawn(async move {
        if claimed.found_at == Some(Step::Spilled) {
            match vm.report().await {
                Ok(report) => wake::count_recalls(&daemon, &vm, &report, claimed.found_at),
                Err(error) => tracing::debug!(%error, vm = vm.id, "A VM has no report after a request"),
            }
        }
        windows::shrink(&daemon, &vm).await;
    });
    Ok(done)
}

async fn start_and_ask(
    daemon: &Arc<Daemon>,
    spec: &StartSpec,
    line: &str,
    limit: Limit,
    keep: Option<bool>,
    recording: &mut Recording,
) -> Result<InvocationAnswer, Fault> {
    let Made { using, span: made, origin, found_at } = make(daemon, spec, limit, recording).await?;
    let vm = using.vm().clone();
    let (answer, execute) = ask(daemon, using, line, limit, recording).await?;
    let next = standby::next(daemon, &vm, keep);
    let done = answered(daemon, &vm, answer, origin, recording);
    let trace = recording.trace.clone();
    daemon.traces.keep(trace);
    let daemon = daemon.clone();
    let mut recording = recording.taken();
    // The client does not wait for these: the VM's own report, and its end.
    tokio::spawn(async move {
        match vm.report().await {
            Ok(report) => {
                wake::count_recalls(&daemon, &vm, &report, found_at);
                recording.add_report(&report, made, execute);
            }
            Err(error) => recording.note(made, "report", json!(error.to_string())),
        }
        daemon.traces.complete(recording.trace);
        match next {
            Next::Keep => windows::shrink(&daemon, &vm).await,
            Next::End => standby::end(&daemon, &vm).await,
            Next::Rewind => standby::give_back(&daemon, &vm).await,
        }
    });
    Ok(done)
}

/// A VM for an invocation.
struct Made {
    using: RequestGuard,
    /// The index of the span in which it was made.
    span: usize,
    origin: Origin,
    /// The step that an idle VM was taken back from.
    found_at: Option<Step>,
}

/// Takes an idle VM, or one that stands by, or else starts one.
async fn make(daemon: &Arc<Daemon>, spec: &StartSpec, limit: Limit, recording: &mut Recording) -> Result<Made, Fault> {
    let begin_ns = clock::monotonic_ns();
    let late = |_| Fault::timed_out(format!("An idle VM was not ready within {} ms.", limit.total.as_millis()));
    if let Some(claimed) = tokio::time::timeout_at(limit.deadline, wake::take(daemon, spec)).await.map_err(late)? {
        let span = recording.lap("wake", 0, begin_ns);
        recording.trace.vm_id = Some(claimed.using.vm().id.clone());
        let Claimed { using, found_at } = claimed;
        return Ok(Made { using, span, origin: Origin::of_idle(found_at), found_at });
    }
    if let Some(vm) = standby::take(daemon, spec, limit.deadline).await {
        let span = recording.lap("standby", 0, begin_ns);
        recording.trace.vm_id = Some(vm.id.clone());
        return Ok(Made { using: vm.claim()?, span, origin: Origin::Standby, found_at: None });
    }
    let started = tokio::time::timeout_at(limit.deadline, daemon.start_vm(spec, recording)).await;
    let (using, span) = started.map_err(|_| limit.fault("The VM was not ready"))??;
    let origin = if spec.restore.is_some() { Origin::Snapshot } else { Origin::Boot };
    Ok(Made { using, span, origin, found_at: None })
}

/// Asks a VM. A VM that does not answer as it should is ended, and its end is waited for.
async fn ask(
    daemon: &Daemon,
    using: RequestGuard,
    line: &str,
    limit: Limit,
    recording: &mut Recording,
) -> Result<(GuestAnswer, usize), Fault> {
    let vm = using.vm();
    let begin_ns = clock::monotonic_ns();
    let asked = tokio::time::timeout_at(limit.deadline, vm.ask(line, daemon.options.limits.max_output_bytes)).await;
    let execute = recording.lap("execute", 0, begin_ns);
    let fault = match asked {
        Ok(Ok(answer)) => return Ok((answer, execute)),
        Ok(Err(LineError::Closed(error))) => {
            let ended = vm.life.stop().await;
            tracing::debug!(%error, vm = vm.id, "A VM's line is closed");
            return Err(Fault::bad_gateway(format!("VM `{}` {}, before it answered.", vm.id, ended.why())));
        }
        Ok(Err(LineError::Flooded(bytes))) => {
            Fault::bad_gateway(format!("The guest wrote {bytes} bytes without an answer, and its VM was ended."))
        }
        Err(_) => limit.fault("The guest did not answer"),
    };
    Counters::count(&daemon.counters.vms_killed);
    vm.life.blame(fault.message.trim_end_matches('.'));
    vm.life.signal(rustix::process::Signal::KILL);
    vm.life.end().await;
    Err(fault)
}

fn answered(
    daemon: &Daemon,
    vm: &Vm,
    answer: GuestAnswer,
    origin: Origin,
    recording: &mut Recording,
) -> InvocationAnswer {
    let duration = recording.answered(200);
    recording.note(0, "ok", json!(answer.ok));
    daemon.counters.took(origin, duration);
    InvocationAnswer {
        duration,
        ok: answer.ok,
        result: answer.text,
        vm_id: Some(vm.id.clone()),
        trace_id: recording.trace.trace_id.clone(),
        span_id: recording.trace.span_id.clone(),
        ss_id: vm.ss_id.clone(),
        origin: origin.name().to_string(),
        policy: vm.policy.clone().filter(|_| origin.is_restore()),
    }
}

/// An invocation whose run is recorded.
async fn record_invocation(
    daemon: &Arc<Daemon>,
    record: Record,
    line: &str,
    limit: Limit,
    recording: &mut Recording,
) -> Result<InvocationAnswer, Fault> {
    let _place = daemon.vms.reserve(&record.need()).await?;
    let begin_ns = clock::monotonic_ns();
    let answer = run_recorder(daemon, &record, line, limit.left()).await;
    let span = recording.lap("record", 0, begin_ns);
    recording.note(span, "recorder", Value::from(record.recorder.clone()));
    let done = recorded(daemon, &record.snapshot, answer?, recording);
    daemon.traces.keep(recording.trace.clone());
    daemon.traces.complete(recording.trace.clone());
    Ok(done)
}

/// The answer to an invocation that ran in a recorder.
fn recorded(
    daemon: &Daemon,
    snapshot: &SnapshotRecord,
    answer: GuestAnswer,
    recording: &mut Recording,
) -> InvocationAnswer {
    let duration = recording.answered(200);
    daemon.counters.took(Origin::Recording, duration);
    InvocationAnswer {
        duration,
        ok: answer.ok,
        result: answer.text,
        vm_id: None,
        trace_id: recording.trace.trace_id.clone(),
        span_id: recording.trace.span_id.clone(),
        ss_id: Some(snapshot.ss_id.clone()),
        origin: Origin::Recording.name().to_string(),
        policy: None,
    }
}
