//! `/snapshots/{id}/profile` and `/plan`: the pages that a run uses, and the plan that a policy makes from them. Both
//! are made by `tvmm` processes, because this one runs no guest.

use std::time::Duration;

use axum::extract::{Extension, Path, State};
use axum::http::{StatusCode, Uri};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::profiles::{exclusively, load, remove_unneeded, save};
use super::recorder::{Record, run_recorder};
use super::slot::Slot;
use crate::config::restore::RestoreOptions;
use crate::serve::access::caller::Caller;
use crate::serve::blocking::blocking;
use crate::serve::body::{Body, check_line, number, query};
use crate::serve::daemon::{START_TIMEOUT, Shared};
use crate::serve::fault::{Fault, FaultBody, Reply};
use crate::serve::function::known_policy;
use crate::serve::store::gone_is_fine;
use crate::serve::vm::process::run_tool;
use crate::tiering::profile::Profile;

/// A run to be recorded.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProfileBody {
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
pub struct ProfileState {
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

/// The recorded profile, in numbers.
#[utoipa::path(get, path = "/snapshots/{id}/profile", tag = "working sets", params(("id" = String, Path)),
    responses((status = 200, description = "The number of pages in each part of the profile", body = ProfileState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist, or has no profile")))]
pub async fn get_profile(State(daemon): State<Shared>, Path(id): Path<String>) -> Result<Reply<ProfileState>, Fault> {
    daemon.snapshot(&id)?;
    let profiles = daemon.store.profiles_dir(&id);
    let profile = blocking(move || load(Slot::Run, &profiles)).await??;
    let profile = profile.ok_or_else(|| Fault::not_found("profile of snapshot", &id))?;
    Ok(Reply(ProfileState::of(&profile)))
}

/// Records a run of the snapshot's function, in a separate VM.
#[utoipa::path(post, path = "/snapshots/{id}/profile", tag = "working sets", params(("id" = String, Path)),
    request_body = ProfileBody,
    responses((status = 200, description = "The number of pages in each part of the profile", body = ProfileState),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody, description = "The snapshot lacks copies of its drives"),
        (status = 422, body = FaultBody, description = "The recorded run failed"),
        (status = 429, body = FaultBody,
        description = "Too many invocations wait, or too many VMs live: try again after `Retry-After` seconds"),
        (status = 504, body = FaultBody, description = "The guest did not answer in time")))]
pub async fn post_profile(
    State(daemon): State<Shared>,
    Extension(caller): Extension<Caller>,
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
    let running = caller.run(&daemon.access)?;
    let task = tokio::spawn(async move {
        let _running = running;
        let _turn = daemon.gate.enter(START_TIMEOUT).await?;
        let _place = daemon.vms.reserve(&record.need()).await?;
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
    responses((status = 200, description = "The number of pages in each part of the profile", body = ProfileState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist, or has no profile"),
        (status = 409, body = FaultBody, description = "The snapshots are not copies of each other")))]
pub async fn put_profile(
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
    let from = daemon.store.profiles_dir(&source);
    let to = daemon.store.profiles_dir(&id);
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
    responses((status = 200, description = "The removed profile", body = ProfileState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist, or has no profile")))]
pub async fn delete_profile(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<ProfileState>, Fault> {
    let told = get_profile(State(daemon.clone()), Path(id.clone())).await?;
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
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
    params(("id" = String, Path), ("policy" = String, Query, description = "The policy, one of `GET /policies`"),
        ("dram_mib" = Option<u64>, Query,
        description = "Local memory that the plan may use, MiB; none: the function's, else the daemon's"),
        ("cxl_mib" = Option<u64>, Query,
        description = "Memory in the CXL tier that the plan may use, MiB; none: the daemon's"),
        ("cache" = Option<String>, Query,
        description = "How the snapshot's memory will be cached: huge, small or cold; none: as a restore would find it \
                       now")),
    responses((status = 200, description = "The plan, as `tvmm plan --json` prints it", body = Object),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody, description = "The policy needs a profile, and the snapshot has none")))]
pub async fn get_plan(State(daemon): State<Shared>, Path(id): Path<String>, uri: Uri) -> Result<Reply<Value>, Fault> {
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
        Some(other) => return Err(Fault::bad(format!("Unknown cache state `{other}`; known: huge, small, cold."))),
    }
    let ran = run_tool(&daemon.spawner, args, START_TIMEOUT).await.map_err(|error| Fault::of(&error))?;
    let (ended, printed) = ran;
    if ended.code != Some(0) {
        let text = format!("Cannot make the plan: `tvmm plan` {}.", ended.why());
        return Err(Fault::coded(StatusCode::UNPROCESSABLE_ENTITY, ended.fault, text));
    }
    serde_json::from_slice(&printed).map(Reply).map_err(|error| Fault::of(&error))
}
