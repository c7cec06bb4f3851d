//! A limit on requests a second.

use std::sync::{Mutex, PoisonError};

use tokio::time::{Duration, Instant};

/// Admits `per_s` requests a second, and as many at once after a pause.
#[derive(Debug)]
pub(super) struct Rate {
    per_s: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Requests that are admitted at once.
    left: f64,
    since: Instant,
}

impl Rate {
    pub(super) fn new(per_s: u32) -> Rate {
        Rate { per_s, state: Mutex::new(State { left: f64::from(per_s), since: Instant::now() }) }
    }

    /// Takes a place for a request. Returns the seconds, rounded up, until there is one if all are taken.
    pub(super) fn take(&self) -> Option<u32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let per_s = f64::from(self.per_s);
        state.left = per_s.min(state.left + per_s * now.duration_since(state.since).as_secs_f64());
        state.since = now;
        if state.left < 1.0 {
            let wait = Duration::from_secs_f64((1.0 - state.left) / per_s);
            return Some(wait.as_secs() as u32 + 1);
        }
        state.left -= 1.0;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back_with_time() {
        let rate = Rate::new(2);
        assert_eq!([rate.take(), rate.take()], [None, None]);
        rate.state.lock().unwrap().left = 0.0;
        assert_eq!(rate.take(), Some(1));
        // Half a second brings one place.
        rate.state.lock().unwrap().since -= Duration::from_millis(500);
        assert_eq!(rate.take(), None);
        // No pause brings more than one second's places.
        rate.state.lock().unwrap().since -= Duration::from_secs(3600);
        rate.take();
        assert!(rate.state.lock().unwrap().left <= 1.0);
    }
}
