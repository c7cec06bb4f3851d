//! Threads that begin at the same moment.

use std::sync::mpsc::channel;
use std::time::Instant;

use crate::sys::errors::{BoxError, refuse};

/// The outcomes of threads that began together.
pub(super) struct Together<T> {
    pub(super) begun: Instant,
    /// In the order of the threads.
    pub(super) outcomes: Vec<Result<T, BoxError>>,
}

/// Runs `one` in `count` threads, each with its index. They begin when all of them are there.
///
/// # Errors
/// A thread cannot be started: then none of them runs `one`.
pub(super) fn together<T: Send>(
    count: usize,
    one: impl Fn(usize) -> Result<T, BoxError> + Sync,
) -> Result<Together<T>, BoxError> {
    let one = &one;
    std::thread::scope(|scope| {
        let mut starts = Vec::new();
        let mut threads = Vec::new();
        for index in 0..count {
            let (start, started) = channel::<()>();
            // The sender of a burst that does not begin is dropped, and its thread ends.
            let run = move || if started.recv().is_ok() { Some(one(index)) } else { None };
            let thread = std::thread::Builder::new().spawn_scoped(scope, run);
            threads.push(thread.map_err(|error| format!("Cannot start a thread for each of {count} VMs: {error}"))?);
            starts.push(start);
        }
        let begun = Instant::now();
        for start in starts {
            // A thread that is gone has panicked, and its join says so.
            let _ = start.send(());
        }
        let outcome = |thread: std::thread::ScopedJoinHandle<'_, Option<Result<T, BoxError>>>| match thread.join() {
            Ok(Some(outcome)) => outcome,
            Ok(None) | Err(_) => refuse("A thread of a measurement has panicked"),
        };
        Ok(Together { begun, outcomes: threads.into_iter().map(outcome).collect() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_have_the_order_of_the_threads_and_a_failure_is_one_of_them() {
        let one = |index: usize| if index == 3 { refuse("three") } else { Ok(index * 2) };
        let outcomes = together(6, one).unwrap().outcomes;
        let texts: Vec<String> = outcomes
            .into_iter()
            .map(|outcome| outcome.map_or_else(|error| error.to_string(), |number| number.to_string()))
            .collect();
        assert_eq!(texts, ["0", "2", "4", "three", "8", "10"]);
    }
}
