//! Shells: `tvmm` processes that wait to become VMs. Some are kept ready, so that an invocation does not wait for a
//! process to start.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::control::Control;
use super::line::Console;
use super::process::{Job, Process, Spawner};
use crate::sys::netns::Netns;

/// A process that waits to become a VM.
#[derive(Debug)]
pub struct Shell {
    pub process: Process,
    pub control: Control,
    pub console: Console,
    /// Begin and end of its spawn, ns of CLOCK_MONOTONIC.
    pub spawned_ns: Range<u64>,
}

/// The ready shells.
#[derive(Debug)]
pub struct Shells {
    spawner: Spawner,
    ready: Mutex<VecDeque<Shell>>,
    wanted: usize,
    taken: Notify,
}

impl Shells {
    pub fn new(spawner: Spawner, wanted: usize) -> Shells {
        Shells { spawner, ready: Mutex::new(VecDeque::new()), wanted, taken: Notify::new() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Shell>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a ready shell, or a new one. Ready shells are in the daemon's network namespace.
    pub async fn take(&self, netns: Option<Netns>) -> io::Result<Shell> {
        if netns.is_some() {
            return self.spawn(netns).await;
        }
        loop {
            let ready = self.lock().pop_front();
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
        Ok(Shell { process, control, console, spawned_ns })
    }

    /// Keeps the wanted number ready, for ever.
    pub async fn keep_ready(self: Arc<Self>) {
        loop {
            while self.lock().len() < self.wanted {
                match self.spawn(None).await {
                    Ok(shell) => self.lock().push_back(shell),
                    Err(error) => {
                        tracing::warn!(%error, "Cannot start a VM process ahead");
                        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    }
                }
            }
            self.taken.notified().await;
        }
    }

    /// The number of ready shells.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// ChildPipes the ready shells.
    pub fn clear(&self) {
        self.lock().clear();
    }
}
