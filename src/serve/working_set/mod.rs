//! Profiles of a snapshot's functions, and the working-set files made from them.

mod caching;
mod faasnap;
mod images;
pub(super) mod mincore;
pub(super) mod profile;
mod profiles;
pub(super) mod reap;
mod recorder;
mod slot;

pub(super) use self::caching::{CacheState, cache_state, drop_cached, files_of, load_cached};
pub(super) use self::faasnap::{check_all_layers, check_thresholds};
pub(super) use self::recorder::{Record, run_recorder};
pub(super) use self::slot::Slot;
