//! A profile of the pages that a VM has used since its restore, beside a snapshot of it: the next restore brings them
//! ahead.

use std::path::{Path, PathBuf};

use super::facts::Restored;
use crate::memory::used_pages::UsedPages;
use crate::session::Error;
use crate::snapshot::{
    Chain, Image, Location, PageSet, Placement, Policy, create_private_dir, derived_dir, used_profile_path,
};
use crate::sys::page_cache::PageCache;
use crate::tiering::planner::{PlanRequest, Planner};
use crate::tiering::policy::{Budget, DRAM_PRICE_US};
use crate::tiering::profile::{Profile, RecorderKind};

/// The pages of a profile to be written.
pub struct UsedProfile {
    /// Written since the restore.
    written: PageSet,
    /// Used, and perhaps written.
    used: PageSet,
    /// The profile that the VM was restored by.
    before: Option<PathBuf>,
}

impl UsedProfile {
    /// The pages that a VM has used since it was `restored`. `None`: pages were copied ahead by a plan without a
    /// profile, and nothing tells which of them the guest has used; or they are not worth copying, and there was no
    /// profile before.
    pub fn of(pages: &UsedPages, restored: &Restored) -> Option<UsedProfile> {
        let placed = |placement| -> PageSet {
            let extents = restored.carried_out.extents.iter().filter(|planned| planned.placement == placement);
            extents.map(|planned| planned.extent).collect()
        };
        let ahead = placed(Placement::Preload);
        if !ahead.is_empty() && restored.profile.is_none() {
            return None;
        }
        let mut pages = pages.without(&ahead);
        if !pages.are_worth_copying() {
            // Those of the profile before were.
            restored.profile.as_ref()?;
            pages.mapped = pages.own.clone();
        }
        // Reads of pages behind the userfaultfd make copies, too.
        let written = pages.own.difference(&placed(Placement::Lazy));
        let used = pages.mapped.difference(&written);
        Some(UsedProfile { written, used, before: restored.profile.clone() })
    }

    /// Writes the profile beside the snapshot at `tip`, and makes the plan of `tiered` for it with its working-set
    /// files. Returns the profile's path.
    ///
    /// # Errors
    /// The profile that the VM was restored by cannot be read, or a file cannot be written.
    pub fn write(&self, tip: &Location) -> Result<PathBuf, Error> {
        let chain = Chain::open(tip)?;
        let mut profile = Profile::new(chain.tip().id(), RecorderKind::Pagemap, "");
        profile.written = self.written.clone();
        profile.unclassified = self.used.clone();
        if let Some(before) = &self.before {
            // Pages that were brought ahead by it may have been used again.
            let before = Profile::load(before)?;
            profile.written.union_with(&before.written);
            profile.unclassified.union_with(&before.read.union(&before.unclassified));
        }
        profile.unclassified.subtract(&profile.written);
        let dir = derived_dir(tip);
        let failed = |source| Error::File { doing: "make", path: dir.clone(), source };
        create_private_dir(&dir).map_err(failed)?;
        let path = used_profile_path(tip);
        profile.save(&path)?;
        keep_plan(&chain, &path)?;
        Ok(path)
    }
}

/// Makes the plan that a restore by the profile alone looks for, and the files that it reads.
fn keep_plan(chain: &Chain, profile: &Path) -> Result<(), Error> {
    let planner = Planner { chain, tiers: &[], cold: None, page_cache: &PageCache };
    let budget = Budget::of_mib(None, None, DRAM_PRICE_US);
    let request = PlanRequest { policy: Policy::Tiered, profile: Some(profile), costs: None, budget, cache: None };
    for spec in &planner.plan(&request)?.plan.images {
        Image::open(chain, spec, &PageCache)?;
    }
    Ok(())
}
