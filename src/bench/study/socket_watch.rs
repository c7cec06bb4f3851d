//! Sockets that appear in a folder. Many threads wait for theirs without using the CPUs on which they measure.

use std::collections::HashMap;
use std::ffi::OsString;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{CreateFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;

use crate::sys::errors::BoxError;

/// Interval at which the thread that watches looks for the end of the measurement.
const STEP: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A watch over one folder: one for many threads, because a user may have few.
pub(super) struct SocketWatch {
    inotify: OwnedFd,
    waiting: HashMap<OsString, Sender<()>>,
}

impl SocketWatch {
    /// Watches `folder`, and `names` in it. Returns a receiver for each name, which gets one message.
    pub(super) fn new(folder: &Path, names: &[String]) -> Result<(SocketWatch, Vec<Receiver<()>>), BoxError> {
        let failed = |error: Errno| format!("Cannot watch {}: {error}", folder.display());
        let inotify = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(failed)?;
        add_watch(&inotify, folder, WatchFlags::CREATE).map_err(failed)?;
        let mut waiting = HashMap::new();
        let mut receivers = Vec::new();
        for name in names {
            let (sender, receiver) = channel();
            waiting.insert(OsString::from(name), sender);
            receivers.push(receiver);
        }
        Ok((SocketWatch { inotify, waiting }, receivers))
    }

    /// Tells each waiting thread when its file is there, until all are or the measurement is over.
    pub(super) fn tell(mut self, is_over: &AtomicBool) -> Result<(), BoxError> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        while !self.waiting.is_empty() && !is_over.load(Ordering::Relaxed) {
            match poll(&mut [PollFd::new(&self.inotify, PollFlags::IN)], Some(&STEP)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let mut events = Reader::new(&self.inotify, &mut buffer);
            loop {
                let name = match events.next() {
                    Ok(event) => event.file_name().map(|name| OsString::from_vec(name.to_bytes().to_vec())),
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => continue,
                    Err(error) => return Err(error.into()),
                };
                if let Some(sender) = name.and_then(|name| self.waiting.remove(&name)) {
                    // The thread may have found its socket already.
                    let _ = sender.send(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_told_once_its_file_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["a", "b", "c"].map(String::from);
        let (watch, receivers) = SocketWatch::new(dir.path(), &names).unwrap();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let telling = scope.spawn(|| watch.tell(&is_over));
            for name in ["b", "other", "a"] {
                std::fs::write(dir.path().join(name), "").unwrap();
            }
            receivers[0].recv().unwrap();
            receivers[1].recv().unwrap();
            assert!(receivers[2].try_recv().is_err(), "its file is not there");
            is_over.store(true, Ordering::Relaxed);
            telling.join().unwrap().unwrap();
        });
    }
}
