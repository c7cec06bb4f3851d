//! `firecracker`: the memory file is mapped private and pages come from the page cache when they are touched
//! (Firecracker `docs/snapshotting/snapshot-support.md`, `mem_backend` File: `MAP_PRIVATE | MAP_NORESERVE`, no prefault).
//!
//! Where tvmm differs: Firecracker merges diffs into one file before it loads it; here a chain is mapped as it is, one
//! mapping for each run of pages that one layer holds.

use crate::snapshot::{Chain, Content, Error, PageSource, Placement, PlannedExtent};

pub fn plan(chain: &Chain) -> Result<Vec<PlannedExtent>, Error> {
    let layout = &chain.tip().manifest().layout;
    if chain.layers().len() == 1 {
        // One mapping per range, zero pages included: holes of the file. The page map need not even be read.
        let whole = layout.ranges().iter().map(|range| {
            PlannedExtent::from(range.extent(), Placement::CowFile, PageSource { layer: 0, offset: range.file_offset })
        });
        return Ok(whole.collect());
    }
    let place = |run: crate::snapshot::ResolvedRun| match run.content {
        Content::Zero => PlannedExtent::zero(run.extent),
        Content::Layer(source) => PlannedExtent::from(run.extent, Placement::CowFile, source),
    };
    Ok(chain.resolve()?.into_iter().map(place).collect())
}
