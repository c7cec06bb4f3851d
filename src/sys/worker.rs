//! Helper threads. The system limits their number (RLIMIT_NPROC, `pids.max` of the cgroup), so the work must get done
//! without them too.

use std::io;
use std::time::Duration;

/// Runs `work` on `wanted` threads, this one included; on fewer if the system allows no more. `work` takes items from a
/// list that the threads share. Returns the number of threads.
///
/// # Errors
/// The first error of `work`.
pub fn share<E: Send>(name: &str, wanted: usize, work: impl Fn() -> Result<(), E> + Sync) -> Result<usize, E> {
    std::thread::scope(|scope| {
        let mut others = Vec::new();
        for _ in 1..wanted {
            match std::thread::Builder::new().name(name.to_string()).spawn_scoped(scope, &work) {
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
    use std::sync::Mutex;

    use super::*;

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
