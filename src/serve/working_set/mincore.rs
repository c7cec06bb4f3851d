//! `/snapshots/{id}/mincore`: FaaSnap's layers of pages, and the working-set file made of them.

use std::path::Path as FilePath;

use axum::extract::{Path, State};
use axum::http::Uri;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::caching::{drop_cached, images_of, io_error};
use super::faasnap::{GAP_PAGES, check_thresholds};
use super::images::ResolvedChain;
use super::profiles::{exclusively, load, save};
use super::slot::Slot;
use crate::serve::blocking::blocking;
use crate::serve::body::{Body, query};
use crate::serve::daemon::Shared;
use crate::serve::fault::{Fault, FaultBody, Reply};
use crate::snapshot::{Content, Extent, PAGE_SIZE, PageOrigin, PageSet};
use crate::sys::resident::CacheView;
use crate::tiering::policy::Policy;
use crate::tiering::profile::{MAX_LAYERS, Order, Profile, RecorderKind, nonzero};

/// The state of a snapshot's layers, in FaaSnap's words. Sizes are in pages of 4 KiB.
#[derive(Debug, Serialize, ToSchema)]
pub struct MincoreState {
    nlayers: u64,
    /// Regions that are not zero, gaps of less than 32 pages included.
    n_nz_regions: u64,
    nz_region_size: u64,
    /// Regions of the working-set file.
    n_ws_regions: u64,
    ws_region_size: u64,
}

/// A layer to be added.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerBody {
    /// Its index among the layers, from 0; none: after the last.
    position: Option<usize>,
    /// Its pages are those that this diff snapshot of the same machine holds; none: the pages of the memory files that
    /// are in the page cache now.
    #[serde(rename = "fromDiff")]
    from_diff: Option<String>,
}

/// Changes to a snapshot's layers, in this order.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MincorePatch {
    /// Replace the layers by those of a recorded run, each of so many pages in the order of their first touch.
    from_records_size: Option<u64>,
    /// Remove pages that are zero in the snapshot from the layers.
    #[serde(default)]
    trim_regions: bool,
    /// Make the working-set file now, not when it is first needed.
    #[serde(default)]
    to_ws_file: bool,
    /// Refused: the file holds exactly the layers' pages.
    #[serde(default)]
    inactive_ws: bool,
    /// Refused: zero pages are anonymous memory.
    #[serde(default)]
    zero_ws: bool,
    size_threshold: Option<u64>,
    interval_threshold: Option<u64>,
    /// Bring the pages of these layers (from 1) of the memory files into the page cache.
    #[serde(default)]
    mincore_cache: Vec<u64>,
    /// Drop the working-set files from the page cache.
    #[serde(default)]
    drop_ws_cache: bool,
}

fn layers(profile: &Profile) -> Vec<PageSet> {
    match &profile.order {
        Order::Layers(layers) => layers.clone(),
        Order::Exact(_) | Order::Unknown => vec![profile.working_set()],
    }
}

/// A profile that has these layers. The recorder cannot tell reads from writes.
fn of_layers(like: Profile, layers: Vec<PageSet>) -> Profile {
    let mut profile = Profile::new(like.snapshot, RecorderKind::Mincore, &like.function);
    let layers: Vec<PageSet> = layers.into_iter().filter(|layer| !layer.is_empty()).collect();
    layers.iter().for_each(|layer| profile.unclassified.union_with(layer));
    profile.order = Order::Layers(layers);
    profile
}

