//! `tvmm profile show`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::draw::Map;
use super::facts::{ProfileView, SnapshotFacts, facts, order_name};
use super::html;
use crate::cli::identify::{InputPath, Role};
use crate::snapshot::{Chain, Location, PAGE_SIZE, PageSet, replace_file};
use crate::sys::errors::BoxError;
use crate::sys::print;
use crate::tiering::profile::{Buckets, Profile, nonzero};

#[derive(Debug, Args)]
pub struct ShowArgs {
    #[arg(value_name = "FILE")]
    profile: PathBuf,
    /// The snapshot it was recorded on: adds loading set and buckets
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
    /// The memory file of the two-file form
    #[arg(long, value_name = "FILE", requires = "snapshot")]
    mem_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long, conflicts_with = "html")]
    json: bool,
    /// Write an HTML page with a heat map, which works offline
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl ShowArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        let snapshot = self.snapshot.iter().flat_map(|path| InputPath::snapshot(path, self.mem_file.as_deref()));
        std::iter::once(InputPath::new(&self.profile, Role::Profile)).chain(snapshot).collect()
    }
}

pub fn run(args: &ShowArgs) -> Result<ExitCode, BoxError> {
    let profile = Profile::load(&args.profile)?;
    let of_snapshot = match &args.snapshot {
        None => None,
        Some(path) => Some(of_snapshot(&profile, path, args.mem_file.as_ref())?),
    };
    let file_bytes = std::fs::metadata(&args.profile)?.len();
    let shown = ProfileView { profile, file_bytes, of_snapshot };
    if args.json {
        out!("{:#}", to_json(&shown));
    } else if let Some(path) = &args.html {
        replace_file(path, html::page(&shown).as_bytes())?;
        out!("{}", path.display());
    } else {
        facts(&shown).iter().for_each(|(name, value)| out!("{name:<11} {value}"));
        let map = Map::of(&shown.profile);
        out!(
            "heat map    (each cell {} KiB: r read, w written, b both, ? one of them; the",
            map.cell * PAGE_SIZE / 1024
        );
        out!("            order's earliest third in capitals; dots untouched)");
        print::write(format_args!("{}", map.text()));
    }
    Ok(ExitCode::SUCCESS)
}

fn of_snapshot(profile: &Profile, path: &std::path::Path, memory: Option<&PathBuf>) -> Result<SnapshotFacts, BoxError> {
    let location = match memory {
        None => Location::Dir(path.to_path_buf()),
        Some(memory) => Location::Files { snapshot: path.to_path_buf(), memory: memory.clone() },
    };
    let chain = Chain::open(&location)?;
    profile.check_for(chain.tip())?;
    let runs = chain.resolve()?;
    Ok(SnapshotFacts {
        loading_set: profile.loading_set(&nonzero(&runs)),
        buckets: Buckets::of(&runs).within(&profile.working_set()),
        pages: chain.layout().pages(),
    })
}

fn to_json(shown: &ProfileView) -> Value {
    let profile = &shown.profile;
    let runs = |set: &PageSet| set.runs().map(|run| [run.first.0, run.pages]).collect::<Vec<_>>();
    let counts = |counts: &[(u32, PageSet)]| {
        counts.iter().map(|(count, pages)| json!({ "runs": count, "pages": pages.len() })).collect::<Vec<_>>()
    };
    json!({
        "snapshot": profile.snapshot,
        "recorder": profile.recorder.name(),
        "function": profile.function,
        "runs": profile.runs,
        "sees_reads": profile.sees_reads,
        "knows_classes": profile.knows_classes(),
        "knows_order": profile.knows_order(),
        "pages": {
            "working_set": profile.working_set().len(),
            "read": profile.read.len(),
            "written": profile.written.len(),
            "unclassified": profile.unclassified.len(),
            "loading_set": shown.of_snapshot.as_ref().map(|of| of.loading_set.len()),
        },
        "buckets": shown.of_snapshot.as_ref().map(|of| json!({
            "runtime": of.buckets.runtime.len(),
            "init": of.buckets.init.len(),
            "execution": of.buckets.execution.len(),
        })),
        "order": order_name(&profile.order),
        "frequency": {
            "touched": counts(&profile.frequency.touched),
            "written": counts(&profile.frequency.written),
        },
        "file_bytes": shown.file_bytes,
        // [gfn, pages]
        "read": runs(&profile.read),
        "written": runs(&profile.written),
        "unclassified": runs(&profile.unclassified),
        "in_order": profile.in_order().iter().map(|run| [run.first.0, run.pages]).collect::<Vec<_>>(),
        "times_ns": profile.times_ns,
    })
}
