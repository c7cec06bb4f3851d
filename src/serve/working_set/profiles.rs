//! The profiles of a snapshot on the disk: loads and stores them, and removes what was made of earlier ones.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::images::ResolvedChain;
use super::slot::Slot;
use crate::serve::fault::Fault;
use crate::serve::snapshot_record::derived;
use crate::snapshot::image_name;
use crate::tiering::plan_cache::{self, profile_mark};
use crate::tiering::policy::Policy;
use crate::tiering::profile::Profile;

/// Serialises changes of layers and records, which are read, changed and written.
static CHANGING: Mutex<()> = Mutex::new(());

/// Locks layers and records for a change. For threads that may block.
pub(super) fn exclusively() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads the profile in a slot, if there is one.
pub(super) fn load(slot: Slot, profiles: &Path) -> Result<Option<Profile>, Fault> {
    slot.existing(profiles).map(|path| Profile::load(&path)).transpose().map_err(|error| Fault::of(&error))
}

/// Stores a profile of the snapshot in `dir`.
pub(super) fn save(slot: Slot, dir: &Path, profiles: &Path, profile: &Profile) -> Result<(), Fault> {
    fs::create_dir_all(profiles).map_err(|error| Fault::of(&error))?;
    profile.save(&slot.path(profiles)).map(drop).map_err(|error| Fault::of(&error))?;
    remove_unneeded(dir, profiles)
}

/// Removes the plans and working-set files of a snapshot whose profiles are missing or have changed.
pub(super) fn remove_unneeded(dir: &Path, profiles: &Path) -> Result<(), Fault> {
    if !derived(dir).is_dir() {
        return Ok(());
    }
    let fault = |error: crate::tiering::Error| Fault::of(&error);
    let mut marks = BTreeSet::from([profile_mark(&[])]);
    let mut images = BTreeSet::new();
    for slot in [Slot::Run, Slot::Mincore, Slot::Reap] {
        let Some(path) = slot.existing(profiles) else { continue };
        marks.insert(profile_mark(&Profile::read(&path).map_err(fault)?));
        // The working-set files of these two are also made ahead of any plan.
        let policy = match slot {
            Slot::Run => continue,
            Slot::Mincore => Policy::Faasnap,
            Slot::Reap => Policy::Reap,
        };
        let snapshot = ResolvedChain::open(dir).map_err(|error| Fault::of(&error))?;
        let profile = Profile::load(&path).map_err(fault)?;
        let of_slot = snapshot.images(policy, &profile)?;
        images.extend(of_slot.iter().map(|spec| image_name(snapshot.chain.tip().id(), spec)));
    }
    let freed = plan_cache::remove_unneeded(&derived(dir), &marks, &images);
    if freed > 0 {
        tracing::info!(bytes = freed, dir = %dir.display(), "Plans and images of profiles that are gone are removed");
    }
    Ok(())
}
