//! The system calls that the threads of a VM's process may make (seccomp(2)).
//!
//! The filters are data, one for each kind of thread: `resources/seccomp/x86_64.json`, which the build makes into
//! programs, or a file of the user's. The main thread installs the first ones before any other thread exists. The
//! others inherit them, and each thread whose name is in [`THREADS`] adds its kind's. Filters add up: a call must be
//! allowed by all that a thread has, so no filter takes back what another forbids. io_uring requests are no system
//! calls; the one ring that a device has can only read and write the files that it was given.
//!
//! A call that a filter does not allow raises SIGSYS in the thread that made it, whose handler reports the call, notes
//! it in the metrics and ends the process. A kernel that cannot run the handler, because the thread has blocked the
//! signal, ends the process by the signal.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use seccompiler::{TargetArch, apply_filter, compile_from_json, sock_filter};
use syscalls::Sysno;

use super::handler_text::Text;
use super::{logging, terminal};

// `BUILT_IN`: the programs by the names of their kinds.
include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// The exit code of a process whose thread has made a call that its filter does not allow; Firecracker's.
pub const EXIT_CODE: u8 = 148;

/// The kinds of threads that have filters of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The main thread until its machine runs, or, if it has an API, to its end; threads without a kind of their own.
    Start,
    /// The main thread of a machine that runs and has no API.
    Main,
    /// The server of the API.
    Api,
    /// vCPUs.
    Vcpu,
    /// The virtio devices.
    Devices,
    /// The page-fault service, and the spill of idle memory.
    Faults,
    /// Threads that bring in or compare pages.
    Loaders,
}

/// The kinds by the beginnings of threads' names. Other threads run under the filters of their makers.
const THREADS: [(&str, Kind); 11] = [
    ("api", Kind::Api),
    ("vcpu", Kind::Vcpu),
    ("devices", Kind::Devices),
    ("faults", Kind::Faults),
    ("spill", Kind::Faults),
    ("background", Kind::Loaders),
    ("chunks", Kind::Loaders),
    ("compare", Kind::Loaders),
    ("lease", Kind::Loaders),
    ("reads", Kind::Loaders),
    ("verify", Kind::Loaders),
];

impl Kind {
    pub const ALL: [Kind; 7] =
        [Kind::Start, Kind::Main, Kind::Api, Kind::Vcpu, Kind::Devices, Kind::Faults, Kind::Loaders];

    /// Its name in files of filters.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Start => "start",
            Kind::Main => "main",
            Kind::Api => "api",
            Kind::Vcpu => "vcpu",
            Kind::Devices => "devices",
            Kind::Faults => "faults",
            Kind::Loaders => "loaders",
        }
    }

    /// The kind of the threads with this name, if they have one of their own.
    pub fn of_thread(name: &str) -> Option<Kind> {
        THREADS.iter().find(|(begin, _)| name.starts_with(begin)).map(|(_, kind)| *kind)
    }
}

/// The reason why filters cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("Cannot read the seccomp filters {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("Cannot use the seccomp filters {path}: {why}. docs/security.md describes the file")]
    Invalid { path: PathBuf, why: String },
    #[error("Cannot install the handler of SIGSYS")]
    Handler(#[source] io::Error),
    #[error(
        "Cannot install the seccomp filter of kind `{kind}`: {why}. Use a kernel with CONFIG_SECCOMP_FILTER, or start \
         without --seccomp and --seccomp-filter"
    )]
    Install { kind: &'static str, why: String },
}

type Program = Cow<'static, [sock_filter]>;

/// A program for each kind of thread, in the order of [`Kind::ALL`].
pub struct Filters {
    programs: [Program; Kind::ALL.len()],
    /// The file they are from.
    file: Option<PathBuf>,
}

impl Filters {
    /// The filters of this build.
    pub fn built_in() -> Filters {
        Filters { programs: BUILT_IN.map(Cow::Borrowed), file: None }
    }

    /// Reads filters in JSON: Firecracker's format, with an object for each kind.
    ///
    /// # Errors
    /// The file cannot be read, is not of the format, lacks a kind, or has a kind that is unknown.
    pub fn from_file(path: &Path) -> Result<Filters, FilterError> {
        let file = File::open(path).map_err(|source| FilterError::Read { path: path.to_owned(), source })?;
        let absolute = std::path::absolute(path);
        let absolute = absolute.map_err(|source| FilterError::Read { path: path.to_owned(), source })?;
        let invalid = |why: String| FilterError::Invalid { path: path.to_owned(), why };
        let compiled = compile_from_json(io::BufReader::new(file), TargetArch::x86_64);
        let mut programs = compiled.map_err(|error| invalid(error.to_string().trim_end_matches('.').to_owned()))?;
        let taken = Kind::ALL.map(|kind| programs.remove(kind.name()));
        if let Some(index) = taken.iter().position(Option::is_none) {
            return Err(invalid(format!("it has no filter of kind `{}`", Kind::ALL[index].name())));
        }
        if let Some(unknown) = programs.keys().min() {
            let known = Kind::ALL.map(Kind::name).join(", ");
            return Err(invalid(format!("its kind `{unknown}` is unknown; known: {known}")));
        }
        let programs = taken.map(|program| Cow::Owned(program.unwrap_or_default()));
        Ok(Filters { programs, file: Some(absolute) })
    }

