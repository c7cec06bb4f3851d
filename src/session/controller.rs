//! Commands to the machine: the states in which each is allowed, and its effect.

mod demote;
mod fork;
mod live;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::console::Input;
use super::demotion::DemotionSlot;
use super::facts::{Facts, Parts, Restored};
use super::fork::{ForkNews, Forks};
use super::jail;
use super::metrics::MetricsFile;
use super::opened_request::OpenedRequest;
use super::read_backs::ReadBacks;
use super::report;
use super::sources::location;
use super::used_profile::UsedProfile;
use super::watch::Watch;
use crate::config::control::{InstanceInfo, LiveTaken, Reply, Request, Respond, Rewound, SnapshotTaken, VmState};
use crate::config::patch::{BalloonQuestion, DevicePatch};
use crate::config::refusal::Refused;
use crate::config::request::{Command, CreateSnapshot, RewindRequest};
use crate::config::restore::{RestoreRequest, Start};
use crate::config::{DeviceConfigs, VmConfig};
use crate::memory::ending::Ending;
use crate::memory::rewind::TakenBack;
use crate::memory::stall::StallWatch;
use crate::session::Error;
use crate::session::live::{LiveOrder, LiveSlot, Purpose, taken};
use crate::session::log;
use crate::snapshot::{ForkPoint, Location, PAGE_SIZE, PageSet, Sealed, SnapshotId};
use crate::sys::errors::chain;
use crate::sys::logging;
use crate::sys::lost;
use crate::sys::output::ConsoleOutput;
use crate::sys::timeline::{Caller, Timeline};
use crate::vmm::capture::{Captured, ReadBackWhen};
use crate::vmm::console_ring::ConsoleRing;
use crate::vmm::devices::no_balloon;
use crate::vmm::machine::SerialPort;
use crate::vmm::machine::{Environment, Machine, Paused, Running};
use crate::vmm::vcpu::STOP_TIMEOUT;

/// The machine, in any of its states.
pub(super) enum Phase {
    NotStarted,
    Running(Machine<Running>),
    Paused(Machine<Paused>),
}

/// Owns the machine and answers commands.
pub struct Controller {
    id: String,
    pub(super) config: VmConfig,
    /// A part of the machine to boot was configured, so a snapshot can no longer be loaded (as in Firecracker).
    configured: bool,
    pub(super) phase: Phase,
    pub(super) environment: Environment,
    pub timeline: Timeline,
    pub(super) restored: Option<Restored>,
    metrics: Option<MetricsFile>,
    seals: (Sender<SealNews>, Receiver<SealNews>),
    seal_event: Arc<EventFd>,
    seal_reply: Option<Respond>,
    live: LiveSlot,
    demotion: DemotionSlot,
    forks: Forks,
    /// The restored machine is paused and waits for its first request.
    pub(super) stands_by: bool,
    read_backs: ReadBacks,
    /// Watches a restored machine for memory that does not come. Declared after `phase`, because it outlives the
    /// machine.
    pub(super) stalls: Option<StallWatch>,
}

/// Messages of the thread that seals a snapshot.
enum SealNews {
    Sealed {
        result: Result<Sealed, Error>,
        capture_us: u64,
        live: Option<LiveTaken>,
        profile: Option<PathBuf>,
    },
    /// The disk did not keep the written bytes.
    Damaged(SnapshotId),
    Fork(ForkNews),
}

/// The controller's ears in other threads.
#[derive(Clone)]
struct SealTeller {
    sender: Sender<SealNews>,
    event: Arc<EventFd>,
}

impl SealTeller {
    fn tell(&self, news: SealNews) {
        // A failure means that the controller, and with it the requester, has ended.
        let _ = self.sender.send(news);
        let _ = self.event.write(1);
    }
}

/// Time that the end of the process waits for snapshots being read back; after it they stay unverified.
const READ_BACK_PATIENCE: Duration = Duration::from_secs(10);

