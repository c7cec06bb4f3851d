//! The memory of a VM that serves requests: it gives back what the requests of a window have not touched.

use std::time::Instant;

use super::Vm;
use super::control::ControlError;
use crate::config::control::{BarrierSet, Demoted};
use crate::config::request::{BarrierRequest, DemoteRequest};
use crate::snapshot::{Bucket, ByBucket, PAGE_SIZE};
use crate::tiering::window::{self, WindowEnd};

/// The end of a window. Until this is dropped no other window of the VM ends.
pub struct EndOfWindow<'a> {
    vm: &'a Vm,
    buckets: Vec<Bucket>,
}

/// The windows of a VM after a request.
pub enum AfterRequest<'a> {
    /// The window goes on.
    Nothing,
    /// It goes on beyond its requests, because its end would cost too much.
    PutOff,
    End(EndOfWindow<'a>),
}

/// Memory at the end of a window, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shrunk {
    /// Given back now.
    pub given: u64,
    /// Given back before, and touched in this window.
    pub recalled: u64,
    /// In local memory afterwards.
    pub local: u64,
    /// Given back, now or before, and not touched since.
    pub away: u64,
}

impl Vm {
    /// Counts a request for the window, and ends the window if it may end and has had its requests.
    pub fn end_window(&self, may_end: bool) -> AfterRequest<'_> {
        let mut usage = self.lock();
        if usage.is_shrinking {
            return AfterRequest::Nothing;
        }
        if !may_end {
            usage.windows.go_on();
            return AfterRequest::Nothing;
        }
        let cost = usage.tracking;
        match usage.windows.after_request(cost, self.made.elapsed()) {
            window::AfterRequest::Nothing => AfterRequest::Nothing,
            window::AfterRequest::PutOff => AfterRequest::PutOff,
            window::AfterRequest::Shrink(buckets) => {
                usage.is_shrinking = true;
                AfterRequest::End(EndOfWindow { vm: self, buckets })
            }
        }
    }
}

impl Drop for EndOfWindow<'_> {
    fn drop(&mut self) {
        self.vm.lock().is_shrinking = false;
    }
}

impl EndOfWindow<'_> {
    /// Gives back pages that no request has touched since the restore. The guest runs meanwhile.
    pub async fn shrink(self) -> Result<Shrunk, ControlError> {
        let begun = Instant::now();
        let shrunk = self.try_shrink().await;
        let mut usage = self.vm.lock();
        // The VM works for a part of this time, and serves requests meanwhile. So its share is an upper bound.
        usage.tracking.add(begun.elapsed());
        // A VM that refuses is asked again at the end of the next window.
        let recalled = usage.windows.ended(shrunk.as_ref().ok().copied());
        drop(usage);
        shrunk.map(|end| Shrunk {
            given: end.given * PAGE_SIZE,
            recalled: recalled * PAGE_SIZE,
            local: end.local * PAGE_SIZE,
            away: end.away * PAGE_SIZE,
        })
    }

    async fn try_shrink(&self) -> Result<WindowEnd, ControlError> {
        let request = DemoteRequest { cold: true, buckets: self.buckets.clone(), ..DemoteRequest::default() };
        let demoted: Demoted = self.vm.send("PUT", "/tvmm/demote", &request).await?;
        // No barrier is set: all touches since the restore count.
        let request = BarrierRequest { keep: true, ..BarrierRequest::default() };
        let set: BarrierSet = self.vm.send("PUT", "/tvmm/barrier", &request).await?;
        let ByBucket { runtime, init, .. } = set.buckets;
        Ok(WindowEnd {
            given: demoted.pages_dropped + demoted.pages_mapped,
            recalled_ever: runtime.recalled + init.recalled,
            local: runtime.local + init.local,
            away: runtime.away + init.away,
        })
    }
}
