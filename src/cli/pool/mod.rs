//! `tvmm pool`: memory that holds the pages of many snapshots.

mod chunks;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};

use super::BoxError;
use crate::tiering::chunks::DEFAULT_BANDWIDTH_MBPS;

#[derive(Debug, Args)]
pub struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
}

/// What kind of memory a pool is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TierName {
    /// Compressed chunks in a directory, to be served to other hosts (`tvmm serve-pages`), or in an object store
    Remote,
    /// Compressed chunks in a directory of this host
    File,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Make a pool
    Create {
        /// What kind of memory it is
        #[arg(long, value_enum)]
        tier: TierName,
        /// Where: a directory
        #[arg(long, value_name = "PATH")]
        at: PathBuf,
        /// Guest memory under one compressed chunk, KiB: a power of two from 64 to 2048
        #[arg(long, value_name = "KIB", default_value_t = chunks::DEFAULT_CHUNK_KIB)]
        chunk: u64,
        /// What the way to the pool carries, MB/s: decides which compression pays
        #[arg(long, value_name = "MBPS", default_value_t = DEFAULT_BANDWIDTH_MBPS, value_parser = clap::value_parser!(u64).range(1..))]
        bandwidth: u64,
    },
    /// Add a snapshot
    Add {
        pool: PathBuf,
        snapshot: PathBuf,
        /// A profile: what it touches is stored together, so that it is fetched without the rest
        #[arg(long, value_name = "FILE")]
        profile: Option<PathBuf>,
        #[arg(long)]
        json: bool,
    },
    /// List the snapshots in a pool
    Ls {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Show what is in a pool
    Show {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Remove a snapshot, by id
    Rm { pool: PathBuf, snapshot: String },
    /// Remove what an interrupted writer left
    Gc {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Compare everything in a pool with its checksums
    Fsck {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
}

pub fn run(args: &PoolArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        PoolCommand::Create { tier: TierName::Remote | TierName::File, at, chunk, bandwidth } => {
            chunks::create(at, *chunk, *bandwidth)
        }
        PoolCommand::Add { pool, snapshot, profile, json } => chunks::add(pool, snapshot, profile.as_deref(), *json),
        PoolCommand::Ls { pool, json } => chunks::list(pool, *json),
        PoolCommand::Show { pool, json } => chunks::show(pool, *json),
        PoolCommand::Rm { pool, snapshot } => chunks::remove(pool, snapshot),
        PoolCommand::Gc { pool, json } => chunks::collect(pool, *json),
        PoolCommand::Fsck { pool, json } => chunks::check(pool, *json),
    }
}
