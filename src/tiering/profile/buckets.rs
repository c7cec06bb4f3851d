//! Classifies pages by the layer of the chain that holds them.

use crate::snapshot::{Content, PageOrigin, PageSet, ResolvedRun};

/// The pages of a guest by origin (FaaSMem's buckets): a chain's base is the booted runtime, later layers have the
/// pages changed by the function's initialisation, and pages that no layer holds are first written while a request is
/// executed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Buckets {
    /// Held by the base layer.
    pub runtime: PageSet,
    /// Held by a later layer.
    pub init: PageSet,
    /// Held by no layer: zero until the function writes them.
    pub execution: PageSet,
}

impl Buckets {
    /// All pages of the guest, from [`Chain::resolve`](crate::snapshot::Chain::resolve).
    pub fn of(runs: &[ResolvedRun]) -> Buckets {
        let mut buckets = Buckets::default();
        for run in runs {
            let bucket = match run.content {
                Content::Zero => &mut buckets.execution,
                Content::Bytes(source) if source.origin == PageOrigin::Layer(0) => &mut buckets.runtime,
                Content::Bytes(_) => &mut buckets.init,
            };
            bucket.insert_run(run.extent);
        }
        buckets
    }

    /// Only the pages of `pages`.
    #[must_use]
    pub fn within(&self, pages: &PageSet) -> Buckets {
        Buckets {
            runtime: self.runtime.intersection(pages),
            init: self.init.intersection(pages),
            execution: self.execution.intersection(pages),
        }
    }
}

/// The pages that some layer holds: those that are not zero in the snapshot.
pub fn nonzero(runs: &[ResolvedRun]) -> PageSet {
    runs.iter().filter(|run| run.content != Content::Zero).map(|run| run.extent).collect()
}
