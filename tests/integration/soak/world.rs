//! The model that operations change and check: which snapshots and VMs there are, and the state that each must have.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fastrand::Rng;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{TIMEOUT, Vm, finish, signal, text, tvmm};

/// A snapshot that tvmm acknowledged, or that was there after its writer was killed.
#[derive(Clone, Debug)]
pub struct Snap {
    /// The directory, or the state file.
    pub path: PathBuf,
    /// The memory file of the two-file form.
    pub memory: Option<PathBuf>,
    pub parent: Option<PathBuf>,
    /// The digest that `check` answers in a guest restored from it.
    pub digest: String,
    pub profile: Option<PathBuf>,
    /// The number of its layers.
    pub depth: usize,
}

impl Snap {
    /// The arguments that name it.
    pub fn location(&self) -> Vec<String> {
        let mut args = vec![text(&self.path).to_string()];
        if let Some(memory) = &self.memory {
            args.extend(["--mem-file".to_string(), text(memory).to_string()]);
        }
        args
    }
}

/// A VM that runs.
pub struct Living {
    pub vm: Vm,
    /// The snapshot that its next diff is relative to.
    pub tip: Option<PathBuf>,
    pub digest: String,
    /// The snapshot that it was restored from, and the digest of that: a rewind goes back there.
    pub origin: Option<(PathBuf, String)>,
}

impl Living {
    fn needs(&self, path: &Path) -> bool {
        let origin = self.origin.as_ref().map(|(path, _)| path.as_path());
        self.tip.as_deref() == Some(path) || origin == Some(path)
    }
}

pub struct World {
    dir: TempDir,
    pub snaps: Vec<Snap>,
    pub vms: Vec<Living>,
    pub service: Option<super::service::Daemon>,
    counts: BTreeMap<&'static str, u64>,
    /// The times of operations that were not disturbed.
    took: HashMap<&'static str, Duration>,
    log: fs::File,
    next: u32,
}

/// The most snapshots there are; more make room by deleting.
pub const SNAPS_MAX: usize = 14;
const VMS_MAX: usize = 3;
/// Layers after which an operation merges first.
pub const DEPTH_MAX: usize = 40;

