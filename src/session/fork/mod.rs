//! The fork of a VM: its children are VMs of their own, each a process, that go on from the same instant.
//!
//! The parent is captured into a fork point, and each child restores that, with its own sockets, taps and drives. The
//! memory file is mapped private, so that parent's and children's pages are in the page cache once until a child writes
//! them. Nothing ties a child to its parent afterwards.

mod child;
mod copies;
mod line;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process;
use std::slice;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use serde_json::json;

use self::child::{Child, end_all};
use self::copies::Copies;
use self::line::ParentEnd;
pub use self::line::{ChildEnd, Heard, Order, Step};
use crate::config::control::{Forked, LiveTaken, Reply, Respond};
use crate::config::fork::{ForkCounts, ForkRequest};
use crate::config::refusal::Refused;
use crate::config::{ChildSpec, VmConfig};
use crate::session::Error;
use crate::snapshot::{ForkPoint, Location, PAGE_SIZE, PageSet, create_new, create_private_dir};
use crate::sys::bounded_wait::Wait;
use crate::sys::worker::Worker;
use crate::sys::{reap, worker};
use crate::vmm::capture::{Captured, ReadBackWhen};

/// News of the thread that carries a fork out.
pub enum ForkNews {
    /// The fork point was written, or could not be.
    PointOver,
    /// All children are restored and told to run, or none is left.
    Over(Result<Forked, Error>),
}

/// The forks of one machine, one at a time.
#[derive(Default)]
pub struct Forks {
    reply: Option<Respond>,
    counts: ForkCounts,
}

impl Forks {
    /// Refuses a fork while another is under way.
    pub fn check_free(&self) -> Result<(), Refused> {
        match self.reply {
            Some(_) => {
                Err(Refused::bad_request("Cannot fork the VM: it is being forked. Ask again after that answer."))
            }
            None => Ok(()),
        }
    }

    pub fn is_under_way(&self) -> bool {
        self.reply.is_some()
    }

    /// The place of a fork's requester: it is answered when the fork is over.
    pub fn reply_mut(&mut self) -> &mut Option<Respond> {
        &mut self.reply
    }

    /// Counts a fork that is over, and answers its request.
    pub fn finish(&mut self, result: Result<Forked, Error>) {
        match &result {
            Ok(forked) => {
                self.counts.done += 1;
                self.counts.children += forked.children.len() as u64;
            }
            Err(_) => self.counts.failed += 1,
        }
        if let Some(respond) = self.reply.take() {
            respond(result.map(Reply::Forked).map_err(|error| Refused::bad_request_because(&error)));
        }
    }

    pub fn counts(&self) -> ForkCounts {
        self.counts
    }
}

/// The children that were started, and the directories made for them.
#[derive(Default)]
struct Started {
    children: Vec<Child>,
    made: Vec<PathBuf>,
}

/// Children that are started at once: enough to keep the host's CPUs busy while some wait.
const THREADS: usize = 8;
/// Time without a child that is restored after which a fork fails.
const RESTORE_LIMIT: Duration = Duration::from_secs(120);
/// Longest wait for a child, while the parent is captured, between two looks whether that is over.
const CAPTURE_LOOK: Duration = Duration::from_millis(10);

/// The machine to fork.
pub struct ForkParent<'a> {
    pub id: &'a str,
    pub config: &'a VmConfig,
    pub fault_timeout: Duration,
    /// The pages that the process has copies of; needed for children that copy some of them.
    pub own_pages: PageSet,
}

/// A fork that was checked. Its fork point has its place, and a thread starts the children, which wait for it. If this
/// is dropped, the children end and the fork point is removed.
pub struct Fork {
    target: Location,
    copies_drives: bool,
    /// Emptied when the capture is handed over, or the fork is given up.
    sender: Arc<Mutex<Option<Sender<Taken>>>>,
    thread: Worker,
}

/// The capture of the parent.
struct Taken {
    captured: Captured,
    /// Time for which the parent stood still.
    stood_still: Duration,
    /// The course of a live capture.
    live: Option<LiveTaken>,
}

