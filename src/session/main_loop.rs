//! The main loop: one thread waits for the console, the control socket, signals, and the guest's end.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use super::console::{Answer, Input, Typed};
use super::fork::{ChildEnd, Heard, Order, Step};
use super::outcome::Outcome;
use super::port_request::{PortRequest, Requesting};
use super::watch::Watch;
use crate::config::DeviceConfigs;
use crate::config::control::ControlReceiver;
use crate::config::restore::RestoreRequest;
use crate::memory::ending::Ending;
use crate::session::Error;
use crate::session::controller::Controller;
use crate::sys::clock;
use crate::sys::code;
use crate::sys::lost;
use crate::sys::lost::Listening;
use crate::sys::output::ConsoleOutput;
use crate::sys::raw_descriptor::RawDescriptor;
use crate::sys::seccomp;
use crate::sys::seccomp::Kind;
use crate::sys::signals::EndSignals;
use crate::sys::timeline::Caller;
use crate::vmm;

/// The first action of the session.
pub enum Begin {
    /// Wait for the control socket to configure a machine.
    Wait,
    /// Boot the configured machine.
    Boot,
    /// Restore a snapshot.
    Restore(RestoreRequest),
    /// Restore a snapshot and watch the guest's use of its memory.
    Record(RestoreRequest, Watch),
}

/// The event sources of the main loop other than the machine.
pub struct EventSources {
    pub input: Input,
    /// True if standard input is read (not while a scripted request runs).
    pub reads_stdin: bool,
    /// The line to the parent of a fork, until the parent has let this process live on.
    pub parent: Option<ChildEnd>,
    pub control: Option<ControlReceiver>,
    /// The seccomp filter of the main thread from the moment on at which the machine runs.
    pub last_filter: Kind,
    pub signals: EndSignals,
    pub answer: Option<Arc<Answer>>,
    /// The scripted request, if it goes over vsock and not by `input`.
    pub request: Option<PortRequest>,
    pub timeout: Option<Duration>,
}

const STDIN: u32 = 0;
const CONTROL: u32 = 1;
const SIGNALS: u32 = 2;
const ANSWER: u32 = 3;
const SEALED: u32 = 4;
const BACKLOG: u32 = 5;
const STDOUT: u32 = 6;
const ENDING: u32 = 7;
const FIFO: u32 = 8;
const CONSOLE: u32 = 9;
const STANDBY: u32 = 10;
const LIVE: u32 = 11;
const PARENT: u32 = 12;
const DEMOTION: u32 = 13;

/// After this time without an event the VM has started, and resources needed only for that are freed. Not earlier:
/// freeing them costs a restore some 60 µs.
const SETTLED: Duration = Duration::from_millis(100);
/// After this time without an event a VM is idle, and the code that its last requests touched is unmapped again. Later
/// than the first time: each request after it maps that code again.
const IDLE: Duration = Duration::from_secs(10);

/// One VM's main loop.
struct Session {
    controller: Controller,
    event_sources: EventSources,
    /// Standard input cannot be polled (a regular file, /dev/null): it is read whenever the guest wants more.
    stdin_always_ready: bool,
    stdin_watched: bool,
    /// The machine's own events are registered, and the SIGBUS handler knows the event to signal.
    machine_watched: bool,
    listening: Option<Listening>,
    /// Descriptors at which the request for a machine that stands by arrives.
    standby_watched: Vec<RawFd>,
    /// Resources needed only for starting have been freed.
    is_settled: bool,
    /// Nothing has happened since the program's code was unmapped.
    is_slim: bool,
    /// Time of the last event other than ticks of the console.
    busy_at: Instant,
    /// The same in ns of CLOCK_MONOTONIC.
    busy_ns: u64,
    /// The scripted request was answered.
    is_answered: bool,
    outcome: Option<Outcome>,
    failure: Option<Error>,
}

/// Interval of the looks whether the memory that an answer may rest on was compared with its checksums.
const COMPARED_POLL: Duration = Duration::from_millis(1);