fn state(dir: &FilePath, profiles: &FilePath) -> Result<MincoreState, Fault> {
    let snapshot = ResolvedChain::open(dir).map_err(|error| Fault::of(&error))?;
    let mut n_nz_regions = 0;
    let mut nz_region_size = 0;
    let mut end = None;
    for run in nonzero(&snapshot.resolved).runs() {
        match end {
            Some(end) if run.first.0 - end < GAP_PAGES => nz_region_size += run.first.0 - end,
            _ => n_nz_regions += 1,
        }
        nz_region_size += run.pages;
        end = Some(run.end().0);
    }
    let mut nlayers = 0;
    let mut ws = Vec::new();
    if let Some(profile) = load(Slot::Mincore, profiles)? {
        nlayers = layers(&profile).len() as u64;
        ws = snapshot.images(Policy::Faasnap, &profile)?;
    }
    let regions = || ws.iter().flat_map(|image| &image.extents);
    let ws_region_size = regions().map(|region| region.pages).sum();
    Ok(MincoreState { nlayers, n_nz_regions, nz_region_size, n_ws_regions: regions().count() as u64, ws_region_size })
}

/// The number of layers, and the number of regions that are mapped.
#[utoipa::path(get, path = "/snapshots/{id}/mincore", tag = "working sets", params(("id" = String, Path)),
    responses((status = 200, description = "The snapshot's layers and regions", body = MincoreState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist")))]
pub async fn get_mincore(State(daemon): State<Shared>, Path(id): Path<String>) -> Result<Reply<MincoreState>, Fault> {
    daemon.snapshot(&id)?;
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    blocking(move || state(&dir, &profiles)).await?.map(Reply)
}

/// Copies the layers of another snapshot of the same machine.
#[utoipa::path(put, path = "/snapshots/{id}/mincore", tag = "working sets",
    params(("id" = String, Path), ("source" = String, Query, description = "The snapshot whose layers are taken")),
    responses((status = 200, description = "The snapshot's layers and regions after the change", body = MincoreState),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody, description = "The source has no layers, or is of another machine")))]
pub async fn put_mincore(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    uri: Uri,
) -> Result<Reply<MincoreState>, Fault> {
    daemon.snapshot(&id)?;
    let source = query(&uri, &["source"])?.remove("source");
    let source = source.ok_or_else(|| Fault::bad("The query needs `source`: the snapshot whose layers are taken."))?;
    daemon.snapshot(&source)?;
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    let sources = daemon.store.profiles_dir(&source);
    let carried = blocking(move || {
        let _turn = exclusively();
        let none = || Fault::conflict(format!("Snapshot `{source}` has no layers."));
        let mut profile = load(Slot::Mincore, &sources)?.ok_or_else(none)?;
        let snapshot = ResolvedChain::open(&dir).map_err(|error| Fault::of(&error))?;
        profile.snapshot = snapshot.chain.tip().id();
        profile.check_for(snapshot.chain.tip()).map_err(|error| Fault::conflict(error.to_string()))?;
        save(Slot::Mincore, &dir, &profiles, &profile)?;
        state(&dir, &profiles)
    });
    carried.await?.map(Reply)
}

/// Adds a layer: the pages in the page cache now, or those of a diff snapshot.
#[utoipa::path(post, path = "/snapshots/{id}/mincore", tag = "working sets", params(("id" = String, Path)),
    request_body = LayerBody,
    responses((status = 200, description = "The snapshot's layers and regions after the change", body = MincoreState),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody, description = "The snapshot has as many layers as it may have")))]
