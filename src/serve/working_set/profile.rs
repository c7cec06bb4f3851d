//! `/snapshots/{id}/profile` and `/plan`: the pages that a run uses, and the plan that a policy makes from them. Both
//! are made by `tvmm` processes, because this one runs no guest.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Slot, exclusively, load, remove_unneeded, save};
use crate::config::restore::RestoreOptions;
use crate::serve::Shared;
use crate::serve::body::{Body, check_line, number, query};
use crate::serve::daemon::{Daemon, START_TIMEOUT, blocking};
use crate::serve::drives::remove_images;
use crate::serve::fault::{Fault, FaultBody, Reply};
use crate::serve::functions::known_policy;
use crate::serve::invocations::{InvocationAnswer, Limit, recorded};
use crate::serve::snapshots::SnapshotRecord;
use crate::serve::store::gone_is_fine;
use crate::serve::traces::Recording;
use crate::serve::vm::process::run_tool;
use crate::snapshot::random_hex;
use crate::sys::clock;
use crate::tiering::profile::Profile;

/// More than the JSON of a plan of many extents.
const MAX_PRINTED: usize = 64 << 20;

/// A run to be recorded.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::serve) struct ProfileBody {
    /// The function's arguments, `key=value …`.
    #[serde(default)]
    params: String,
    /// uffd (exact, slow), pagemap (cheap, no order), mincore (as FaaSnap) or dirty-log (writes only).
    recorder: Option<String>,
    /// Number of runs; several are merged by union.
    repeat: Option<u32>,
    /// Time limit of one run, ms.
    timeout_ms: Option<u64>,
}

/// The contents of a profile. Sizes are in pages of 4 KiB.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::serve) struct ProfileState {
    recorder: String,
    function: String,
    runs: u32,
    pages_read: u64,
    pages_written: u64,
    /// Touched, but the recorder cannot tell a read from a write.
    pages_unclassified: u64,
    knows_order: bool,
}

impl ProfileState {
    fn of(profile: &Profile) -> ProfileState {
        ProfileState {
            recorder: profile.recorder.name().to_string(),
            function: profile.function.clone(),
            runs: profile.runs,
            pages_read: profile.read.len(),
            pages_written: profile.written.len(),
            pages_unclassified: profile.unclassified.len(),
            knows_order: profile.knows_order(),
        }
    }
}

/// A recording to make.
pub(in crate::serve) struct Record {
    pub(in crate::serve) snapshot: SnapshotRecord,
    pub(in crate::serve) slot: Slot,
    pub(in crate::serve) recorder: String,
    pub(in crate::serve) repeat: u32,
}

/// The directory of a recorder's copies of drives; removed at the end, even if the recorder was killed.
struct RunDir(std::path::PathBuf);

impl Drop for RunDir {
    fn drop(&mut self) {
        remove_images(std::mem::take(&mut self.0));
    }
}

