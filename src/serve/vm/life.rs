//! The life of a VM: it owns the process of the VM. When the life is over, the process has ended, or it was taken out
//! and serves another VM, which a request to this one can no longer reach.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::{Notify, watch};

use super::capacity::VmPermit;
use super::process::ChildExit;
use super::shells::Shell;

/// The end of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LifeEnd {
    /// Its process has ended.
    Exited(ChildExit),
    /// Its process serves another VM, or will.
    GaveProcess,
}

impl LifeEnd {
    /// The reason as a clause.
    pub fn why(&self) -> String {
        match self {
            LifeEnd::Exited(exit) => exit.why(),
            LifeEnd::GaveProcess => "ended, and its process was kept for another VM".to_owned(),
        }
    }
}

/// A process with the connections to it, and its place among all VMs.
#[derive(Debug)]
struct Held {
    /// Requests to the VM share it while they last.
    shell: Arc<Shell>,
    permit: VmPermit,
}

/// A request's use of a process. No other VM gets the process meanwhile.
#[derive(Debug)]
pub struct InUse {
    shell: Arc<Shell>,
    /// Dropped after `shell`.
    _notice: Notice,
}

impl Deref for InUse {
    type Target = Shell;

    fn deref(&self) -> &Shell {
        &self.shell
    }
}

/// Says that a request has ended.
#[derive(Debug)]
struct Notice(Arc<Notify>);

impl Drop for Notice {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// The owner of a VM's process.
#[derive(Debug)]
pub struct Life {
    pid: u32,
    held: Mutex<Option<Held>>,
    exit: watch::Receiver<Option<ChildExit>>,
    gave: watch::Sender<bool>,
    /// Notified when a request has ended.
    freed: Arc<Notify>,
    /// The reason for which the service ends the process.
    cause: Mutex<Option<String>>,
}

impl Life {
    pub fn new(shell: Shell, permit: VmPermit) -> Life {
        let pid = shell.process.pid();
        let exit = shell.process.exit();
        let held = Held { shell: Arc::new(shell), permit };
        let held = Mutex::new(Some(held));
        Life { pid, held, exit, gave: watch::Sender::new(false), freed: Arc::default(), cause: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the process, also when it serves another VM.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The process for one request to the VM; `None` when the life is over.
    pub fn shell(&self) -> Option<InUse> {
        let shell = self.held().as_ref()?.shell.clone();
        Some(InUse { shell, _notice: Notice(self.freed.clone()) })
    }

    /// Ends the life, and returns its process for another VM, as soon as no request uses it. `None` if the life is
    /// over, or requests use the process for longer than `patience`: then nothing has changed.
    pub async fn give(&self, patience: Duration) -> Option<(Shell, VmPermit)> {
        let given = async {
            while self.ended().is_none() {
                if let Some(given) = self.give_now() {
                    return Some(given);
                }
                tokio::select! {
                    () = self.freed.notified() => {}
                    _ = self.end() => {}
                }
            }
            None
        };
        tokio::time::timeout(patience, given).await.ok().flatten()
    }

    fn give_now(&self) -> Option<(Shell, VmPermit)> {
        let mut held = self.held();
        let Held { shell, permit } = held.take()?;
        match Arc::try_unwrap(shell) {
            Ok(shell) => {
                self.gave.send_replace(true);
                Some((shell, permit))
            }
            Err(shell) => {
                *held = Some(Held { shell, permit });
                None
            }
        }
    }

    /// Gives back the place of a VM whose process has ended.
    pub fn close(&self) {
        drop(self.held().take());
    }

    /// The end of the life, if it is over.
    pub fn ended(&self) -> Option<LifeEnd> {
        if *self.gave.borrow() {
            return Some(LifeEnd::GaveProcess);
        }
        self.exit.borrow().clone().map(LifeEnd::Exited)
    }

    /// Waits until the life is over.
    pub async fn end(&self) -> LifeEnd {
        let mut exit = self.exit.clone();
        let mut gave = self.gave.subscribe();
        tokio::select! {
            biased;
            _ = gave.wait_for(|gave| *gave) => LifeEnd::GaveProcess,
            exit = exit.wait_for(Option::is_some) => {
                LifeEnd::Exited(exit.ok().and_then(|exit| exit.clone()).unwrap_or_default())
            }
        }
    }

    /// Sends a signal to the process, unless the life is over.
    pub fn signal(&self, signal: Signal) {
        if let Some(shell) = self.shell() {
            shell.process.signal(signal);
        }
    }

    /// Notes the reason for which the service is about to end the process. The first one counts.
    pub fn blame(&self, cause: impl Into<String>) {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(cause.into());
    }

    /// The reason of the end, if the life is over.
    pub fn why(&self) -> Option<String> {
        let ended = self.ended()?;
        let cause = self.cause().filter(|_| matches!(ended, LifeEnd::Exited(_)));
        Some(cause.unwrap_or_else(|| ended.why()))
    }

    /// The reason for which the service ends the process, if it does.
    pub fn cause(&self) -> Option<String> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the process for this reason: see [`stop`](Self::stop).
    pub async fn stop_because(&self, cause: &str) -> LifeEnd {
        self.blame(cause);
        self.stop().await
    }

    /// Asks the process to end, and ends it if it does not. Does nothing if the life is over.
    pub async fn stop(&self) -> LifeEnd {
        match self.shell() {
            Some(shell) => LifeEnd::Exited(shell.process.stop().await),
            None => self.end().await,
        }
    }
}
