//! The watch for memory that does not come: a layer on a file system that hangs, or a page-fault handler that lives and
//! does not answer.
//!
//! A thread blocked in the kernel cannot be called back. So a thread of its own looks a few times per time-out whether
//! some thread has waited for memory for too long, and ends the VM with the reason:
//!
//! | waiting thread | sign |
//! |---|---|
//! | the fault service, the background thread | they note what they read, and since when |
//! | a vCPU, on a handler outside | the userfaultfd has waiters (`/proc/self/fdinfo`), and no page has come |
//! | the device thread, on a handler outside | it notes the pages it gives back, and since when |
//! | a vCPU, on a mapped file | its thread sleeps uninterruptibly and has not run |
//! | the main thread | in a page fault, it has not run; during a restore or a rewind, no thread has run |
//!
//! The same thread ends a VM whose memory may not be its own any more, when a lease reports that ([`Stalls::end`]).
//!
//! If the main loop does not take the reason (the main loop may be the waiting thread), this thread ends the process.

mod handler;
mod threads;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

pub use handler::HandlerProbe;

use super::ending::{Ending, EndingSignal};
use crate::memory::Error;
use crate::snapshot::{Extent, PageOrigin, PageSource};
use crate::sys::logging;
use crate::sys::lost::CANNOT_GO_ON;
use crate::sys::worker::Worker;
use threads::SleepingThreads;

/// Looks of the watch within one time-out.
const LOOKS: u32 = 4;
/// Time for the main loop to take the reason, write its report and end the process.
const GRACE: Duration = Duration::from_secs(5);

/// Work of a VMM thread for the guest.
#[derive(Clone, Copy, Debug)]
enum Work {
    Reads(Option<PageSource>),
    /// Reads pages that were spilled.
    Recalls,
    /// Gives pages back; a handler outside must read the notification.
    GivesBack,
}

/// The work of a VMM thread for the guest, and its start.
#[derive(Clone, Copy, Debug)]
struct Reading {
    pages: Extent,
    work: Work,
    since: Instant,
}

/// A VMM thread notes its work for the guest here.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Mutex<Option<Reading>>>);

impl Activity {
    /// Notes that the thread reads `pages`, until the result is dropped.
    pub fn reads(&self, pages: Extent, source: Option<PageSource>) -> impl Drop + use<> {
        self.begin(pages, Work::Reads(source))
    }

    /// Notes that the thread reads `pages` from a spill file, until the result is dropped.
    pub fn recalls(&self, pages: Extent) -> impl Drop + use<> {
        self.begin(pages, Work::Recalls)
    }

    /// Notes that the thread gives `pages` back to the host, until the result is dropped.
    pub fn gives_back(&self, pages: Extent) -> impl Drop + use<> {
        self.begin(pages, Work::GivesBack)
    }

    fn begin(&self, pages: Extent, work: Work) -> ReadingGuard {
        *lock(&self.0) = Some(Reading { pages, work, since: Instant::now() });
        ReadingGuard(self.clone())
    }

    fn now(&self) -> Option<Reading> {
        *lock(&self.0)
    }
}

/// Ends the reading when it is dropped.
struct ReadingGuard(Activity);

impl Drop for ReadingGuard {
    fn drop(&mut self) {
        *lock(&self.0.0) = None;
    }
}

/// Ends the work of the main thread when it is dropped.
struct MainWork(Arc<Stalls>);

impl Drop for MainWork {
    fn drop(&mut self) {
        lock(&self.0.state).main_work = None;
    }
}

/// The watch's state, and the reason once the VM has waited for too long.
#[derive(Debug)]
pub struct Stalls {
    limit: Duration,
    reason: OnceLock<String>,
    state: Mutex<State>,
    stop: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stopped: bool,
    /// The work of the main thread on memory; `None`: the main loop runs, and listens for an ending.
    main_work: Option<&'static str>,
    /// A reason reported by another thread ([`Stalls::end`]).
    told: Option<String>,
    /// The files of the plan.
    sources: BTreeMap<PageOrigin, PathBuf>,
    activities: Vec<Activity>,
    handler: Option<HandlerProbe>,
    ending: Option<Arc<EndingSignal>>,
    /// The ending signal that fails the restore of a machine whose memory a handler outside serves.
    rescue: Option<Arc<EndingSignal>>,
}

impl Stalls {
    /// Returns a slot in which a thread notes its reads.
    pub fn activity(&self) -> Activity {
        let activity = Activity::default();
        lock(&self.state).activities.push(activity.clone());
        activity
    }