/// Boots or restores the machine if the session begins so, makes the scripted request, and narrows the seccomp filter.
fn begin_machine(
    controller: &mut Controller,
    begin: Begin,
    event_sources: &mut EventSources,
) -> Result<Option<Requesting>, Error> {
    let requesting = match begin {
        Begin::Wait => None,
        Begin::Boot => {
            controller.boot()?;
            begin_request(event_sources, controller.devices(), controller.output())?
        }
        Begin::Restore(load) => restore(controller, &load, Watch::default(), event_sources)?,
        Begin::Record(load, watch) => restore(controller, &load, watch, event_sources)?,
    };
    if event_sources.last_filter != Kind::Start {
        seccomp::enter(event_sources.last_filter);
    }
    Ok(requesting)
}

/// Names the action of an error on the line to the parent.
const HEAR_PARENT: &str = "talk to the parent of the fork by standard input";

/// Waits until the parent, if this process is a child of a fork, has sealed the fork point. Returns the outcome if this
/// process is to end instead.
fn await_fork_point(controller: &mut Controller, event_sources: &mut EventSources) -> Result<Option<Outcome>, Error> {
    let Some(parent) = event_sources.parent else { return Ok(None) };
    parent.tell(Step::Waits).map_err(Error::os(HEAR_PARENT))?;
    loop {
        match parent.hear(Step::Waits).map_err(Error::os(HEAR_PARENT))? {
            Heard::Order(_) => break,
            Heard::End => return Ok(Some(Outcome::Quit)),
            Heard::Nothing => {}
        }
        let is_signalled = parent.wait(&event_sources.signals).map_err(Error::os(HEAR_PARENT))?;
        if is_signalled && let Some(number) = event_sources.signals.take_one() {
            return Ok(Some(Outcome::Signal(number)));
        }
    }
    controller.timeline.wake();
    Ok(None)
}

