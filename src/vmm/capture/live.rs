//! Live capture: memory is written while the guest runs, and the guest stands still only for the rest and the state.
//!
//! The first pass writes all pages that the snapshot needs; each later pass those that were written meanwhile. KVM's
//! dirty log has the writes of vCPUs and of KVM itself, the marks of guest memory those of devices. When few pages are
//! left the machine is paused, and the last ones are copied with its state: the snapshot is the instant of that pause.
//! A guest that writes faster than its memory can be saved makes no pass shorter than the one before; the machine is
//! paused then with more pages left, and the outcome says so.
//!
//! Write protection by userfaultfd would give the instant at which the capture begins. The kernel has it for anonymous
//! memory and shmem alone (Linux `vma_can_userfault`), but a restored guest's memory is mapped from files.

use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::page_writer::{BATCH_PAGES, PageWriter};
use super::{Captured, Changes, Copied, LiveCounts, Noted, Opened, write_extent};
use crate::memory;
use crate::snapshot::{Location, PageSet, Parent, SnapshotKind};
use crate::vmm::error::Error;
use crate::vmm::machine::{Core, Machine, Paused};

/// With so few pages left, a further pass would save less time than it takes.
const FEW_PAGES: u64 = 1024;
/// Most pages copied during the pause, 128 MiB; further pages are written to the snapshot at once.
const COPIED_MAX: u64 = 32 << 10;
/// Most passes before the machine is paused.
const PASSES_MAX: u32 = 16;

/// A snapshot of a running machine that is being taken.
pub struct LiveCapture {
    writing: PageWriter,
    kind: SnapshotKind,
    parent: Option<Parent>,
    /// Pages to write in this pass.
    pending: PageSet,
    /// All pages of a diff.
    looked_at: PageSet,
    /// Pages given back to the balloon since the capture began.
    released: PageSet,
    /// Pages of this pass at its beginning.
    pass_pages: u64,
    counts: LiveCounts,
    start: Instant,
    /// Room for the pages that are left when the machine is paused, once that is due.
    copied: Option<Copied>,
}

/// The next action of a live capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Call [`Machine::step_live`] again.
    Step,
    /// Call [`Machine::step_live`] when the event given to [`Machine::begin_live`] is readable.
    Wait,
    /// Pause the machine and call [`Machine::finish_live`].
    Pause,
}

impl<S> Machine<S> {
    /// Begins to capture the machine to `target` while it runs. `event` becomes readable whenever pages were written.
    ///
    /// # Errors
    /// As for [`Machine::capture`]. Nothing has changed then.
    pub fn begin_live(
        &mut self,
        target: Location,
        kind: SnapshotKind,
        event: Arc<EventFd>,
    ) -> Result<LiveCapture, Error> {
        let start = Instant::now();
        let Opened { writer, kind, parent } = self.open_capture(target, kind)?;
        let writing = PageWriter::start(writer, event)?;
        self.core.log_writes()?;
        let begun = self.core.first_pass(kind);
        let Changes { pages, gone } = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.core.stop_logging()?;
                return Err(error);
            }
        };
        Ok(LiveCapture {
            writing,
            kind,
            parent,
            pass_pages: pages.len(),
            looked_at: pages.clone(),
            pending: pages,
            released: gone,
            counts: LiveCounts::default(),
            start,
            copied: None,
        })
    }

    /// Passes some pages to the thread that writes them.
    ///
    /// # Errors
    /// The capture has failed: call [`end_live`](Self::end_live).
    pub fn step_live(&mut self, live: &mut LiveCapture) -> Result<Next, Error> {
        if let Some(copied) = &mut live.copied {
            return Ok(if copied.put_memory(BATCH_PAGES) { Next::Pause } else { Next::Step });
        }
        if live.pending.is_empty() {
            return self.core.next_pass(live);
        }
        let Some(mut batch) = live.writing.free_batch()? else { return Ok(Next::Wait) };
        let mut left = BATCH_PAGES;
        while left > 0 {
            let Some(run) = live.pending.runs().next() else { break };
            let Some(extent) = self.core.ram.layout().split(run).next() else { break };
            let extent = extent.chunks(left).next().unwrap_or(extent);
            let read = self.core.ram.view().read_slice(batch.add(extent), GuestAddress(extent.gpa()));
            read.map_err(|error| memory::Error::MemoryView(error.to_string()))?;
            live.pending.remove_run(extent);
            left -= extent.pages;
            live.counts.pages_live += extent.pages;
        }
        live.writing.write(batch);
        Ok(Next::Step)
    }

    /// Called when a live capture is over, either way.
    pub fn end_live(&mut self) -> Result<(), Error> {
        self.core.stop_logging()
    }
}

