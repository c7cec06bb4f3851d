//! A plan in a file: decided once, carried out many times.
//!
//! The file is a container like all of tvmm's (`docs/snapshot-format.md`): sections with checksums. It names the
//! snapshot it is for and has the length and modification time of every memory file, so that a file that changed after
//! the plan was made is noticed before anything is mapped from it.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Error;
use super::costs::Costs;
use super::fit::Fit;
use super::policy::Estimate;
use super::profile::Profile;
use crate::snapshot::{
    Chain, Container, RestorePlan, Section, SectionKind, Snapshot, StoredPlan, TierSource, write_container,
    write_limited,
};

/// The version of the section. A plan of another version is not read but made again.
const VERSION: u32 = 4;
/// The largest plan, in bytes.
pub const FILE_LIMIT: u64 = 256 << 20;

/// A memory file as it was when the plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Bytes.
    pub len: u64,
    /// Modification time: seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl SourceFile {
    fn of(layer: &Snapshot) -> Result<SourceFile, Error> {
        if layer.is_elsewhere() {
            return Ok(SourceFile { len: 0, modified: (0, 0) });
        }
        let path = layer.memory_path();
        let bad = |error: std::io::Error| Error::PlanFile { path: path.to_path_buf(), problem: error.to_string() };
        let metadata = layer.memory().metadata().map_err(bad)?;
        Ok(SourceFile { len: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

/// The costs a plan was made by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostsUsed {
    /// `built-in`, `measured`, or how much of each: [`Costs::source`].
    pub source: String,
    /// The page cache state of the snapshot's files that the costs are for: `huge`, `small` or `cold`.
    pub cache: String,
    /// The file the costs were read from; `None` if they are built in.
    pub file: Option<PathBuf>,
    /// Time that file was last written, in seconds since 1970.
    pub written: Option<i64>,
}

impl CostsUsed {
    /// The record of `costs`, read from `file`, or from the host's own file if it exists.
    pub fn new(costs: &Costs, file: Option<&Path>) -> CostsUsed {
        let file = file.map(Path::to_path_buf).or_else(Costs::default_path).filter(|path| path.exists());
        let written = file.as_ref().and_then(|path| Some(path.metadata().ok()?.mtime()));
        CostsUsed { source: costs.source(), cache: costs.cache.name().to_string(), file, written }
    }
}

impl fmt::Display for CostsUsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        if let Some(file) = &self.file {
            write!(f, ", from {}", file.display())?;
        }
        if let Some(written) = self.written {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
            write!(f, ", written {} hours ago", (now - written).max(0) / 3600)?;
        }
        write!(f, "; files cached: {}", self.cache)
    }
}

/// A plan and its inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct PlanFile {
    pub plan: RestorePlan,
    /// Its expected cost.
    pub expected: Estimate,
    /// The costs it was made by; `None` if its policy weighs nothing.
    pub costs: Option<CostsUsed>,
    /// Its comparison with the profile it was made from; `None` if it was made from none.
    pub fit: Option<Fit>,
    /// The memory file of each layer, base first.
    pub sources: Vec<SourceFile>,
}

/// A [`PlanFile`], field by field, as the section has it.
#[derive(Serialize, Deserialize)]
struct Stored {
    plan: StoredPlan,
    expected: Estimate,
    costs: Option<CostsUsed>,
    fit: Option<Fit>,
    sources: Vec<SourceFile>,
}

impl From<PlanFile> for Stored {
    fn from(file: PlanFile) -> Stored {
        let PlanFile { plan, expected, costs, fit, sources } = file;
        let plan = StoredPlan::new(plan, sources.len());
        Stored { plan, expected, costs, fit, sources }
    }
}

impl From<Stored> for PlanFile {
    fn from(stored: Stored) -> PlanFile {
        let Stored { plan, expected, costs, fit, sources } = stored;
        PlanFile { plan: plan.into_plan(sources.len()), expected, costs, fit, sources }
    }
}

impl PlanFile {
    /// A plan just made for the tip of `chain`.
    pub fn new(plan: RestorePlan, expected: Estimate, chain: &Chain) -> Result<PlanFile, Error> {
        let sources = chain.layers().iter().map(SourceFile::of).collect::<Result<_, _>>()?;
        Ok(PlanFile { plan, expected, costs: None, fit: None, sources })
    }

    /// Adds the inputs it was made from.
    #[must_use]
    pub fn made_from(mut self, costs: CostsUsed, profile: Option<&Profile>) -> PlanFile {
        self.costs = Some(costs);
        self.fit = profile.map(|profile| Fit::of(&self.plan, profile));
        self
    }

