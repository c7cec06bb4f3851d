//! Recording a profile: restores a snapshot in this process, runs one function of the guest, and asks the kernel about
//! its pages. `tiering::recorder` says what each recorder can see.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::console::{Answer, AnswerWatch, Input, request_id};
use super::main_loop;
use super::main_loop::{Begin, EventSources};
use super::outcome::Outcome;
use super::port_request::PortRequest;
use super::sources;
use super::watch::Watch;
use crate::config::VmConfig;
use crate::config::overrides::Overrides;
use crate::config::request::SnapshotPaths;
use crate::config::restore::{MemoryFrom, RestoreRequest, Start};
use crate::session::Error;
use crate::session::controller::Controller;
use crate::snapshot::{Chain, Extent, Gfn, PAGE_SIZE, PageSet, Snapshot};
use crate::sys::output::{ConsoleOutput, Sink};
use crate::sys::pagemap_scan;
use crate::sys::pagemap_scan::Mapped;
use crate::sys::resident::CacheView;
use crate::sys::seccomp::Kind;
use crate::sys::signals::EndSignals;
use crate::sys::timeline::{Moments, Timeline};
use crate::tiering::profile::{Profile, RecorderKind, nonzero};
use crate::tiering::recorder::{FaultLog, Layering, MappedPages, ResidentPages, from_dirty, from_layers, from_mapped};
use crate::vmm::machine::Environment;

/// The parameters of a recording.
#[derive(Clone, Debug)]
pub struct RecordSpec {
    pub snapshot: SnapshotPaths,
    pub recorder: RecorderKind,
    /// One function of the guest: `name key=value…`.
    pub function: String,
    /// The vsock port on which the guest takes requests; `None`: the serial line.
    pub port: Option<u32>,
    /// Time limit of the function.
    pub timeout: Duration,
    /// Longest wait of the guest for a page.
    pub fault_timeout: Duration,
    /// Directory for the run's own copies of drives, for a snapshot that contains copies.
    pub drive_dir: Option<PathBuf>,
}

/// A recorded run.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub profile: Profile,
    /// The guest's answer.
    pub answer: String,
    /// First entry into the guest to the answer's last byte, ns.
    pub execute_ns: u64,
}

/// The name of the VM and the first part of its request's.
const RECORD: &str = "record";
/// FaaSnap's daemon uses the same interval.
const POLL: Duration = Duration::from_millis(4);

/// Records one run. Returns `signals` for the next.
pub fn record(spec: &RecordSpec, signals: EndSignals) -> Result<(Recorded, EndSignals), Error> {
    let chain = Arc::new(Chain::open(&sources::location(&spec.snapshot))?);
    let snapshot = chain.tip().id();
    let name = spec.function.as_str();
    let mut signals = Some(signals);
    let (profile, run) = match spec.recorder {
        RecorderKind::Uffd => {
            let log = FaultLog::new();
            let watch = Watch { observer: Some(Box::new(log.clone())), ..Watch::default() };
            let run = run(spec, watch, false, &mut signals)?;
            (log.profile(snapshot, name, run.answered_ns), run)
        }
        RecorderKind::Mincore => {
            let poller = Poller::start(CacheOfChain::evicted(&chain)?)?;
            let run = run(spec, Watch::default(), false, &mut signals)?;
            let (layering, resident) = poller.finish()?;
            let layers = layering.finish(&resident, &nonzero(&chain.resolve()?));
            (from_layers(snapshot, name, layers), run)
        }
        RecorderKind::Pagemap => {
            let run = run(spec, Watch { single_pages: true, ..Watch::default() }, false, &mut signals)?;
            (from_mapped(snapshot, name, mapped_pages(&run.controller)?), run)
        }
        RecorderKind::DirtyLog => {
            let run = run(spec, Watch::default(), true, &mut signals)?;
            let dirty = run.controller.dirty_pages()?;
            (from_dirty(snapshot, name, dirty), run)
        }
        RecorderKind::Merged => return Err(Error::Record("a merged profile is made of others".to_string())),
    };
    let Run { mut controller, answer, execute_ns, .. } = run;
    controller.stop()?;
    let signals = signals.ok_or_else(|| Error::Record("the signals got lost".to_string()))?;
    Ok((Recorded { profile, answer, execute_ns }, signals))
}

