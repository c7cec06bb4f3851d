//! `tvmm pool`: memory that holds the pages of many snapshots, and that VMs map.

mod chunks;
mod show;
mod usage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use super::identify::{InputPath, Role};
use super::merge::bytes_bar;
use super::units;
use crate::backends::pool_media;
use crate::backends::pool_media::Access;
use crate::snapshot::{Chain, Location, PoolId};
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::costs::Costs;
use crate::tiering::pool::add::{Added, name_of};
use crate::tiering::pool::{Error, Medium, Writer, fsck, writer};
use crate::tiering::profile::Profile;

#[derive(Debug, Args)]
pub struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
}

/// The kind of memory of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TierName {
    /// Byte-addressable: mapped in place
    Cxl,
    /// Compressed chunks in a directory, to be served to other hosts (`tvmm serve-pages`), or in an object store
    Remote,
    /// Compressed chunks in a directory of this host
    File,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Make a pool
    Create {
        /// Kind of memory
        #[arg(long, value_enum)]
        tier: TierName,
        /// Place: /dev/daxX.Y, a directory (tmpfs, hugetlbfs, fsdax, any file system; made if it does not exist), or
        /// numa:N; for compressed chunks a directory or s3://BUCKET/PREFIX, gs://, az://, http(s)://
        #[arg(long, value_name = "PATH")]
        at: PathBuf,
        /// Size in GiB (0.5 is half a GiB); default for a device: all of it
        #[arg(long, value_name = "GIB")]
        size: Option<f64>,
        /// Format the device of this name, whatever is on it
        #[arg(long, value_name = "DEVICE-NAME")]
        format: Option<String>,
        #[command(flatten)]
        chunks: chunks::ChunkArgs,
    },
    /// Add a snapshot: store the pages that are not yet in the pool
    Add {
        pool: PathBuf,
        snapshot: PathBuf,
        /// Profile of a run: pages that it reads are packed in 2 MiB blocks, apart from pages that it writes
        #[arg(long, value_name = "FILE")]
        profile: Option<PathBuf>,
        /// Name of the snapshot in the pool; default: the name of its directory
        #[arg(long)]
        name: Option<String>,
        /// Expected number of restores: with more restores, fewer mappings are spent on sharing a page
        #[arg(long, default_value_t = 100, value_name = "COUNT")]
        restores: u64,
        #[arg(long)]
        json: bool,
    },
    /// List the snapshots in a pool
    Ls {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Draw a pool's contents, the snapshots that share them, and the memory of running VMs
    Show {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Remove a snapshot, by name or id; `gc` frees its pages when no VM maps them
    Rm { pool: PathBuf, snapshot: String },
    /// Free the pages of removed snapshots
    Gc {
        pool: PathBuf,
        /// Time without a sign of life, s, after which VMs of other hosts are suspected to have ended; those that stay
        /// silent for another 25 s are taken for ended
        #[arg(long, default_value_t = 600, value_name = "SECONDS")]
        lease_expiry: u64,
        #[arg(long)]
        json: bool,
    },
    /// Compare all bytes of a pool with their checksums
    Fsck {
        pool: PathBuf,
        #[arg(long)]
        json: bool,
    },
}

impl PoolArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        match &self.command {
            PoolCommand::Create { .. } => Vec::new(),
            PoolCommand::Add { pool, snapshot, profile, .. } => {
                let profile = profile.iter().map(|path| InputPath::new(path, Role::Profile));
                let both = [InputPath::new(pool, Role::Pool), InputPath::new(snapshot, Role::Snapshot)];
                both.into_iter().chain(profile).collect()
            }
            PoolCommand::Ls { pool, .. }
            | PoolCommand::Show { pool, .. }
            | PoolCommand::Rm { pool, .. }
            | PoolCommand::Gc { pool, .. }
            | PoolCommand::Fsck { pool, .. } => vec![InputPath::new(pool, Role::Pool)],
        }
    }
}

pub fn run(args: &PoolArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        PoolCommand::Create { tier: TierName::Cxl, at, size, format, chunks } => {
            chunks.refuse_for_cxl()?;
            create(at, *size, format.as_deref())
        }
        PoolCommand::Create { tier: TierName::Remote | TierName::File, at, size: None, format: None, chunks } => {
            chunks::create(at, chunks)
        }
        PoolCommand::Create { .. } => {
            refuse("Pools of compressed chunks grow as they are filled: leave --size and --format out")
        }
        PoolCommand::Add { pool, snapshot, profile, json, .. } if chunks::is_one(pool) => {
            chunks::add(pool, snapshot, profile.as_deref(), *json)
        }
        PoolCommand::Ls { pool, json } if chunks::is_one(pool) => chunks::list(pool, *json),
        PoolCommand::Show { pool, json } if chunks::is_one(pool) => chunks::show(pool, *json),
        PoolCommand::Rm { pool, snapshot } if chunks::is_one(pool) => chunks::remove(pool, snapshot),
        PoolCommand::Gc { pool, json, .. } if chunks::is_one(pool) => chunks::collect(pool, *json),
        PoolCommand::Fsck { pool, json } if chunks::is_one(pool) => chunks::check(pool, *json),
        PoolCommand::Add { .. } => add(&args.command),
        PoolCommand::Ls { pool, json } => show::list(&pool_media::open(pool, Access::Look)?, *json),
        PoolCommand::Show { pool, json } => show::show(&pool_media::open(pool, Access::Look)?, *json),
        PoolCommand::Rm { pool, snapshot } => remove(pool, snapshot),
        PoolCommand::Gc { pool, lease_expiry, json } => collect(pool, *lease_expiry, *json),
        PoolCommand::Fsck { pool, json } => check(pool, *json),
    }
}

