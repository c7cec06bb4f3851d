//! Waits for a peer, a process or a lock: never without a limit, and logged when they take long.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time after which a wait is logged.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// A wait for one unit of progress: a chunk, an answer, a line of a guest. Bytes that do not complete a unit do not
/// prolong it. After a second a log line names the object of the wait and its limit.
#[derive(Debug)]
pub struct Wait {
    /// Completes "Waiting for …".
    what: Arc<str>,
    limit: Duration,
    began: Instant,
    is_told: bool,
}

impl Wait {
    /// Begins to wait for `what`, `limit` at most.
    pub fn new(what: impl Into<Arc<str>>, limit: Duration) -> Wait {
        Wait { what: what.into(), limit, began: Instant::now(), is_told: false }
    }

    /// A whole unit has come: the next one has the full time again.
    pub fn restart(&mut self) {
        self.began = Instant::now();
    }

    /// The time spent on this unit.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// True if the time is over. The waiting thread calls this from time to time; it logs the wait when it has become
    /// long.
    pub fn is_over(&mut self) -> bool {
        self.tell();
        self.elapsed() >= self.limit
    }

    /// Logs the wait, once, if it has become long.
    pub fn tell(&mut self) {
        if self.elapsed() >= TOLD_AFTER && !self.is_told {
            self.is_told = true;
            tracing::warn!("Waiting for {}, at most {} s", self.what, self.limit.as_secs_f64());
        }
    }

    /// Waits for an answer; `None` if the time is over before it comes.
    pub async fn answered<T>(&mut self, answer: impl Future<Output = T>) -> Option<T> {
        let mut answer = std::pin::pin!(answer);
        loop {
            match tokio::time::timeout(self.step(), answer.as_mut()).await {
                Ok(answer) => return Some(answer),
                Err(_) if self.is_over() => return None,
                Err(_) => {}
            }
        }
    }

    /// The longest that a blocking call may wait before the thread must call [`Wait::is_over`] again.
    pub fn step(&self) -> Duration {
        let elapsed = self.elapsed();
        let next = if self.is_told || self.limit < TOLD_AFTER { self.limit } else { TOLD_AFTER };
        // A call that may wait for no time at all would spin, or be refused (SO_RCVTIMEO).
        next.saturating_sub(elapsed).max(Duration::from_millis(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_ends_after_its_limit_unless_a_unit_comes() {
        let mut wait = Wait::new("nothing", Duration::from_millis(40));
        assert!(!wait.is_over());
        std::thread::sleep(Duration::from_millis(50));
        assert!(wait.is_over());
        wait.restart();
        assert!(wait.elapsed() < wait.limit() || wait.is_over());
        assert!(wait.step() <= wait.limit());
    }

    #[test]
    fn long_wait_is_looked_at_after_a_second_and_at_its_end() {
        let mut wait = Wait::new("nothing", Duration::from_secs(3600));
        assert!(wait.step() <= TOLD_AFTER);
        wait.is_told = true;
        assert!(wait.step() > TOLD_AFTER);
        assert!(!wait.is_over());
    }
}
