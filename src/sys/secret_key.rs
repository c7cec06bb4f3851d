//! Reads the key of an encrypted snapshot from a file, or from the output of a command.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use super::own_file::check_private;
use crate::snapshot::{self, KeySource, NoKey, SecretKey, open_regular};

/// The largest key, with all that is around it, in bytes.
const LIMIT: u64 = 4096;
/// The longest that a command may take: it may ask a service on another host.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// The reason why there is no key. It never shows the key.
#[derive(Debug, thiserror::Error)]
pub enum SecretKeyError {
    #[error(transparent)]
    File(#[from] snapshot::Error),
    #[error("Cannot use the key {path}: {problem}", path = path.display())]
    Exposed { path: PathBuf, problem: String },
    #[error("Cannot use the key from {from}")]
    NoKey { from: KeySource, source: NoKey },
    #[error("Cannot read the key from {from}")]
    Read { from: KeySource, source: io::Error },
    #[error("Cannot get the key from {from}: {problem}")]
    Command { from: KeySource, problem: String },
}

/// Reads the key.
///
/// # Errors
/// A file that others may use, a command that fails or takes longer than 30 s, or bytes that are no key.
pub fn read(from: &KeySource) -> Result<SecretKey, SecretKeyError> {
    let text = match from {
        KeySource::File(path) => {
            let failed = |source| SecretKeyError::Read { from: from.clone(), source };
            let (file, _) = open_regular(path)?;
            let metadata = file.metadata().map_err(failed)?;
            let exposed = |problem| SecretKeyError::Exposed { path: path.clone(), problem };
            check_private(&metadata).map_err(exposed)?;
            read_some(file).map_err(failed)?
        }
        KeySource::Command(command) => output_of(command, from)?,
    };
    text.parse().map_err(|source| SecretKeyError::NoKey { from: from.clone(), source })
}

fn read_some(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    from.take(LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

/// The output of a command, which ends by itself with exit code 0.
fn output_of(command: &str, from: &KeySource) -> Result<String, SecretKeyError> {
    let failed = |problem: String| SecretKeyError::Command { from: from.clone(), problem };
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = shell.spawn().map_err(|error| failed(format!("it does not start: {error}")))?;
    let Some(output) = child.stdout.take() else { return Err(failed("it has no output".to_string())) };
    let (sender, receiver) = mpsc::channel();
    let reader = std::thread::Builder::new().name("key".into()).spawn(move || {
        // The receiver is gone if the command has taken too long.
        let _ = sender.send(read_some(output));
    });
    let text = match reader {
        Ok(_) => receiver.recv_timeout(COMMAND_LIMIT),
        Err(error) => {
            end(&mut child);
            return Err(failed(format!("no thread can read its output: {error}")));
        }
    };
    let Ok(text) = text else {
        end(&mut child);
        return Err(failed(format!("it has not ended after {} s", COMMAND_LIMIT.as_secs())));
    };
    // Its output is closed. A command that goes on without it is ended.
    let status = match child.try_wait() {
        Ok(None) => wait_a_little(&mut child),
        status => status,
    };
    match status {
        Ok(Some(status)) if status.success() => text.map_err(|error| failed(error.to_string())),
        Ok(Some(status)) => Err(failed(format!("it failed ({status})"))),
        Ok(None) => {
            end(&mut child);
            Err(failed("it has closed its output and not ended".to_string()))
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

fn wait_a_little(child: &mut Child) -> io::Result<Option<std::process::ExitStatus>> {
    for _ in 0..COMMAND_LIMIT.as_millis() / 10 {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(None)
}

/// Ends the command and all that it has started.
fn end(child: &mut Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        // It may have ended meanwhile.
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}