fn create(at: &std::path::Path, gib: Option<f64>, format: Option<&str>) -> Result<ExitCode, BoxError> {
    let size = match gib {
        Some(gib) if !(gib > 0.0 && gib < f64::from(1 << 20)) => {
            return refuse(format!(
                "A pool of {gib} GiB cannot be made: its size must be more than 0 and less than 1,048,576 GiB"
            ));
        }
        gib => gib.map(|gib| (gib * f64::from(1 << 30)) as u64),
    };
    let mut id = PoolId::default();
    rustix::rand::getrandom(&mut id.0, rustix::rand::GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    let medium = pool_media::create(at, size)?;
    writer::create(&medium, id, format, &pool_media::format_name(at)).inspect_err(|_| medium.abandon())?;
    let facts = medium.facts();
    out!("{}", at.display());
    let mib = medium.size() >> 20;
    let pages = match (facts.huge, facts.copy_on_write) {
        (true, true) => "2 MiB pages, copied on write by the kernel",
        (true, false) => "2 MiB pages, promoted on write",
        (false, _) => "4 KiB pages: a tmpfs mounted with huge=always, or hugetlbfs, is many times faster",
    };
    say!("pool {id}: {mib} MiB on {}, {pages}", facts.kind);
    Ok(ExitCode::SUCCESS)
}

fn add(command: &PoolCommand) -> Result<ExitCode, BoxError> {
    let PoolCommand::Add { pool, snapshot, profile, name, restores, json } = command else {
        return refuse("Cannot add: no snapshot is named");
    };
    let medium = pool_media::open(pool, Access::Change)?;
    let profile = profile.as_deref().map(Profile::load).transpose()?;
    let chain = Chain::open(&Location::Dir(snapshot.clone()))?;
    let costs = Costs::of_this_host()?;
    let name = name.clone().unwrap_or_else(|| name_of(snapshot));
    let mut writer = Writer::open(&medium)?;
    let bar = bytes_bar("adding");
    let added = Added { chain: &chain, name: &name, profile: profile.as_ref(), costs: &costs, restores: *restores };
    let head = writer.add(&added, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    if *json {
        out!("{:#}", show::head_json(&head))
    } else {
        show::print_added(&head)
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(pool: &std::path::Path, snapshot: &str) -> Result<ExitCode, BoxError> {
    let medium = pool_media::open(pool, Access::Change)?;
    let head = Writer::open(&medium)?.remove(snapshot)?;
    say!("{} ({}) is removed; `tvmm pool gc {}` frees its pages", head.name, head.snapshot, pool.display());
    Ok(ExitCode::SUCCESS)
}

fn collect(pool: &std::path::Path, expiry_s: u64, json: bool) -> Result<ExitCode, BoxError> {
    let medium = pool_media::open(pool, Access::Change)?;
    let done = Writer::open(&medium)?.collect(Some(expiry_s))?;
    if json {
        out!("{:#}", json!({ "snapshots": done.snapshots, "pages": done.pages, "held": done.held }));
        return Ok(ExitCode::SUCCESS);
    }
    out!("freed      {} snapshots, {:.1} MiB", done.snapshots, units::mib_of_pages(done.pages));
    if done.held > 0 {
        out!("held       {} removed snapshots, which VMs still run from", done.held);
    }
    Ok(ExitCode::SUCCESS)
}

fn check(pool: &std::path::Path, json: bool) -> Result<ExitCode, BoxError> {
    let medium = pool_media::open(pool, Access::Look)?;
    let bar = bytes_bar("checking");
    let found = fsck::check(&medium, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    if json {
        let json = json!({
            "good": found.is_good(),
            "generation": found.generation,
            "both_states": found.both_states,
            "snapshots": found.snapshots,
            "pages": found.pages,
            "bad_pages": found.bad_pages,
            "bad_snapshots": found.bad_snapshots,
            "problems": found.problems,
            "live_leases": found.live_leases,
        });
        out!("{json:#}");
    } else {
        out!("state      {} with {} snapshots, {} VMs", found.generation, found.snapshots, found.live_leases);
        out!("pages      {} checked, {} damaged", found.pages, found.bad_pages.len());
        found.problems.iter().for_each(|problem| out!("problem    {problem}"));
        found.bad_snapshots.iter().for_each(|name| out!("damaged    {name}: remove it, and add it again"));
    }
    if found.is_good() {
        return Ok(ExitCode::SUCCESS);
    }
    let problem =
        format!("{} pages and {} entries do not match their checksums", found.bad_pages.len(), found.problems.len());
    Err(Error::damaged(medium.path(), problem).into())
}
