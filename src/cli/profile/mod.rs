//! `tvmm profile`: records the pages that a function reads and writes, shows profiles, and merges several runs.

mod draw;
mod facts;
mod html;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::identify::{InputPath, Role};
use super::seccomp_args::SeccompArgs;
use crate::config::request::DEFAULT_FAULT_TIMEOUT;
use crate::config::request::SnapshotPaths;
use crate::session::record::{RecordSpec, record};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::kick;
use crate::sys::seccomp;
use crate::sys::signals::EndSignals;
use crate::tiering::profile::{Agreement, MergeKind, Profile, RecorderKind, merge};

#[derive(Debug, Args)]
pub struct ProfileArgs {
    #[command(subcommand)]
    command: ProfileCommand,
}

impl ProfileArgs {
    /// Returns whether a VM runs in this process.
    pub fn runs_a_vm(&self) -> bool {
        matches!(self.command, ProfileCommand::Record(_))
    }

    pub fn inputs(&self) -> Vec<InputPath> {
        match &self.command {
            ProfileCommand::Record(args) => InputPath::snapshot(&args.snapshot, args.mem_file.as_deref()),
            ProfileCommand::Show(args) => args.inputs(),
            ProfileCommand::Merge(args) => {
                args.profiles.iter().map(|path| InputPath::new(path, Role::Profile)).collect()
            }
        }
    }
}

#[derive(Debug, Subcommand)]
enum ProfileCommand {
    /// Restore a snapshot, run one function, and record its use of each page
    Record(RecordArgs),
    /// Show the contents of a profile
    Show(show::ShowArgs),
    /// Merge several profiles into one, and show how far they agree
    Merge(MergeArgs),
}

#[derive(Debug, Args)]
struct RecordArgs {
    /// The snapshot: a directory that `tvmm snapshot` made, or with --mem-file the state file of Firecracker's two
    #[arg(long, value_name = "DIR")]
    snapshot: PathBuf,
    /// The memory file of the two-file form
    #[arg(long, value_name = "FILE")]
    mem_file: Option<PathBuf>,
    /// Recorder: uffd (exact, slow), pagemap (cheap, no order), mincore (as FaaSnap), dirty-log (writes only)
    #[arg(long, default_value = "uffd", value_name = "NAME")]
    recorder: String,
    /// The function of the guest to run (`name key=value…`)
    #[arg(long, value_name = "FUNCTION")]
    run: String,
    /// Make the request on this vsock port of the guest, instead of on its serial line
    #[arg(long, value_name = "PORT")]
    run_port: Option<u32>,
    /// Time limit of one run, s
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    run_timeout: u64,
    /// Longest wait of the guest for a page before it is ended, s
    #[arg(long, default_value_t = DEFAULT_FAULT_TIMEOUT.as_secs(), value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    fault_timeout: u64,
    /// Number of restores and runs; several runs are merged
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    repeat: u32,
    /// Merge of several runs: union, intersection or majority
    #[arg(long, default_value = "union", value_name = "KIND")]
    by: String,
    /// Directory for each run's own copies of drives, for a snapshot taken with --copy-drives; removed after the run
    #[arg(long, value_name = "DIR")]
    drive_dir: Option<PathBuf>,
    /// The profile to write; an older one is replaced
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Print the answers and the recording as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    seccomp: SeccompArgs,
}

#[derive(Debug, Args)]
struct MergeArgs {
    /// The profiles, all of one snapshot
    #[arg(required = true, value_name = "FILE")]
    profiles: Vec<PathBuf>,
    /// Pages to keep: those of any run (union), of all (intersection), of more than half (majority)
    #[arg(long, default_value = "union", value_name = "KIND")]
    by: String,
    /// The profile to write; an older one is replaced
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub fn run(args: &ProfileArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        ProfileCommand::Record(args) => run_record(args),
        ProfileCommand::Show(args) => show::run(args),
        ProfileCommand::Merge(args) => run_merge(args),
    }
}