    /// Names the files that pages come from.
    pub fn name_sources(&self, sources: BTreeMap<PageOrigin, PathBuf>) {
        lock(&self.state).sources = sources;
    }

    /// Returns the time that a guest may wait for a page.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Watches a page-fault handler outside. While the machine is restored, `rescue` releases the threads that wait for
    /// it.
    pub fn watch_handler(&self, probe: HandlerProbe, rescue: Arc<EndingSignal>) {
        let mut state = lock(&self.state);
        state.handler = Some(probe);
        state.rescue = Some(rescue);
    }

    /// Called when the machine is restored: from now on the main loop is told.
    pub fn restored(&self, ending: Arc<EndingSignal>) {
        let mut state = lock(&self.state);
        state.ending = Some(ending);
        state.main_work = None;
    }

    /// Notes that the main thread does `work` to memory, and cannot listen, until the result is dropped.
    pub fn main_thread_does(self: &Arc<Self>, work: &'static str) -> impl Drop + use<> {
        lock(&self.state).main_work = Some(work);
        MainWork(self.clone())
    }

    /// Ends the guest for this reason.
    pub fn end(&self, reason: String) {
        lock(&self.state).told.get_or_insert(reason);
        self.stop.notify_all();
    }

    /// Returns whether the VM has waited for too long: its waiting threads will not come back.
    pub fn is_stalled(&self) -> bool {
        self.reason.get().is_some()
    }

    fn look(&self, threads: &mut SleepingThreads) -> Option<String> {
        let now = Instant::now();
        let mut state = lock(&self.state);
        if state.told.is_some() {
            return state.told.clone();
        }
        if let Some(reason) = state.stalled_activity(now, self.limit) {
            return Some(reason);
        }
        let handler = state.handler.as_mut().and_then(|probe| probe.look(now, self.limit));
        if handler.is_some() {
            return handler;
        }
        let waits = threads.look(now, self.limit, state.main_work)?;
        let seconds = self.limit.as_secs_f64();
        Some(format!("{waits} has waited {seconds} s (--fault-timeout) for a page of {}", state.mapped_files()))
    }

    /// Looks until told to stop, or until a thread has waited for too long.
    fn watch(&self) {
        let mut threads = SleepingThreads::default();
        let every = self.limit / LOOKS;
        let reason = loop {
            let state = lock(&self.state);
            let idle = |state: &mut State| !state.stopped && state.told.is_none();
            if self.stop.wait_timeout_while(state, every, idle).is_ok_and(|(state, _)| state.stopped) {
                return;
            }
            if let Some(reason) = self.look(&mut threads) {
                break reason;
            }
        };
        let reason = self.reason.get_or_init(|| reason);
        let state = lock(&self.state);
        if let Some(ending) = if state.main_work.is_some() { &state.rescue } else { &state.ending } {
            ending.end(Ending::Failed(reason.clone()));
            let (state, _) = self
                .stop
                .wait_timeout_while(state, GRACE, |state| !state.stopped)
                .unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                return;
            }
        }
        give_up(reason);
    }
}

impl State {
    /// The reason, if a thread's activity has taken `limit` at `now`.
    fn stalled_activity(&self, now: Instant, limit: Duration) -> Option<String> {
        let mut readings = self.activities.iter().filter_map(Activity::now);
        let stalled = readings.find(|reading| now.saturating_duration_since(reading.since) >= limit)?;
        Some(self.describe(stalled, limit.as_secs_f64()))
    }

    fn describe(&self, reading: Reading, seconds: f64) -> String {
        let pages = reading.pages;
        let source = match reading.work {
            Work::Reads(source) => source,
            Work::Recalls => {
                let gpa = pages.gpa();
                return format!(
                    "Reading the page at guest-physical {gpa:#x} from the spill file has taken {seconds} s \
                     (--fault-timeout): its disk hangs"
                );
            }
            Work::GivesBack => {
                return format!(
                    "Giving back {} KiB at guest-physical {:#x} has taken {seconds} s (--fault-timeout): the \
                     page-fault handler does not read that they are gone",
                    pages.bytes() / 1024,
                    pages.gpa()
                );
            }
        };
        let from = match source.map(|source| (source, self.sources.get(&source.origin))) {
            Some((source, Some(path))) => format!("{} at offset {:#x}", path.display(), source.offset),
            _ => "memory".to_string(),
        };
        let kib = pages.bytes() / 1024;
        let gpa = pages.gpa();
        format!(
            "Reading {kib} KiB for the page at guest-physical {gpa:#x} from {from} has taken {seconds} s \
             (--fault-timeout): the source hangs"
        )
    }