/// Runs `tvmm profile record`. Returns the guest's first answer.
async fn run_recorder(daemon: &Daemon, record: &Record, line: &str, limit: Duration) -> Result<(bool, String), Fault> {
    // The recorder opens the image that the snapshot names.
    daemon.confined_function(record.snapshot.function.clone()).await?;
    let profiles = daemon.store.profiles_dir(&record.snapshot.ss_id);
    std::fs::create_dir_all(&profiles).map_err(|error| Fault::of(&error))?;
    let utf8 = |path: std::path::PathBuf| {
        path.into_os_string().into_string().map_err(|_| Fault::internal("The daemon's directory is not UTF-8."))
    };
    let mut args: Vec<String> =
        ["profile", "record", "--json", "--recorder", &record.recorder].map(String::from).into();
    args.extend(["--snapshot".into(), utf8(daemon.snapshot_dir(&record.snapshot.ss_id))?]);
    args.extend(["--out".into(), utf8(record.slot.path(&profiles))?]);
    args.extend(["--repeat".into(), record.repeat.to_string()]);
    args.extend(["--run".into(), line.to_string()]);
    args.extend(["--run-timeout".into(), limit.as_secs().max(1).to_string()]);
    let own = RunDir(daemon.store.drives_dir(&random_hex(8)));
    if record.snapshot.has_drive_copies()? {
        std::fs::create_dir(&own.0).map_err(|error| Fault::of(&error))?;
        args.extend(["--drive-dir".into(), utf8(own.0.clone())?]);
    }
    if let Some(port) = record.snapshot.function.port {
        args.extend(["--run-port".into(), port.to_string()]);
    }
    let patience = limit.saturating_mul(record.repeat.max(1));
    let ran = run_tool(&daemon.spawner, args, MAX_PRINTED, patience).await;
    let (ended, printed) = ran.map_err(|error| match error.kind() {
        std::io::ErrorKind::TimedOut => Fault::timed_out("The recorded run did not end in time, and its VM was ended."),
        _ => Fault::of(&error),
    })?;
    if ended.code != Some(0) {
        let text = format!("The run cannot be recorded: it {}.", ended.why());
        return Err(Fault::coded(StatusCode::UNPROCESSABLE_ENTITY, ended.fault, text));
    }
    let dir = daemon.snapshot_dir(&record.snapshot.ss_id);
    let removed = blocking(move || {
        let _turn = exclusively();
        remove_unneeded(&dir, &profiles)
    });
    removed.await??;
    let told: Value = serde_json::from_slice(&printed).unwrap_or_default();
    let answer = told["runs"][0]["answer"].as_str().unwrap_or_default();
    let mut words = answer.splitn(3, ' ');
    Ok((words.next() == Some("ok"), words.nth(1).unwrap_or_default().to_string()))
}

/// An invocation whose run is recorded.
pub(in crate::serve) async fn record_invocation(
    daemon: &Arc<Daemon>,
    record: Record,
    line: &str,
    limit: Limit,
    recording: &mut Recording,
) -> Result<InvocationAnswer, Fault> {
    let _slot = daemon.vms.reserve(record.snapshot.function.mem_size).await?;
    let begin_ns = clock::monotonic_ns();
    let answer = run_recorder(daemon, &record, line, limit.left()).await;
    let span = recording.lap("record", 0, begin_ns);
    recording.note(span, "recorder", Value::from(record.recorder.clone()));
    let done = recorded(daemon, &record.snapshot, answer?, recording);
    daemon.traces.keep(recording.trace.clone());
    daemon.traces.complete(recording.trace.clone());
    Ok(done)
}

/// The recorded profile, in numbers.
#[utoipa::path(get, path = "/snapshots/{id}/profile", tag = "working sets", params(("id" = String, Path)),
    responses((status = 200, description = "The profile, in numbers", body = ProfileState),
        (status = 404, body = FaultBody, description = "There is no such snapshot, or no profile of it")))]
pub(in crate::serve) async fn get_profile(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<ProfileState>, Fault> {
    daemon.snapshot(&id)?;
    let profiles = daemon.store.profiles_dir(&id);
    let profile = blocking(move || load(Slot::Run, &profiles)).await??;
    let profile = profile.ok_or_else(|| Fault::not_found("profile of snapshot", &id))?;
    Ok(Reply(ProfileState::of(&profile)))
}

/// Records a run of the snapshot's function, in a separate VM.
#[utoipa::path(post, path = "/snapshots/{id}/profile", tag = "working sets", params(("id" = String, Path)),
    request_body = ProfileBody,
    responses((status = 200, description = "The profile, in numbers", body = ProfileState),
        (status = 400, body = FaultBody, description = "It makes no sense"),
        (status = 404, body = FaultBody, description = "There is no such snapshot"),
        (status = 409, body = FaultBody, description = "It lacks copies of its drives"),
        (status = 422, body = FaultBody, description = "The run failed"),
        (status = 429, body = FaultBody, description = "Too much at once"),
        (status = 504, body = FaultBody, description = "The guest did not answer in time")))]