    /// Reads what [`PlanFile::save`] wrote. The caller must still check the plan: see [`PlanFile::check_for`].
    ///
    /// # Errors
    /// [`Error::Snapshot`] for a file that is no container, or damaged; [`Error::PlanFile`] for one that is no plan.
    pub fn load(path: &Path) -> Result<PlanFile, Error> {
        PlanFile::decode(path, &Container::read(path, FILE_LIMIT)?)
    }

    /// As [`load`](Self::load) for a container in memory; `path` names it in errors.
    ///
    /// # Errors
    /// As for [`load`](Self::load).
    pub(super) fn decode(path: &Path, container: &Container) -> Result<PlanFile, Error> {
        let bad = |problem: String| Error::PlanFile { path: path.to_path_buf(), problem };
        let info = container.info(SectionKind::Plan, 0)?;
        if info.version != VERSION {
            return Err(bad(format!("it has version {}, this build reads {VERSION}; make it again", info.version)));
        }
        if container.sections().len() != 1 {
            return Err(bad("it has more sections than a plan has".to_string()));
        }
        match postcard::take_from_bytes::<PlanFile>(container.payload(info)?) {
            Ok((file, [])) => Ok(file),
            Ok((_, rest)) => Err(bad(format!("{} bytes follow its plan", rest.len()))),
            Err(error) => Err(bad(error.to_string())),
        }
    }

    /// Writes the plan beside its name, makes it durable, and renames it. Returns its size in bytes.
    pub fn save(&self, path: &Path) -> Result<u64, Error> {
        let bad = |error: postcard::Error| Error::PlanFile { path: path.to_path_buf(), problem: error.to_string() };
        let payload = postcard::to_stdvec(self).map_err(bad)?;
        let bytes = write_container(&[Section { kind: SectionKind::Plan, instance: 0, version: VERSION, payload }]);
        write_limited(path, &bytes, FILE_LIMIT)?;
        Ok(bytes.len() as u64)
    }

    /// The plan, if it is valid, for the tip of `chain` and for these tiers, and no file it takes pages from has
    /// changed since. `path` names the file in errors.
    ///
    /// # Errors
    /// [`Error::PlanOfOther`], [`Error::SourceChanged`], [`Error::PoolChanged`], or the broken rule of
    /// [`RestorePlan::validate`].
    pub fn check_for(&self, chain: &Chain, tiers: &[TierSource], path: &Path) -> Result<&RestorePlan, Error> {
        let given = chain.tip().id();
        if self.plan.snapshot != given {
            return Err(Error::PlanOfOther { made_for: self.plan.snapshot, given });
        }
        check_tiers(&self.plan.tiers, tiers)?;
        if self.sources.len() != chain.layers().len() {
            let problem = format!("it is for {} layers, the chain has {}", self.sources.len(), chain.layers().len());
            return Err(Error::PlanFile { path: path.to_path_buf(), problem });
        }
        for (layer, then) in chain.layers().iter().zip(&self.sources) {
            if !layer.is_elsewhere() && SourceFile::of(layer)? != *then {
                return Err(Error::SourceChanged { path: layer.memory_path().to_path_buf() });
            }
        }
        self.plan.validate(chain.layout(), &chain.layer_file_lens())?;
        Ok(&self.plan)
    }
}

