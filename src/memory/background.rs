//! The background thread: carries out a plan's background steps while the guest already runs, in the plan's order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::Instant;

use super::comparison::Comparison;
use super::fault_service::{FaultCounters, LazyExtent, fetch, unavailable};
use super::files::Files;
use crate::memory::Error;
use crate::memory::balloon_release::Released;
use crate::memory::ending::{Ending, EndingSignal};
use crate::memory::guest_ram::GuestRam;
use crate::memory::promote::{InPlace, Resort};
use crate::memory::stall::Activity;
use crate::snapshot::{
    Background, BackgroundAction, Extent, PAGE_SIZE, PageSet, Placement, PlannedExtent, RestorePlan,
};
use crate::sys::lost;
use crate::sys::mapping::Populator;
use crate::sys::uffd::{Install, Uffd};
use crate::sys::worker::Worker;
use crate::tiering::cold::{ColdReader, Flow};

/// One step, with everything it needs.
struct Step {
    /// Part of `lazy`.
    part: Extent,
    lazy: LazyExtent,
    action: Action,
    /// The bytes come from a cold pool, whole chunk by whole chunk.
    is_far: bool,
}

enum Action {
    ReadAhead,
    BreakCow(Populator),
    /// As `BreakCow`, on a tier where the kernel does not copy on write.
    Promote(Arc<InPlace>),
    Install,
}

/// The userfaultfd that steps install through, and the counters of what they install.
type Installer = (Arc<Uffd>, Arc<FaultCounters>);

/// Bytes read or fetched at once: large against a system call, small against the guest's patience.
const PIECE: u64 = 1 << 20;

/// The running thread. Stops when dropped.
pub struct BackgroundWork {
    comparison: Comparison,
    /// Some step makes copies of pages.
    copies: bool,
    worker: Worker,
}

impl BackgroundWork {
    /// Starts on the steps of `plan`; `None` if it has none.
    pub fn start(
        plan: &RestorePlan,
        files: &Files,
        ram: &GuestRam,
        lazy: Option<Installer>,
        (ending, activity): (Arc<EndingSignal>, Activity),
    ) -> Result<Option<Self>, Error> {
        let wanted: Vec<Background> = plan.background.iter().copied().chain(unread(plan, files)).collect();
        if wanted.is_empty() {
            return Ok(None);
        }
        let copies = wanted.iter().any(|step| step.action == BackgroundAction::BreakCow);
        let mut steps = steps(plan, &wanted, ram, files)?;
        let far: Vec<Step> = steps.extract_if(.., |step| step.is_far).collect();
        let compares = |step: &Step| step.lazy.source.is_some_and(|source| files.image(source.origin).is_some());
        let last_compared = steps.iter().rposition(compares);
        let stop = Arc::new(AtomicBool::new(false));
        let comparison = Comparison::default();
        let comparing = comparison.comparing();
        if last_compared.is_none() {
            comparing.done();
        }
        let stopped = stop.clone();
        let mut files = files.clone();
        let released = ram.released().clone();
        let work = move || {
            if let (Some(reader), Some((uffd, counters))) = (files.cold_reader(), &lazy) {
                let work = FarInstall { uffd, counters, released: &released, activity: &activity, stop: &stopped };
                if let Err(error) = work.run(reader, &far) {
                    ending.end(Ending::Failed(format!("Cannot bring in memory in the background: {error}")));
                    return;
                }
            }
            // One buffer for all steps: fresh memory would cost a fault for each of its pages.
            let mut buffer = Vec::new();
            for (index, step) in steps.into_iter().enumerate() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let part = step.part;
                let from = step.lazy;
                let _reads = activity.reads(part, from.source_of(part));
                if let Err(error) = carry_out(step, &mut files, lazy.as_ref(), &released, &mut buffer) {
                    let lost = lost::within(part).map(Ending::MemoryLost);
                    ending.end(lost.unwrap_or_else(|| unavailable("bring in", &from, part.first, &error)));
                    return;
                }
                if last_compared == Some(index) {
                    comparing.done();
                }
            }
        };
        let ask = move || stop.store(true, Ordering::Relaxed);
        let worker = Worker::start(Builder::new().name("background".into()), ask, work);
        let worker = worker.map_err(Error::os("start the background thread"))?;
        Ok(Some(BackgroundWork { comparison, copies, worker }))
    }

    /// The comparison of everything that is mapped from images with its checksums.
    pub fn comparison(&self) -> &Comparison {
        &self.comparison
    }

    /// Returns whether the thread may still make copies of pages. It holds the record of pages given back meanwhile, so
    /// none of them may wait for another thread that needs the record.
    pub fn is_copying(&self) -> bool {
        self.copies && !self.worker.has_ended()
    }

    /// Asks the thread to end and waits for it until `deadline`. Returns whether it has ended.
    pub fn finish(&self, deadline: Instant) -> bool {
        self.worker.finish(deadline)
    }
}