    /// The program for threads of `kind`.
    pub fn program(&self, kind: Kind) -> &[sock_filter] {
        &self.programs[kind as usize]
    }

    fn install(&self, kind: Kind) -> Result<(), FilterError> {
        install(self.program(kind)).map_err(|why| FilterError::Install { kind: kind.name(), why })
    }
}

fn install(program: &[sock_filter]) -> Result<(), String> {
    apply_filter(program).map_err(|error| error.to_string())
}

/// Answers clone3(2) with ENOSYS, in addition to all other filters. The C library then calls clone(2), whose flags a
/// filter can check: those of clone3 are in memory.
const NO_CLONE3: [sock_filter; 4] = [
    step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
    step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_clone3 as u32),
    step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
];

const fn step(code: u32, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf, k }
}

/// The filters in force in this process.
static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Installs the filters that all threads have, and the handler of SIGSYS. Call while the main thread is the only one.
/// A process that has `inherited` the filters from one that uses the same does not add them once more: each filter
/// makes every call slower, and the kernel limits their sum.
///
/// # Errors
/// The kernel does not take a filter.
pub fn begin(filters: Filters, inherited: bool) -> Result<(), FilterError> {
    install_handler().map_err(FilterError::Handler)?;
    if !inherited || !is_filtered() {
        filters.install(Kind::Start)?;
        install(&NO_CLONE3).map_err(|why| FilterError::Install { kind: "start", why })?;
    }
    // A command begins once.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Returns whether this thread has any filter.
fn is_filtered() -> bool {
    // SAFETY: the call takes no pointers.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) == libc::SECCOMP_MODE_FILTER as libc::c_int }
}

/// The arguments by which another tvmm gets the filters that this process has.
pub fn args_of_this_process() -> Vec<OsString> {
    match FILTERS.get() {
        None => args_of(Choice::NoFilters),
        Some(filters) => args_of(filters.file.as_deref().map_or(Choice::BuiltIn, Choice::File)),
    }
}

/// A choice of filters for a process.
#[derive(Clone, Copy, Debug)]
pub enum Choice<'a> {
    BuiltIn,
    File(&'a Path),
    NoFilters,
}

/// The arguments for a choice of filters.
pub fn args_of(choice: Choice<'_>) -> Vec<OsString> {
    match choice {
        Choice::BuiltIn => vec!["--seccomp".into()],
        Choice::File(path) => vec!["--seccomp-filter".into(), path.into()],
        Choice::NoFilters => Vec::new(),
    }
}

/// Adds the filter of `kind` to those of this thread, in a process that has filters. If the kernel refuses, the process
/// ends: no thread runs with a wider filter than its own.
pub fn enter(kind: Kind) {
    let Some(filters) = FILTERS.get() else { return };
    if let Err(error) = filters.install(kind) {
        terminal::restore();
        logging::say(&format!("tvmm: {error}"));
        logging::finish();
        std::process::exit(1);
    }
}

/// As [`enter`], for the kind that this thread's name has, if it has one. The first call of each thread.
pub fn enter_thread() {
    if FILTERS.get().is_some() {
        std::thread::current().name().and_then(Kind::of_thread).into_iter().for_each(enter);
    }
}

/// The descriptor of the metrics file, or -1.
static METRICS: AtomicI32 = AtomicI32::new(-1);

/// Has violations noted in the metrics file, from now on until the result is dropped. `fd` must stay open as long.
pub fn note_in(fd: RawFd) -> NotedIn {
    METRICS.store(fd, Ordering::SeqCst);
    NotedIn(fd)
}

/// The registration of a metrics file.
#[derive(Debug)]
pub struct NotedIn(RawFd);

impl Drop for NotedIn {
    fn drop(&mut self) {
        let _ = METRICS.compare_exchange(self.0, -1, Ordering::SeqCst, Ordering::SeqCst);
    }
}

fn install_handler() -> io::Result<()> {
    // SAFETY: sigaction is plain data for which zeros are a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigsys;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the structure is initialised, and the handler has the signature that SA_SIGINFO requires.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The beginning of `siginfo_t` for SIGSYS (sigaction(2); Linux `include/uapi/asm-generic/siginfo.h`).
#[repr(C)]
struct SigsysInfo {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    _padding: libc::c_int,
    call_address: *const libc::c_void,
    call: libc::c_int,
    arch: libc::c_uint,
}

/// `si_code` of a SIGSYS by seccomp.
const SYS_SECCOMP: libc::c_int = 1;

extern "C" fn on_sigsys(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO; it is longer than this structure.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    // Another process can send the signal too.
    if info.code != SYS_SECCOMP {
        return;
    }
    terminal::restore_in_handler();
    let mut line = Text::EMPTY;
    describe(&mut line, info.call);
    line.end_line();
    line.write_at_once(libc::STDERR_FILENO);
    let metrics = METRICS.load(Ordering::SeqCst);
    if metrics >= 0 {
        let mut line = Text::EMPTY;
        let _ = write!(line, r#"{{"utc_timestamp_ms":{},"seccomp":{{"num_faults":1}}}}"#, unix_time_ms());
        line.end_line();
        line.write_at_once(metrics);
    }
    // SAFETY: ends the process without running any of its destructors.
    unsafe { libc::_exit(libc::c_int::from(EXIT_CODE)) }
}

/// Writes the sentence about a forbidden call by this thread.
fn describe(line: &mut Text, call: libc::c_int) {
    let mut name = [0_u8; 16];
    // SAFETY: prctl(2) writes at most 16 bytes with this option.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr(), 0, 0, 0) };
    let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    let _ = write!(line, "tvmm: Cannot make the system call ");
    let _ = match usize::try_from(call).ok().and_then(Sysno::new) {
        Some(known) => write!(line, "{} ({call})", known.name()),
        None => write!(line, "{call}"),
    };
    let _ = write!(line, " in thread ");
    line.push(&name[..len]);
    let _ = write!(
        line,
        ": its seccomp filter does not allow it. If nothing has taken the process over, this is a fault of tvmm's \
         filters; --seccomp-filter FILE replaces them, and without --seccomp there are none"
    );
}

/// Time since 1970, ms.
fn unix_time_ms() -> u64 {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: the call fills the structure, for which zeros are a value; it is safe in a signal handler.
    let now = unsafe {
        libc::clock_gettime(libc::CLOCK_REALTIME, now.as_mut_ptr());
        now.assume_init()
    };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_a_program_and_a_name_of_its_own() {
        let filters = Filters::built_in();
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
            assert!(!filters.program(kind).is_empty());
            assert_eq!(Kind::ALL.iter().filter(|other| other.name() == kind.name()).count(), 1);
        }
    }

    /// The answer of a program (the kernel's `Documentation/networking/filter.rst`) to a call with each argument `arg`.
    fn verdict(program: &[sock_filter], call: u32, arg: u64) -> u32 {
        let mut at = 0;
        let mut value = 0_u32;
        loop {
            let step = &program[at];
            at += 1;
            match step.code {
                0x20 if step.k == 0 => value = call,
                0x20 if step.k == 4 => value = 0xc000_003e,
                0x20 if step.k.is_multiple_of(8) => value = arg as u32,
                0x20 => value = (arg >> 32) as u32,
                0x54 => value &= step.k,
                0x05 => at += step.k as usize,
                0x15 => at += usize::from(if value == step.k { step.jt } else { step.jf }),
                0x25 => at += usize::from(if value > step.k { step.jt } else { step.jf }),
                0x35 => at += usize::from(if value >= step.k { step.jt } else { step.jf }),
                0x06 => return step.k,
                code => panic!("step {code:#x}"),
            }
        }
    }

    #[test]
    fn programs_of_the_build_decide_as_those_of_seccompiler() {
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/seccomp/x86_64.json");
        let json: serde_json::Value = serde_json::from_reader(File::open(&place).unwrap()).unwrap();
        let built = Filters::built_in();
        let compiled = Filters::from_file(&place).unwrap();
        for kind in Kind::ALL {
            let rules = json[kind.name()]["filter"].as_array().unwrap().iter();
            let args = rules.flat_map(|rule| rule["args"].as_array().into_iter().flatten());
            let mut values: Vec<u64> = args.map(|arg| arg["val"].as_u64().unwrap()).collect();
            values.extend([0, 1, 4, 7, 0x11200, 1 << 16, 1 << 32, u64::MAX]);
            for (call, arg) in (0..1000).flat_map(|call| values.iter().map(move |arg| (call, *arg))) {
                let one = verdict(built.program(kind), call, arg);
                let other = verdict(compiled.program(kind), call, arg);
                assert_eq!(one, other, "{kind:?}, call {call} with {arg:#x}");
            }
        }
    }

    #[test]
    fn threads_are_known_by_the_beginning_of_their_name() {
        assert_eq!(Kind::of_thread("vcpu31"), Some(Kind::Vcpu));
        assert_eq!(Kind::of_thread("spill-sync"), Some(Kind::Faults));
        assert_eq!(Kind::of_thread("seal"), None);
        assert_eq!(Kind::of_thread("tvmm"), None);
    }

    #[test]
    fn call_that_is_not_allowed_is_named() {
        let mut line = Text::EMPTY;
        describe(&mut line, libc::SYS_swapoff as libc::c_int);
        let text = String::from_utf8_lossy(line.bytes()).into_owned();
        assert!(text.starts_with("tvmm: Cannot make the system call swapoff (168) in thread "), "{text}");
    }
}
