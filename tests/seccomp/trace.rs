//! Records the system calls that each kind of thread makes while tests run, and compares them with the filters.
//!
//! usage: `TVMM_TRACED=BINARY TVMM_TRACE_DIR=DIR seccomp-trace ARGUMENT...`
//!     Runs BINARY with the arguments and --seccomp, in this process, and writes a record of its calls, and of those of
//!     the processes it starts, to DIR. With this program as `TVMM_BINARY`, the integration tests record a trace;
//!     without `TVMM_TRACE_DIR` they only run with filters.
//! usage: `seccomp-trace compare FILTERS DIR`
//!     Compares the records with the filters in JSON. Fails if a thread made a call that its filter does not allow, or
//!     if a filter has a rule that no call needed. A rule whose comment begins with "Untraced: " need not be needed.
//!
//! The traced process has a filter that sends each call to a supervisor (seccomp_unotify(2)), which notes it and lets
//! it go on. The filters of tvmm stay in force: a call that they forbid ends the process, and the test fails.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use serde_json::Value;
use syscalls::Sysno;
use tvmm::sys::seccomp::{Filters, Kind};

fn main() -> ExitCode {
    if let Some(binary) = std::env::var_os("TVMM_TRACED") {
        let error = run(Path::new(&binary));
        eprintln!("seccomp-trace: Cannot run {}: {error}", binary.display());
        return ExitCode::FAILURE;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["compare", filters, dir] => compare(Path::new(filters), Path::new(dir)),
        _ => {
            eprintln!("usage: seccomp-trace compare FILTERS DIR; or see the first lines of tests/seccomp/trace.rs");
            ExitCode::from(2)
        }
    }
}

/// Becomes `binary`, traced. Returns only an error.
fn run(binary: &Path) -> io::Error {
    let mut args: Vec<_> = std::env::args_os().skip(1).collect();
    let runs_vm = match args.first().and_then(|arg| arg.to_str()) {
        Some("profile") => args.get(1).is_some_and(|arg| arg == "record"),
        Some("restore" | "serve") => true,
        Some(first) => first.starts_with("--") && args.len() > 1,
        None => false,
    };
    let chooses = |arg: &OsString| arg.to_str().is_some_and(|arg| arg.contains("seccomp") || arg == "--help");
    if runs_vm && !args.iter().any(chooses) {
        args.push("--seccomp".into());
    }
    if runs_vm
        && std::env::var_os("TVMM_TRACE_DIR").is_some()
        && let Err(error) = be_traced()
    {
        return error;
    }
    Command::new(binary).arg0("tvmm").args(args).exec()
}

/// The system calls whose arguments decide, and which of these do. Other arguments are recorded as 0.
const DECIDING: [(Sysno, &[usize]); 9] = [
    (Sysno::clone, &[0]),
    (Sysno::fcntl, &[1]),
    (Sysno::ioctl, &[1]),
    (Sysno::kill, &[1]),
    (Sysno::mmap, &[2]),
    (Sysno::mprotect, &[2]),
    (Sysno::prctl, &[0]),
    (Sysno::seccomp, &[0]),
    (Sysno::socket, &[0]),
];

const KVM_RUN: u32 = 0xae80;
const NOTIF_RECV: u64 = 0xc050_2100;
const NOTIF_SEND: u64 = 0xc018_2101;
const NOTIF_SET_FLAGS: u64 = 0x4008_2104;
const SYNC_WAKE_UP: u64 = 1;
const SEND_CONTINUE: u32 = 1;
const NEW_LISTENER: u64 = 1 << 3;
const WAIT_KILLABLE_RECV: u64 = 1 << 5;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;
const RET_ALLOW: u32 = 0x7fff_0000;

/// `struct seccomp_notif` (Linux `include/uapi/linux/seccomp.h`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Notification {
    id: u64,
    tid: u32,
    flags: u32,
    call: i32,
    arch: u32,
    instruction: u64,
    args: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
#[derive(Default)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// Starts the supervisor, and gives this process the filter.
fn be_traced() -> io::Result<()> {
    // The listener gets the lowest free number: this one.
    let number = File::open("/dev/null")?.as_raw_fd();
    let traced = std::process::id();
    // SAFETY: this process has one thread, so the child may go on as any program; the calls take no pointers.
    unsafe {
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY, 0, 0, 0);
        match libc::fork() {
            -1 => return Err(io::Error::last_os_error()),
            0 => {
                // The supervisor is nobody's child that anyone waits for.
                libc::setsid();
                if libc::fork() == 0 {
                    let code = i32::from(supervise(traced, number).is_err());
                    libc::_exit(code);
                }
                libc::_exit(0);
            }
            child => libc::waitpid(child, std::ptr::null_mut(), 0),
        };
    }
    install(number)
}