impl Fork {
    /// Checks a request, makes the directory of the fork point, and begins to start the children. Fork points there
    /// that no VM uses are removed. `tell` is called by the thread that carries the fork out.
    pub fn begin(
        request: &ForkRequest,
        parent: ForkParent<'_>,
        tell: impl Fn(ForkNews) + Send + Sync + 'static,
    ) -> Result<Fork, Refused> {
        let began = Instant::now();
        let devices = &parent.config.devices;
        let mut children = request.children(devices).map_err(|error| Refused::bad_request_because(&error))?;
        let copies_drives = request.copies_drives(devices);
        let dir = std::path::absolute(request.fork_dir()).map_err(|error| Refused::internal_because(&error))?;
        let point = ForkPoint::create(&dir).map_err(|error| Refused::bad_request_because(&error))?;
        let most_bytes = request.dram_mib.saturating_mul(1 << 20);
        let copies = (most_bytes > 0).then_some(Copies { pages: parent.own_pages, most_bytes });
        for child in &mut children {
            child.load.snapshot_path = point.snapshot();
            if copies.is_some() {
                child.load.tvmm.policy = None;
                child.load.tvmm.plan = Some(point.dir().join(PLAN));
            }
            child.load.track_dirty_pages = parent.config.machine.track_dirty_pages;
            if copies_drives && child.load.tvmm.drive_dir.is_none() {
                child.load.tvmm.drive_dir = Some(point.dir().join(format!("drives-{}", child.number)));
            }
        }
        let target = Location::Dir(point.snapshot());
        let failed = |what| move |error| Refused::internal(format!("Cannot fork the VM: cannot make {what}: {error}"));
        let work = Work {
            line: ParentEnd::new().map_err(failed("a pair of sockets"))?,
            started: Mutex::default(),
            point,
            count: children.len(),
            id: parent.id.to_owned(),
            fault_timeout: parent.fault_timeout,
            stays_paused: request.paused,
            copies,
            began,
        };
        let (sender, taken) = channel();
        let sender = Arc::new(Mutex::new(Some(sender)));
        let stop = sender.clone();
        let stop = move || drop(lock(&stop).take());
        let thread = Worker::start(Builder::new().name("fork".into()), stop, move || {
            work.run(&children, &taken, tell);
        });
        let thread = thread.map_err(failed("the thread that starts the children"))?;
        Ok(Fork { target, copies_drives, sender, thread })
    }

    /// The place of the fork point's snapshot.
    pub fn target(&self) -> Location {
        self.target.clone()
    }

    /// Returns whether the fork point gets copies of the drives that the guest can write.
    pub fn copies_drives(&self) -> bool {
        self.copies_drives
    }

    /// Leaves the rest to the thread: it seals the fork point, lets the children restore it and waits for their ends.
    pub fn hand_over(self, captured: Captured, stood_still: Duration, live: Option<LiveTaken>) {
        if let Some(sender) = lock(&self.sender).take() {
            // The thread takes it, whatever became of the children.
            let _ = sender.send(Taken { captured, stood_still, live });
        }
        self.thread.abandon(Instant::now());
    }
}

/// The name of the children's plan in the fork point, if they copy pages.
const PLAN: &str = "plan";

/// Sizes of a fork point.
#[derive(Clone, Copy, Default)]
struct Sizes {
    /// Bytes of memory in it.
    memory_bytes: u64,
    /// Bytes that each child copies before it runs.
    copied_bytes: u64,
}

/// Specs of children that no thread has started yet.
type Left<'a> = Mutex<slice::Iter<'a, ChildSpec>>;

/// The work of a fork's thread.
struct Work {
    point: ForkPoint,
    line: ParentEnd,
    started: Mutex<Started>,
    /// The number of children.
    count: usize,
    id: String,
    fault_timeout: Duration,
    stays_paused: bool,
    copies: Option<Copies>,
    began: Instant,
}