pub(in crate::serve) async fn post_profile(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    Body(body): Body<ProfileBody>,
) -> Result<Reply<ProfileState>, Fault> {
    let snapshot = daemon.snapshot(&id)?;
    let recorder = body.recorder.unwrap_or_else(|| "uffd".into());
    let slot = Slot::of_recorder(&recorder)?;
    let repeat = body.repeat.unwrap_or(1);
    if !(1..=64).contains(&repeat) {
        return Err(Fault::bad("`repeat` must be 1 to 64."));
    }
    let line = snapshot.function.line(&body.params);
    check_line("The function with its `params`", &line)?;
    let limit = match body.timeout_ms {
        Some(0) => return Err(Fault::bad("`timeout_ms` must not be 0.")),
        Some(ms) => Duration::from_millis(ms),
        None => daemon.options.limits.timeout,
    };
    let record = Record { snapshot, slot, recorder, repeat };
    let task = tokio::spawn(async move {
        let _turn = daemon.gate.enter(START_TIMEOUT).await?;
        let _slot = daemon.vms.reserve(record.snapshot.function.mem_size).await?;
        run_recorder(&daemon, &record, &line, limit).await?;
        let profiles = daemon.store.profiles_dir(&record.snapshot.ss_id);
        let profile = blocking(move || load(slot, &profiles)).await??;
        profile.ok_or_else(|| Fault::internal("The recorder left no profile."))
    });
    let profile = task.await.unwrap_or_else(|_| Err(Fault::internal("The recording was given up.")))?;
    Ok(Reply(ProfileState::of(&profile)))
}

/// Copies a profile of another snapshot with the same identity (a copy, or its original).
#[utoipa::path(put, path = "/snapshots/{id}/profile", tag = "working sets",
    params(("id" = String, Path), ("source" = String, Query, description = "The snapshot whose profile is taken")),
    responses((status = 200, description = "The profile, in numbers", body = ProfileState),
        (status = 404, body = FaultBody, description = "There is no such snapshot, or no profile of it"),
        (status = 409, body = FaultBody, description = "The snapshots differ")))]
pub(in crate::serve) async fn put_profile(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Reply<ProfileState>, Fault> {
    let target = daemon.snapshot(&id)?;
    let source = query(&uri, &["source"])?.remove("source");
    let source = source.ok_or_else(|| Fault::bad("The query needs `source`: the snapshot whose profile is taken."))?;
    if daemon.snapshot(&source)?.identity != target.identity {
        let message =
            format!("A profile is bound to its snapshot: `{source}` and `{id}` are not copies of each other.");
        return Err(Fault::conflict(message));
    }
    let (from, to) = (daemon.store.profiles_dir(&source), daemon.store.profiles_dir(&id));
    let dir = daemon.snapshot_dir(&id);
    let carried = blocking(move || {
        let _turn = exclusively();
        let profile = load(Slot::Run, &from)?.ok_or_else(|| Fault::not_found("profile of snapshot", &source))?;
        save(Slot::Run, &dir, &to, &profile)?;
        Ok(profile)
    });
    let profile: Profile = carried.await??;
    Ok(Reply(ProfileState::of(&profile)))
}

/// Removes the profile.
#[utoipa::path(delete, path = "/snapshots/{id}/profile", tag = "working sets", params(("id" = String, Path)),
    responses((status = 200, description = "It was this", body = ProfileState),
        (status = 404, body = FaultBody, description = "There is no such snapshot, or no profile of it")))]
