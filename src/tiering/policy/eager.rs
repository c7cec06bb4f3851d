//! `eager`: the whole image is read into local DRAM before the guest runs, as QEMU and Cloud Hypervisor restore by
//! default. No fault costs more than an anonymous page; start-up pays for pages nobody will touch. Zero pages are not
//! read: they are anonymous memory.

use crate::snapshot::{Chain, Content, Error, Placement, PlannedExtent};

pub fn plan(chain: &Chain) -> Result<Vec<PlannedExtent>, Error> {
    let place = |run: crate::snapshot::ResolvedRun| match run.content {
        Content::Zero => PlannedExtent::zero(run.extent),
        Content::Layer(source) => PlannedExtent::from(run.extent, Placement::Preload, source),
    };
    Ok(chain.resolve()?.into_iter().map(place).collect())
}
