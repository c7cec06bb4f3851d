//! Shells: `tvmm` processes that wait to become VMs, or were taken from VMs that have finished. Some are kept ready, so
//! that an invocation does not wait for a process to start.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::control::Control;
use super::line::Console;
use super::process::{Job, Process, Spawner};
use crate::sys::netns::Netns;

/// The past of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It has had no machine.
    None,
    /// It has the machine of a VM that has finished.
    Vm,
}

/// A process that waits to become a VM, or is one.
#[derive(Debug)]
pub struct Shell {
    pub process: Process,
    pub control: Control,
    pub console: Console,
    /// Begin and end of its spawn, ns of CLOCK_MONOTONIC.
    pub spawned_ns: Range<u64>,
    pub past: Past,
}

/// The most network namespaces in which a shell waits.
const MOST_NAMESPACES: usize = 16;
/// Pause between two looks for shells in network namespaces that are gone.
const LOOK: Duration = Duration::from_secs(5);
/// Pause after a shell that could not be started.
const RETRY: Duration = Duration::from_secs(1);

/// A ready shell in a network namespace.
#[derive(Debug)]
struct InNamespace {
    netns: Arc<Netns>,
    shell: Shell,
}

/// The ready shells.
#[derive(Debug)]
pub struct Shells {
    spawner: Spawner,
    /// Those in the daemon's own network namespace.
    ready: Mutex<VecDeque<Shell>>,
    wanted: usize,
    /// Those in other network namespaces, one in each. The first waits longest.
    in_namespaces: Mutex<VecDeque<InNamespace>>,
    /// Network namespaces whose shell was taken, one of each name. Locked before `in_namespaces`.
    emptied: Mutex<VecDeque<Arc<Netns>>>,
    taken: Notify,
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shells {
    pub fn new(spawner: Spawner, wanted: usize) -> Shells {
        Shells {
            spawner,
            ready: Mutex::default(),
            wanted,
            in_namespaces: Mutex::default(),
            emptied: Mutex::default(),
            taken: Notify::new(),
        }
    }

    /// Returns a ready shell in the network namespace, or a new one. From now on a shell waits there.
    pub async fn take_in(&self, netns: Netns) -> io::Result<Shell> {
        let ready = self.ready_in(&netns);
        if self.wanted > 0 {
            let left = Arc::new(netns.try_clone()?);
            let mut emptied = lock(&self.emptied);
            emptied.retain(|other| other.name() != left.name());
            emptied.push_back(left);
            let too_many = emptied.len().saturating_sub(MOST_NAMESPACES);
            emptied.drain(..too_many);
            self.taken.notify_one();
        }
        match ready {
            Some(shell) => Ok(shell),
            None => self.spawn(Some(netns)).await,
        }
    }

    /// Takes the ready shell in the network namespace. One in a former namespace of this name ends.
    fn ready_in(&self, netns: &Netns) -> Option<Shell> {
        let mut waiting = lock(&self.in_namespaces);
        let found = waiting.iter().position(|waiting| waiting.netns.name() == netns.name())?;
        let found = waiting.remove(found)?;
        (found.netns.is_same(netns) && found.shell.process.ended().is_none()).then_some(found.shell)
    }

    /// Ends the ready shell in the network namespace of this name.
    pub fn leave(&self, name: &str) {
        let mut emptied = lock(&self.emptied);
        emptied.retain(|netns| netns.name() != name);
        lock(&self.in_namespaces).retain(|waiting| waiting.netns.name() != name);
    }

    /// Returns a ready shell in the daemon's network namespace, or a new one.
    pub async fn take(&self) -> io::Result<Shell> {
        loop {
            let ready = lock(&self.ready).pop_front();
            self.taken.notify_one();
            match ready {
                Some(shell) if shell.process.ended().is_none() => return Ok(shell),
                // This shell has ended: take the next one.
                Some(_) => {}
                None => return self.spawn(None).await,
            }
        }
    }

    async fn spawn(&self, netns: Option<Netns>) -> io::Result<Shell> {
        let spawned = self.spawner.spawn(Job::Shell { id: "tvmm-serve".into(), netns }).await?;
        let spawned_ns = spawned.spawned_ns.clone();
        let (process, ends) = spawned.watch()?;
        let api = ends.api.ok_or_else(|| io::Error::other("a shell has no API"))?;
        let control = Control::connect(api).await.map_err(io::Error::other)?;
        let console = Console { input: ends.stdin, output: ends.stdout };
        Ok(Shell { process, control, console, spawned_ns, past: Past::None })
    }

    /// Keeps the wanted number ready, for ever.
    pub async fn keep_ready(self: Arc<Self>) {
        loop {
            let filled = self.fill().await;
            self.fill_namespaces().await;
            // A shell keeps its namespace alive, also when the host has removed it.
            lock(&self.in_namespaces).retain(|waiting| is_there(&waiting.netns));
            match filled {
                Ok(()) => drop(tokio::time::timeout(LOOK, self.taken.notified()).await),
                Err(error) => {
                    tracing::warn!(%error, "Cannot start a VM process ahead");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Starts the shells that are missing in the daemon's network namespace.
    async fn fill(&self) -> io::Result<()> {
        while lock(&self.ready).len() < self.wanted {
            let shell = self.spawn(None).await?;
            lock(&self.ready).push_back(shell);
        }
        Ok(())
    }

    /// Starts a shell in each network namespace whose shell was taken.
    async fn fill_namespaces(&self) {
        loop {
            let Some(netns) = lock(&self.emptied).front().cloned() else { return };
            let started = self.start_in(&netns).await;
            let mut emptied = lock(&self.emptied);
            let is_it = |other: &Arc<Netns>| Arc::ptr_eq(other, &netns) || other.is_same(&netns);
            // The namespace was left meanwhile: the shell ends.
            let Some(found) = emptied.iter().position(is_it) else { continue };
            emptied.remove(found);
            match started {
                Ok(Some(shell)) => {
                    let mut waiting = lock(&self.in_namespaces);
                    waiting.push_back(InNamespace { netns, shell });
                    let too_many = waiting.len().saturating_sub(MOST_NAMESPACES);
                    waiting.drain(..too_many);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, namespace = netns.name(), "Cannot start a VM process ahead in a namespace");
                }
            }
        }
    }

    /// Starts a shell in the network namespace, unless one waits there or the namespace is gone.
    async fn start_in(&self, netns: &Netns) -> io::Result<Option<Shell>> {
        let has_one = lock(&self.in_namespaces).iter().any(|waiting| waiting.netns.is_same(netns));
        if has_one || !is_there(netns) {
            return Ok(None);
        }
        self.spawn(Some(netns.try_clone()?)).await.map(Some)
    }

    /// The number of ready shells in the daemon's network namespace.
    pub fn len(&self) -> usize {
        lock(&self.ready).len()
    }

    /// The number of ready shells in other network namespaces.
    pub fn count_in_namespaces(&self) -> usize {
        lock(&self.in_namespaces).len()
    }

    /// Ends the ready shells.
    pub fn clear(&self) {
        lock(&self.ready).clear();
        lock(&self.in_namespaces).clear();
    }
}

/// Returns whether the host has the namespace under its name.
fn is_there(netns: &Netns) -> bool {
    Netns::open(netns.name()).is_ok_and(|now| now.is_same(netns))
}
