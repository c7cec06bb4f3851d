//! Helper threads. The system limits their number (RLIMIT_NPROC, `pids.max` of the cgroup), so the work must get done
//! without them too.

use std::fmt;
use std::io;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::seccomp;

/// Pause between two looks of [`Worker::finish`].
const LOOK: Duration = Duration::from_micros(100);

/// A thread that works until it is asked to stop. Dropping it asks, and joins.
pub struct Worker {
    stop: Box<dyn Fn() + Send + Sync>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `work` on a thread made by `builder`, under the seccomp filter that its name has. `stop` makes `work`
    /// return soon; it may be called several times, and after `work` has returned.
    ///
    /// # Errors
    /// Those of pthread_create(3).
    pub fn start(
        builder: Builder,
        stop: impl Fn() + Send + Sync + 'static,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<Worker> {
        let thread = builder.spawn(move || {
            seccomp::enter_thread();
            work();
        })?;
        Ok(Worker { stop: Box::new(stop), thread: Some(thread) })
    }

    /// True if the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Asks the thread to end, and waits for it until `deadline`. Returns whether it has ended.
    pub fn finish(&self, deadline: Instant) -> bool {
        (self.stop)();
        while !self.has_ended() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// Asks the thread to end, as a drop does, but waits only until `deadline`. A thread that runs longer is left
    /// alone.
    pub fn abandon(mut self, deadline: Instant) {
        self.finish(deadline);
        self.thread = None;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        (self.stop)();
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("Worker").field(&self.thread).finish()
    }
}

/// Runs `work` on `wanted` threads, this one included; on fewer if the system allows no more. `work` takes items from a
/// list that the threads share. Returns the number of threads.
///
/// # Errors
/// The first error of `work`.
pub fn share<E: Send>(name: &str, wanted: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<usize, E> {
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        let own_filter = || {
            seccomp::enter_thread();
            work()
        };
        for _ in 1..wanted {
            match std::thread::Builder::new().name(name.to_string()).spawn_scoped(scope, own_filter) {
                Ok(other) => others.push(other),
                Err(error) => {
                    let threads = others.len() + 1;
                    tracing::warn!(name, wanted, threads, %error, "Fewer threads than wanted can be started");
                    break;
                }
            }
        }
        let threads = others.len() + 1;
        let own = work();
        // A panic of a thread continues here.
        let join = |other: std::thread::ScopedJoinHandle<'_, Result<(), E>>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        others.into_iter().map(join).fold(own, Result::and).map(|()| threads)
    })
}

/// Longer than any process lives.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Makes a runtime that always has a thread for blocking work: tokio panics if it needs one and can start none.
pub fn runtime(builder: &mut tokio::runtime::Builder) -> io::Result<tokio::runtime::Runtime> {
    let runtime = builder.thread_keep_alive(FOR_EVER).build()?;
    let probe = std::thread::Builder::new().name("probe".into()).spawn(|| ())?;
    // It does nothing, so it cannot panic.
    let _ = probe.join();
    drop(runtime.spawn_blocking(|| ()));
    Ok(runtime)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn worker_is_asked_and_waited_for() {
        let (stop, stopped) = channel();
        let has_returned = Arc::new(Mutex::new(false));
        let returned = has_returned.clone();
        let work = move || {
            stopped.recv().unwrap();
            *returned.lock().unwrap() = true;
        };
        // Asked once it has ended, nothing listens any more.
        let ask = move || {
            let _ = stop.send(());
        };
        let worker = Worker::start(Builder::new(), ask, work).unwrap();
        assert!(!worker.has_ended());
        drop(worker);
        assert!(*has_returned.lock().unwrap());
    }

    #[test]
    fn worker_that_does_not_listen_is_left_alone() {
        let (release, released) = channel::<()>();
        let worker = Worker::start(Builder::new(), || (), move || assert!(released.recv().is_err())).unwrap();
        assert!(!worker.finish(Instant::now() + Duration::from_millis(2)));
        worker.abandon(Instant::now());
        drop(release);
    }

    #[test]
    fn threads_share_all_work_and_the_first_error_is_returned() {
        let left = Mutex::new(0..1000);
        let done = Mutex::new(Vec::new());
        let work = || {
            loop {
                let next = left.lock().unwrap().next();
                match next {
                    Some(700) => return Err("700"),
                    Some(number) => done.lock().unwrap().push(number),
                    None => return Ok(()),
                }
            }
        };
        assert_eq!(share("test", 1, work), Err("700"));
        assert_eq!(done.lock().unwrap().len(), 700);
        assert_eq!(share("test", 4, work), Ok(4));
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..1000).filter(|number| *number != 700).collect::<Vec<_>>());
    }
}
