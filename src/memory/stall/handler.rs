//! Watches whether a page-fault handler outside answers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::snapshot::{GuestRange, PAGE_SIZE};
use crate::sys::pagemap::Pagemap;
use crate::sys::uffd::Uffd;

/// A range of guest memory and its host address, which is only looked up in the page map.
type Range = (GuestRange, usize);

/// The userfaultfd that a handler outside serves, and its memory.
pub struct HandlerProbe {
    uffd: Arc<Uffd>,
    socket: PathBuf,
    process: i32,
    ranges: Vec<Range>,
    /// The time since which a thread has waited without any page coming, and the pages that were there then.
    waiting: Option<(Instant, u64)>,
}

impl std::fmt::Debug for HandlerProbe {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("HandlerProbe").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl HandlerProbe {
    pub fn new(
        uffd: Arc<Uffd>,
        socket: PathBuf,
        process: i32,
        slots: impl Iterator<Item = (GuestRange, *mut u8)>,
    ) -> Self {
        let ranges = slots.map(|(range, host)| (range, host as usize)).collect();
        HandlerProbe { uffd, socket, process, ranges, waiting: None }
    }

    /// Returns the fault once a thread has waited for `limit` and no page has come meanwhile. A count that cannot be
    /// read is taken for an answer: a failed probe must not end a guest.
    pub fn look(&mut self, now: Instant, limit: Duration) -> Option<String> {
        if self.uffd.waiters().unwrap_or(0) == 0 {
            self.waiting = None;
            return None;
        }
        let there = self.pages_there()?;
        let (since, then) = *self.waiting.get_or_insert((now, there));
        if there != then {
            self.waiting = Some((now, there));
            return None;
        }
        (now.saturating_duration_since(since) >= limit).then(|| self.describe(limit))
    }

    fn pages_there(&self) -> Option<u64> {
        let pagemap = Pagemap::open().ok()?;
        let mut there = 0;
        for (range, host) in &self.ranges {
            let counted = pagemap.populated_runs(*host as *const u8, range.len / PAGE_SIZE, |_, pages| there += pages);
            counted.ok()?;
        }
        Some(there)
    }

    fn describe(&self, limit: Duration) -> String {
        // Faults that the handler has not even read can be read here: the guest ends anyway.
        let unread = self.uffd.faults().unwrap_or_default().into_iter().find_map(|fault| {
            let at = |(range, host): &Range| Some(range.gpa + (fault.address.checked_sub(*host)? as u64));
            let inside = |(range, host): &&Range| (*host..*host + range.len as usize).contains(&fault.address);
            self.ranges.iter().find(inside).and_then(at)
        });
        let what = match unread {
            Some(gpa) => format!("has not read the fault on the page at guest-physical {gpa:#x}"),
            None => "has read a fault and not answered it".to_string(),
        };
        format!(
            "The page-fault handler at {} (process {}) {what} within {} s (--fault-timeout)",
            self.socket.display(),
            self.process,
            limit.as_secs_f64()
        )
    }
}
