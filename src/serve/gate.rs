//! Limits on concurrency: running invocations, and waiting ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::fault::Fault;

/// Admits some invocations, lets some wait, and turns away the rest.
#[derive(Debug)]
pub(super) struct Gate {
    running: Arc<Semaphore>,
    max_running: usize,
    queued: AtomicUsize,
    max_queue: usize,
}

/// Gives the place in the queue back, however the wait ends.
struct QueuePlace<'a>(&'a AtomicUsize);

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Gate {
    pub(super) fn new(max_running: usize, max_queue: usize) -> Gate {
        Gate { running: Arc::new(Semaphore::new(max_running)), max_running, queued: AtomicUsize::new(0), max_queue }
    }

    /// Waits for a turn, first come first served.
    pub(super) async fn enter(&self, patience: Duration) -> Result<OwnedSemaphorePermit, Fault> {
        if let Ok(permit) = self.running.clone().try_acquire_owned() {
            return Ok(permit);
        }
        if self.queued.fetch_add(1, Ordering::Relaxed) >= self.max_queue {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            let message = format!("{} invocations run and {} wait: try again later.", self.max_running, self.max_queue);
            return Err(Fault::busy(message));
        }
        let _queued = QueuePlace(&self.queued);
        match tokio::time::timeout(patience, self.running.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(Fault::new(StatusCode::SERVICE_UNAVAILABLE, "The service is stopping.")),
            Err(_) => {
                Err(Fault::busy(format!("It was not this invocation's turn within {} ms.", patience.as_millis())))
            }
        }
    }

    /// Returns a turn if one is free and no invocation waits for one.
    pub(super) fn free_turn(&self) -> Option<OwnedSemaphorePermit> {
        let is_free = self.queued.load(Ordering::Relaxed) == 0;
        is_free.then(|| self.running.clone().try_acquire_owned().ok()).flatten()
    }

    /// Admits no further invocation.
    pub(super) fn close(&self) {
        self.running.close();
    }

    /// Numbers of running and of waiting invocations.
    pub(super) fn load(&self) -> (usize, usize) {
        (self.max_running.saturating_sub(self.running.available_permits()), self.queued.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_lets_some_run_some_wait_and_turns_away_the_rest() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let gate = Arc::new(Gate::new(1, 1));
            let first = gate.enter(Duration::from_secs(1)).await.unwrap();
            let second = tokio::spawn({
                let gate = gate.clone();
                async move { gate.enter(Duration::from_secs(60)).await.map(drop) }
            });
            tokio::task::yield_now().await;
            assert_eq!(gate.load(), (1, 1));
            assert_eq!(gate.enter(Duration::from_secs(1)).await.unwrap_err().retry_after_s, Some(1));
            drop(first);
            second.await.unwrap().unwrap();
            let held = gate.enter(Duration::from_secs(1)).await.unwrap();
            assert!(gate.enter(Duration::from_millis(5)).await.is_err(), "patience ends");
            assert_eq!(gate.load(), (1, 0));
            drop(held);
            gate.close();
            assert!(gate.enter(Duration::from_secs(1)).await.is_err());
        });
    }
}