pub async fn post_mincore(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    Body(body): Body<LayerBody>,
) -> Result<Reply<MincoreState>, Fault> {
    let function = daemon.snapshot(&id)?.function;
    let diff = body.from_diff.map(|diff| daemon.snapshot(&diff)).transpose()?;
    if let Some(diff) = diff.as_ref().filter(|diff| diff.snapshot_type != "Diff") {
        return Err(Fault::bad(format!("Snapshot `{}` is no diff.", diff.ss_id)));
    }
    let diff = diff.map(|diff| daemon.snapshot_dir(&diff.ss_id));
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    let added = blocking(move || {
        let _turn = exclusively();
        let snapshot = ResolvedChain::open(&dir).map_err(|error| Fault::of(&error))?;
        let mut pages = match diff {
            Some(diff) => held_by_tip(&ResolvedChain::open(&diff).map_err(|error| Fault::of(&error))?),
            None => resident(&snapshot).map_err(|error| Fault::of(&error))?,
        };
        pages.intersect_with(&nonzero(&snapshot.resolved));
        let call = function.line("");
        let empty = || Profile::new(snapshot.chain.tip().id(), RecorderKind::Mincore, &call);
        let profile = load(Slot::Mincore, &profiles)?.unwrap_or_else(empty);
        let mut layers: Vec<PageSet> = layers(&profile).into_iter().filter(|layer| !layer.is_empty()).collect();
        let position = body.position.unwrap_or(layers.len());
        if position > layers.len() {
            return Err(Fault::bad(format!("`position` must be 0 to {}, the number of layers.", layers.len())));
        }
        if layers.len() >= MAX_LAYERS {
            return Err(Fault::conflict(format!("There are {MAX_LAYERS} layers, which is all there may be.")));
        }
        // A page is in the first layer that has it.
        layers[..position].iter().for_each(|before| pages.subtract(before));
        layers[position..].iter_mut().for_each(|after| after.subtract(&pages));
        layers.insert(position, pages);
        save(Slot::Mincore, &dir, &profiles, &of_layers(profile, layers))?;
        state(&dir, &profiles)
    });
    added.await?.map(Reply)
}

/// Pages that the last layer of a chain holds itself.
fn held_by_tip(snapshot: &ResolvedChain) -> PageSet {
    let tip = snapshot.chain.tip_index();
    snapshot.resolved.iter().filter(|run| run.content.layer() == Some(tip)).map(|run| run.extent).collect()
}

/// Guest pages whose place in the memory files is in the page cache.
fn resident(snapshot: &ResolvedChain) -> crate::snapshot::Result<PageSet> {
    let mut found = PageSet::new();
    for (index, layer) in snapshot.chain.layers().iter().enumerate() {
        let failed = |source| crate::snapshot::Error::Io {
            action: "ask for the cached part of",
            path: layer.memory_path().to_owned(),
            source,
        };
        let len = layer.memory().metadata().map_err(failed)?.len() / PAGE_SIZE * PAGE_SIZE;
        if len == 0 {
            continue;
        }
        let mut cached = PageSet::new();
        let mut view = CacheView::new(layer.memory(), len).map_err(failed)?;
        let insert = |first, pages| cached.insert_run(Extent { first: crate::snapshot::Gfn(first), pages });
        view.resident_runs(insert).map_err(failed)?;
        for run in &snapshot.resolved {
            let Content::Bytes(source) = run.content else { continue };
            if source.origin != PageOrigin::Layer(index) {
                continue;
            }
            // Maps pages of the file back to those of the guest.
            let first = source.offset / PAGE_SIZE;
            let in_file = Extent { first: crate::snapshot::Gfn(first), pages: run.extent.pages };
            for part in cached.runs_in(in_file) {
                let first = crate::snapshot::Gfn(run.extent.first.0 + (part.first.0 - first));
                found.insert_run(Extent { first, pages: part.pages });
            }
        }
    }
    Ok(found)
}

/// Makes layers from a recorded run, trims them, makes their working-set file, or changes their caching.
#[utoipa::path(patch, path = "/snapshots/{id}/mincore", tag = "working sets", params(("id" = String, Path)),
    request_body = MincorePatch,
    responses((status = 200, description = "The snapshot's layers and regions after the change", body = MincoreState),
        (status = 400, body = FaultBody, description = "The request is invalid"),
        (status = 404, body = FaultBody, description = "The snapshot does not exist"),
        (status = 409, body = FaultBody, description = "The snapshot has no recorded run, or no layers")))]
pub async fn patch_mincore(
    State(daemon): State<Shared>,
    Path(id): Path<String>,
    Body(patch): Body<MincorePatch>,
) -> Result<Reply<MincoreState>, Fault> {
    daemon.snapshot(&id)?;
    check_thresholds(patch.size_threshold, patch.interval_threshold)?;
    if patch.inactive_ws || patch.zero_ws {
        return Err(Fault::bad(
            "`inactive_ws` and `zero_ws` cannot be true: the working-set file holds the layers' pages that are not \
             zero; zero pages are anonymous memory.",
        ));
    }
    let dir = daemon.snapshot_dir(&id);
    let profiles = daemon.store.profiles_dir(&id);
    blocking(move || change(&dir, &profiles, &patch)).await?.map(Reply)
}

