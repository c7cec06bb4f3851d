//! `tvmm snapshot merge`: flattens a chain of snapshots.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::identify::{InputPath, Role};
use crate::snapshot::{Chain, Location, MAX_MERGED_DEPTH, merge};
use crate::sys::errors::BoxError;
use crate::sys::limits::raise_open_files;
use crate::sys::page_cache::PageCache;

#[derive(Debug, Args)]
pub struct MergeArgs {
    /// The snapshots: one, whose parents are found automatically, or all of them from the base to the tip
    #[arg(required = true, value_name = "DIR")]
    dirs: Vec<PathBuf>,
    /// The directory to make: it must not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl MergeArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        self.dirs.iter().map(|dir| InputPath::new(dir, Role::Snapshot)).collect()
    }
}

pub fn run(args: &MergeArgs) -> Result<ExitCode, BoxError> {
    // Each layer has an open file.
    raise_open_files(MAX_MERGED_DEPTH as u64 + 64);
    let chain = match args.dirs.as_slice() {
        [tip] => Chain::open_to_merge(&Location::Dir(tip.clone()))?,
        dirs => Chain::from_dirs(dirs)?,
    };
    let bar = bytes_bar("merging");
    let sealed = merge(&chain, Location::Dir(args.out.clone()), &PageCache, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    out!("{}", args.out.display());
    say!("snapshot {}: {} layers merged, {} pages", sealed.id, chain.layers().len(), sealed.pages_held);
    Ok(ExitCode::SUCCESS)
}

/// A progress bar over bytes on standard error; not drawn if that is no terminal.
pub fn bytes_bar(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    bar
}