impl World {
    pub fn new() -> World {
        let dir = tempfile::Builder::new().prefix("tvmm-soak-").tempdir().expect("a temporary directory");
        let log = fs::File::create(dir.path().join("log")).unwrap();
        World {
            dir,
            snaps: Vec::new(),
            vms: Vec::new(),
            service: None,
            counts: BTreeMap::new(),
            took: HashMap::new(),
            log,
            next: 0,
        }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path that was never used.
    pub fn fresh(&mut self, kind: &str) -> PathBuf {
        self.next += 1;
        self.dir.path().join(format!("{kind}{}", self.next))
    }

    /// Notes which step begins.
    pub fn begin(&mut self, step: u64, name: &'static str) {
        self.note(&format!("step {step}: {name}"));
    }

    /// Writes a line to the log that is kept with the evidence.
    pub fn note(&mut self, line: &str) {
        writeln!(self.log, "{line}").unwrap();
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub fn counts(&self) -> String {
        let counts: Vec<String> = self.counts.iter().map(|(what, count)| format!("{count} {what}")).collect();
        counts.join(", ")
    }

    /// Ends everything that runs and keeps the files.
    pub fn keep(mut self) -> PathBuf {
        self.vms.clear();
        self.service = None;
        self.dir.keep()
    }

    pub fn add_vm(&mut self, living: Living) {
        if self.vms.len() >= VMS_MAX {
            self.vms.remove(0);
        }
        self.vms.push(living);
    }

    /// A snapshot drawn at random.
    pub fn any_snap(&self, rng: &mut Rng) -> Option<Snap> {
        let number = rng.usize(..);
        (!self.snaps.is_empty()).then(|| self.snaps[number % self.snaps.len()].clone())
    }

    /// A snapshot in a directory of its own, drawn at random.
    pub fn any_dir(&self, rng: &mut Rng) -> Option<Snap> {
        let number = rng.usize(..);
        let dirs: Vec<&Snap> = self.snaps.iter().filter(|snap| snap.memory.is_none()).collect();
        (!dirs.is_empty()).then(|| dirs[number % dirs.len()].clone())
    }

    /// A VM drawn at random, as its number.
    pub fn any_vm(&self, rng: &mut Rng) -> Option<usize> {
        let number = rng.usize(..);
        (!self.vms.is_empty()).then(|| number % self.vms.len())
    }

    pub fn snap(&self, path: &Path) -> Option<&Snap> {
        self.snaps.iter().find(|snap| snap.path == path)
    }

    pub fn depth_of(&self, path: Option<&Path>) -> usize {
        path.and_then(|path| self.snap(path)).map_or(0, |snap| snap.depth)
    }

    /// Returns true if something would miss the snapshot: a child, or a VM whose next diff is relative to it.
    pub fn is_needed(&self, path: &Path) -> bool {
        let is_parent = self.snaps.iter().any(|snap| snap.parent.as_deref() == Some(path));
        is_parent || self.vms.iter().any(|living| living.needs(path))
    }

    /// Takes a snapshot that is proved whole into the model.
    pub fn add_snap(&mut self, snap: Snap) {
        self.snaps.push(snap);
        while self.snaps.len() > SNAPS_MAX {
            let free = (0..self.snaps.len()).find(|index| !self.is_needed(&self.snaps[*index].path));
            match free {
                Some(index) => self.remove_snap(index),
                // All are needed: the oldest VM holds a chain.
                None if !self.vms.is_empty() => drop(self.vms.remove(0)),
                None => break,
            }
        }
    }

    pub fn remove_snap(&mut self, index: usize) {
        let snap = self.snaps.remove(index);
        self.note(&format!("  deleted {}", snap.path.display()));
        remove(&snap.path);
        snap.memory.iter().chain(&snap.profile).for_each(|path| remove(path));
        let mut derived = snap.path.into_os_string();
        derived.push(".plan");
        remove(Path::new(&derived));
    }

    /// A moment within a bit more than what the operation takes undisturbed.
    pub fn moment(&self, what: &'static str, rng: &mut Rng) -> Duration {
        let took = self.took.get(what).copied().unwrap_or(Duration::from_millis(100));
        took.mul_f64(1.3 * rng.f64())
    }

    /// Runs `tvmm` to its end, or kills it at a moment drawn at random: then there is no output.
    pub fn run(&mut self, what: &'static str, args: &[String], kill: Option<&mut Rng>) -> Option<Output> {
        self.note(&format!("  tvmm {}{}", args.join(" "), if kill.is_some() { " (killed)" } else { "" }));
        let start = Instant::now();
        let Some(rng) = kill else {
            let output = finish(tvmm().args(args));
            self.took.insert(what, start.elapsed());
            self.note(&format!("  {:?} {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end()));
            return Some(output);
        };
        let output = killed_after(tvmm().args(args), self.moment(what, rng));
        self.count("kills");
        output
    }

    /// As [`run`](Self::run), and it must succeed.
    pub fn run_ok(&mut self, what: &'static str, args: &[String]) -> String {
        let output = self.run(what, args, None).expect("it is not killed");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "tvmm {}: {:?} {said}", args.join(" "), output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Restores by the command line and checks the guest's memory.
    pub fn check(&mut self, snap: &Snap, more: &[String]) {
        let args = restore_args(snap, more);
        let said = self.run_ok("restore", &args);
        assert_eq!(digest_of(&said).as_deref(), Some(&*snap.digest), "{} is another: {said}", args.join(" "));
        self.count("restores checked");
    }

    /// Restores, where it may be refused but nothing else; whether it was done.
    pub fn check_or_refused(&mut self, snap: &Snap, more: &[String]) -> bool {
        let args = restore_args(snap, more);
        let output = self.run("restore", &args, None).expect("it is not killed");
        let out = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            assert_eq!(digest_of(&out).as_deref(), Some(&*snap.digest), "{} is another: {out}", args.join(" "));
            self.count("restores checked");
            return true;
        }
        // 3: memory was lost while the guest ran.
        let is_refused = matches!(output.status.code(), Some(1 | 3));
        assert!(is_refused, "{}: {:?} {said}", args.join(" "), output.status);
        assert!(said.contains("tvmm: ") && !said.contains("panicked"), "{}: {said}", args.join(" "));
        self.count("restores refused");
        false
    }

    /// Everything in the model is still there.
    pub fn check_everything(&mut self) {
        for index in 0..self.vms.len() {
            let living = &mut self.vms[index];
            assert_eq!(living.vm.call("check").digest, living.digest, "a VM's memory is another");
        }
        for snap in self.snaps.clone() {
            self.inspect(&snap);
            self.check(&snap, &[]);
        }
        super::pools::check(self);
        super::service::check(self);
        self.vms.clear();
        self.service = None;
    }

    pub fn inspect(&mut self, snap: &Snap) {
        let args = [vec!["inspect".to_string()], snap.location()].concat();
        self.run_ok("inspect", &args);
    }

    /// Asks the VM for something and kills it at a moment drawn at random; whether it had said yes.
    pub fn ask_and_kill(&mut self, vm: Vm, what: &'static str, path: &str, body: &str, rng: &mut Rng) -> bool {
        let moment = self.moment(what, rng);
        self.note(&format!("  PUT {path} {body}, killed after {moment:?}"));
        let head = format!("PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}", body.len());
        let mut client = UnixStream::connect(vm.socket()).expect("the control socket answers");
        client.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        let answer = std::thread::spawn(move || {
            let mut answer = [0; 12];
            // A VM that was killed closes it.
            let read = client.read(&mut answer).unwrap_or(0);
            answer[..read].starts_with(b"HTTP/1.1 20")
        });
        std::thread::sleep(moment);
        signal(vm.pid(), Signal::KILL);
        drop(vm);
        self.count("kills");
        answer.join().unwrap()
    }

    /// Takes note of how long an operation took undisturbed.
    pub fn took(&mut self, what: &'static str, since: Instant) {
        self.took.insert(what, since.elapsed());
    }
}

fn restore_args(snap: &Snap, more: &[String]) -> Vec<String> {
    let mut args = vec!["restore".to_string(), "--snapshot".to_string()];
    args.extend(snap.location());
    args.extend(more.iter().cloned());
    args.extend(["--run", "check", "--fault-timeout", "20"].map(str::to_string));
    args
}

/// The digest in the answer to `--run`.
fn digest_of(stdout: &str) -> Option<String> {
    stdout.lines().find(|line| line.starts_with("ok run-"))?.split(' ').nth(2).map(str::to_string)
}

/// Runs a command and kills it after `moment`, unless it has ended; then its output.
fn killed_after(command: &mut Command, moment: Duration) -> Option<Output> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let deadline = Instant::now() + moment;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(Output { status, stdout: Vec::new(), stderr: Vec::new() });
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    let _ = child.kill();
    child.wait().unwrap();
    None
}

/// Removes a file or a directory that may be there.
pub fn remove(path: &Path) {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    assert!(removed.is_ok() || !path.exists(), "{}: {removed:?}", path.display());
}

/// `args` as owned strings.
pub fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|word| word.to_string()).collect()
}
