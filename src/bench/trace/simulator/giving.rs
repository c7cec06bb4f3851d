//! VMs that serve requests by the policy `ladder` give memory back at the end of each window.

use std::time::Duration;

use crate::bench::trace::costs::WindowCosts;
use crate::tiering::window::{AfterRequest, TrackingCost, Windows};

/// The windows of one VM since its restore.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Giving {
    windows: Windows,
    /// The time that the ends of windows have taken.
    cost: TrackingCost,
    /// The time of the first answer, µs.
    answered_us: Option<f64>,
    /// The time at which the last window's end began, µs.
    begun_us: f64,
    /// Windows that have ended.
    ended: usize,
    /// It gives memory back at present: its requests count for no window.
    is_giving: bool,
    /// No request has touched what the last window has given back.
    is_untouched: bool,
}

impl Giving {
    /// Called after an answer at `now_us`. Returns the costs of the window that ends now; `None`: none does, or none
    /// was measured.
    pub(super) fn after_request<'a>(&mut self, costs: &'a [WindowCosts], now_us: f64) -> Option<&'a WindowCosts> {
        if self.is_giving {
            return None;
        }
        // The VM is a little older, as its first request took its time.
        let life = since(*self.answered_us.get_or_insert(now_us), now_us);
        if !matches!(self.windows.after_request(self.cost, life), AfterRequest::Shrink(_)) {
            return None;
        }
        let window = costs.get(self.ended).or(costs.last())?;
        self.is_giving = true;
        self.begun_us = now_us;
        Some(window)
    }

    /// Called when the VM has given memory back. Returns the costs of the window that has ended.
    pub(super) fn ended<'a>(&mut self, costs: &'a [WindowCosts], now_us: f64) -> Option<&'a WindowCosts> {
        self.is_giving = false;
        self.cost.add(since(self.begun_us, now_us));
        self.is_untouched = true;
        // A window beyond those that were measured gives nothing back.
        let window = costs.get(self.ended);
        self.windows.ended(window.map(|window| window.pages));
        self.ended += 1;
        window
    }

    /// Called when a request begins. Returns the costs of the last window, if the request is the first one after it.
    pub(super) fn touched<'a>(&mut self, costs: &'a [WindowCosts]) -> Option<&'a WindowCosts> {
        if !std::mem::take(&mut self.is_untouched) {
            return None;
        }
        costs.get(self.ended.checked_sub(1)?)
    }
}

/// The time between two moments.
fn since(before_us: f64, now_us: f64) -> Duration {
    Duration::from_micros((now_us - before_us).max(0.0) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::trace::samples::{Samples, Work};
    use crate::tiering::window::WindowEnd;

    fn window(mib: f64, given: u64, away: u64) -> WindowCosts {
        let times = Samples::of(vec![Work { ms: mib, cpu_ms: 1.0 }]).unwrap();
        let pages = WindowEnd { given, recalled_ever: 0, local: 1000 - away, away };
        WindowCosts { give: times.clone(), pages, mib, request: times, after_mib: mib + 1.0 }
    }

    #[test]
    fn windows_end_as_in_the_service_until_the_rate_is_steady() {
        let costs = [window(9.0, 800, 800), window(8.0, 100, 900), window(7.0, 90, 990)];
        let mut giving = Giving::default();
        let mut ends = Vec::new();
        for request in 1..100 {
            let now_us = f64::from(request) * 1e6;
            let touched = giving.touched(&costs).map(|window| window.mib);
            assert_eq!(touched.is_some(), ends.last().is_some_and(|(last, _)| last + 1 == request), "{request}");
            if giving.after_request(&costs, now_us).is_some() {
                assert!(giving.after_request(&costs, now_us).is_none(), "requests meanwhile do not count");
                ends.push((request, giving.ended(&costs, now_us + 1e4).unwrap().mib));
            }
        }
        assert_eq!(ends, [(1, 9.0), (3, 8.0), (7, 7.0)]);
        // One that was measured for too short a time goes on without a change.
        let mut giving = Giving::default();
        assert!(giving.after_request(&costs[..1], 0.0).is_some());
        assert!(giving.ended(&costs[..1], 1e6).is_some());
        assert_eq!(giving.after_request(&costs[..1], 2e6), None);
        assert!(giving.after_request(&costs[..1], 99e6).is_none(), "it is put off until its second is 1 % of the life");
        assert!(giving.after_request(&costs[..1], 100e6).is_some());
        assert_eq!((giving.ended(&costs[..1], 101e6), giving.touched(&costs[..1])), (None, None));
        assert!(Giving::default().after_request(&[], 0.0).is_none(), "nothing was measured");
    }
}