/// A function that has answered, and its machine.
struct Run {
    controller: Controller,
    answer: String,
    answered_ns: u64,
    execute_ns: u64,
}

/// Discards output: the answer is taken before it.
struct Nowhere;

impl Sink for Nowhere {
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}

fn run(spec: &RecordSpec, watch: Watch, dirty: bool, signals: &mut Option<EndSignals>) -> Result<Run, Error> {
    let answer = Answer::new().map_err(Error::os("make an eventfd"))?;
    let moments = Arc::new(Moments::default());
    let id = request_id(RECORD);
    let witness = Box::new(AnswerWatch::new(&id, answer.clone()));
    let output = ConsoleOutput::watched(Box::new(Nowhere), Some(witness));
    let output = Arc::new(output.map_err(Error::os("make an eventfd"))?);
    let environment = Environment { output, fault_timeout: spec.fault_timeout, moments: moments.clone() };
    let load = RestoreRequest {
        snapshot: spec.snapshot.snapshot.clone(),
        memory: MemoryFrom::Files { memory_file: spec.snapshot.memory.clone(), trusted_keys: Vec::new() },
        track_dirty_pages: dirty,
        overrides: Overrides { drive_dir: spec.drive_dir.clone(), ..Overrides::default() },
        start: Start::Running,
        ..RestoreRequest::default()
    };
    let signals_now = signals.take().ok_or_else(|| Error::Record("the signals got lost".to_string()))?;
    let line = format!("run {id} {}", spec.function);
    let asked = answer.clone();
    let request = spec.port.map(|port| PortRequest { port, line: line.clone(), id, answer: asked });
    let event_sources = EventSources {
        input: if request.is_some() { Input::default() } else { Input::script(format!("{line}\n").as_bytes()) },
        reads_stdin: false,
        parent: None,
        control: None,
        // The next run makes another machine.
        last_filter: Kind::Start,
        signals: signals_now,
        answer: Some(answer.clone()),
        request,
        timeout: Some(spec.timeout),
    };
    let controller = Controller::new(RECORD.to_string(), VmConfig::default(), environment, Timeline::begin(None))?;
    let (outcome, controller, event_sources) = main_loop::run(controller, Begin::Record(load, watch), event_sources)?;
    *signals = Some(event_sources.signals);
    match outcome {
        Outcome::Answered => {}
        Outcome::TimedOut => return Err(Error::NoAnswer(format!(" within {} s", spec.timeout.as_secs()))),
        Outcome::Failed(what) | Outcome::MemoryLost(what) => return failed(what),
        Outcome::Guest(ending) => return failed(format!("the guest ended before it answered: {ending:?}")),
        Outcome::Signal(number) => return failed(format!("signal {number} came first")),
        Outcome::NoAnswer(why) => return Err(Error::NoAnswer(format!(": {why}"))),
        Outcome::Quit => return failed("it was ended".to_string()),
    }
    match (answer.get(), moments.first_run_ns()) {
        (Some((line, answered_ns)), Some(entered_ns)) if line.starts_with("ok ") => {
            let execute_ns = answered_ns.saturating_sub(entered_ns);
            Ok(Run { controller, answer: line, answered_ns, execute_ns })
        }
        (Some((line, _)), _) => failed(format!("the function failed: {line}")),
        (None, _) => failed("the answer got lost".to_string()),
    }
}

fn failed<T>(what: String) -> Result<T, Error> {
    Err(Error::Record(what))
}

/// The pages of guest memory that are mapped now.
fn mapped_pages(controller: &Controller) -> Result<MappedPages, Error> {
    let Some(parts) = controller.machine_parts() else { return failed("the machine is gone".to_string()) };
    let mut mapped = MappedPages { only_touched: parts.single_pages, ..MappedPages::default() };
    for (range, host) in parts.ram.slots() {
        let first = range.gpa / PAGE_SIZE;
        let scan = pagemap_scan::mapped_runs(host, range.len / PAGE_SIZE, |run, pages, what| {
            let extent = Extent { first: Gfn(first + run), pages };
            match what {
                Mapped::Own => mapped.own.insert_run(extent),
                Mapped::Shared => mapped.shared.insert_run(extent),
            }
        });
        scan.map_err(Error::os("scan the page map (PAGEMAP_SCAN needs Linux 6.7)"))?;
    }
    Ok(mapped)
}

