//! Children that end in their own time.

use std::os::fd::OwnedFd;
use std::process::Child;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A child, and the descriptor that becomes readable when it ends.
struct Watched {
    child: Child,
    pidfd: OwnedFd,
}

/// Waits for each of `children` when it ends, so that none stays a zombie. Returns after the end of the last one.
pub fn all(children: Vec<Child>) {
    let mut watched = Vec::with_capacity(children.len());
    let mut unwatched = Vec::new();
    for child in children {
        let opened = Pid::from_raw(child.id() as i32).ok_or(Errno::SRCH);
        match opened.and_then(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(pidfd) => watched.push(Watched { child, pidfd }),
            // The limit of descriptors: such a child is waited for after the others.
            Err(_) => unwatched.push(child),
        }
    }
    while !watched.is_empty() {
        let mut ended: Vec<PollFd<'_>> =
            watched.iter().map(|watched| PollFd::new(&watched.pidfd, PollFlags::IN)).collect();
        match poll(&mut ended, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => break,
        }
        let has_ended: Vec<bool> = ended.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut has_ended = has_ended.into_iter();
        watched.retain_mut(|watched| {
            let is_over = has_ended.next().unwrap_or(false);
            // An error means that it was waited for already.
            is_over.then(|| watched.child.wait()).is_none()
        });
    }
    let rest = watched.into_iter().map(|watched| watched.child).chain(unwatched);
    rest.for_each(|mut child| drop(child.wait()));
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn all_children_are_waited_for_in_any_order() {
        let children: Vec<Child> =
            ["0.2", "0", "0.1"].iter().map(|time| Command::new("sleep").arg(time).spawn().unwrap()).collect();
        let pids: Vec<u32> = children.iter().map(Child::id).collect();
        all(children);
        for pid in pids {
            assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
        }
    }
}
