//! The threads and handles that work on guest memory while the guest runs.

use crate::memory::Error;
use crate::memory::background::BackgroundWork;
use crate::memory::comparison::Comparison;
use crate::memory::external_handler::ExternalHandler;
use crate::memory::fault_batches::FaultBatch;
use crate::memory::fault_service::{FaultCounters, FaultCounts, FaultService};
use crate::memory::spill::Spill;
use crate::memory::verify::Verifier;
use crate::sys::uffd::Uffd;
use crate::tiering::cold::{ColdCounts, ColdPool};
use crate::tiering::tier::Tier;
use std::sync::Arc;
use std::time::Instant;

/// The services of guest memory while the guest runs. They end when dropped.
#[derive(Default)]
pub struct MemoryServices {
    /// Dropped first: a closed pool wakes the threads that wait for it.
    pub(crate) cold: Option<CloseCold>,
    pub(crate) verifier: Option<Verifier>,
    pub(crate) background: Option<BackgroundWork>,
    pub(crate) service: Option<FaultService>,
    pub(crate) handler: Option<ExternalHandler>,
    pub(crate) spill: Option<Spill>,
    pub(crate) uffd: Option<Arc<Uffd>>,
    pub(crate) counters: Arc<FaultCounters>,
    /// The tiers that guest memory is mapped from; they must not change while this lives.
    pub(crate) tiers_held: Vec<Arc<dyn Tier>>,
    /// Keeps the kernel from mapping neighbours of touched pages while it lives.
    pub(crate) single_pages: Option<Uffd>,
}

impl MemoryServices {
    /// The tiers that guest memory was restored from.
    pub fn tiers(&self) -> &[Arc<dyn Tier>] {
        &self.tiers_held
    }

    /// Returns the times at which the fault service was busy.
    pub fn fault_batches(&self) -> Vec<FaultBatch> {
        self.counters.batches()
    }

    pub fn fault_counts(&self) -> FaultCounts {
        self.counters.counts()
    }

    /// Returns whether pages that the guest can read from images are still being compared with their checksums.
    pub fn is_comparing(&self) -> bool {
        self.comparison().is_some_and(Comparison::is_under_way)
    }

    /// The comparison of images with their checksums; `None` if there is nothing to compare.
    pub fn comparison(&self) -> Option<&Comparison> {
        self.background.as_ref().map(BackgroundWork::comparison)
    }

    pub fn cold_counts(&self) -> Option<ColdCounts> {
        self.cold.as_ref().map(|cold| cold.0.counts())
    }

    /// The pages that have left local memory for a file.
    pub fn spill(&self) -> Option<&Spill> {
        self.spill.as_ref()
    }

    /// The share of memory that has been compared with checksums, for reports.
    pub fn verification(&self) -> serde_json::Value {
        self.verifier.as_ref().map(Verifier::json).unwrap_or_default()
    }

    /// Returns whether lazy memory is no longer served: threads that wait for it wait for ever.
    pub fn have_failed(&self) -> bool {
        self.service.as_ref().is_some_and(FaultService::has_failed)
            || self.handler.as_ref().is_some_and(ExternalHandler::has_failed)
            || self.spill.as_ref().is_some_and(Spill::has_failed)
    }

    pub fn maps_single_pages(&self) -> bool {
        self.single_pages.is_some()
    }

    /// Asks all threads to end and waits until `deadline`. An error names the thread that still waits for memory in the
    /// kernel.
    pub fn finish(&self, deadline: Instant) -> Result<(), Error> {
        self.cold.iter().for_each(|cold| cold.0.close());
        if !self.background.as_ref().is_none_or(|work| work.finish(deadline)) {
            return Err(Error::Stuck("background thread"));
        }
        if !self.service.as_ref().is_none_or(|service| service.finish(deadline)) {
            return Err(Error::Stuck("fault service"));
        }
        if !self.spill.as_ref().is_none_or(|spill| spill.finish(deadline)) {
            return Err(Error::Stuck("thread of the spill"));
        }
        Ok(())
    }
}

/// Closes a cold pool when the machine is dropped.
pub(crate) struct CloseCold(pub(crate) Arc<ColdPool>);

impl Drop for CloseCold {
    fn drop(&mut self) {
        self.0.close();
    }
}
