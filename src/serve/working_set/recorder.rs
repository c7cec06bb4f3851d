//! A run that is recorded: `tvmm profile record` restores the snapshot and runs its function, because the daemon runs
//! no guest itself.

use std::ffi::OsString;
use std::time::Duration;

use axum::http::StatusCode;
use serde_json::Value;

use super::profiles::{exclusively, remove_unneeded};
use super::slot::Slot;
use crate::serve::blocking::blocking;
use crate::serve::daemon::Daemon;
use crate::serve::drives::remove_images;
use crate::serve::fault::Fault;
use crate::serve::function::Function;
use crate::serve::snapshot_record::SnapshotRecord;
use crate::serve::vm::line::GuestAnswer;
use crate::serve::vm::process::run_tool;
use crate::serve::vm::shape::Need;
use crate::snapshot::random_hex;

/// A recording to make.
pub struct Record {
    pub snapshot: SnapshotRecord,
    pub slot: Slot,
    pub recorder: String,
    pub repeat: u32,
}

impl Record {
    /// The place that the recorded VM needs. It runs in the recorder's process.
    pub fn need(&self) -> Need<'_> {
        let Function { func_name, mem_size, .. } = &self.snapshot.function;
        Need { func_name, memory_mib: *mem_size, shape: None }
    }
}

/// The directory of a recorder's copies of drives; removed at the end, even if the recorder was killed.
struct RunDir(std::path::PathBuf);

impl Drop for RunDir {
    fn drop(&mut self) {
        remove_images(std::mem::take(&mut self.0));
    }
}

/// Runs `tvmm profile record`. Returns the guest's first answer.
pub async fn run_recorder(daemon: &Daemon, record: &Record, line: &str, limit: Duration) -> Result<GuestAnswer, Fault> {
    // The recorder opens the image that the snapshot names.
    daemon.allowances.confined_function(record.snapshot.function.clone()).await?;
    let profiles = daemon.store.profiles_dir(&record.snapshot.ss_id);
    std::fs::create_dir_all(&profiles).map_err(|error| Fault::of(&error))?;
    let utf8 = |path: std::path::PathBuf| {
        path.into_os_string().into_string().map_err(|_| Fault::internal("The daemon's directory is not UTF-8."))
    };
    let mut args: Vec<String> =
        ["profile", "record", "--json", "--recorder", &record.recorder].map(String::from).into();
    args.extend(["--snapshot".into(), utf8(daemon.snapshot_dir(&record.snapshot.ss_id))?]);
    args.extend(["--out".into(), utf8(record.slot.path(&profiles))?]);
    args.extend(["--repeat".into(), record.repeat.to_string()]);
    args.extend(["--run".into(), line.to_string()]);
    args.extend(["--run-timeout".into(), limit.as_secs().max(1).to_string()]);
    let own = RunDir(daemon.store.drives_dir(&random_hex(8)));
    if record.snapshot.has_drive_copies()? {
        std::fs::create_dir(&own.0).map_err(|error| Fault::of(&error))?;
        args.extend(["--drive-dir".into(), utf8(own.0.clone())?]);
    }
    if let Some(port) = record.snapshot.function.port {
        args.extend(["--run-port".into(), port.to_string()]);
    }
    let patience = limit.saturating_mul(record.repeat.max(1));
    let args = args.into_iter().map(OsString::from).chain(daemon.spawner.vm_args().iter().cloned());
    let ran = run_tool(&daemon.spawner, args, patience).await;
    let (ended, printed) = ran.map_err(|error| match error.kind() {
        std::io::ErrorKind::TimedOut => Fault::timed_out("The recorded run did not end in time, and its VM was ended."),
        _ => Fault::of(&error),
    })?;
    if ended.code != Some(0) {
        let text = format!("The run cannot be recorded: it {}.", ended.why());
        return Err(Fault::coded(StatusCode::UNPROCESSABLE_ENTITY, ended.fault, text));
    }
    let dir = daemon.snapshot_dir(&record.snapshot.ss_id);
    let removed = blocking(move || {
        let _turn = exclusively();
        remove_unneeded(&dir, &profiles)
    });
    removed.await??;
    let told: Value = serde_json::from_slice(&printed).unwrap_or_default();
    let answer = told["runs"][0]["answer"].as_str().unwrap_or_default();
    let mut words = answer.splitn(3, ' ');
    let ok = words.next() == Some("ok");
    Ok(GuestAnswer { ok, text: words.nth(1).unwrap_or_default().to_string() })
}