fn change(dir: &FilePath, profiles: &FilePath, patch: &MincorePatch) -> Result<MincoreState, Fault> {
    let _turn = exclusively();
    let failed = |error: crate::snapshot::Error| Fault::of(&error);
    let snapshot = ResolvedChain::open(dir).map_err(failed)?;
    if let Some(size) = patch.from_records_size {
        let record = load(Slot::Reap, profiles)?.or(load(Slot::Run, profiles)?).filter(Profile::knows_order);
        let none = || Fault::conflict("No run was recorded in order: record one by POST /snapshots/{id}/profile.");
        save(Slot::Mincore, dir, profiles, &from_record(record.ok_or_else(none)?, size)?)?;
    }
    let layered = || {
        let none = || Fault::conflict("The snapshot has no layers.");
        load(Slot::Mincore, profiles)?.ok_or_else(none)
    };
    if patch.trim_regions {
        let profile = layered()?;
        let nonzero = nonzero(&snapshot.resolved);
        let trimmed = layers(&profile).iter().map(|layer| layer.intersection(&nonzero)).collect();
        save(Slot::Mincore, dir, profiles, &of_layers(profile, trimmed))?;
    }
    if patch.to_ws_file {
        snapshot.make_images(Policy::Faasnap, &layered()?)?;
    }
    if !patch.mincore_cache.is_empty() {
        let layers = layers(&layered()?);
        for &number in &patch.mincore_cache {
            let layer = number.checked_sub(1).and_then(|index| layers.get(usize::try_from(index).ok()?));
            let none = || Fault::bad(format!("There is no layer {number}: 1 to {}.", layers.len()));
            read_layer(&snapshot, layer.ok_or_else(none)?).map_err(failed)?;
        }
    }
    if patch.drop_ws_cache {
        drop_cached(&images_of(dir).map_err(failed)?).map_err(failed)?;
    }
    state(dir, profiles)
}

/// Layers of `size` pages each, in the order of their first touch.
fn from_record(record: Profile, size: u64) -> Result<Profile, Fault> {
    let pages = record.working_set().len();
    if size == 0 || pages.div_ceil(size) > MAX_LAYERS as u64 {
        return Err(Fault::bad(format!(
            "`from_records_size` must make 1 to {MAX_LAYERS} layers of the {pages} pages that were recorded."
        )));
    }
    let mut layers = vec![PageSet::new()];
    let mut room = size;
    for extent in record.in_order() {
        for part in extent.first.0..extent.end().0 {
            if room == 0 {
                layers.push(PageSet::new());
                room = size;
            }
            if let Some(layer) = layers.last_mut() {
                layer.insert(crate::snapshot::Gfn(part));
            }
            room -= 1;
        }
    }
    Ok(of_layers(record, layers))
}

/// Reads the pages of a layer from the memory files.
fn read_layer(snapshot: &ResolvedChain, layer: &PageSet) -> crate::snapshot::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 1 << 20];
    for run in &snapshot.resolved {
        let Content::Bytes(source) = run.content else { continue };
        let Some(holder) = snapshot.chain.layer_of(run.content) else { continue };
        for part in layer.runs_in(run.extent) {
            let mut offset = source.offset + (part.first.0 - run.extent.first.0) * PAGE_SIZE;
            let end = offset + part.bytes();
            while offset < end {
                let piece = &mut buffer[..(end - offset).min(1 << 20) as usize];
                let read = holder.memory().read_exact_at(piece, offset);
                read.map_err(io_error("read", holder.memory_path()))?;
                offset += piece.len() as u64;
            }
        }
    }
    Ok(())
}
