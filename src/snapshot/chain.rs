//! A snapshot with everything it is relative to, and the source of each page of guest memory.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::manifest::canonical;
use super::{
    Error, Extent, Location, MemoryLayout, PageOrigin, PageSet, PageSource, Parent, Result, SecretKey, Snapshot,
    SnapshotKind, TrustedKeys,
};

/// The most layers that a chain may have to be restored. The writer refuses to make a longer one.
pub const MAX_CHAIN_DEPTH: usize = 64;

/// The most layers that a chain may have to be merged: tvmm 0.1 wrote chains longer than it could restore.
pub const MAX_MERGED_DEPTH: usize = 1024;

/// A tip and its parents down to a full snapshot.
#[derive(Debug)]
pub struct Chain {
    /// Base first; never empty.
    layers: Vec<Snapshot>,
    /// The folder for files derived from the chain, if not beside its tip.
    derived: Option<PathBuf>,
    trust: Trust,
}

/// The trust in the directory of a chain's tip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Plans and images in it are taken for what their names say.
    Folder,
    /// Only what trusted keys have signed is used, and no plan and no image is signed.
    Signatures,
}

/// The content of a run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// Bytes of a layer or of a tier, contiguous for the whole run.
    Bytes(PageSource),
}

impl Content {
    /// Returns the index of the layer that has the bytes; `None` for zeros and for bytes of a tier.
    pub fn layer(self) -> Option<usize> {
        match self {
            Content::Bytes(PageSource { origin: PageOrigin::Layer(index), .. }) => Some(index),
            _ => None,
        }
    }
}

/// A maximal run of pages with contiguous content. Never crosses the end of a range of the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolvedRun {
    /// The pages.
    pub extent: Extent,
    /// Their content.
    pub content: Content,
}

impl Chain {
    /// Opens the snapshot at `tip` and its parents, where the manifests say they are.
    ///
    /// # Errors
    /// As for [`Snapshot::open`]; [`Error::Parent`] around it for a parent; [`Error::WrongParent`],
    /// [`Error::ParentLoop`], [`Error::ChainTooLong`], [`Error::LayoutMismatch`].
    pub fn open(tip: &Location) -> Result<Chain> {
        Chain::open_by(tip, Snapshot::open, MAX_CHAIN_DEPTH)
    }

    /// As [`open`](Chain::open), but of up to [`MAX_MERGED_DEPTH`] layers. Each layer has an open file.
    ///
    /// # Errors
    /// As for [`open`](Chain::open).
    pub fn open_to_merge(tip: &Location) -> Result<Chain> {
        Chain::open_by(tip, Snapshot::open, MAX_MERGED_DEPTH)
    }

    /// As [`open`](Chain::open), but the memory files need not be there: a cold pool has guest memory. With a
    /// `key`, the files must be encrypted with it.
    ///
    /// # Errors
    /// As for [`open`](Chain::open).
    pub fn open_elsewhere(tip: &Location, key: Option<&SecretKey>) -> Result<Chain> {
        Chain::open_by(tip, |location| Snapshot::open_elsewhere(location, key), MAX_CHAIN_DEPTH)
    }

    /// As [`open`](Chain::open) for a chain of which one of `keys` must have signed each layer. No byte of a layer is
    /// parsed before it was compared with what was signed, and all memory is compared here. Plans and images beside the
    /// snapshot are not used, because they have no signature.
    ///
    /// # Errors
    /// As for [`open`](Chain::open), [`Snapshot::open_signed`] and [`Snapshot::check_signed`].
    pub fn open_signed(tip: &Location, keys: &TrustedKeys) -> Result<Chain> {
        let chain = Chain::open_by(tip, |location| Snapshot::open_signed(location, keys), MAX_CHAIN_DEPTH)?;
        chain.layers.iter().try_for_each(Snapshot::check_signed)?;
        Ok(Chain { trust: Trust::Signatures, ..chain })
    }

    fn open_by(tip: &Location, open: impl Fn(&Location) -> Result<Snapshot>, limit: usize) -> Result<Chain> {
        let mut layers = vec![open(tip)?];
        let mut seen = HashSet::from([layers[0].id()]);
        while let Some(child) = layers.last()
            && let Some(location) = child.parent_location()
        {
            if layers.len() == limit {
                return Err(Error::ChainTooLong { object: tip.display(), limit });
            }
            let in_child = |source| Error::Parent { child: child.object().to_string(), source: Box::new(source) };
            let parent = open(&location).map_err(in_child)?;
            check_pair(child, &parent)?;
            // The id covers the parent's id, and a merged snapshot that stands for another is full: a loop needs a
            // broken hash or a broken check.
            if !seen.insert(parent.id()) {
                return Err(Error::ParentLoop { object: tip.display() });
            }
            layers.push(parent);
        }
        layers.reverse();
        Ok(Chain { layers, derived: None, trust: Trust::Folder })
    }