impl Work {
    fn run(self, specs: &[ChildSpec], taken: &Receiver<Taken>, tell: impl Fn(ForkNews) + Sync) {
        let left = Mutex::new(specs.iter());
        let mut early = None;
        let begun = self.start_beside_capture(&left, taken, &mut early);
        // Also if a child has failed: the fork point cannot be removed while the parent's memory is written to it.
        let Some(Taken { captured, stood_still, live }) = early.or_else(|| taken.recv().ok()) else {
            return self.give_up();
        };
        let result = match begun {
            Ok(()) => self.finish(captured, &left, &tell),
            Err(error) => {
                drop(captured);
                tell(ForkNews::PointOver);
                Err(error)
            }
        };
        let sizes = match result {
            Ok(sizes) => sizes,
            Err(error) => {
                self.give_up();
                return tell(ForkNews::Over(Err(error)));
            }
        };
        let mut children = self.started.into_inner().unwrap_or_else(PoisonError::into_inner).children;
        children.sort_by_key(Child::number);
        let forked = Forked {
            fork_point: self.point.keep().dir().to_owned(),
            memory_bytes: sizes.memory_bytes,
            copied_bytes: sizes.copied_bytes,
            stood_still_us: stood_still.as_micros() as u64,
            total_us: self.began.elapsed().as_micros() as u64,
            live,
            children: children.iter().map(Child::answer).collect(),
        };
        tell(ForkNews::Over(Ok(forked)));
        drop(self.line);
        reap::all(children.into_iter().map(Child::into_process).collect::<Vec<process::Child>>());
    }

    /// Starts children until the capture is there, which is put to `early`, or all children wait. The capture keeps a
    /// CPU, because the parent stands still for it.
    fn start_beside_capture(
        &self,
        left: &Left<'_>,
        taken: &Receiver<Taken>,
        early: &mut Option<Taken>,
    ) -> Result<(), Error> {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let at_once = cpus.saturating_sub(1).clamp(1, THREADS);
        let mut starting = BTreeSet::new();
        loop {
            match taken.try_recv() {
                Ok(taken) => {
                    *early = Some(taken);
                    return Ok(());
                }
                Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => {}
            }
            if starting.len() >= at_once {
                self.hear(Step::Waits, &mut starting, CAPTURE_LOOK)?;
                continue;
            }
            let Some(spec) = next(left) else { return Ok(()) };
            starting.insert(self.start_one(spec)?);
        }
    }

    /// Seals the fork point, starts the children that are left, and waits until all are restored.
    ///
    /// # Errors
    /// The reason why the first child failed.
    fn finish(&self, captured: Captured, left: &Left<'_>, tell: &(impl Fn(ForkNews) + Sync)) -> Result<Sizes, Error> {
        let to_start = lock(left).len();
        let captured = Mutex::new(Some(captured));
        let point_sizes = Mutex::new(Sizes::default());
        worker::share("fork", (1 + to_start).min(THREADS), || {
            let captured = lock(&captured).take();
            let sealed = captured.map(|captured| self.seal(captured, tell)).transpose();
            let done = sealed.and_then(|sizes| {
                sizes.into_iter().for_each(|sizes| *lock(&point_sizes) = sizes);
                self.start_all(left)
            });
            if done.is_err() {
                // The other threads start no more.
                while next(left).is_some() {}
            }
            done
        })?;
        self.await_restored()?;
        let order = if self.stays_paused { Order::StayPaused } else { Order::Run };
        self.order(order)?;
        Ok(*lock(&point_sizes))
    }

    /// Seals the fork point, and lets the children restore it.
    fn seal(&self, captured: Captured, tell: &impl Fn(ForkNews)) -> Result<Sizes, Error> {
        let sealed = captured.unsynced().seal(ReadBackWhen::Later);
        tell(ForkNews::PointOver);
        let (sealed, _) = sealed?;
        let plan = |copies: &Copies| copies.write_plan(&sealed.location, &self.point.dir().join(PLAN));
        let copied_bytes = self.copies.as_ref().map_or(Ok(0), plan)?;
        self.order(Order::Restore)?;
        Ok(Sizes { memory_bytes: sealed.pages_held * PAGE_SIZE, copied_bytes })
    }