impl Controller {
    pub fn new(id: String, config: VmConfig, environment: Environment, timeline: Timeline) -> Result<Self, Error> {
        let seal_event = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(Error::os("make an eventfd"))?);
        let metrics = config.metrics.as_ref().map(|metrics| MetricsFile::open(&metrics.metrics_path)).transpose()?;
        Ok(Controller {
            id,
            config,
            configured: false,
            phase: Phase::NotStarted,
            environment,
            timeline,
            restored: None,
            metrics,
            seals: channel(),
            seal_event,
            seal_reply: None,
            live: LiveSlot::new()?,
            demotion: DemotionSlot::new()?,
            forks: Forks::default(),
            stands_by: false,
            read_backs: ReadBacks::default(),
            stalls: None,
        })
    }

    /// Readable when the sealing of a snapshot has ended, either way.
    pub fn seal_event(&self) -> &EventFd {
        &self.seal_event
    }

    /// The facts for a report on the machine as it is now.
    pub fn facts(&self) -> Facts<'_> {
        Facts {
            parts: self.machine_parts(),
            restored: self.restored.as_ref(),
            timeline: &self.timeline,
            moments: &self.environment.moments,
            read_backs: self.read_backs.json(),
            forks: self.forks.counts(),
        }
    }

    pub fn output(&self) -> &Arc<ConsoleOutput> {
        &self.environment.output
    }

    /// The virtio devices of the machine, running or to be booted.
    pub fn devices(&self) -> &DeviceConfigs {
        &self.config.devices
    }

    /// The serial port; `None` before there is a machine.
    pub fn serial(&self) -> Option<&SerialPort> {
        match &self.phase {
            Phase::NotStarted => None,
            Phase::Running(machine) => Some(machine.serial()),
            Phase::Paused(machine) => Some(machine.serial()),
        }
    }

    /// Console bytes that KVM collects; `None` before there is a machine.
    pub fn console(&self) -> Option<&Arc<ConsoleRing>> {
        match &self.phase {
            Phase::NotStarted => None,
            Phase::Running(machine) => machine.console(),
            Phase::Paused(machine) => machine.console(),
        }
    }

    /// Returns the parts of the machine that do not depend on its state.
    pub fn machine_parts(&self) -> Option<Parts<'_>> {
        match &self.phase {
            Phase::NotStarted => None,
            Phase::Running(machine) => Some(Parts::of(machine)),
            Phase::Paused(machine) => Some(Parts::of(machine)),
        }
    }

    /// Returns whether pages that the guest can read from images are still being compared with their checksums.
    pub fn is_comparing(&self) -> bool {
        match &self.phase {
            Phase::NotStarted => false,
            Phase::Running(machine) => machine.is_comparing(),
            Phase::Paused(machine) => machine.is_comparing(),
        }
    }

    /// The pages the guest has written since it was restored with dirty tracking.
    pub fn dirty_pages(&self) -> Result<PageSet, Error> {
        match &self.phase {
            Phase::NotStarted => Ok(PageSet::new()),
            Phase::Running(machine) => Ok(machine.dirty_pages()?),
            Phase::Paused(machine) => Ok(machine.dirty_pages()?),
        }
    }

    /// Answers one request: at once, or a snapshot when it is sealed, a fork when its children answer, a demotion and
    /// a barrier after the last step. `input`: the bytes on their way to the guest.
    pub fn handle(&mut self, request: Request, input: &mut Input) {
        let Request { command, respond, read_ns } = request;
        if let Err(refused) = self.check_has_guest(&command).and_then(|()| jail::check(&command)) {
            return respond(Err(refused));
        }
        match command {
            Command::CreateSnapshot(create) if create.live && matches!(self.phase, Phase::Running(_)) => {
                let order = LiveOrder {
                    target: location(&create.location),
                    kind: create.kind,
                    copy_drives: create.copy_drives,
                    purpose: Purpose::Snapshot { verify: create.verify },
                };
                self.begin_live(order, respond);
            }
            Command::CreateSnapshot(create) => match self.begin_snapshot(create) {
                Ok(()) => self.seal_reply = Some(respond),
                Err(refused) => respond(Err(refused)),
            },
            Command::Fork(request) => self.begin_fork(&request, respond),
            Command::Demote(request) => self.begin_demotion(&request, respond),
            Command::Barrier(request) => self.begin_barrier(request, respond),
            Command::Repurpose(request) => respond(self.repurpose(&request, input).map(Reply::Repurposed)),
            Command::Vacate => respond(self.vacate().map(|()| Reply::Empty)),
            Command::Resume => {
                self.note_request(Caller::Api, read_ns);
                respond(self.resume().map(|()| Reply::Empty));
            }
            command => respond(self.answer(command)),
        }
    }

    /// Notes the request for which a machine has waited whose guest has not run since it was restored.
    fn note_request(&mut self, by: Caller, asked_ns: u64) {
        let moments = &self.environment.moments;
        moments.note_request(by, asked_ns);
        if moments.first_run_ns().is_none() {
            self.timeline.wake();
        }
    }

    fn answer(&mut self, command: Command) -> Result<Reply, Refused> {
        match command {
            Command::InstanceInfo => Ok(Reply::InstanceInfo(InstanceInfo::new(&self.id, self.state()))),
            Command::Version => Ok(Reply::Version(env!("CARGO_PKG_VERSION").to_string())),
            Command::GetMachineConfig => Ok(Reply::MachineConfig(self.config.machine.clone())),
            Command::GetVmConfig => Ok(Reply::VmConfig(Box::new(self.config.clone()))),
            Command::PutBootSource(source) => self.configure(|config| config.boot_source = source),
            Command::PutMachineConfig(machine) => self.configure(|config| config.machine = machine),
            Command::PutCpuConfig(cpu) => self.configure(|config| config.cpu = Some(cpu)),
            Command::PatchMachineConfig(patch) => {
                let machine = self.config.machine.patched(&patch)?;
                self.configure(|config| config.machine = machine)
            }
            Command::PutDevice(device) => {
                self.before_start()?;
                self.config.devices.put(device)?;
                self.configured = true;
                Ok(Reply::Empty)
            }
            Command::PatchDevice(patch) => self.patch_device(patch),
            Command::AskBalloon(question) => self.ask_balloon(question).map(Reply::Balloon),
            Command::Report => {
                report::live(&self.facts()).map(Reply::Report).map_err(|error| Refused::internal_because(&error))
            }
            Command::PutLogger(logger) => {
                self.before_start()?;
                log::configure(&logger).map_err(|error| Refused::bad_request_because(&error))?;
                self.config.logger = Some(logger);
                Ok(Reply::Empty)
            }
            Command::PutMetrics(metrics) => {
                self.before_start()?;
                if self.metrics.is_some() {
                    return Err(Refused::bad_request("Reinitialization of metrics not allowed."));
                }
                let file = MetricsFile::open(&metrics.metrics_path).map_err(|e| Refused::bad_request_because(&e))?;
                self.metrics = Some(file);
                self.config.metrics = Some(metrics);
                Ok(Reply::Empty)
            }
            Command::InstanceStart => self.instance_start(),
            Command::SendCtrlAltDel => Err(match self.phase {
                Phase::NotStarted => Refused::before_start(),
                _ => Refused::bad_request("Ctrl+Alt+Del cannot be sent: this machine has no keyboard."),
            }),
            Command::FlushMetrics => self.flush_metrics(),
            Command::Pause => {
                // Only the API ends this pause.
                self.stands_by = false;
                self.pause().map(|()| Reply::Empty)
            }
            Command::LoadSnapshot(load) => self.load(&load).map(|()| Reply::Empty),
            Command::Rewind(rewind) => self.rewind(rewind).map(Reply::Rewound),
            // `handle` answers these commands.
            Command::CreateSnapshot(_)
            | Command::Fork(_)
            | Command::Demote(_)
            | Command::Barrier(_)
            | Command::Repurpose(_)
            | Command::Vacate
            | Command::Resume => Err(Refused::internal("A request got lost.")),
        }
    }

    fn state(&self) -> VmState {
        match self.phase {
            Phase::NotStarted => VmState::NotStarted,
            Phase::Running(_) => VmState::Running,
            Phase::Paused(_) => VmState::Paused,
        }
    }

    fn before_start(&self) -> Result<(), Refused> {
        if matches!(self.phase, Phase::NotStarted) { Ok(()) } else { Err(Refused::after_start()) }
    }

    fn configure(&mut self, change: impl FnOnce(&mut VmConfig)) -> Result<Reply, Refused> {
        self.before_start()?;
        self.configured = true;
        change(&mut self.config);
        Ok(Reply::Empty)
    }

    fn patch_device(&mut self, patch: DevicePatch) -> Result<Reply, Refused> {
        let devices = match &mut self.phase {
            Phase::NotStarted => return Err(Refused::before_start()),
            Phase::Running(machine) => machine.patch_device(patch),
            Phase::Paused(machine) => machine.patch_device(patch),
        };
        self.config.devices = devices?.clone();
        Ok(Reply::Empty)
    }

    fn ask_balloon(&self, question: BalloonQuestion) -> Result<serde_json::Value, Refused> {
        match &self.phase {
            Phase::NotStarted => match (&self.config.devices.balloon, question) {
                (Some(balloon), BalloonQuestion::Config) => Ok(serde_json::json!(balloon)),
                (None, BalloonQuestion::Config) => Err(no_balloon()),
                _ => Err(Refused::before_start()),
            },
            Phase::Running(machine) => machine.virtio().ask_balloon(question),
            Phase::Paused(machine) => machine.virtio().ask_balloon(question),
        }
    }

    fn instance_start(&mut self) -> Result<Reply, Refused> {
        self.before_start()?;
        self.timeline.wake();
        self.boot().map_err(|error| Refused::bad_request_because(&error))?;
        Ok(Reply::Empty)
    }

    /// Boots the configured machine.
    pub fn boot(&mut self) -> Result<(), Error> {
        let machine = Machine::boot(&self.config, self.environment.clone(), &mut self.timeline)?;
        self.phase = Phase::Running(machine.start()?);
        Ok(())
    }

    /// Restores a machine, running or paused. After an error everything is as before.
    pub fn restore(
        &mut self,
        load: &RestoreRequest,
        watch: Watch,
        before_run: impl FnOnce(&SerialPort, &DeviceConfigs) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let restored = self.try_restore(load, watch, before_run);
        if restored.is_err() {
            self.stalls = None;
        }
        restored
    }

    fn try_restore(
        &mut self,
        load: &RestoreRequest,
        watch: Watch,
        before_run: impl FnOnce(&SerialPort, &DeviceConfigs) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let stalls = self.stalls.insert(StallWatch::start(self.environment.fault_timeout)?).stalls().clone();
        let opened = OpenedRequest::open(load, self.environment.fault_timeout, &stalls)?;
        let spec = opened.spec(watch);
        let (machine, engine) = Machine::restore(spec, self.environment.clone(), &mut self.timeline)?;
        opened.note_plan(&engine)?;
        before_run(machine.serial(), machine.virtio().configs())?;
        stalls.restored(machine.ending().clone());
        let phase = match load.start {
            Start::Running => Phase::Running(machine.start()?),
            Start::Paused | Start::Standby => {
                let paused = machine.start_paused()?;
                self.environment.moments.await_request();
                Phase::Paused(paused)
            }
        };
        self.stands_by = load.start == Start::Standby;
        let (shape, configs) = match &phase {
            Phase::Running(machine) => (machine.shape(), machine.virtio().configs()),
            Phase::Paused(machine) => (machine.shape(), machine.virtio().configs()),
            Phase::NotStarted => return Ok(()),
        };
        self.config.machine.vcpu_count = shape.vcpu_count;
        self.config.machine.mem_size_mib = shape.mem_size_mib;
        self.config.machine.track_dirty_pages = shape.track_dirty_pages;
        self.config.devices = configs.clone();
        self.phase = phase;
        self.restored = Some(opened.restored(engine));
        Ok(())
    }

    /// The descriptors that become readable when a request comes for a machine that stands by; none otherwise.
    pub fn standby_sources(&self) -> Vec<RawFd> {
        match &self.phase {
            Phase::Paused(machine) if self.stands_by => machine.virtio().connection_sources(),
            _ => Vec::new(),
        }
    }

    /// Called when a request comes, which was seen at `asked_ns`: lets a machine that stands by run.
    pub fn wake_standby(&mut self, by: Caller, asked_ns: u64) -> Result<(), Error> {
        if self.stands_by { self.let_run(by, asked_ns) } else { Ok(()) }
    }

    /// Lets a machine run that has waited since its restore, because of a request seen at `asked_ns`.
    pub fn let_run(&mut self, by: Caller, asked_ns: u64) -> Result<(), Error> {
        self.note_request(by, asked_ns);
        self.resume().map_err(|refused| Error::Os {
            doing: "let the VM run that waited",
            source: std::io::Error::other(refused.message),
        })
    }

    fn load(&mut self, load: &RestoreRequest) -> Result<(), Refused> {
        self.before_start()?;
        if self.configured {
            return Err(Refused::bad_request(
                "Loading a microVM snapshot not allowed after configuring boot-specific resources.",
            ));
        }
        self.timeline.wake();
        self.restore(load, Watch::default(), |_, _| Ok(())).map_err(|error| Refused::bad_request_because(&error))
    }

    /// Takes the machine back to the snapshot that it was restored from. It runs afterwards if it ran before.
    ///
    /// After a failure half-way its memory is neither the old nor the snapshot's, so it ends.
    fn rewind(&mut self, request: RewindRequest) -> Result<Rewound, Refused> {
        let start = Instant::now();
        let was_running = matches!(self.phase, Phase::Running(_));
        self.check_no_live()?;
        let _work = self.stalls.as_ref().map(|watch| watch.stalls().main_thread_does("rewind"));
        let prepared = match &self.phase {
            Phase::NotStarted => return Err(Refused::before_start()),
            Phase::Running(machine) => machine.prepare_rewind(),
            Phase::Paused(machine) => machine.prepare_rewind(),
        };
        let drives = prepared.map_err(|error| Refused::bad_request_because(&error))?;
        let stopping = Instant::now();
        self.pause()?;
        self.abandon_demotion("the machine was rewound");
        let stop_us = stopping.elapsed().as_micros() as u64;
        let (Phase::Paused(machine), Some(restored)) = (&mut self.phase, &mut self.restored) else {
            return Err(Refused::internal("The machine to rewind is gone."));
        };
        let result = machine.rewind(&restored.carried_out, restored.keep_pages, drives);
        let rewound_us = start.elapsed().as_micros() as u64;
        let result = result.and_then(|rewound| {
            if request.compare {
                machine.compare(&restored.carried_out)?;
            }
            machine.raise_events()?;
            Ok(rewound)
        });
        let rewound = result.map_err(|error| {
            machine.ending().end(Ending::Failed(format!("cannot rewind: {}", chain(&error))));
            Refused::internal_because(&error)
        })?;
        self.config.devices = machine.virtio().configs().clone();
        let TakenBack { copied, cleared, dropped, returned } = rewound.pages;
        let rewound = Rewound {
            pages_copied: copied,
            pages_cleared: cleared,
            pages_dropped: dropped,
            pages_returned: returned,
            stop_us,
            state_us: rewound.state.as_micros() as u64,
            memory_us: rewound.memory.as_micros() as u64,
            total_us: rewound_us,
        };
        restored.rewinds += 1;
        restored.last_rewind = Some(rewound);
        if was_running {
            self.environment.moments.forget_request();
            self.resume()?;
        } else {
            self.environment.moments.await_request();
        }
        Ok(rewound)
    }

    pub(super) fn pause(&mut self) -> Result<(), Refused> {
        let (phase, result) = match std::mem::replace(&mut self.phase, Phase::NotStarted) {
            Phase::NotStarted => (Phase::NotStarted, Err(Refused::before_start())),
            // As in Firecracker, pausing a paused machine is no error.
            paused @ Phase::Paused(_) => (paused, Ok(())),
            Phase::Running(machine) => match machine.pause() {
                Ok(machine) => (Phase::Paused(machine), Ok(())),
                Err(failed) => {
                    let (machine, error) = *failed;
                    (Phase::Running(machine), Err(Refused::internal_because(&error)))
                }
            },
        };
        self.phase = phase;
        result
    }

    pub(super) fn resume(&mut self) -> Result<(), Refused> {
        self.stands_by = false;
        let (phase, result) = match std::mem::replace(&mut self.phase, Phase::NotStarted) {
            Phase::NotStarted => (Phase::NotStarted, Err(Refused::before_start())),
            running @ Phase::Running(_) => (running, Ok(())),
            Phase::Paused(machine) => match machine.resume() {
                Ok(machine) => (Phase::Running(machine), Ok(())),
                Err(failed) => {
                    let (machine, error) = *failed;
                    (Phase::Paused(machine), Err(Refused::internal_because(&error)))
                }
            },
        };
        self.phase = phase;
        result
    }

    /// Captures the paused machine, resumes it if asked to, and seals the snapshot on its own thread.
    fn begin_snapshot(&mut self, create: CreateSnapshot) -> Result<(), Refused> {
        self.check_no_live()?;
        // Before the capture, which reads memory itself.
        let used = if create.profile { self.used_profile()? } else { None };
        let machine = match &mut self.phase {
            Phase::NotStarted => return Err(Refused::before_start()),
            Phase::Running(_) => {
                return Err(Refused::bad_request("Cannot create a snapshot of a running microVM: pause it first."));
            }
            Phase::Paused(machine) => machine,
        };
        let target = location(&create.location);
        let captured = machine.capture(target.clone(), create.kind, create.copy_drives);
        let mut captured = captured.map_err(|error| Refused::bad_request_because(&error))?;
        if ForkPoint::has(&target) {
            captured = captured.unsynced();
        }
        if create.resume
            && let Err(refused) = self.resume()
        {
            // The snapshot is good nonetheless, and the machine is still paused; both are reported.
            tracing::error!(fault = %refused.message, "The machine could not be resumed after its capture");
        }
        self.spawn_seal(captured, create.verify, used)
    }

    /// The pages that the guest has used since its restore, if they can be told.
    fn used_profile(&self) -> Result<Option<UsedProfile>, Refused> {
        let (Phase::Paused(machine), Some(restored)) = (&self.phase, &self.restored) else {
            return Err(Refused::bad_request(
                "Only a paused VM that was restored has a profile of its use since the restore: leave `profile` out.",
            ));
        };
        let used = machine.ram().used_pages().map_err(|error| Refused::bad_request_because(&error))?;
        Ok(UsedProfile::of(&used, restored))
    }

    /// Seals the snapshot on a thread of its own. With `verify`, its memory is read back before that is done. `used`:
    /// the profile that is then written beside it.
    fn spawn_seal(&mut self, captured: Captured, verify: bool, used: Option<UsedProfile>) -> Result<(), Refused> {
        let is_first = verify || self.read_backs.are_many();
        let when = if is_first { ReadBackWhen::First } else { ReadBackWhen::Later };
        let teller = self.seal_teller();
        let read_backs = self.read_backs.clone();
        let capture_us = captured.capture_us;
        let live = captured.live.map(taken);
        let spawned = std::thread::Builder::new().name("seal".into()).spawn(move || {
            let (result, left) = match captured.seal(when) {
                Ok((sealed, read_back)) => {
                    if read_back.is_none() {
                        read_backs.note_first();
                    }
                    // A fork point may never reach a disk.
                    let read_back = read_back.filter(|_| !ForkPoint::has(&sealed.location));
                    let left = read_back.map(|left| (sealed.id, read_backs.add(anchor(&sealed.location), left)));
                    (Ok(sealed), left)
                }
                Err(error) => (Err(Error::from(error)), None),
            };
            let profile = match (&result, used) {
                (Ok(sealed), Some(used)) => written(&used, sealed),
                _ => None,
            };
            teller.tell(SealNews::Sealed { result, capture_us, live, profile });
            if let Some((id, left)) = left
                && left.run().is_err()
            {
                teller.tell(SealNews::Damaged(id));
            }
        });
        spawned.map(drop).map_err(|error| {
            self.with_machine(None);
            Refused::internal(format!("Cannot start the thread that seals the snapshot: {error}"))
        })
    }

    /// Records sealed snapshots and answers their requests. Called when `seal_event` is readable.
    pub fn finish_seals(&mut self) {
        let _ = self.seal_event.read();
        while let Ok(news) = self.seals.1.try_recv() {
            let (result, capture_us, live, profile) = match news {
                SealNews::Sealed { result, capture_us, live, profile } => (result, capture_us, live, profile),
                SealNews::Damaged(id) => {
                    self.snapshot_damaged(id);
                    continue;
                }
                SealNews::Fork(ForkNews::PointOver) => {
                    self.with_machine(None);
                    continue;
                }
                SealNews::Fork(ForkNews::Over(result)) => {
                    self.forks.finish(result);
                    continue;
                }
            };
            // A fork point is no parent of diffs: it ends with its users.
            self.with_machine(result.as_ref().ok().filter(|sealed| !ForkPoint::has(&sealed.location)));
            let Some(respond) = self.seal_reply.take() else { continue };
            respond(match result {
                Ok(sealed) => Ok(Reply::Snapshot(SnapshotTaken {
                    id: sealed.id.to_string(),
                    path: anchor(&sealed.location),
                    memory_bytes: sealed.pages_held * PAGE_SIZE,
                    capture_us,
                    live,
                    profile,
                })),
                Err(error) => Err(Refused::bad_request_because(&error)),
            });
        }
    }

    /// Returns whether a snapshot is being sealed or children of a fork are being started; the process should not end
    /// before that is over.
    pub fn is_sealing(&self) -> bool {
        self.seal_reply.is_some() || self.forks.is_under_way()
    }

    fn seal_teller(&self) -> SealTeller {
        SealTeller { sender: self.seals.0.clone(), event: self.seal_event.clone() }
    }

    fn with_machine(&mut self, sealed: Option<&Sealed>) {
        match &mut self.phase {
            Phase::NotStarted => {}
            Phase::Running(machine) => machine.seal_finished(sealed),
            Phase::Paused(machine) => machine.seal_finished(sealed),
        }
    }

    fn snapshot_damaged(&mut self, id: SnapshotId) {
        match &mut self.phase {
            Phase::NotStarted => {}
            Phase::Running(machine) => machine.snapshot_damaged(id),
            Phase::Paused(machine) => machine.snapshot_damaged(id),
        }
    }

    fn flush_metrics(&mut self) -> Result<Reply, Refused> {
        if matches!(self.phase, Phase::NotStarted) {
            return Err(Refused::before_start());
        }
        self.write_metrics().map_err(|error| Refused::internal_because(&error))?;
        Ok(Reply::Empty)
    }

    /// Appends a line of metrics to the metrics file, if there is one.
    pub fn write_metrics(&mut self) -> Result<(), Error> {
        let (written, dropped) = self.environment.output.counts();
        let uart = serde_json::json!({ "write_count": written, "dropped_count": dropped });
        let parts = self.machine_parts();
        let vcpu = parts.as_ref().map(Parts::counters_json);
        let faults = parts.as_ref().map(|parts| parts.faults);
        let devices = parts.as_ref().map(|parts| parts.virtio.metrics());
        let promotion = parts.as_ref().and_then(|parts| parts.ram.promotion());
        let read_backs = self.read_backs.json();
        match &mut self.metrics {
            Some(file) => {
                let fit = self.restored.as_ref().and_then(|restored| restored.fit.as_ref());
                let plan = fit.map(|fit| {
                    let preloaded = fit.preload;
                    let in_place = fit.in_place;
                    serde_json::json!({
                        "preloaded": preloaded.pages, "preloaded_unexpected": preloaded.untouched,
                        "in_place": in_place.pages, "in_place_unexpected": in_place.untouched,
                    })
                });
                let all = serde_json::json!({ "vcpu": vcpu, "uart": uart, "faults_served": faults, "plan": plan,
                    "promotion": promotion, "devices": devices, "read_backs": read_backs, "log": logging::counts() });
                file.write(&all)
            }
            None => Ok(()),
        }
    }

    /// Ends the machine: vCPU threads first, then VM and memory. An error names the thread that did not stop; the
    /// process should end then.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.abandon_live();
        self.abandon_demotion("the machine ended");
        let is_stalled = self.stalls.as_ref().is_some_and(|watch| watch.stalls().is_stalled());
        // A thread that waits for memory that does not come, or has touched lost memory, does not stop.
        let patience = if is_stalled || lost::touched().is_some() { Duration::ZERO } else { STOP_TIMEOUT };
        let stopped = match std::mem::replace(&mut self.phase, Phase::NotStarted) {
            Phase::NotStarted => Ok(()),
            Phase::Running(machine) => machine.stop(patience).map_err(Error::from),
            Phase::Paused(machine) => machine.stop(patience).map_err(Error::from),
        };
        self.stalls = None;
        if !self.read_backs.wait(READ_BACK_PATIENCE) {
            tracing::warn!("The process ends before its last snapshots were read back; `tvmm inspect` verifies them");
        }
        stopped
    }
}

/// Writes a profile beside a snapshot, which is good without it.
fn written(used: &UsedProfile, sealed: &Sealed) -> Option<PathBuf> {
    let written = used.write(&sealed.location);
    written.inspect_err(|error| tracing::warn!(error = chain(error), "A snapshot has no profile")).ok()
}

fn anchor(location: &Location) -> PathBuf {
    match location {
        Location::Dir(dir) => dir.clone(),
        Location::Files { snapshot, .. } => snapshot.clone(),
    }
}
