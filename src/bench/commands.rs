//! The other commands of tvmm that a benchmark needs, each in a separate process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{child, guest};
use crate::sys::errors::{BoxError, refuse};

/// Records a run of `function` with tvmm in a separate process. Returns the profile's path, which is `out`.
pub(super) fn record(
    exe: &Path,
    snapshot: &Path,
    function: &str,
    recorder: &str,
    out: &Path,
) -> Result<PathBuf, BoxError> {
    to_end(&mut recording(exe, snapshot, function, recorder, out))?;
    Ok(out.to_owned())
}

/// The command by which tvmm records a run of `function`.
pub(super) fn recording(exe: &Path, snapshot: &Path, function: &str, recorder: &str, out: &Path) -> Command {
    let mut command = Command::new(exe);
    command.args(["profile", "record", "--recorder", recorder, "--run", function]);
    command.args(["--run-timeout", &guest::TIMEOUT.as_secs().to_string()]);
    command.arg("--snapshot").arg(snapshot).arg("--out").arg(out);
    command
}

/// Adds a snapshot to a pool, laid out by its profile, with tvmm in a separate process.
pub(super) fn add_to_pool(
    exe: &Path,
    pool: &Path,
    snapshot: &Path,
    profile: &Path,
    name: &str,
) -> Result<(), BoxError> {
    let mut command = Command::new(exe);
    to_end(command.args(["pool", "add", "--name", name, "--profile"]).args([profile, pool, snapshot]))
}

/// Removes a snapshot from a pool, and frees its pages.
pub(super) fn remove_from_pool(exe: &Path, pool: &Path, name: &str) -> Result<(), BoxError> {
    to_end(Command::new(exe).args(["pool", "rm"]).arg(pool).arg(name))?;
    to_end(Command::new(exe).args(["pool", "gc"]).arg(pool))
}

/// Time limit of a command that packs or copies a large snapshot.
pub(super) const LONG: Duration = Duration::from_secs(3600);

/// Runs a command that must succeed.
pub(super) fn to_end(command: &mut Command) -> Result<(), BoxError> {
    let output = child::output(command, LONG)?;
    if output.status.success() {
        return Ok(());
    }
    refuse(format!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
}