    fn order(&self, order: Order) -> Result<(), Error> {
        self.line.order(order, self.count).map_err(Error::os("write to the children"))
    }

    fn start_all(&self, left: &Left<'_>) -> Result<(), Error> {
        while let Some(spec) = next(left) {
            self.start_one(spec)?;
        }
        Ok(())
    }

    /// Starts a child. Returns the id of its process.
    fn start_one(&self, spec: &ChildSpec) -> Result<u32, Error> {
        if let Some(dir) = spec.load.tvmm.drive_dir.as_deref().filter(|dir| !dir.exists()) {
            let failed = |source| Error::File { doing: "make", path: dir.to_owned(), source };
            create_private_dir(dir).map_err(failed)?;
            lock(&self.started).made.push(dir.to_owned());
        }
        let config = self.point.dir().join(format!("child-{}.json", spec.number));
        write_config(&config, spec)?;
        let id = format!("{}-{}", self.id, spec.number);
        let failed = |source| Error::File { doing: "start the child for", path: spec.socket.clone(), source };
        let child = Child::spawn(spec, id, &config, self.fault_timeout, &self.line).map_err(failed)?;
        let pid = child.pid();
        lock(&self.started).children.push(child);
        Ok(pid)
    }

    /// Waits until all children are restored. None of them runs before.
    fn await_restored(&self) -> Result<(), Error> {
        let mut left: BTreeSet<u32> = lock(&self.started).children.iter().map(Child::pid).collect();
        let mut wait = Wait::new("the children of a fork to be restored", RESTORE_LIMIT);
        while !left.is_empty() {
            let before = left.len();
            self.hear(Step::Restored, &mut left, wait.step())?;
            if left.len() < before {
                wait.restart();
            } else if wait.is_over() {
                let mut started = lock(&self.started);
                let late = started.children.iter_mut().find(|child| left.contains(&child.pid()));
                return late.map_or(Ok(()), |child| Err(child.failure()));
            }
        }
        // A child that has ended since it was restored is found here.
        self.hear(Step::Restored, &mut left, Duration::ZERO)
    }

    /// Waits for news of the children, `limit` at most, and takes those that have reached `step` off `awaited`.
    ///
    /// # Errors
    /// The reason why a child has ended.
    fn hear(&self, step: Step, awaited: &mut BTreeSet<u32>, limit: Duration) -> Result<(), Error> {
        let mut started = lock(&self.started);
        let failed = || Error::os("listen to the children");
        let ended = self.line.wait(started.children.iter().map(Child::end), limit).map_err(failed())?;
        if let Some(index) = ended {
            return Err(started.children[index].failure());
        }
        let news = self.line.news().map_err(failed())?;
        for news in news.iter().filter(|news| news.step == step) {
            awaited.remove(&news.pid);
        }
        Ok(())
    }

    /// Ends the children, and removes what was made for them.
    fn give_up(self) {
        let Started { children, made } = self.started.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Children that wait for the fork point end with the line.
        drop(self.line);
        end_all(children);
        // Their copies of drives.
        made.iter().for_each(|dir| drop(std::fs::remove_dir_all(dir)));
    }
}

/// Takes the next item of a list that threads share.
fn next<T>(left: &Mutex<impl Iterator<Item = T>>) -> Option<T> {
    lock(left).next()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the config by which a child restores the fork point. It has the child's metadata, and is its owner's only.
fn write_config(path: &Path, spec: &ChildSpec) -> Result<(), Error> {
    let text = json!({ "snapshot-load": spec.load }).to_string();
    let failed = |source| Error::File { doing: "write", path: path.to_owned(), source };
    create_new(path)?.write_all(text.as_bytes()).map_err(failed)
}
