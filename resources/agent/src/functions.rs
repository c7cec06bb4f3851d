//! The functions: two of the agent's own, and one for each file in the directory of functions.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tvmm_guest::digest::Digest;

use crate::python::Handler;

/// Output of a program that is kept; more is an error.
const OUTPUT_MAX: u64 = 1 << 20;
/// The longest answer's `key=value` pairs.
const KEYS_MAX: usize = 1024;

/// The answer of a function.
pub struct Reply {
    pub digest: u64,
    pub keys: String,
}

/// An error message for the caller.
pub struct Failure(pub String);

impl<T: std::fmt::Display> From<T> for Failure {
    fn from(message: T) -> Self {
        Failure(message.to_string())
    }
}

/// The failure with this message.
pub fn failed<T>(message: impl std::fmt::Display) -> Result<T, Failure> {
    Err(Failure(message.to_string()))
}

enum Function {
    /// An executable file: one process per request.
    Program(PathBuf),
    /// A Python module that was imported before the first request.
    Handler(Handler),
}

/// All functions by name.
pub struct Functions(BTreeMap<String, Function>);

impl Functions {
    /// The functions in `dir`, if it exists. Python handlers are started.
    pub fn load(dir: &Path) -> io::Result<Self> {
        let mut functions = BTreeMap::new();
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Functions(functions)),
            Err(error) => return Err(io::Error::new(error.kind(), format!("cannot read {}: {error}", dir.display()))),
        };
        for entry in entries {
            let path = entry?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
            if !path.is_file() {
                continue;
            }
            match name.strip_suffix(".py") {
                Some(module) => functions.insert(module.to_owned(), Function::Handler(Handler::start(path))),
                None => functions.insert(name, Function::Program(path)),
            };
        }
        Ok(Functions(functions))
    }

    /// Runs a function with `key=value` pairs.
    pub fn run(&self, name: &str, pairs: &[&str]) -> Result<Reply, Failure> {
        match (self.0.get(name), name) {
            (Some(Function::Program(path)), _) => run_program(path, pairs),
            (Some(Function::Handler(handler)), _) => {
                let (digest, keys) = handler.call(pairs)?;
                Ok(Reply { digest, keys: fit(keys)? })
            }
            (None, "hello") => Ok(Reply { digest: digest(b"hello, world"), keys: String::new() }),
            (None, "info") => Ok(Reply { digest: digest(b"info"), keys: self.info() }),
            (None, _) => failed(format!("unknown function '{name}'")),
        }
    }

    fn info(&self) -> String {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
        let version = env!("CARGO_PKG_VERSION");
        let mut keys = format!("version={version} {} kernel={}", machine(), release.trim());
        for name in names {
            // As many names as fit.
            if keys.len() + name.len() < KEYS_MAX - 16 {
                keys += if keys.contains(" functions=") { "," } else { " functions=" };
                keys += name;
            }
        }
        keys
    }
}

/// `mem=<MiB> vcpus=<n>`
pub fn machine() -> String {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = meminfo.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    let vcpus = std::thread::available_parallelism().map_or(1, |count| count.get());
    format!("mem={} vcpus={vcpus}", kib >> 10)
}

fn digest(bytes: &[u8]) -> u64 {
    let mut digest = Digest::new();
    digest.bytes(bytes);
    digest.finish()
}

fn fit(keys: String) -> Result<String, Failure> {
    if keys.len() > KEYS_MAX {
        return failed(format!("the answer is {} bytes long, at most {KEYS_MAX} fit", keys.len()));
    }
    Ok(keys)
}

/// Runs a program with the pairs as arguments. The digest is that of the output; its last line, if it is made of
/// `key=value`, goes into the answer.
fn run_program(path: &Path, pairs: &[&str]) -> Result<Reply, Failure> {
    let mut child = Command::new(path)
        .args(pairs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run {}: {error}", path.display()))?;
    let errors = child.stderr.take().map(|mut pipe| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            // The rest of the output is read and dropped: the program must not wait for it.
            let _ = pipe.by_ref().take(OUTPUT_MAX).read_to_end(&mut text);
            let _ = io::copy(&mut pipe, &mut io::sink());
            text
        })
    });
    let mut output = Vec::new();
    let read = child.stdout.take().map_or(Ok(0), |pipe| pipe.take(OUTPUT_MAX + 1).read_to_end(&mut output));
    if output.len() as u64 > OUTPUT_MAX {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    read?;
    if output.len() as u64 > OUTPUT_MAX {
        return failed("the output is longer than 1 MiB");
    }
    if !status.success() {
        let errors = String::from_utf8_lossy(&errors);
        return failed(format!("{status}: {}", errors.lines().last().unwrap_or("")));
    }
    let text = String::from_utf8_lossy(&output);
    let last = text.trim_end().lines().last().unwrap_or("").to_owned();
    let is_pairs = last.bytes().all(|b| (b' '..=b'~').contains(&b)) && last.split(' ').all(|word| word.contains('='));
    Ok(Reply { digest: digest(&output), keys: if is_pairs { fit(last)? } else { format!("bytes={}", output.len()) } })
}
