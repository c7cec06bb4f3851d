//! The fork of a VM: its children are VMs of their own, each a process, that go on from the same instant.
//!
//! The parent is captured into a fork point, and each child restores that, with its own sockets, taps and drives. The
//! memory file is mapped private, so that parent's and children's pages are in the page cache once until a child writes
//! them. Nothing ties a child to its parent afterwards.

mod child;

use std::io::{self, PipeReader, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use self::child::{Child, end_all};
use crate::config::control::{Forked, LiveTaken, Reply, Respond};
use crate::config::fork::{ForkCounts, ForkRequest};
use crate::config::refusal::Refused;
use crate::config::{ChildSpec, VmConfig};
use crate::session::Error;
use crate::snapshot::{ForkPoint, Location, PAGE_SIZE, create_new, create_private_dir};
use crate::sys::{reap, worker};
use crate::vmm::capture::{Captured, ReadBackWhen};

/// News of the thread that carries a fork out.
pub enum ForkNews {
    /// The fork point was written, or could not be.
    PointOver,
    /// All children answer, or none is left.
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

/// Children that are restored at once: enough to keep the host's CPUs busy while some wait.
const THREADS: usize = 8;

/// The machine to fork.
pub struct ForkParent<'a> {
    pub id: &'a str,
    pub config: &'a VmConfig,
    pub fault_timeout: Duration,
}

/// A fork that was checked, and whose fork point has its place.
pub struct Fork {
    point: ForkPoint,
    children: Vec<ChildSpec>,
    id: String,
    fault_timeout: Duration,
    copies_drives: bool,
    stays_paused: bool,
    began: Instant,
    /// Time for which the parent stood still.
    pub stood_still: Duration,
    /// The course of a live capture.
    pub live: Option<LiveTaken>,
}

impl Fork {
    /// Checks a request, and makes the directory of the fork point. Fork points there that no VM uses are removed.
    pub fn prepare(request: &ForkRequest, parent: &ForkParent<'_>) -> Result<Fork, Refused> {
        let began = Instant::now();
        let devices = &parent.config.devices;
        let mut children = request.children(devices).map_err(|error| Refused::bad_request_because(&error))?;
        let copies_drives = request.copies_drives(devices);
        let dir = std::path::absolute(request.fork_dir()).map_err(|error| Refused::internal_because(&error))?;
        let point = ForkPoint::create(&dir).map_err(|error| Refused::bad_request_because(&error))?;
        for child in &mut children {
            child.load.snapshot_path = point.snapshot();
            child.load.track_dirty_pages = parent.config.machine.track_dirty_pages;
            if copies_drives && child.load.tvmm.drive_dir.is_none() {
                child.load.tvmm.drive_dir = Some(point.dir().join(format!("drives-{}", child.number)));
            }
        }
        Ok(Fork {
            point,
            children,
            id: parent.id.to_owned(),
            fault_timeout: parent.fault_timeout,
            copies_drives,
            stays_paused: request.paused,
            began,
            stood_still: Duration::ZERO,
            live: None,
        })
    }

    /// The place of the fork point's snapshot.
    pub fn target(&self) -> Location {
        Location::Dir(self.point.snapshot())
    }

    /// Returns whether the fork point gets copies of the drives that the guest can write.
    pub fn copies_drives(&self) -> bool {
        self.copies_drives
    }

    /// Seals the fork point, starts the children and waits for their ends, all on a thread of its own.
    pub fn spawn(self, captured: Captured, tell: impl Fn(ForkNews) + Send + 'static) -> Result<(), Refused> {
        let spawned = std::thread::Builder::new().name("fork".into()).spawn(move || {
            let sealed = captured.unsynced().seal(ReadBackWhen::Later);
            tell(ForkNews::PointOver);
            let started = match sealed {
                Ok((sealed, _)) => self.start(sealed.pages_held * PAGE_SIZE),
                Err(error) => Err(error.into()),
            };
            match started {
                Ok((forked, processes)) => {
                    tell(ForkNews::Over(Ok(forked)));
                    reap::all(processes);
                }
                Err(error) => tell(ForkNews::Over(Err(error))),
            }
        });
        let failed = |error| Refused::internal(format!("Cannot start the thread that starts the children: {error}"));
        spawned.map(drop).map_err(failed)
    }

    /// Starts the children from the sealed fork point, and returns when all of them answer. Their processes are the
    /// caller's to reap.
    ///
    /// # Errors
    /// The reason why the first child failed; then all children have ended, and the fork point is removed.
    fn start(self, memory_bytes: u64) -> Result<(Forked, Vec<process::Child>), Error> {
        let started = Mutex::new(Started::default());
        let (reader, mut writer) = io::pipe().map_err(Error::os("make a pipe"))?;
        // One write of a byte for each child: either all of them live on without this process, or none.
        let bytes = vec![1; self.children.len()];
        let result = self.start_all(&started, &reader);
        let result = result.and_then(|()| writer.write_all(&bytes).map_err(Error::os("write to the children")));
        let Started { mut children, made } = started.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = result {
            end_all(children);
            // Their copies of drives.
            made.iter().for_each(|dir| drop(std::fs::remove_dir_all(dir)));
            return Err(error);
        }
        children.sort_by_key(Child::number);
        let point = self.point.keep();
        let forked = Forked {
            fork_point: point.dir().to_owned(),
            memory_bytes,
            stood_still_us: self.stood_still.as_micros() as u64,
            total_us: self.began.elapsed().as_micros() as u64,
            live: self.live,
            children: children.iter().map(Child::answer).collect(),
        };
        Ok((forked, children.into_iter().map(Child::into_process).collect()))
    }

    /// Starts all children. None of them runs before all are restored.
    fn start_all(&self, started: &Mutex<Started>, parent: &PipeReader) -> Result<(), Error> {
        let left = Mutex::new(self.children.iter());
        self.share(|| {
            loop {
                let Some(spec) = next(&left) else { return Ok(()) };
                let restored = self.start_one(spec, started, parent);
                if restored.is_err() {
                    // The other threads start no more.
                    while next(&left).is_some() {}
                    return restored;
                }
            }
        })?;
        if self.stays_paused {
            return Ok(());
        }
        let mut started = lock(started);
        let left = Mutex::new(started.children.iter_mut());
        self.share(|| {
            loop {
                let Some(child) = next(&left) else { return Ok(()) };
                child.resume()?;
            }
        })
    }

    fn share(&self, work: impl Fn() -> Result<(), Error> + Sync) -> Result<(), Error> {
        worker::share("fork", self.children.len().min(THREADS), work).map(drop)
    }

    /// Starts a child, and waits until it is restored.
    fn start_one(&self, spec: &ChildSpec, started: &Mutex<Started>, parent: &PipeReader) -> Result<(), Error> {
        if let Some(dir) = spec.load.tvmm.drive_dir.as_deref().filter(|dir| !dir.exists()) {
            let failed = |source| Error::File { doing: "make", path: dir.to_owned(), source };
            create_private_dir(dir).map_err(failed)?;
            lock(started).made.push(dir.to_owned());
        }
        let config = self.point.dir().join(format!("child-{}.json", spec.number));
        write_config(&config, spec)?;
        let id = format!("{}-{}", self.id, spec.number);
        let failed = |source| Error::File { doing: "start the child for", path: spec.socket.clone(), source };
        let mut child = Child::spawn(spec, id, &config, self.fault_timeout, parent).map_err(failed)?;
        let restored = child.wait_until_restored();
        lock(started).children.push(child);
        restored
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
