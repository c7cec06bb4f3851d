//! `/snapshots/{id}/reap`: REAP's recorded working set.

use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::caching::{CacheState, cache_state, drop_cached, images_of, load_cached};
use super::images::ResolvedChain;
use super::profiles::{exclusively, load, remove_unneeded};
use super::slot::Slot;
use crate::serve::blocking::blocking;
use crate::serve::body::Body;
use crate::serve::daemon::Shared;
use crate::serve::fault::{Fault, FaultBody, Reply};
use crate::serve::store::gone_is_fine;
use crate::snapshot::PAGE_SIZE;
use crate::tiering::policy::Policy;

/// The state of a snapshot's record for REAP. Sizes are in pages of 4 KiB.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReapState {
    /// True if there is one. Without it, an invocation with `enableReap` makes one.
    recorded: bool,
    /// The recorded function.
    function: Option<String>,
    pages_read: u64,
    pages_written: u64,
    /// The pages of the working-set file.
    ws_pages: u64,
    /// The caching of the working-set file, once it was made.
    ws_cache: Option<CacheState>,
}

/// The state of REAP's record.
#[utoipa::path(get, path = "/snapshots/{id}/reap", tag = "working sets", params(("id" = String, Path)),
    responses((status = 200, description = "The snapshot's record for REAP", body = ReapState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist")))]
pub async fn get_reap(State(daemon): State<Shared>, Path(id): Path<String>) -> Result<Reply<ReapState>, Fault> {
    daemon.snapshot(&id)?;
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    let told = blocking(move || {
        let nothing =
            ReapState { recorded: false, function: None, pages_read: 0, pages_written: 0, ws_pages: 0, ws_cache: None };
        let Some(profile) = load(Slot::Reap, &profiles)? else { return Ok(nothing) };
        let snapshot = ResolvedChain::open(&dir).map_err(|error| Fault::of(&error))?;
        let ws_pages = snapshot.images(Policy::Reap, &profile)?.iter().map(|image| image.file_len() / PAGE_SIZE).sum();
        let images = images_of(&dir).map_err(|error| Fault::of(&error))?;
        let state = cache_state(&images).map_err(|error| Fault::of(&error))?;
        Ok(ReapState {
            recorded: true,
            function: Some(profile.function.clone()),
            pages_read: profile.read.len(),
            pages_written: profile.written.len(),
            ws_pages,
            ws_cache: (!images.is_empty()).then_some(state),
        })
    });
    told.await?.map(Reply)
}

/// Brings the working-set file into the page cache (`true`, making it if it is missing), or drops it (`false`).
#[utoipa::path(patch, path = "/snapshots/{id}/reap", tag = "working sets", params(("id" = String, Path)),
    request_body = bool,
    responses((status = 200, description = "The cached part of the files after the change", body = CacheState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody, description = "The snapshot has no record for REAP")))]
pub async fn patch_reap(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    Body(cached): Body<bool>,
) -> Result<Reply<CacheState>, Fault> {
    daemon.snapshot(&id)?;
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    let changed = blocking(move || {
        let _turn = exclusively();
        let none = || Fault::conflict("Nothing is recorded for REAP: an invocation with `enableReap` does that.");
        let profile = load(Slot::Reap, &profiles)?.ok_or_else(none)?;
        let snapshot = ResolvedChain::open(&dir).map_err(|error| Fault::of(&error))?;
        let images = snapshot.make_images(Policy::Reap, &profile)?;
        let changed = if cached { load_cached(&images) } else { drop_cached(&images) };
        changed.and_then(|()| cache_state(&images)).map_err(|error| Fault::of(&error))
    });
    changed.await?.map(Reply)
}

/// Removes the record and its working-set file.
#[utoipa::path(delete, path = "/snapshots/{id}/reap", tag = "working sets", params(("id" = String, Path)),
    responses((status = 200, description = "The key `removed` is true if there was a record", body = Object),
        (status = 404, body = FaultBody, description = "The snapshot does not exist")))]
pub async fn delete_reap(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
) -> Result<Reply<serde_json::Value>, Fault> {
    daemon.snapshot(&id)?;
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    let removed = blocking(move || {
        let _turn = exclusively();
        if load(Slot::Reap, &profiles)?.is_none() {
            return Ok(false);
        }
        gone_is_fine(std::fs::remove_file(Slot::Reap.path(&profiles))).map_err(|error| Fault::of(&error))?;
        remove_unneeded(&dir, &profiles)?;
        Ok(true)
    });
    let removed: bool = removed.await??;
    Ok(Reply(serde_json::json!({ "removed": removed })))
}