/// The pages that are mapped from images and that no step of the plan reads. They are read too, because reading an
/// image compares its pages with their checksums.
fn unread(plan: &RestorePlan, files: &Files) -> Vec<Background> {
    if plan.images.is_empty() {
        return Vec::new();
    }
    let is_read = |step: &&Background| step.action == BackgroundAction::ReadAhead;
    let read: PageSet = plan.background.iter().filter(is_read).map(|step| step.extent).collect();
    let is_mapped = |planned: &&PlannedExtent| {
        matches!(planned.placement, Placement::CowFile | Placement::InPlace)
            && planned.source.is_some_and(|source| files.image(source.origin).is_some())
    };
    let mapped: Vec<Extent> = plan.extents.iter().filter(is_mapped).map(|planned| planned.extent).collect();
    let left = mapped.iter().copied().collect::<PageSet>().difference(&read);
    // Each within one extent of the plan.
    let parts = mapped.iter().flat_map(|extent| left.runs_in(*extent));
    parts.map(|extent| Background { action: BackgroundAction::ReadAhead, extent }).collect()
}

/// Resolves steps to files and addresses, cut into pieces.
fn steps(plan: &RestorePlan, wanted: &[Background], ram: &GuestRam, files: &Files) -> Result<Vec<Step>, Error> {
    let mut steps: Vec<Step> = Vec::new();
    for background in wanted {
        let at = plan.extents.partition_point(|planned| planned.extent.end() <= background.extent.first);
        // `validate` has made sure that the step lies within one extent that has a source.
        let Some(planned) = plan.extents.get(at).filter(|planned| planned.source.is_some()) else { continue };
        let lazy = LazyExtent {
            extent: planned.extent,
            host: ram.populator(planned.extent)?.address(),
            source: planned.source,
        };
        let from_far = planned.source.is_some_and(|source| files.cold_source(source.origin).is_some());
        if from_far && background.action == BackgroundAction::Install {
            steps.push(Step { part: background.extent, lazy, action: Action::Install, is_far: true });
            continue;
        }
        for part in pieces(background.extent) {
            let action = match background.action {
                BackgroundAction::BreakCow => match ram.in_place().filter(|in_place| in_place.has(part)) {
                    Some(in_place) => Action::Promote(in_place.clone()),
                    None => Action::BreakCow(ram.populator(part)?),
                },
                BackgroundAction::Install => Action::Install,
                BackgroundAction::ReadAhead => Action::ReadAhead,
            };
            steps.push(Step { part, lazy, action, is_far: false });
        }
    }
    Ok(steps)
}

fn pieces(extent: Extent) -> impl Iterator<Item = Extent> {
    let pages = PIECE / PAGE_SIZE;
    (0..extent.pages.div_ceil(pages)).map(move |index| Extent {
        first: crate::snapshot::Gfn(extent.first.0 + index * pages),
        pages: pages.min(extent.pages - index * pages),
    })
}