/// Sends all calls but KVM_RUN, which every vCPU makes all the time, to a listener with this descriptor.
fn install(number: RawFd) -> io::Result<()> {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let mut program = [
        step(load, 0, 0, 0),
        step(equal, 0, 3, libc::SYS_ioctl as u32),
        step(load, 0, 0, 24),
        step(equal, 0, 1, KVM_RUN),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, RET_ALLOW),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, RET_USER_NOTIF),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let flags = NEW_LISTENER | WAIT_KILLABLE_RECV;
    // SAFETY: the kernel reads the program, which outlives the call.
    let made = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    match i32::try_from(made) {
        Ok(made) if made == number => Ok(()),
        Ok(-1) => Err(io::Error::last_os_error()),
        _ => Err(io::Error::other("the listener has another descriptor than the supervisor looks for")),
    }
}

/// A call as it is recorded: its number, and the arguments that decide.
type Call = (i32, [u64; 6]);

#[derive(Default)]
struct Thread {
    process: u32,
    name: String,
    /// The kinds of the filters that it has.
    kinds: BTreeSet<&'static str>,
}

struct Supervisor {
    listener: OwnedFd,
    filters: Filters,
    threads: HashMap<u32, Thread>,
    calls: BTreeMap<(&'static str, Call), u64>,
}

/// Notes calls until all traced processes have ended.
fn supervise(traced: u32, number: RawFd) -> io::Result<()> {
    let listener = listener_of(traced, number)?;
    // Whatever a test may wait for the end of.
    // SAFETY: nothing here uses the descriptors that are closed.
    unsafe {
        let own = listener.as_raw_fd() as u32;
        libc::syscall(libc::SYS_close_range, 0, own.saturating_sub(1), 0);
        libc::syscall(libc::SYS_close_range, own + 1, u32::MAX, 0);
        libc::ioctl(own as RawFd, NOTIF_SET_FLAGS as _, SYNC_WAKE_UP);
    }
    let filters = match std::env::var_os("TVMM_TRACE_FILTERS") {
        Some(path) => Filters::from_file(Path::new(&path)).map_err(io::Error::other)?,
        None => Filters::built_in(),
    };
    let mut supervisor = Supervisor { listener, filters, threads: HashMap::new(), calls: BTreeMap::new() };
    while let Some(notification) = supervisor.receive()? {
        supervisor.note(&notification);
        let mut response = Response { id: notification.id, flags: SEND_CONTINUE, ..Response::default() };
        // An error means that the thread has ended meanwhile.
        // SAFETY: the kernel reads a local.
        unsafe { libc::ioctl(supervisor.listener.as_raw_fd(), NOTIF_SEND as _, &raw mut response) };
    }
    supervisor.write()
}

/// Takes the listener from the traced process, once it is there.
fn listener_of(traced: u32, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, traced, 0) };
    if pidfd < 0 {
        return Err(io::Error::last_os_error());
    }
    let link = PathBuf::from(format!("/proc/{traced}/fd/{number}"));
    loop {
        if fs::read_link(&link).is_ok_and(|target| target.to_string_lossy().contains("seccomp")) {
            // SAFETY: the call takes no pointers.
            let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, number, 0) };
            if taken < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor was just made and has no other owner.
            return Ok(unsafe { OwnedFd::from_raw_fd(taken as RawFd) });
        }
        if !Path::new(&format!("/proc/{traced}")).exists() {
            return Err(io::Error::other("the traced process has ended"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Supervisor {
    /// The next call; `None` when no process is left.
    fn receive(&self) -> io::Result<Option<Notification>> {
        let fd = self.listener.as_raw_fd();
        loop {
            let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: works on a local.
            unsafe { libc::poll(&raw mut poll, 1, -1) };
            if poll.revents & libc::POLLIN == 0 {
                if poll.revents != 0 {
                    return Ok(None);
                }
                continue;
            }
            let mut notification = Notification::default();
            // SAFETY: the kernel fills a local of the size that the request has in it.
            if unsafe { libc::ioctl(fd, NOTIF_RECV as _, &raw mut notification) } == 0 {
                return Ok(Some(notification));
            }
            // ENOENT: the thread was killed meanwhile.
        }
    }

    fn note(&mut self, notification: &Notification) {
        let tid = notification.tid;
        if !self.threads.contains_key(&tid) {
            let thread = self.new_thread(tid);
            self.threads.insert(tid, thread);
        }
        let added = self.added_kind(notification);
        let thread = self.threads.entry(tid).or_default();
        let mut args = [0; 6];
        let call = usize::try_from(notification.call).ok().and_then(Sysno::new);
        if let Some((_, deciding)) = DECIDING.iter().find(|(name, _)| Some(*name) == call) {
            deciding.iter().for_each(|&index| args[index] = notification.args[index]);
        }
        for kind in &thread.kinds {
            *self.calls.entry((kind, (notification.call, args))).or_default() += 1;
        }
        thread.kinds.extend(added.map(Kind::name));
        match call {
            Some(Sysno::prctl) if notification.args[0] == libc::PR_SET_NAME as u64 => {
                let name = read_memory(tid, notification.args[1], 16).unwrap_or_default();
                thread.name = String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into();
            }
            Some(Sysno::exit) => drop(self.threads.remove(&tid)),
            Some(Sysno::exit_group) => {
                let process = thread.process;
                self.threads.retain(|_, thread| thread.process != process);
            }
            _ => {}
        }
    }

    /// The kind of the filter that a call installs.
    fn added_kind(&self, notification: &Notification) -> Option<Kind> {
        if i64::from(notification.call) != libc::SYS_seccomp {
            return None;
        }
        let header = read_memory(notification.tid, notification.args[2], 16)?;
        let steps = u16::from_ne_bytes(header[..2].try_into().ok()?);
        let place = u64::from_ne_bytes(header[8..].try_into().ok()?);
        let bytes = read_memory(notification.tid, place, usize::from(steps) * 8)?;
        Kind::ALL.into_iter().find(|&kind| {
            let program = self.filters.program(kind).iter();
            let program = program.flat_map(|step| {
                let [code0, code1] = step.code.to_ne_bytes();
                let [k0, k1, k2, k3] = step.k.to_ne_bytes();
                [code0, code1, step.jt, step.jf, k0, k1, k2, k3]
            });
            program.eq(bytes.iter().copied())
        })
    }

    /// A thread that makes its first call: it has the filters, and as yet the name, of its maker.
    fn new_thread(&self, tid: u32) -> Thread {
        let status = fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        let name = field("Name:").to_owned();
        let process = field("Tgid:").parse().unwrap_or(tid);
        let makers = if process == tid { field("PPid:").parse().unwrap_or(0) } else { process };
        let maker = self.threads.values().find(|thread| thread.process == makers && thread.name == name);
        Thread { process, name, kinds: maker.map(|maker| maker.kinds.clone()).unwrap_or_default() }
    }

    fn write(&self) -> io::Result<()> {
        let dir = std::env::var_os("TVMM_TRACE_DIR").ok_or_else(|| io::Error::other("TVMM_TRACE_DIR is not set"))?;
        let mut text = String::new();
        for ((kind, (call, args)), count) in &self.calls {
            text += &format!("{kind} {call} {} {count}\n", args.map(|arg| format!("{arg:#x}")).join(" "));
        }
        let path = Path::new(&dir).join(format!("{}.calls", std::process::id()));
        fs::OpenOptions::new().append(true).create(true).open(path)?.write_all(text.as_bytes())
    }
}

fn read_memory(tid: u32, address: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    File::open(format!("/proc/{tid}/mem")).ok()?.read_exact_at(&mut bytes, address).ok()?;
    Some(bytes)
}

/// A rule of a filter.
struct Rule {
    call: i32,
    conditions: Vec<Condition>,
    is_untraced: bool,
    text: String,
}

struct Condition {
    index: usize,
    /// The bits of the argument that are compared.
    mask: u64,
    value: u64,
}

impl Rule {
    fn of(json: &Value) -> Result<Rule, String> {
        let name = json["syscall"].as_str().ok_or("a rule has no `syscall`")?;
        let call = name.parse::<Sysno>().map_err(|_| format!("the system call {name} is unknown"))? as i32;
        let args = json["args"].as_array().map(Vec::as_slice).unwrap_or_default();
        let conditions = args.iter().map(Condition::of).collect::<Result<Vec<_>, _>>()?;
        let deciding = DECIDING.iter().find(|(known, _)| *known as i32 == call).map_or(&[][..], |(_, indices)| indices);
        if let Some(lost) = conditions.iter().find(|condition| !deciding.contains(&condition.index)) {
            return Err(format!("argument {} of {name} is not recorded: add it to DECIDING", lost.index));
        }
        let is_untraced = json["comment"].as_str().is_some_and(|comment| comment.starts_with("Untraced: "));
        let values: Vec<String> = conditions.iter().map(|c| format!(" {:#x}", c.value)).collect();
        Ok(Rule { call, conditions, is_untraced, text: format!("{name}{}", values.concat()) })
    }

    fn allows(&self, (call, args): &Call) -> bool {
        let meets = |condition: &Condition| args[condition.index] & condition.mask == condition.value & condition.mask;
        self.call == *call && self.conditions.iter().all(meets)
    }
}

impl Condition {
    fn of(json: &Value) -> Result<Condition, String> {
        let index = json["index"].as_u64().ok_or("a condition has no `index`")? as usize;
        let value = json["val"].as_u64().ok_or("a condition has no `val`")?;
        let width = if json["type"] == "dword" { u64::from(u32::MAX) } else { u64::MAX };
        let mask = match (json["op"].as_str(), json["op"]["masked_eq"].as_u64()) {
            (Some("eq"), _) => width,
            (None, Some(mask)) => mask & width,
            _ => return Err(format!("the operator {} is not compared here", json["op"])),
        };
        Ok(Condition { index, mask, value })
    }
}

fn compare(filters: &Path, dir: &Path) -> ExitCode {
    match differences(filters, dir) {
        Ok((rules, differences)) if differences.is_empty() => {
            println!("seccomp-trace: {rules} rules, each of them needed, and no call without a rule");
            ExitCode::SUCCESS
        }
        Ok((_, differences)) => {
            differences.iter().for_each(|line| println!("{line}"));
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("seccomp-trace: Cannot compare {} with {}: {why}", dir.display(), filters.display());
            ExitCode::from(2)
        }
    }
}

/// Compares filters with all records. Returns the number of rules, and a line for each difference.
fn differences(filters: &Path, dir: &Path) -> Result<(usize, Vec<String>), String> {
    let text = fs::read_to_string(filters).map_err(|error| error.to_string())?;
    let filters: BTreeMap<String, Value> = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let calls = records(dir)?;
    let mut differences = Vec::new();
    let mut count = 0;
    for (kind, filter) in &filters {
        // The others answer single calls with an error.
        if filter["mismatch_action"] == "allow" || filter["default_action"] == "allow" {
            continue;
        }
        let of_kind = calls.get(kind).cloned().unwrap_or_default();
        let rules = filter["filter"].as_array().map(Vec::as_slice).unwrap_or_default();
        let rules = rules.iter().map(Rule::of).collect::<Result<Vec<_>, _>>()?;
        count += rules.len();
        for (call, args) in of_kind.iter().filter(|call| !rules.iter().any(|rule| rule.allows(call))) {
            let name = usize::try_from(*call).ok().and_then(Sysno::new).map_or("?", |known| known.name());
            let args: Vec<String> = args.iter().map(|arg| format!("{arg:#x}")).collect();
            differences.push(format!("{kind}: no rule allows {name} ({call}) with {}", args.join(" ")));
        }
        for rule in rules.iter().filter(|rule| !rule.is_untraced && !of_kind.iter().any(|call| rule.allows(call))) {
            differences.push(format!("{kind}: no test needs the rule {}", rule.text));
        }
    }
    Ok((count, differences))
}

/// The calls in all records, by kind.
fn records(dir: &Path) -> Result<BTreeMap<String, BTreeSet<Call>>, String> {
    let mut calls: BTreeMap<String, BTreeSet<Call>> = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(|error| error.to_string())? {
        let path = entry.map_err(|error| error.to_string())?.path();
        let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        for line in text.lines() {
            let (kind, call) = parse(line).ok_or_else(|| format!("{}: {line} is no record", path.display()))?;
            calls.entry(kind).or_default().insert(call);
        }
    }
    if calls.is_empty() { Err("there are no records".to_owned()) } else { Ok(calls) }
}

fn parse(line: &str) -> Option<(String, Call)> {
    let fields: Vec<&str> = line.split(' ').collect();
    let [kind, call, args @ .., _count] = &fields[..] else { return None };
    let hex = |text: &&str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let args: Vec<u64> = args.iter().map(hex).collect::<Option<_>>()?;
    Some(((*kind).to_owned(), (call.parse().ok()?, args.try_into().ok()?)))
}
