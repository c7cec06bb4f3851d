//! The working-set files that a policy uses with a profile.

use std::path::{Path, PathBuf};

use crate::serve::fault::Fault;
use crate::snapshot::{Chain, Image, ImageSpec, Location, ResolvedRun};
use crate::sys::page_cache::PageCache;
use crate::tiering::planner::Planner;
use crate::tiering::policy::Policy;
use crate::tiering::profile::Profile;

/// A snapshot's chain with the source of each page.
pub(super) struct ResolvedChain {
    pub(super) chain: Chain,
    pub(super) resolved: Vec<ResolvedRun>,
}

impl ResolvedChain {
    pub(super) fn open(dir: &Path) -> crate::snapshot::Result<ResolvedChain> {
        let chain = Chain::open(&Location::Dir(dir.to_owned()))?;
        let resolved = chain.resolve()?;
        Ok(ResolvedChain { chain, resolved })
    }

    /// The working-set files that a policy would use with this profile.
    pub(super) fn images(&self, policy: Policy, profile: &Profile) -> Result<Vec<ImageSpec>, Fault> {
        let planner = Planner { chain: &self.chain, tiers: &[], cold: None, page_cache: &PageCache };
        planner.images(policy, profile).map_err(|error| Fault::of(&error))
    }

    /// Makes the working-set files that a policy would use with this profile, unless they exist, and opens them.
    pub(super) fn make_images(&self, policy: Policy, profile: &Profile) -> Result<Vec<PathBuf>, Fault> {
        let specs = self.images(policy, profile)?;
        let open = |spec| Image::open(&self.chain, spec, &PageCache).map(|(image, _)| image.path().to_path_buf());
        specs.iter().map(open).collect::<Result<_, _>>().map_err(|error| Fault::of(&error))
    }
}
