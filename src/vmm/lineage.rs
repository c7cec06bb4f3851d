//! Lineage: the snapshot that a running VM's memory is a change of, and the pages changed since.
//!
//! A diff holds the pages written since its parent. KVM's log is read and cleared while the VM is paused, but sealing
//! the snapshot may still fail later (a full disk). No page may be lost then: the pages go back and are part of the
//! next diff.

use std::sync::Arc;

use super::error::Error;
use crate::snapshot::{Chain, ForkPoint, PageSet, Parent, SnapshotId};

/// Ancestry of one VM's memory.
#[derive(Debug, Default)]
pub struct Lineage {
    /// The last snapshot sealed from, or restored into, this VM.
    parent: Option<Parent>,
    /// Pages known to have changed since `parent`, without those still in KVM's log.
    changed: PageSet,
    /// Pages of the snapshot that is being sealed.
    in_flight: Option<PageSet>,
    /// The layers that this VM was restored from: some of its pieces still map their files.
    origin: Option<Arc<Chain>>,
    /// Pages of a restored VM that the host makes writable only when they are written: KVM's log is exact for these.
    exact: PageSet,
}

impl Lineage {
    /// The lineage of a VM that was just restored from `chain`. `exact`: pages that the host makes writable only when
    /// they are written.
    pub fn restored(chain: Arc<Chain>, exact: PageSet) -> Self {
        Lineage { parent: Some(parent_of(&chain)), origin: Some(chain), exact, ..Lineage::default() }
    }

    pub fn origin(&self) -> Option<&Arc<Chain>> {
        self.origin.as_ref()
    }

    /// The snapshot that the VM was restored from, as the parent of a diff taken now; `None` if it was booted.
    ///
    /// # Errors
    /// It is a fork point.
    pub fn origin_parent(&self) -> Result<Option<Parent>, Error> {
        let parent = self.origin.as_ref().map(|chain| parent_of(chain));
        parent.map(|parent| check_lasting(&parent).map(|()| parent.clone())).transpose()
    }

    /// The snapshot that a diff taken now would be a change of.
    ///
    /// # Errors
    /// There is none, or it is a fork point: a diff needs its parent for longer than a fork point lives.
    pub fn parent(&self) -> Result<&Parent, Error> {
        let none = || Error::Diff("this VM has no earlier snapshot; take a full one first".into());
        let parent = self.parent.as_ref().ok_or_else(none)?;
        check_lasting(parent)?;
        Ok(parent)
    }

    /// The pages of `changed` that may only have been read. If KVM finds a page writable, as memory filled for a
    /// restore is, it counts a read as a write.
    pub fn doubtful(&self, changed: &PageSet) -> PageSet {
        match self.origin {
            Some(_) => changed.difference(&self.exact),
            None => PageSet::new(),
        }
    }

    /// Called when the snapshot `id` is found damaged on the disk: no diff may be relative to it.
    pub fn damaged(&mut self, id: SnapshotId) {
        if self.parent.as_ref().is_some_and(|parent| parent.id == id) {
            self.parent = None;
        }
    }

    pub fn is_sealing(&self) -> bool {
        self.in_flight.is_some()
    }

    /// Returns whether [`changed`](Self::changed) and KVM's log together have every change since the restore.
    pub fn is_relative_to_origin(&self) -> bool {
        let origin = self.origin.as_ref().map(|chain| chain.tip().manifest().id);
        self.parent.as_ref().map(|parent| parent.id) == origin && origin.is_some()
    }

    /// Pages known to have changed since the parent, without those still in KVM's log.
    pub fn changed(&self) -> &PageSet {
        &self.changed
    }

    /// Adds pages read from KVM's log. Returns all pages changed since the parent.
    pub fn add_changed(&mut self, pages: &PageSet) -> &PageSet {
        self.changed.union_with(pages);
        &self.changed
    }

    /// Called when the sealing of a snapshot of this instant begins: changes count from now on.
    pub fn begin_seal(&mut self) {
        self.in_flight = Some(std::mem::take(&mut self.changed));
    }

    /// Called when it was sealed: it is the parent of the next diff.
    pub fn seal_done(&mut self, parent: Parent) {
        self.in_flight = None;
        self.parent = Some(parent);
    }

    /// Called when sealing failed: its pages are still changes against the old parent.
    pub fn seal_failed(&mut self) {
        if let Some(pages) = self.in_flight.take() {
            self.changed.union_with(&pages);
        }
    }
}

/// Refuses a parent that ends with the VMs that use it.
fn check_lasting(parent: &Parent) -> Result<(), Error> {
    let why = "this VM was forked, and its fork point ends with the VMs that use it; take a full one first";
    if ForkPoint::has(&parent.location) { Err(Error::Diff(why.into())) } else { Ok(()) }
}

/// The tip of `chain` as the parent of a diff.
fn parent_of(chain: &Chain) -> Parent {
    let tip = chain.tip();
    Parent { id: tip.manifest().id, location: tip.location().clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Gfn, Location};

    fn pages(gfns: &[u64]) -> PageSet {
        gfns.iter().map(|&gfn| Gfn(gfn)).collect()
    }

    #[test]
    fn pages_of_a_failed_snapshot_are_in_the_next_diff() {
        let mut lineage = Lineage::default();
        assert!(lineage.parent().is_err());
        lineage.add_changed(&pages(&[1, 2]));
        lineage.begin_seal();
        assert!(lineage.is_sealing());
        lineage.seal_failed();
        assert_eq!(lineage.add_changed(&pages(&[5])), &pages(&[1, 2, 5]));
        lineage.begin_seal();
        lineage.seal_done(Parent { id: SnapshotId([1; 32]), location: Location::Dir("x".into()) });
        assert!(lineage.parent().is_ok());
        assert_eq!(lineage.add_changed(&pages(&[7])), &pages(&[7]));
        assert!(lineage.doubtful(&pages(&[7])).is_empty(), "memory of a VM that booted was filled by the guest");
        lineage.damaged(SnapshotId([2; 32]));
        assert!(lineage.parent().is_ok());
        lineage.damaged(SnapshotId([1; 32]));
        assert!(lineage.parent().is_err());
    }
}