impl Machine<Paused> {
    /// Copies the pages that are left, and reads the machine's state. `stopped`: the time at which the machine was
    /// asked to pause. Call [`end_live`](Self::end_live) afterwards.
    pub fn finish_live(
        &mut self,
        mut live: LiveCapture,
        copy_drives: bool,
        stopped: Instant,
    ) -> Result<Captured, Error> {
        let writer = live.writing.into_writer()?;
        let mut opened = Opened { writer, kind: live.kind, parent: live.parent };
        let mut copied = live.copied.unwrap_or_default();
        let (state, drives) = self.capture_state(&mut opened, copy_drives)?;
        let log = self.core.read_dirty_log()?;
        let Noted { written, released } = self.core.note_changes();
        self.core.lineage.add_changed(&log.pages);
        live.released.union_with(&released);
        let gone = self.core.unpopulated(&live.released)?;
        let last = live.pending.union(&log.pages).union(&written).union(&live.released).difference(&gone);
        opened.writer.next_pass();
        self.core.mark_gone(&gone, &mut opened.writer)?;
        self.core.read_pages(&last, |extent, bytes| {
            let is_copied = copied.take(extent, bytes);
            if is_copied { Ok(()) } else { write_extent(extent, bytes, &mut opened.writer) }
        })?;
        self.core.clear_dirty_log(&log)?;
        live.counts.pages_paused = last.len();
        live.counts.window_us = (stopped - live.start).as_micros() as u64;
        let looked_at = match opened.kind {
            SnapshotKind::Full => PageSet::new(),
            SnapshotKind::Diff => live.looked_at.union(&last),
        };
        let captured = self.captured(opened, &looked_at, (state, drives), stopped);
        Ok(Captured { live: Some(live.counts), copied, ..captured })
    }
}

impl Core {
    /// The pages that a snapshot taken now needs. KVM's log is cleared before memory is read: it has all later writes.
    fn first_pass(&mut self, kind: SnapshotKind) -> Result<Changes, Error> {
        let log = self.read_dirty_log()?;
        self.lineage.add_changed(&log.pages);
        self.clear_dirty_log(&log)?;
        let released = self.note_changes().released;
        match kind {
            SnapshotKind::Full => Ok(Changes { pages: self.maybe_nonzero()?, gone: released }),
            SnapshotKind::Diff => {
                let Changes { pages, gone } = self.changes(&log, &released)?;
                Ok(Changes { pages, gone: gone.union(&released) })
            }
        }
    }

    /// Looks for the pages written during the last pass, once all of that pass is on its way to the disk.
    fn next_pass(&mut self, live: &mut LiveCapture) -> Result<Next, Error> {
        let Some(mut idle) = live.writing.idle()? else { return Ok(Next::Wait) };
        idle.next_pass();
        drop(idle);
        let log = self.read_dirty_log()?;
        self.lineage.add_changed(&log.pages);
        self.clear_dirty_log(&log)?;
        let Noted { written, released } = self.note_changes();
        live.released.union_with(&released);
        live.pending = log.pages.union(&written);
        live.looked_at.union_with(&live.pending);
        live.counts.passes += 1;
        let pages = live.pending.len();
        let is_slower = live.counts.passes >= PASSES_MAX || pages > live.pass_pages / 4 * 3;
        live.pass_pages = pages;
        if pages > FEW_PAGES && !is_slower {
            return Ok(Next::Step);
        }
        live.counts.is_cut_short = pages > FEW_PAGES;
        // The guest may write as many again until it stands still.
        live.writing.free_memory();
        live.copied = Some(Copied::with_room((2 * pages + FEW_PAGES).min(COPIED_MAX)));
        Ok(Next::Step)
    }
}
