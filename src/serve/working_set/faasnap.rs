//! FaaSnap's settings that have one value here: requests may name it, and any other is refused.

use std::path::Path;

use crate::serve::fault::Fault;
use crate::tiering::profile::{Order, Profile};

/// FaaSnap's gap, pages: its policy includes smaller ones.
pub const GAP_PAGES: u64 = 32;

/// Refuses thresholds other than the policy's.
pub fn check_thresholds(size: Option<u64>, interval: Option<u64>) -> Result<(), Fault> {
    if size.is_some_and(|size| size != 0) {
        return Err(Fault::bad("`size_threshold` can only be 0: no region is too small to be mapped."));
    }
    if interval.is_some_and(|interval| interval != GAP_PAGES) {
        return Err(Fault::bad(format!("`interval_threshold` can only be {GAP_PAGES} pages, FaaSnap's.")));
    }
    Ok(())
}

/// Refuses anything but all layers of a profile, counted from 1.
pub fn check_all_layers(profile: &Path, wanted: &[u64]) -> Result<(), Fault> {
    let profile = Profile::load(profile).map_err(|error| Fault::of(&error))?;
    let count = match &profile.order {
        Order::Layers(layers) => layers.len() as u64,
        Order::Exact(_) | Order::Unknown => 1,
    };
    let mut wanted = wanted.to_vec();
    wanted.sort_unstable();
    if wanted != (1..=count).collect::<Vec<_>>() {
        return Err(Fault::bad(format!("`loadMincore` must have all layers of the snapshot: 1 to {count}.")));
    }
    Ok(())
}