    /// Opens a full snapshot whose memory does not come from its own file: the directory, or the state file of the
    /// two-file form alone.
    ///
    /// # Errors
    /// As for [`Snapshot::open`]; [`Error::NotAChain`] for a diff.
    pub fn open_without_memory(snapshot: &Path) -> Result<Chain> {
        let location = if snapshot.is_dir() {
            Location::Dir(snapshot.to_path_buf())
        } else {
            // The state file stands in for the memory file, which is never read.
            Location::Files { snapshot: snapshot.to_path_buf(), memory: snapshot.to_path_buf() }
        };
        let snapshot = Snapshot::open_state(&location)?;
        if snapshot.manifest().kind == SnapshotKind::Diff {
            let problem =
                format!("{} is a diff, and a page-fault handler serves whole memories; merge it", snapshot.object());
            return Err(Error::NotAChain { problem });
        }
        Ok(Chain { layers: vec![snapshot], derived: None, trust: Trust::Folder })
    }

    /// Opens a snapshot all of whose pages are in a pool: without its memory file, and without its parents.
    ///
    /// # Errors
    /// As for [`Snapshot::open`].
    pub fn open_pooled(tip: &Location) -> Result<Chain> {
        Ok(Chain { layers: vec![Snapshot::open_without_memory(tip)?], derived: None, trust: Trust::Folder })
    }

    /// Keeps files derived from the chain in `dir` from now on.
    pub fn derive_in(&mut self, dir: PathBuf) {
        self.derived = Some(dir);
    }

    /// The folder for files derived from the chain (plans, images): beside its tip, unless
    /// [`derive_in`](Chain::derive_in) named another place.
    pub fn derived_dir(&self) -> PathBuf {
        self.derived.clone().unwrap_or_else(|| derived_dir(self.tip().location()))
    }

    /// The trust in the directory of the tip.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// The path of a derived file: in the chain's folder, or beside the tip if it is only there and trusted.
    pub fn derived_file(&self, name: &str) -> PathBuf {
        let kept = self.derived_dir().join(name);
        if self.trust == Trust::Signatures {
            return kept;
        }
        let beside = derived_dir(self.tip().location()).join(name);
        if self.derived.is_some() && !kept.exists() && beside.exists() { beside } else { kept }
    }

    /// Opens a chain from the given directories, base first, regardless of the locations in their manifests.
    ///
    /// # Errors
    /// As for [`Chain::open`], and [`Error::NotAChain`] if a directory other than the first is a full snapshot, or
    /// the first is not.
    pub fn from_dirs(dirs: &[PathBuf]) -> Result<Chain> {
        let not_a_chain = |problem: String| Error::NotAChain { problem };
        if dirs.len() > MAX_MERGED_DEPTH {
            return Err(not_a_chain(format!("{} directories are more than {MAX_MERGED_DEPTH}", dirs.len())));
        }
        let mut layers: Vec<Snapshot> = Vec::with_capacity(dirs.len());
        for dir in dirs {
            let layer = Snapshot::open(&Location::Dir(dir.clone()))?;
            let is_full = layer.manifest().kind == SnapshotKind::Full;
            match layers.last() {
                None if is_full => {}
                None => return Err(not_a_chain(format!("{} comes first but is a diff", dir.display()))),
                Some(_) if is_full => {
                    return Err(not_a_chain(format!("{} is full but does not come first", dir.display())));
                }
                Some(parent) => check_pair(&layer, parent)?,
            }
            layers.push(layer);
        }
        if layers.is_empty() {
            return Err(not_a_chain("no directory is given".to_string()));
        }
        Ok(Chain { layers, derived: None, trust: Trust::Folder })
    }

    /// The layers, base first. [`PageOrigin::Layer`] has an index into this.
    pub fn layers(&self) -> &[Snapshot] {
        &self.layers
    }

    /// Returns the layer that has the bytes of `content`; `None` for zeros and for bytes of a tier.
    pub fn layer_of(&self, content: Content) -> Option<&Snapshot> {
        self.layers.get(content.layer()?)
    }

    /// The snapshot the chain was opened for.
    pub fn tip(&self) -> &Snapshot {
        // Proven: both constructors refuse to make an empty chain.
        self.layers.last().expect("a chain has a layer")
    }

    /// The index of the tip in [`layers`](Chain::layers).
    pub fn tip_index(&self) -> usize {
        self.layers.len() - 1
    }

    /// Guest RAM, the same for all layers.
    pub fn layout(&self) -> &MemoryLayout {
        self.tip().layout()
    }

    /// The length of each layer's memory file in bytes, as [`super::RestorePlan::validate`] wants them.
    pub fn layer_file_lens(&self) -> Vec<u64> {
        self.layers.iter().map(|layer| layer.memory_len().min(layer.layout().file_len())).collect()
    }