/// Installs from a cold pool: chunks are requested ahead of each other, and each is installed as soon as it has
/// arrived.
struct FarInstall<'a> {
    uffd: &'a Uffd,
    counters: &'a FaultCounters,
    released: &'a Released,
    activity: &'a Activity,
    stop: &'a AtomicBool,
}

impl FarInstall<'_> {
    fn run(&self, reader: &mut ColdReader, steps: &[Step]) -> io::Result<()> {
        let index = reader.pool().index().clone();
        let mut is_wanted = vec![false; index.chunks().len()];
        let mut wanted = Vec::new();
        for number in steps.iter().flat_map(|step| index.chunks_of(step.part)) {
            if !std::mem::replace(&mut is_wanted[number as usize], true) {
                wanted.push(number);
            }
        }
        let mut by_gfn: Vec<&Step> = steps.iter().collect();
        by_gfn.sort_unstable_by_key(|step| step.part.first);
        let Some(first) = steps.first() else { return Ok(()) };
        let mut _reads = Some(self.activity.reads(first.part, first.lazy.source_of(first.part)));
        reader.stream(&wanted, &mut |number, pages| {
            // The chunk has arrived; the wait from here on is for the next one.
            _reads = None;
            for (run, at) in index.runs(number) {
                let start = by_gfn.partition_point(|step| step.part.end() <= run.first);
                for step in by_gfn[start..].iter().take_while(|step| step.part.first < run.end()) {
                    if let Some(part) = step.part.intersection(&run) {
                        let at = at + ((part.first.0 - run.first.0) * PAGE_SIZE) as usize;
                        self.install(step, part, &pages[at..at + part.bytes() as usize])?;
                    }
                    _reads = Some(self.activity.reads(step.part, step.lazy.source_of(step.part)));
                }
            }
            Ok(if self.stop.load(Ordering::Relaxed) { Flow::Stop } else { Flow::Continue })
        })
    }

    fn install(&self, step: &Step, part: Extent, bytes: &[u8]) -> io::Result<()> {
        let books = self.released.read();
        for run in books.still_snapshot(part) {
            let start = ((run.first.0 - part.first.0) * PAGE_SIZE) as usize;
            let how = Install { wake: true, write_protect: false };
            let bytes = &bytes[start..start + run.bytes() as usize];
            self.counters.add_ahead(self.uffd.install(step.lazy.host_of(run.first), bytes, how)?);
        }
        Ok(())
    }
}

/// Carries out one step. Pages that the guest has given back are left alone.
fn carry_out(
    step: Step,
    files: &mut Files,
    installer: Option<&Installer>,
    released: &Released,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let Step { part, lazy, action, .. } = step;
    let offset = |run: Extent| ((run.first.0 - part.first.0) * PAGE_SIZE) as usize;
    match (action, installer) {
        (Action::BreakCow(range), _) => {
            let books = released.read();
            let mut runs = books.still_snapshot(part).into_iter();
            runs.try_for_each(|run| range.part(offset(run), run.bytes() as usize).populate_write())
        }
        (Action::Promote(in_place), _) => in_place.promote_as(Resort::Ahead, part),
        (Action::ReadAhead, _) => fetch(files, &lazy, part, room_in(buffer, part)),
        (Action::Install, Some((uffd, counters))) => {
            let bytes = room_in(buffer, part);
            fetch(files, &lazy, part, bytes)?;
            let books = released.read();
            for run in books.still_snapshot(part) {
                let bytes = &bytes[offset(run)..offset(run) + run.bytes() as usize];
                let how = Install { wake: true, write_protect: false };
                counters.add_ahead(uffd.install(lazy.host_of(run.first), bytes, how)?);
            }
            Ok(())
        }
        // The machine has no userfaultfd.
        (Action::Install, None) => Ok(()),
    }
}

/// The first bytes of `buffer`, which grows to hold the pages of `part`.
fn room_in(buffer: &mut Vec<u8>, part: Extent) -> &mut [u8] {
    let len = part.bytes() as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}