/// Checks that the given tiers are those that the plan was made for.
fn check_tiers(planned: &[TierSource], given: &[TierSource]) -> Result<(), Error> {
    for (index, then) in planned.iter().enumerate() {
        match given.get(index) {
            Some(now) if now == then => {}
            Some(now) if now.pool == then.pool => return Err(Error::PoolChanged { pool: then.pool }),
            _ => return Err(Error::PlanNeedsPool { pool: then.pool }),
        }
    }
    match given.get(planned.len()) {
        Some(surplus) => Err(Error::PlanWithoutPool { pool: surplus.pool }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{
        Digest, Gfn, HostFacts, LoadHuge, Location, MachineFacts, MemoryLayout, PAGE_SIZE, PoolId, SealInput,
        SnapshotKind, SnapshotWriter, TierAccess,
    };
    use crate::tiering::policy::{Budget, Policy, PolicyInput};

    struct NoCache;

    impl LoadHuge for NoCache {
        fn load_huge(&self, _: &std::fs::File, _: u64, _: u64) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn snapshot(dir: &Path, byte: u8) -> Chain {
        let layout = MemoryLayout::from_gpa_ranges(&[(0, 64 * PAGE_SIZE)]).unwrap();
        let location = Location::Dir(dir.to_path_buf());
        let mut writer = SnapshotWriter::create(location.clone(), layout, SnapshotKind::Full, None).unwrap();
        writer.write_run(Gfn(3), &vec![byte; 5 * PAGE_SIZE as usize]).unwrap();
        let machine = MachineFacts { vcpu_count: 1, mem_size_mib: 1 };
        writer.seal(SealInput { state: Vec::new(), host: HostFacts::default(), machine, cache: &NoCache }).unwrap();
        Chain::open(&location).unwrap()
    }

    fn planned(chain: &Chain) -> PlanFile {
        let resolved = chain.resolve().unwrap();
        let costs = Costs::default();
        let input = PolicyInput {
            chain,
            resolved: &resolved,
            tiers: &[],
            profile: None,
            costs: &costs,
            budget: Budget::default(),
        };
        let plan = Policy::Trenv.plan(&input).unwrap();
        let expected = input.estimate(&plan);
        let used = CostsUsed::new(&costs, None);
        PlanFile::new(plan, expected, chain).unwrap().made_from(used, None)
    }

    #[test]
    fn plan_survives_a_file_and_is_for_its_snapshot_only() {
        let dir = tempfile::tempdir().unwrap();
        let chain = snapshot(&dir.path().join("a"), 1);
        let other = snapshot(&dir.path().join("b"), 2);
        let file = planned(&chain);
        let path = dir.path().join("p.plan");
        file.save(&path).unwrap();
        let back = PlanFile::load(&path).unwrap();
        assert_eq!(back, file);
        assert_eq!(back.check_for(&chain, &[], &path).unwrap(), &file.plan);
        assert!(matches!(back.check_for(&other, &[], &path), Err(Error::PlanOfOther { .. })));
    }

    #[test]
    fn plan_over_a_changed_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let chain = snapshot(&dir.path().join("a"), 1);
        let file = planned(&chain);
        let memory = std::fs::File::options().write(true).open(chain.tip().memory_path()).unwrap();
        memory.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let error = file.check_for(&chain, &[], Path::new("p")).unwrap_err();
        assert!(matches!(error, Error::SourceChanged { .. }), "{error}");
    }

    #[test]
    fn plan_for_another_pool_state_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let chain = snapshot(&dir.path().join("a"), 1);
        let mut file = planned(&chain);
        let tier = |byte| TierSource {
            pool: PoolId([7; 32]),
            entry: Digest([byte; 32]),
            access: TierAccess::MapPrivate,
            len: 2 << 20,
        };
        let other = TierSource { pool: PoolId([8; 32]), ..tier(1) };
        let path = Path::new("p");
        assert!(matches!(file.check_for(&chain, &[tier(1)], path), Err(Error::PlanWithoutPool { .. })));
        file.plan.tiers = vec![tier(1)];
        file.check_for(&chain, &[tier(1)], path).unwrap();
        assert!(matches!(file.check_for(&chain, &[tier(2)], path), Err(Error::PoolChanged { .. })));
        assert!(matches!(file.check_for(&chain, &[other], path), Err(Error::PlanNeedsPool { .. })));
        assert!(matches!(file.check_for(&chain, &[], path), Err(Error::PlanNeedsPool { .. })));
    }

    #[test]
    fn damaged_cut_and_forged_plans_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let chain = snapshot(&dir.path().join("a"), 1);
        let mut file = planned(&chain);
        let path = dir.path().join("p.plan");
        file.save(&path).unwrap();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x11;
            std::fs::write(&path, &bad).unwrap();
            assert!(PlanFile::load(&path).is_err(), "byte {at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert!(PlanFile::load(&path).is_err(), "cut at {at}");
        }
        let forged = |kind, version, payload| {
            std::fs::write(&path, write_container(&[Section { kind, instance: 0, version, payload }])).unwrap();
            PlanFile::load(&path).unwrap_err().to_string()
        };
        let payload = postcard::to_stdvec(&file).unwrap();
        assert!(forged(SectionKind::Plan, 1, payload.clone()).contains("version 1"));
        assert!(forged(SectionKind::Plan, VERSION, [&payload[..], &[0]].concat()).contains("1 bytes follow"));
        // Lengths that claim more bytes than there are.
        for at in 0..payload.len() {
            let mut bad = payload.clone();
            bad[at] = 0xff;
            bad.truncate(at + 1);
            bad.extend([0xff; 9]);
            forged(SectionKind::Plan, VERSION, bad);
        }
        assert!(forged(SectionKind::Manifest, 1, payload).contains("no section"));
        file.plan.extents.pop();
        assert!(matches!(file.check_for(&chain, &[], &path), Err(Error::Snapshot(_))));
    }
}