fn run_record(args: &RecordArgs) -> Result<ExitCode, BoxError> {
    let function = args.run.trim();
    if function.is_empty() || function.chars().any(char::is_control) {
        return refuse("--run takes one function of the guest with its arguments, such as `hello` or `touch pages=16`");
    }
    let by: MergeKind = args.by.parse()?;
    let mut spec = RecordSpec {
        snapshot: SnapshotPaths { snapshot: args.snapshot.clone(), memory: args.mem_file.clone() },
        recorder: args.recorder.parse::<RecorderKind>()?,
        function: function.to_string(),
        port: args.run_port,
        drive_dir: None,
        timeout: Duration::from_secs(args.run_timeout),
        fault_timeout: Duration::from_secs(args.fault_timeout),
    };
    // Taken before any thread exists, so that none of them gets the signals.
    let mut signals = EndSignals::take()?;
    kick::install_handler()?;
    if let Some(filters) = args.seccomp.filters()? {
        seccomp::begin(filters, false)?;
    }
    let mut runs = Vec::new();
    let mut told = Vec::new();
    for number in 1..=args.repeat {
        let drives = args.drive_dir.as_deref().map(|dir| RunDrives::make(dir, number)).transpose()?;
        spec.drive_dir = drives.as_ref().map(|drives| drives.0.clone());
        let (recorded, back) = record(&spec, signals)?;
        signals = back;
        let profile = &recorded.profile;
        let ms = recorded.execute_ns as f64 / 1e6;
        let answer = recorded.answer.trim_end();
        say!("run {number}: {answer}, {ms:.3} ms, {}", counts(profile));
        told.push(json!({ "answer": answer, "execute_us": recorded.execute_ns as f64 / 1e3 }));
        runs.push(recorded.profile);
    }
    write(&runs, by, &args.out)?;
    if args.json {
        out!("{:#}", json!({ "profile": args.out, "runs": told }));
    } else {
        out!("{}", args.out.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The directory of one run's copies of drives.
struct RunDrives(PathBuf);

impl RunDrives {
    fn make(dir: &Path, number: u32) -> Result<RunDrives, BoxError> {
        let path = dir.join(format!("run-{number}"));
        match std::fs::create_dir(&path) {
            Ok(()) => Ok(RunDrives(path)),
            Err(error) => refuse(format!("Cannot make {}: {error}", path.display())),
        }
    }
}

impl Drop for RunDrives {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "Cannot remove a run's copies of drives");
        }
    }
}

fn run_merge(args: &MergeArgs) -> Result<ExitCode, BoxError> {
    let by: MergeKind = args.by.parse()?;
    let profiles = args.profiles.iter().map(|path| Profile::load(path)).collect::<Result<Vec<_>, _>>()?;
    write(&profiles, by, &args.out)?;
    out!("{}", args.out.display());
    Ok(ExitCode::SUCCESS)
}

/// Merges several profiles, saves the result, and logs a summary.
fn write(profiles: &[Profile], by: MergeKind, out: &Path) -> Result<(), BoxError> {
    let (merged, agreement) = merge(profiles, by)?;
    if profiles.len() > 1 {
        print_agreement(&agreement, by);
    }
    let bytes = merged.save(out)?;
    let pages = merged.working_set().len();
    let per_page = bytes as f64 / pages.max(1) as f64;
    say!("profile of {} run(s): {}, {bytes} bytes, {per_page:.2} per page", merged.runs, counts(&merged));
    Ok(())
}

/// Profiles of up to this many are compared pair by pair on the screen.
const PAIRS_SHOWN: usize = 10;

fn print_agreement(agreement: &Agreement, by: MergeKind) {
    say!("merged by {by}; agreement (Jaccard: common pages / all pages)");
    for pair in agreement.pairs.iter().take(PAIRS_SHOWN) {
        say!("  {} and {}: touched {:.4}, written {:.4}", pair.a + 1, pair.b + 1, pair.touched, pair.written);
    }
    let mean = agreement.mean();
    let least = agreement.least();
    say!("  mean:    touched {:.4}, written {:.4}", mean.0, mean.1);
    say!("  least:   touched {:.4}, written {:.4}", least.0, least.1);
}

fn counts(profile: &Profile) -> String {
    let mut text =
        if profile.sees_reads { format!("{} pages read", profile.read.len()) } else { "reads not seen".to_string() };
    text += &format!(", {} written", profile.written.len());
    if !profile.unclassified.is_empty() {
        text += &format!(", {} read or written", profile.unclassified.len());
    }
    text
}
