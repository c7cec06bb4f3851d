//! `catalyzer`: overlay memory (Du et al., "Catalyzer: Sub-millisecond Startup for Serverless Computing with
//! Initialization-less Booting", ASPLOS 2020). The base mapping, the function's image, is mapped and shared by all
//! instances; an instance's private pages come into being over it when it writes. Nothing is copied ahead.
//!
//! Differences in tvmm: Catalyzer restores gVisor sandboxes, keeps the base as page tables that instances share, and
//! re-establishes I/O when it is first used; a tvmm guest's devices are part of the machine state, which is small. Here
//! the base mapping is the layer's file in place, in huge folios where it has them, and the private pages are the
//! kernel's copy-on-write. As long as all tiers are files its plan is that of `trenv`.

use super::facts::PolicyFacts;
use super::place;
use crate::snapshot::PlannedExtent;

pub fn plan(facts: &PolicyFacts) -> Vec<PlannedExtent> {
    place::by_content(facts.resolved, |extent, source| facts.in_place(extent, source))
}
