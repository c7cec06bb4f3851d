//! The second thread: what a plan wants done while the guest already runs, in the plan's order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::files::Files;
use super::lazy::{FaultCounters, LazyExtent, fetch};
use crate::snapshot::{BackgroundAction, Extent, PAGE_SIZE, PageSource, RestorePlan};
use crate::tiering::fault::PageReader;
use crate::vmm::error::Error;
use crate::vmm::memory::GuestRam;
use crate::vmm::sys::mapping::Populator;
use crate::vmm::sys::uffd::{Install, Uffd};
use crate::vmm::vcpu::{Ending, EndingSignal};

/// One step, with everything it needs.
enum Step {
    ReadAhead { source: PageSource, bytes: u64 },
    BreakCow(Populator),
    Install { lazy: LazyExtent, part: Extent },
}

/// Read or fetched at once: large against a system call, small against the guest's patience.
const PIECE: u64 = 1 << 20;

/// The running thread. Stops when dropped.
pub struct BackgroundWork {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BackgroundWork {
    /// Starts on the steps of `plan`; `None` if it has none.
    pub fn start(
        plan: &RestorePlan,
        files: &Files,
        ram: &GuestRam,
        lazy: Option<(Arc<Uffd>, Arc<FaultCounters>)>,
        ending: Arc<EndingSignal>,
    ) -> Result<Option<Self>, Error> {
        if plan.background.is_empty() {
            return Ok(None);
        }
        let steps = steps(plan, ram)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, mut files) = (stop.clone(), files.clone());
        let work = move || {
            for step in steps {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if let Err(error) = carry_out(step, &mut files, lazy.as_ref()) {
                    ending.end(Ending::Failed(format!("Cannot bring in memory in the background: {error}")));
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("background".into()).spawn(work);
        let thread = thread.map_err(Error::os("start the background thread"))?;
        Ok(Some(BackgroundWork { stop, thread: Some(thread) }))
    }
}

impl Drop for BackgroundWork {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Resolves the plan's steps to files and addresses, cut into pieces.
fn steps(plan: &RestorePlan, ram: &GuestRam) -> Result<Vec<Step>, Error> {
    let mut steps: Vec<Step> = Vec::new();
    for background in &plan.background {
        let at = plan.extents.partition_point(|planned| planned.extent.end() <= background.extent.first);
        // `validate` has made sure that the step lies within one extent that has a source.
        let Some((planned, source)) = plan.extents.get(at).and_then(|p| p.source.map(|source| (p, source))) else {
            continue;
        };
        let lazy = LazyExtent {
            extent: planned.extent,
            host: ram.populator(planned.extent)?.address(),
            source: planned.source,
        };
        for part in pieces(background.extent) {
            steps.push(match background.action {
                BackgroundAction::BreakCow => Step::BreakCow(ram.populator(part)?),
                BackgroundAction::Install => Step::Install { lazy, part },
                BackgroundAction::ReadAhead => {
                    let offset = source.offset + (part.first.0 - planned.extent.first.0) * PAGE_SIZE;
                    Step::ReadAhead { source: PageSource { offset, ..source }, bytes: part.bytes() }
                }
            });
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

fn carry_out(step: Step, files: &mut Files, lazy: Option<&(Arc<Uffd>, Arc<FaultCounters>)>) -> io::Result<()> {
    match step {
        Step::BreakCow(range) => range.populate_write(),
        Step::ReadAhead { source, bytes } => PageReader::read(files, source, &mut vec![0; bytes as usize]),
        Step::Install { lazy: extent, part } => {
            let Some((uffd, counters)) = lazy else { return Ok(()) };
            let mut bytes = vec![0; part.bytes() as usize];
            fetch(files, &extent, part, &mut bytes)?;
            let host = extent.host + ((part.first.0 - extent.extent.first.0) * PAGE_SIZE) as usize;
            let installed = uffd.install(host, &bytes, Install { wake: true, write_protect: false })?;
            counters.add_ahead(installed);
            Ok(())
        }
    }
}