    fn mapped_files(&self) -> String {
        let paths: Vec<String> = self.sources.values().map(|path| path.display().to_string()).collect();
        match paths.split_last() {
            None => "the snapshot: the source hangs".to_string(),
            Some((only, [])) => format!("{only}: the source hangs"),
            Some((last, others)) => format!("{} or {last}: the source hangs", others.join(", ")),
        }
    }
}

/// Ends the process: a thread waits in the kernel and cannot be called back.
pub fn give_up(reason: &str) -> ! {
    crate::sys::terminal::restore();
    logging::say(&format!("tvmm: {CANNOT_GO_ON}: {reason}"));
    std::process::exit(1);
}

/// The thread of the watch. Ends when dropped.
pub struct StallWatch {
    stalls: Arc<Stalls>,
    _worker: Worker,
}

impl StallWatch {
    /// Watches a restore from now on.
    pub fn start(limit: Duration) -> Result<Self, Error> {
        let stalls = Arc::new(Stalls {
            limit,
            reason: OnceLock::new(),
            state: Mutex::new(State { main_work: Some("restore"), ..State::default() }),
            stop: Condvar::new(),
        });
        let watched = stalls.clone();
        let told = stalls.clone();
        let stop = move || {
            lock(&told.state).stopped = true;
            told.stop.notify_all();
        };
        let builder = Builder::new().name("stalls".into()).stack_size(128 * 1024);
        let worker = Worker::start(builder, stop, move || watched.watch());
        let worker = worker.map_err(Error::os("start the thread that watches for stalls"))?;
        Ok(StallWatch { stalls, _worker: worker })
    }

    pub fn stalls(&self) -> &Arc<Stalls> {
        &self.stalls
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Gfn;

    #[test]
    fn reading_that_takes_too_long_ends_the_guest_with_page_source_and_limit() {
        let watch = StallWatch::start(Duration::from_millis(80)).unwrap();
        let ending = Arc::new(EndingSignal::new().unwrap());
        let stalls = watch.stalls();
        stalls.name_sources(BTreeMap::from([
            (PageOrigin::Layer(0), "/base".into()),
            (PageOrigin::Layer(1), "/diff".into()),
        ]));
        stalls.restored(ending.clone());
        let activity = stalls.activity();
        let source = Some(PageSource::layer(1, 0x5000));
        let _reading = activity.reads(Extent { first: Gfn(7), pages: 16 }, source);
        let deadline = Instant::now() + Duration::from_secs(20);
        let reason = loop {
            match ending.take() {
                Some(Ending::Failed(reason)) => break reason,
                _ => assert!(Instant::now() < deadline, "the stall goes unnoticed"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        for part in ["64 KiB", "0x7000", "/diff at offset 0x5000", "0.08 s"] {
            assert!(reason.contains(part), "{reason}");
        }
        assert!(stalls.is_stalled());
    }

    #[test]
    fn many_short_reads_are_no_long_one() {
        let activity = Activity::default();
        let state = State { activities: vec![activity.clone()], ..Default::default() };
        let limit = Duration::from_secs(3600);
        // The test says what time it is, so a slow host changes nothing.
        let mut now = Instant::now();
        for _ in 0..20 {
            now += limit - Duration::from_nanos(1);
            let reading = activity.reads(Extent { first: Gfn(7), pages: 16 }, None);
            lock(&activity.0).as_mut().unwrap().since = now;
            for (elapsed, is_stalled) in
                [(Duration::ZERO, false), (limit - Duration::from_nanos(1), false), (limit, true)]
            {
                let reason = state.stalled_activity(now + elapsed, limit);
                assert_eq!(reason.is_some(), is_stalled, "{elapsed:?}: {reason:?}");
            }
            drop(reading);
            assert_eq!(state.stalled_activity(now + 2 * limit, limit), None, "no thread reads");
        }
    }

    #[test]
    fn what_somebody_else_has_found_out_ends_the_guest_at_once() {
        let watch = StallWatch::start(Duration::from_secs(3600)).unwrap();
        let ending = Arc::new(EndingSignal::new().unwrap());
        watch.stalls().restored(ending.clone());
        watch.stalls().end("it is gone".to_string());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match ending.take() {
                Some(Ending::Failed(reason)) => break assert_eq!(reason, "it is gone"),
                _ => assert!(Instant::now() < deadline, "nobody is told"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