/// Runs a VM until it ends. Returns the outcome, and the controller with the rest of the machine.
pub fn run(
    mut controller: Controller,
    begin: Begin,
    mut event_sources: EventSources,
) -> Result<(Outcome, Controller, EventSources), Error> {
    if let Some(outcome) = await_fork_point(&mut controller, &mut event_sources)? {
        return Ok((outcome, controller, event_sources));
    }
    let requesting = begin_machine(&mut controller, begin, &mut event_sources)?;
    let deadline = event_sources.timeout.map(|timeout| Instant::now() + timeout);
    event_sources.input.stdin_open = event_sources.reads_stdin;
    let session = Session {
        controller,
        event_sources,
        stdin_always_ready: false,
        stdin_watched: false,
        machine_watched: false,
        listening: None,
        standby_watched: Vec::new(),
        is_settled: false,
        is_slim: false,
        busy_at: Instant::now(),
        busy_ns: clock::monotonic_ns(),
        is_answered: false,
        outcome: None,
        failure: None,
    };
    let mut manager = EventManager::<Session>::new().map_err(|error| event_error(&error))?;
    let id = manager.add_subscriber(session);
    loop {
        let (settles, awaits_comparison) = {
            let session = manager.subscriber_mut(id).map_err(|error| event_error(&error))?;
            if let Some(failure) = session.failure.take() {
                return Err(failure);
            }
            session.conclude();
            let over = session.outcome.is_some() && !session.controller.is_sealing();
            if over {
                break;
            }
            let awaits_comparison = session.awaits_comparison();
            let settles = session.machine_watched && !session.is_slim && !awaits_comparison;
            (settles.then(|| session.quiet_time().saturating_sub(session.busy_at.elapsed())), awaits_comparison)
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let wait = settles.map_or(left, |settles| Some(left.map_or(settles, |left| left.min(settles))));
        let wait = if awaits_comparison { Some(COMPARED_POLL) } else { wait };
        // Rounded up, so that the last wait does not spin.
        let wait = wait.map_or(-1, |wait| wait.as_millis() as i32 + 1);
        manager.run_with_timeout(wait).map_err(|error| event_error(&error))?;
        let session = manager.subscriber_mut(id).map_err(|error| event_error(&error))?;
        if settles.is_some() && session.busy_at.elapsed() >= session.quiet_time() {
            code::unmap_until_touched();
            session.is_settled = true;
            session.is_slim = true;
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let session = manager.subscriber_mut(id).map_err(|error| event_error(&error))?;
            // The answer has come, and its reader does not read.
            let is_unread = session.is_answered && !session.controller.is_comparing();
            let late = if is_unread { Outcome::Answered } else { Outcome::TimedOut };
            session.outcome.get_or_insert(late);
        }
    }
    let session = manager.remove_subscriber(id).map_err(|error| event_error(&error))?;
    drop(requesting);
    // The loop only breaks with an outcome.
    let outcome = session.outcome.unwrap_or(Outcome::Quit);
    Ok((outcome, session.controller, session.event_sources))
}

fn restore(
    controller: &mut Controller,
    load: &RestoreRequest,
    watch: Watch,
    event_sources: &mut EventSources,
) -> Result<Option<Requesting>, Error> {
    // A scripted request is in the FIFO, or at the vsock device, before the guest runs: this saves a wake-up.
    let mut requesting = None;
    let output = controller.output().clone();
    controller.restore(load, watch, |serial, devices| {
        event_sources.input.feed(|bytes| serial.receive(bytes)).map_err(vmm::Error::from)?;
        requesting = begin_request(event_sources, devices, &output)?;
        Ok(())
    })?;
    let parent = event_sources.parent;
    parent.map_or(Ok(()), |parent| parent.tell(Step::Restored)).map_err(Error::os(HEAR_PARENT))?;
    Ok(requesting)
}

/// Makes the scripted request if it goes over vsock.
fn begin_request(
    event_sources: &EventSources,
    devices: &DeviceConfigs,
    output: &Arc<ConsoleOutput>,
) -> Result<Option<Requesting>, Error> {
    event_sources.request.as_ref().map(|request| request.begin(devices, output.clone())).transpose()
}

fn event_error(error: &event_manager::Error) -> Error {
    Error::Os { doing: "wait for events", source: std::io::Error::other(error.to_string()) }
}

impl Session {
    fn try_init(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        watch(ops, &self.event_sources.signals, SIGNALS)?;
        if let Some(control) = &self.event_sources.control {
            watch_event(ops, control.eventfd(), CONTROL)?;
        }
        if let Some(answer) = &self.event_sources.answer {
            watch_event(ops, answer.event(), ANSWER)?;
        }
        watch_event(ops, self.controller.seal_event(), SEALED)?;
        watch_event(ops, self.controller.live_event(), LIVE)?;
        watch(ops, self.controller.demotion_timer(), DEMOTION)?;
        if self.event_sources.parent.is_some() {
            // Bytes that are for other children stay there.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data(&io::stdin(), PARENT, events)).map_err(|error| event_error(&error))?;
        }
        watch_event(ops, self.controller.output().backlog_event(), BACKLOG)?;
        self.watch_machine(ops)?;
        self.watch_standby(ops)?;
        self.check_standby()
    }

    /// Refuses to wait for a request that cannot come.
    fn check_standby(&self) -> Result<(), Error> {
        let sources = &self.event_sources;
        let can_come = sources.input.stdin_open
            || sources.control.is_some()
            || sources.parent.is_some()
            || !self.standby_watched.is_empty();
        if self.controller.stands_by && !can_come { Err(Error::StandbyForNothing) } else { Ok(()) }
    }

    /// Registers the events of a new machine.
    fn watch_machine(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        if self.machine_watched {
            return Ok(());
        }
        let (Some(parts), Some(serial)) = (self.controller.machine_parts(), self.controller.serial()) else {
            return Ok(());
        };
        watch_event(ops, parts.ending.event(), ENDING)?;
        let listening = lost::listen(parts.ending.event());
        watch_event(ops, serial.fifo_empty_event(), FIFO)?;
        self.listening = Some(listening);
        if let Some(console) = self.controller.console() {
            watch(ops, &**console, CONSOLE)?;
        }
        self.machine_watched = true;
        self.feed(ops)
    }

    /// Waits for a request to a machine that stands by.
    fn watch_standby(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        for source in self.controller.standby_sources() {
            watch(ops, &RawDescriptor(source), STANDBY)?;
            self.standby_watched.push(source);
        }
        Ok(())
    }

    /// Called before the descriptors of [`watch_standby`](Self::watch_standby) may be closed, or when they are no
    /// longer of interest.
    fn unwatch_standby(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        for source in std::mem::take(&mut self.standby_watched) {
            ops.remove(Events::new(&RawDescriptor(source), EventSet::IN)).map_err(|error| event_error(&error))?;
        }
        Ok(())
    }

    /// Returns the time without an event after which the program's code is unmapped.
    fn quiet_time(&self) -> Duration {
        if self.is_settled { IDLE } else { SETTLED }
    }

    /// Returns whether the session waits only for the comparison of memory, whose end is no event.
    fn awaits_comparison(&self) -> bool {
        self.is_answered && self.outcome.is_none() && !self.controller.output().has_backlog()
    }

    /// Ends the session once the request is answered, the output is written, and the memory that the answer may rest on
    /// was compared with its checksums. If the comparison found damage, the answer does not count.
    fn conclude(&mut self) {
        let is_under_way = self.controller.output().has_backlog() || self.controller.is_comparing();
        if !self.is_answered || self.outcome.is_some() || is_under_way {
            return;
        }
        let ending = self.controller.machine_parts().and_then(|parts| parts.ending.take());
        self.outcome = Some(match ending {
            Some(Ending::Failed(what)) => Outcome::Failed(what),
            _ => Outcome::Answered,
        });
    }

    fn handle(&mut self, token: u32, ops: &mut EventOps) -> Result<(), Error> {
        if token != CONSOLE {
            self.busy_at = Instant::now();
            self.busy_ns = clock::monotonic_ns();
            self.is_slim = false;
        }
        match token {
            STDIN => self.read_stdin(ops),
            CONTROL => {
                // A client that asks after the answer to the fork meets a VM that runs.
                self.hear_parent(ops)?;
                let requests = self.event_sources.control.as_ref().map(ControlReceiver::drain).unwrap_or_default();
                self.unwatch_standby(ops)?;
                let input = &mut self.event_sources.input;
                requests.into_iter().for_each(|request| self.controller.handle(request, input));
                self.watch_machine(ops)?;
                // A command may have emptied the FIFO.
                self.feed(ops)?;
                self.watch_standby(ops)
            }
            SIGNALS => {
                if let Some(number) = self.event_sources.signals.take_one() {
                    self.outcome.get_or_insert(Outcome::Signal(number));
                }
                Ok(())
            }
            ANSWER => {
                self.note_answer();
                Ok(())
            }
            SEALED => {
                self.controller.finish_seals();
                Ok(())
            }
            PARENT => self.hear_parent(ops),
            LIVE => {
                self.controller.step_live();
                Ok(())
            }
            DEMOTION => {
                self.controller.step_demotion();
                Ok(())
            }
            CONSOLE => {
                if let Some(console) = self.controller.console() {
                    console.tick();
                }
                Ok(())
            }
            STANDBY => {
                self.unwatch_standby(ops)?;
                self.controller.wake_standby(Caller::Vsock, self.busy_ns)
            }
            BACKLOG | STDOUT => self.drain_output(token, ops),
            ENDING => {
                if let Some(ending) = self.controller.machine_parts().and_then(|parts| parts.ending.take()) {
                    self.outcome.get_or_insert(Outcome::from(ending));
                }
                Ok(())
            }
            FIFO => {
                if let Some(serial) = self.controller.serial() {
                    let _ = serial.fifo_empty_event().read();
                }
                self.feed(ops)
            }
            _ => Ok(()),
        }
    }

    /// Called when the guest has answered, or its request has failed.
    fn note_answer(&mut self) {
        match self.event_sources.answer.as_ref().and_then(|answer| answer.failure()) {
            Some(why) => {
                self.outcome.get_or_insert(Outcome::NoAnswer(why));
            }
            None => self.is_answered = true,
        }
        self.event_sources.answer.as_ref().map_or(Ok(0), |answer| answer.event().read()).ok();
    }

    /// Follows the parent of a fork: after its order this process lives on without it, before it they end together.
    fn hear_parent(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        let Some(parent) = self.event_sources.parent else { return Ok(()) };
        match parent.hear(Step::Restored).map_err(Error::os(HEAR_PARENT))? {
            Heard::Nothing | Heard::Order(Order::Restore) => return Ok(()),
            Heard::Order(Order::Run) => self.controller.let_run(Caller::Parent, self.busy_ns)?,
            Heard::Order(Order::StayPaused) => {}
            Heard::End => {
                self.outcome.get_or_insert(Outcome::Quit);
            }
        }
        self.event_sources.parent = None;
        ops.remove(Events::with_data(&io::stdin(), PARENT, EventSet::IN)).map_err(|error| event_error(&error))
    }

    fn read_stdin(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        match self.event_sources.input.read().map_err(Error::os("read standard input"))? {
            Typed::Quit => {
                self.outcome.get_or_insert(Outcome::Quit);
            }
            Typed::End => self.event_sources.input.stdin_open = false,
            Typed::Nothing => {}
        }
        self.feed(ops)?;
        self.check_standby()
    }

    /// Passes waiting input to the guest, and watches standard input exactly while more is wanted.
    fn feed(&mut self, ops: &mut EventOps) -> Result<(), Error> {
        let Some(serial) = self.controller.serial().cloned() else { return Ok(()) };
        loop {
            let mut came = false;
            let pass = |bytes: &[u8]| {
                let taken = serial.receive(bytes);
                came |= taken.as_ref().is_ok_and(|taken| *taken > 0);
                taken
            };
            self.event_sources.input.feed(pass).map_err(vmm::Error::from)?;
            if came {
                self.controller.wake_standby(Caller::Console, self.busy_ns)?;
            }
            let wanted = self.event_sources.input.stdin_open && self.event_sources.input.wants_more();
            if wanted && self.stdin_always_ready && serial.room() > 0 {
                if self.event_sources.input.read().map_err(Error::os("read standard input"))? == Typed::End {
                    self.event_sources.input.stdin_open = false;
                }
                continue;
            }
            return self.watch_stdin(wanted && !self.stdin_always_ready, ops);
        }
    }

    fn watch_stdin(&mut self, wanted: bool, ops: &mut EventOps) -> Result<(), Error> {
        if wanted == self.stdin_watched {
            return Ok(());
        }
        let stdin = std::io::stdin();
        let events = Events::with_data(&stdin, STDIN, EventSet::IN);
        let result = if wanted { ops.add(events) } else { ops.remove(events) };
        match result {
            Ok(()) => self.stdin_watched = wanted,
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EPERM => {
                self.stdin_always_ready = true;
                return self.feed(ops);
            }
            Err(error) => return Err(event_error(&error)),
        }
        Ok(())
    }

    /// Writes waiting output to standard output, and watches the descriptor while output waits.
    fn drain_output(&mut self, token: u32, ops: &mut EventOps) -> Result<(), Error> {
        let waiting = self.controller.output().drain();
        let stdout = std::io::stdout();
        let events = Events::with_data(&stdout, STDOUT, EventSet::OUT);
        let result = match (token, waiting) {
            (BACKLOG, true) => ops.add(events),
            (STDOUT, false) => ops.remove(events),
            _ => Ok(()),
        };
        match result {
            // Watched already: more bytes began to wait before it was writable.
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EEXIST => Ok(()),
            Err(event_manager::Error::FdAlreadyRegistered) => Ok(()),
            result => result.map_err(|error| event_error(&error)),
        }
    }
}

fn watch(ops: &mut EventOps, fd: &impl AsRawFd, token: u32) -> Result<(), Error> {
    ops.add(Events::with_data(fd, token, EventSet::IN)).map_err(|error| event_error(&error))
}

fn watch_event(ops: &mut EventOps, event: &EventFd, token: u32) -> Result<(), Error> {
    watch(ops, event, token)
}

impl MutEventSubscriber for Session {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.handle(events.data(), ops) {
            self.failure.get_or_insert(error);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.try_init(ops) {
            self.failure.get_or_insert(error);
        }
    }
}
