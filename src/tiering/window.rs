//! The windows of requests after which a VM gives back memory that no request has touched.
//!
//! The runtime's pages are tried once, after the first request. The function's own pages (bucket `init`) are tried at
//! the end of each window; a window is twice as long as the one before, until the bucket shrinks at a steady rate.
//! Pages that the guest has written stay. The end of a window is put off while looking at touched pages has cost more
//! than its share of the VM's life. Everything here is a pure function of counts and times; `docs/idle.md` has the
//! rules.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::snapshot::Bucket;

/// A window shrinks its bucket at the rate of the one before, if the rates differ by no more than this.
const STEADY: f64 = 1.0 / 16.0;
/// The longest window, requests.
const LONGEST: u32 = 1024;

/// The part of a VM's life that the ends of its windows may take: one in so many.
const LIFE_SHARE: u32 = 100;

/// The time that the ends of a VM's windows have taken, rewinds included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrackingCost(Duration);

impl TrackingCost {
    /// Adds the time that the end of a window took.
    pub fn add(&mut self, took: Duration) {
        self.0 += took;
    }

    /// Returns how long a VM must have lived to end another window.
    pub fn life_needed(self) -> Duration {
        self.0 * LIFE_SHARE
    }
}

/// The fate of a VM's window after a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AfterRequest {
    /// The window goes on.
    Nothing,
    /// The window has had its requests, and goes on because its end would cost too much. Told once for each window.
    PutOff,
    /// The window ends: untouched pages of these buckets are to be given back.
    Shrink(Vec<Bucket>),
}

/// The pages of the bucket `init` at the end of a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowEnd {
    /// Pages that were given back now.
    pub given: u64,
    /// Pages given back before that were touched since the restore.
    pub recalled_ever: u64,
    /// Pages that are in local memory.
    pub local: u64,
    /// Pages that were given back, now or before, and were not touched since.
    pub away: u64,
}

/// The windows of one VM since its restore, or since a rewind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Windows {
    is_first: bool,
    /// Length of the present window, requests; `None`: the bucket's rate is steady, and it is tried no more.
    length: Option<u32>,
    /// Requests in the present window.
    requests: u32,
    /// The end of the present window was put off.
    is_put_off: bool,
    /// The share of the bucket that the last window gave back.
    rate: Option<f64>,
    /// Pages given back before that were touched up to the end of the last window.
    recalled_ever: u64,
}

impl Default for Windows {
    fn default() -> Self {
        Windows { is_first: true, length: Some(1), requests: 0, is_put_off: false, rate: None, recalled_ever: 0 }
    }
}

impl Windows {
    /// Called after a request at whose end no window may end: the window goes on.
    pub fn go_on(&mut self) {
        self.requests = self.requests.saturating_add(1);
    }

    /// Called after a request to a VM that has lived for `life`, and whose windows have cost `cost`.
    pub fn after_request(&mut self, cost: TrackingCost, life: Duration) -> AfterRequest {
        self.go_on();
        let mut due = Vec::new();
        if self.is_first {
            due.push(Bucket::Runtime);
        }
        if self.length.is_some_and(|length| self.requests >= length) {
            due.push(Bucket::Init);
        }
        if due.is_empty() {
            return AfterRequest::Nothing;
        }
        if life < cost.life_needed() {
            let was_put_off = std::mem::replace(&mut self.is_put_off, true);
            return if was_put_off { AfterRequest::Nothing } else { AfterRequest::PutOff };
        }
        self.is_first = false;
        self.is_put_off = false;
        AfterRequest::Shrink(due)
    }

    /// Called when the pages of the bucket `init` were given back; `None`: nothing could be. Returns the pages given
    /// back before that were touched in this window.
    pub fn ended(&mut self, end: Option<WindowEnd>) -> u64 {
        let unchanged = WindowEnd { recalled_ever: self.recalled_ever, ..WindowEnd::default() };
        let end = end.unwrap_or(unchanged);
        let recalled = end.recalled_ever.saturating_sub(self.recalled_ever);
        let size = (end.local + end.away).max(1);
        let rate = end.given.saturating_sub(recalled) as f64 / size as f64;
        let is_steady = self.rate.is_some_and(|last| (last - rate).abs() <= STEADY);
        self.rate = Some(rate);
        self.recalled_ever = end.recalled_ever;
        self.requests = 0;
        self.length = self.length.map(|length| length * 2).filter(|length| !is_steady && *length <= LONGEST);
        recalled
    }