pub(in crate::serve) async fn delete_profile(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<ProfileState>, Fault> {
    let told = get_profile(State(daemon.clone()), Path(id.clone())).await?;
    let (dir, profiles) = (daemon.snapshot_dir(&id), daemon.store.profiles_dir(&id));
    let removed = blocking(move || {
        let _turn = exclusively();
        gone_is_fine(std::fs::remove_file(Slot::Run.path(&profiles))).map_err(|error| Fault::of(&error))?;
        remove_unneeded(&dir, &profiles)
    });
    removed.await??;
    Ok(told)
}

/// The plan that a restore of the snapshot by a policy would carry out, as `tvmm plan --json` shows it: with the pools,
/// cold pools, budgets and price of the daemon, and the function's local memory.
#[utoipa::path(get, path = "/snapshots/{id}/plan", tag = "working sets",
    params(("id" = String, Path), ("policy" = String, Query, description = "See `GET /policies`"),
        ("dram_mib" = Option<u64>, Query,
        description = "Local memory the plan may use; none: the function's, else the daemon's"),
        ("cxl_mib" = Option<u64>, Query, description = "Memory in the CXL tier it may use"),
        ("cache" = Option<String>, Query,
        description = "How the snapshot's memory will be cached: huge, small or cold; none: as a restore would find it \
                       now")),
    responses((status = 200, description = "The plan", body = Object),
        (status = 400, body = FaultBody, description = "It makes no sense"),
        (status = 404, body = FaultBody, description = "There is no such snapshot"),
        (status = 409, body = FaultBody, description = "The policy needs a profile")))]
pub(in crate::serve) async fn get_plan(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Reply<Value>, Fault> {
    let snapshot = daemon.snapshot(&id)?;
    let query = query(&uri, &["policy", "dram_mib", "cxl_mib", "cache"])?;
    let name = query.get("policy").ok_or_else(|| Fault::bad("The query needs `policy`."))?;
    let policy = known_policy(name)?;
    let mut args: Vec<String> = ["plan", "--json", "--policy", policy.name()].map(String::from).into();
    let mut path = |flag: &str, path: std::path::PathBuf| {
        args.extend([flag.to_string(), path.to_string_lossy().into_owned()]);
    };
    path("--snapshot", daemon.snapshot_dir(&id));
    if policy.needs_profile() {
        path("--profile", Slot::for_policy(policy, &daemon.store.profiles_dir(&id))?);
    }
    // The options of a restore whose request names no tier.
    let of_function = RestoreOptions { dram_mib: snapshot.function.dram_mib, ..RestoreOptions::default() };
    let tiers = of_function.or(&daemon.options.load);
    for pool in tiers.pools.iter().flatten() {
        path("--pool", pool.clone());
    }
    for pool in tiers.cold_pools.iter().flatten() {
        path("--cold", pool.to_string().into());
    }
    if let Some(price) = tiers.dram_price {
        args.extend(["--dram-price".into(), price.to_string()]);
    }
    for (key, flag, default) in [("dram_mib", "--dram", tiers.dram_mib), ("cxl_mib", "--cxl", tiers.cxl_mib)] {
        if let Some(mib) = number(&query, key)?.or(default) {
            args.extend([flag.to_string(), mib.to_string()]);
        }
    }
    match query.get("cache").map(String::as_str) {
        None => {}
        Some(cache @ ("huge" | "small" | "cold")) => args.extend(["--cache".into(), cache.to_string()]),
        Some(other) => return Err(Fault::bad(format!("There is no cache state `{other}`: huge, small or cold."))),
    }
    let ran = run_tool(&daemon.spawner, args, MAX_PRINTED, START_TIMEOUT).await.map_err(|error| Fault::of(&error))?;
    let (ended, printed) = ran;
    if ended.code != Some(0) {
        let text = format!("The plan cannot be made: it {}.", ended.why());
        return Err(Fault::coded(StatusCode::UNPROCESSABLE_ENTITY, ended.fault, text));
    }
    serde_json::from_slice(&printed).map(Reply).map_err(|error| Fault::of(&error))
}