/// The page cache of all layers of a chain, as guest pages.
struct CacheOfChain {
    chain: Arc<Chain>,
    views: Vec<CacheView>,
    /// Guest pages by the layer they come from; a zero page belongs to the layer that has it as a hole.
    from_layer: Vec<PageSet>,
}

impl CacheOfChain {
    /// Views of the layers' memory files, which are dropped from the page cache first.
    fn evicted(chain: &Arc<Chain>) -> Result<Self, Error> {
        let mut by_layer: BTreeMap<usize, PageSet> = BTreeMap::new();
        for run in chain.resolve()? {
            if let Some(layer) = run.content.layer() {
                by_layer.entry(layer).or_default().insert_run(run.extent);
            }
        }
        let from_layer = (0..chain.layers().len()).map(|layer| by_layer.remove(&layer).unwrap_or_default()).collect();
        let views = chain.layers().iter().map(evict).collect::<Result<_, _>>()?;
        let mut cache = CacheOfChain { chain: chain.clone(), views, from_layer };
        let left = cache.resident().map_err(Error::os("ask which pages are in the page cache"))?;
        match left.len() {
            0 => Ok(cache),
            pages => failed(format!(
                "{pages} pages of the snapshot's memory cannot be dropped from the page cache, so that mincore would \
                 take them for touched: another VM maps them, or the file system is a tmpfs"
            )),
        }
    }
}

fn evict(layer: &Snapshot) -> Result<CacheView, Error> {
    let path = layer.memory_path();
    let failed = |doing| move |source| Error::File { doing, path: path.to_owned(), source };
    let evicted = rustix::fs::fadvise(layer.memory(), 0, None, rustix::fs::Advice::DontNeed);
    evicted.map_err(io::Error::from).map_err(failed("evict"))?;
    CacheView::new(layer.memory(), layer.layout().file_len()).map_err(failed("map"))
}

impl ResidentPages for CacheOfChain {
    fn resident(&mut self) -> io::Result<PageSet> {
        let mut all = PageSet::new();
        let layout = self.chain.layout();
        for (view, wanted) in self.views.iter_mut().zip(&self.from_layer) {
            let mut pages = PageSet::new();
            view.resident_runs(|first, count| {
                for range in layout.ranges() {
                    let from = range.file_offset / PAGE_SIZE;
                    let low = first.max(from);
                    let high = (first + count).min(from + range.len / PAGE_SIZE);
                    if low < high {
                        let gfn = Gfn(range.gpa / PAGE_SIZE + (low - from));
                        pages.insert_run(Extent { first: gfn, pages: high - low });
                    }
                }
            })?;
            pages.intersect_with(wanted);
            all.union_with(&pages);
        }
        Ok(all)
    }
}

/// Looks at the page cache while the function runs.
struct Poller {
    stop: Sender<()>,
    thread: JoinHandle<io::Result<(Layering, PageSet)>>,
}

impl Poller {
    fn start(mut cache: impl ResidentPages + 'static) -> Result<Self, Error> {
        let (stop, stopped) = channel();
        let look = move || {
            let mut layering = Layering::new();
            loop {
                let over = stopped.recv_timeout(POLL) != Err(RecvTimeoutError::Timeout);
                let resident = cache.resident()?;
                if over {
                    return Ok((layering, resident));
                }
                layering.look(&resident);
            }
        };
        let thread = std::thread::Builder::new().name("mincore".into()).spawn(look);
        Ok(Poller { stop, thread: thread.map_err(Error::os("start the thread that watches the page cache"))? })
    }

    fn finish(self) -> Result<(Layering, PageSet), Error> {
        // A failure means that the thread has failed and ended; its result holds the reason.
        let _ = self.stop.send(());
        let result = self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
        result.map_err(Error::os("ask which pages are in the page cache"))
    }
}