    /// The source of every page of guest memory: each page exactly once, ascending, in maximal runs.
    ///
    /// # Errors
    /// As for [`Snapshot::page_map`].
    pub fn resolve(&self) -> Result<Vec<ResolvedRun>> {
        let layout = self.layout();
        let mut rest: PageSet = layout.extents().collect();
        let mut runs = Vec::new();
        // From the tip down, each layer decides about the pages that no layer above it has decided.
        for (index, layer) in self.layers.iter().enumerate().rev() {
            let map = layer.page_map()?;
            let held = rest.intersection(map.held());
            push_layer_runs(&mut runs, layout, &held, index);
            rest.subtract(&held);
            let zero = rest.intersection(map.zero());
            push_zero_runs(&mut runs, layout, &zero);
            rest.subtract(&zero);
        }
        push_zero_runs(&mut runs, layout, &rest);
        runs.sort_unstable_by_key(|run| run.extent.first);
        Ok(joined(runs, layout))
    }
}

/// The folder that caches files derived from the snapshot at `location`.
pub fn derived_dir(location: &Location) -> PathBuf {
    match location {
        Location::Dir(dir) => dir.join("plan"),
        Location::Files { snapshot, .. } => {
            let mut name = canonical(snapshot).into_os_string();
            name.push(".plan");
            PathBuf::from(name)
        }
    }
}

/// The profile of the pages that a VM had used when the snapshot at `location` was taken, if one was written.
pub fn used_profile_path(location: &Location) -> PathBuf {
    derived_dir(location).join("used.profile")
}

/// Checks that a reader finds `parent` and everything it is relative to, and may add a layer of `layout` to it.
/// `object` is the diff that needs it. Memory files need not be there: a cold pool can have the pages of all layers.
///
/// # Errors
/// [`Error::NoParent`] around a reader's error; [`Error::ChainFull`].
pub(crate) fn check_parent(object: &str, parent: &Parent, layout: &MemoryLayout) -> Result<()> {
    let no_parent = |source| Error::NoParent { object: object.to_string(), source: Box::new(source) };
    let chain = Chain::open_elsewhere(&parent.location, None).map_err(|error| match error {
        // A chain that a restore would refuse cannot be extended either.
        Error::ChainTooLong { limit, .. } => Error::ChainFull { object: object.to_string(), limit },
        error => no_parent(error),
    })?;
    let tip = chain.tip();
    if !tip.stands_for(parent.id) {
        let child = object.to_string();
        let found = tip.id();
        let source = Error::WrongParent { child, parent: tip.object().to_string(), expected: parent.id, found };
        return Err(no_parent(source));
    }
    if tip.layout() != layout {
        return Err(no_parent(Error::LayoutMismatch { object: object.to_string() }));
    }
    if chain.layers().len() >= MAX_CHAIN_DEPTH {
        return Err(Error::ChainFull { object: object.to_string(), limit: MAX_CHAIN_DEPTH });
    }
    Ok(())
}

/// Checks that `parent` is the snapshot that `child` is relative to.
fn check_pair(child: &Snapshot, parent: &Snapshot) -> Result<()> {
    let expected = match &child.manifest().parent {
        Some(parent) => parent.id,
        None => return Err(Error::BadParentage { object: child.object().to_string() }),
    };
    if !parent.stands_for(expected) {
        let child = child.object().to_string();
        let parent_name = parent.object().to_string();
        return Err(Error::WrongParent { child, parent: parent_name, expected, found: parent.id() });
    }
    if parent.layout() != child.layout() {
        return Err(Error::LayoutMismatch { object: child.object().to_string() });
    }
    Ok(())
}

fn push_layer_runs(runs: &mut Vec<ResolvedRun>, layout: &MemoryLayout, held: &PageSet, layer: usize) {
    for extent in held.runs().flat_map(|run| layout.split(run)) {
        if let Some(offset) = layout.file_offset(extent.first) {
            runs.push(ResolvedRun { extent, content: Content::Bytes(PageSource::layer(layer, offset)) });
        }
    }
}

fn push_zero_runs(runs: &mut Vec<ResolvedRun>, layout: &MemoryLayout, zero: &PageSet) {
    let extents = zero.runs().flat_map(|run| layout.split(run));
    runs.extend(extents.map(|extent| ResolvedRun { extent, content: Content::Zero }));
}

/// Joins neighbours of one range whose content continues.
fn joined(runs: Vec<ResolvedRun>, layout: &MemoryLayout) -> Vec<ResolvedRun> {
    let mut out: Vec<ResolvedRun> = Vec::with_capacity(runs.len());
    for run in runs {
        if let Some(last) = out.last_mut()
            && last.extent.end() == run.extent.first
            && layout.range_of(last.extent.first) == layout.range_of(run.extent.first)
            && continues(last, &run)
        {
            last.extent.pages += run.extent.pages;
        } else {
            out.push(run);
        }
    }
    out
}

fn continues(a: &ResolvedRun, b: &ResolvedRun) -> bool {
    match (a.content, b.content) {
        (Content::Zero, Content::Zero) => true,
        (Content::Bytes(a_from), Content::Bytes(b_from)) => a_from.continues_at(a.extent.bytes(), b_from),
        _ => false,
    }
}