    /// Returns whether no pages will be given back any more.
    pub fn are_over(&self) -> bool {
        !self.is_first && self.length.is_none()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The buckets to shrink after a request, if that costs nothing.
    fn due(windows: &mut Windows) -> Vec<Bucket> {
        match windows.after_request(TrackingCost::default(), Duration::ZERO) {
            AfterRequest::Nothing => Vec::new(),
            AfterRequest::PutOff => panic!("nothing was spent"),
            AfterRequest::Shrink(buckets) => buckets,
        }
    }

    /// The numbers of the requests after which each bucket was tried, when the windows end as `ends` says.
    fn tried(requests: u32, mut end: impl FnMut(usize) -> WindowEnd) -> (Vec<u32>, Vec<u32>, Windows) {
        let mut windows = Windows::default();
        let mut runtime = Vec::new();
        let mut init = Vec::new();
        for request in 1..=requests {
            for bucket in due(&mut windows) {
                match bucket {
                    Bucket::Runtime => runtime.push(request),
                    Bucket::Init => {
                        windows.ended(Some(end(init.len())));
                        init.push(request);
                    }
                    Bucket::Execution => panic!("written pages stay"),
                }
            }
        }
        (runtime, init, windows)
    }

    #[test]
    fn windows_grow_until_the_rate_is_steady() {
        let ends = |ends: &'static [[u64; 4]]| {
            move |at: usize| {
                let [given, recalled_ever, local, away] = ends[at.min(ends.len() - 1)];
                WindowEnd { given, recalled_ever, local, away }
            }
        };
        // Copies that were preloaded: all leave at once, and show their file afterwards.
        let (runtime, init, windows) = tried(500, ends(&[[1000, 0, 0, 1000], [0, 300, 0, 700], [2, 310, 3, 692]]));
        assert_eq!(runtime, [1]);
        assert_eq!(init, [1, 3, 7]);
        assert!(windows.are_over());
        // Memory that a service brings: those of the first request are tried, and some come back to stay.
        let (_, init, windows) =
            tried(500, ends(&[[300, 0, 700, 300], [650, 10, 60, 940], [20, 610, 640, 360], [10, 615, 635, 365]]));
        assert_eq!(init, [1, 3, 7, 15]);
        assert!(windows.are_over());
        // The rate is never steady: the longest window is the last.
        let (_, init, windows) = tried(3000, |at| {
            let given = if at % 2 == 0 { 900 } else { 0 };
            WindowEnd { given, recalled_ever: 0, local: 100, away: 900 }
        });
        assert_eq!(init, [1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047]);
        assert!(windows.are_over());
        let mut refused = Windows::default();
        assert_eq!(due(&mut refused).len(), 2);
        assert_eq!(refused.ended(None), 0);
        assert!(!refused.are_over() && due(&mut refused).is_empty());
    }

    #[test]
    fn a_window_that_may_not_end_ends_after_the_first_request_that_lets_it() {
        let mut windows = Windows::default();
        (0..9).for_each(|_| windows.go_on());
        assert_eq!(due(&mut windows), [Bucket::Runtime, Bucket::Init]);
        windows.ended(Some(WindowEnd { given: 100, recalled_ever: 0, local: 0, away: 100 }));
        windows.go_on();
        assert_eq!(due(&mut windows), [Bucket::Init], "the second window has two requests");
    }

    #[test]
    fn a_window_whose_end_costs_too_much_goes_on_until_it_does_not() {
        let ms = Duration::from_millis;
        let mut cost = TrackingCost::default();
        let mut windows = Windows::default();
        assert_eq!(windows.after_request(cost, ms(0)), AfterRequest::Shrink(vec![Bucket::Runtime, Bucket::Init]));
        windows.ended(Some(WindowEnd { given: 100, recalled_ever: 0, local: 0, away: 100 }));
        cost.add(ms(20));
        assert_eq!(windows.after_request(cost, ms(1900)), AfterRequest::Nothing);
        assert_eq!(windows.after_request(cost, ms(1950)), AfterRequest::PutOff);
        assert_eq!(windows.after_request(cost, ms(1999)), AfterRequest::Nothing, "it is told once");
        assert_eq!(windows.after_request(cost, ms(2000)), AfterRequest::Shrink(vec![Bucket::Init]));
        windows.ended(Some(WindowEnd { given: 0, recalled_ever: 0, local: 0, away: 100 }));
        cost.add(ms(20));
        (0..3).for_each(|_| assert_eq!(windows.after_request(cost, ms(2100)), AfterRequest::Nothing));
        assert_eq!(windows.after_request(cost, ms(2100)), AfterRequest::PutOff, "once for each window");
        // A rewind begins anew, but what was spent is spent, and the runtime's pages wait as well.
        let mut windows = Windows::default();
        assert_eq!(windows.after_request(cost, ms(3000)), AfterRequest::PutOff);
        assert_eq!(windows.after_request(cost, ms(4000)), AfterRequest::Shrink(vec![Bucket::Runtime, Bucket::Init]));
    }

    proptest! {
        #[test]
        fn the_runtime_is_tried_once_and_the_function_seldom(
            ends in prop::collection::vec((0_u64..5000, 0_u64..5000, 0_u64..5000, 0_u64..5000), 1..20),
            requests in 1_u32..5000,
        ) {
            let (runtime, init, windows) = tried(requests, |at| {
                let (given, recalled_ever, local, away) = ends[at % ends.len()];
                WindowEnd { given, recalled_ever, local, away }
            });
            prop_assert_eq!(runtime, vec![1]);
            prop_assert!(init.len() as u32 <= requests.ilog2() + 1);
            // A window follows the one before, and is twice as long.
            prop_assert!(init.windows(2).all(|pair| pair[1] == 2 * pair[0] + 1));
            if windows.are_over() {
                let mut later = windows;
                prop_assert!((0..100).all(|_| due(&mut later).is_empty()));
            }
        }

        #[test]
        fn ends_of_windows_take_their_share_and_no_more_than_one_of_them_beyond(
            pauses_ms in prop::collection::vec(0_u64..2000, 1..500),
            took_ms in 1_u64..200,
        ) {
            let mut windows = Windows::default();
            let mut cost = TrackingCost::default();
            let mut life = Duration::ZERO;
            for pause in pauses_ms {
                life += Duration::from_millis(pause);
                if matches!(windows.after_request(cost, life), AfterRequest::Shrink(_)) {
                    windows.ended(None);
                    cost.add(Duration::from_millis(took_ms));
                }
                prop_assert!(cost.0 <= life / LIFE_SHARE + Duration::from_millis(took_ms));
            }
        }
    }
}
