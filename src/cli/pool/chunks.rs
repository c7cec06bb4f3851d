//! `tvmm pool` for pools of compressed chunks.

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::backends::cold::AnyPool;
use crate::cli::merge::bytes_bar;
use crate::cli::units::mib;
use crate::snapshot::{Chain, Location, PAGE_SIZE, PageSet, SnapshotId, is_object_url};
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::cold::store::{MANIFEST, Manifest};
use crate::tiering::cold::{Compression, DEFAULT_BANDWIDTH_MBPS, DEFAULT_CHUNK_PAGES, Index, Packed};
use crate::tiering::profile::{Profile, nonzero};

/// Default size of guest memory under one chunk, KiB.
const DEFAULT_CHUNK_KIB: u64 = (DEFAULT_CHUNK_PAGES * PAGE_SIZE) >> 10;

/// Arguments of pools of compressed chunks only.
#[derive(Debug, Args)]
pub struct ChunkArgs {
    /// Compressed chunks: guest memory under one, KiB, a power of two from 64 to 2048 [default: 128]
    #[arg(long, value_name = "KIB")]
    chunk: Option<u64>,
    /// Compressed chunks: bandwidth of the path to the pool, MB/s, by which the compression is chosen [default: 1200]
    #[arg(long, value_name = "MBPS", value_parser = clap::value_parser!(u64).range(1..))]
    bandwidth: Option<u64>,
}

impl ChunkArgs {
    /// Refuses these arguments for byte-addressable pools, which have no chunks.
    pub fn refuse_for_cxl(&self) -> Result<(), BoxError> {
        match (self.chunk, self.bandwidth) {
            (None, None) => Ok(()),
            _ => refuse("--chunk and --bandwidth are for pools of compressed chunks (--tier remote, --tier file)"),
        }
    }
}

/// Returns whether there is a pool of chunks at `pool`. Otherwise opening it as a byte-addressable pool gives the
/// error.
pub fn is_one(pool: &Path) -> bool {
    is_object_url(&pool.to_string_lossy()) || pool.join(MANIFEST).exists()
}

/// Makes a pool in an empty or missing directory.
pub fn create(at: &Path, args: &ChunkArgs) -> Result<ExitCode, BoxError> {
    let chunk_kib = args.chunk.unwrap_or(DEFAULT_CHUNK_KIB);
    let bandwidth_mbps = args.bandwidth.unwrap_or(DEFAULT_BANDWIDTH_MBPS);
    AnyPool::create(text(at)?, Manifest::new(chunk_kib, bandwidth_mbps)?)?;
    out!("{}", at.display());
    say!("cold pool: chunks of {chunk_kib} KiB, compressed for {bandwidth_mbps} MB/s");
    Ok(ExitCode::SUCCESS)
}

/// A pool's name, which may be a URL.
fn text(pool: &Path) -> Result<&str, BoxError> {
    match pool.to_str() {
        Some(text) => Ok(text),
        None => refuse(format!("Cannot use {}: the path is not UTF-8", pool.display())),
    }
}

/// Adds a snapshot with all its parents.
pub fn add(pool: &Path, snapshot: &Path, profile: Option<&Path>, as_json: bool) -> Result<ExitCode, BoxError> {
    let store = AnyPool::open(text(pool)?)?;
    let chain = Chain::open(&Location::Dir(snapshot.to_path_buf()))?;
    let hot = profile.map(|path| hot_pages(path, &chain)).transpose()?;
    let bar = bytes_bar("packing");
    let packed = store.add(&chain, hot, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    if as_json {
        out!("{:#}", packed_json(&packed))
    } else {
        print_packed(&packed)
    }
    Ok(ExitCode::SUCCESS)
}

/// The pages that a profile's run touches.
fn hot_pages(profile: &Path, chain: &Chain) -> Result<PageSet, BoxError> {
    let profile = Profile::load(profile)?;
    profile.check_for(chain.tip())?;
    Ok(profile.loading_set(&nonzero(&chain.resolve()?)))
}

fn packed_json(packed: &Packed) -> Value {
    let methods = Compression::ALL.iter().zip(packed.methods).map(|(method, (chunks, pages, stored))| {
        (method.name().to_string(), json!({ "chunks": chunks, "bytes": pages, "bytes_stored": stored }))
    });
    let mut json = index_json(&packed.index);
    json["methods"] = methods.collect();
    json
}

fn index_json(index: &Index) -> Value {
    json!({
        "snapshot": index.snapshot(),
        "pages": index.pages(),
        "chunks": index.chunks().len(),
        "chunk_kib": (index.chunk_pages() * PAGE_SIZE) >> 10,
        "bytes": index.pages() * PAGE_SIZE,
        "bytes_stored": index.data_len(),
    })
}

fn print_packed(packed: &Packed) {
    let index = &packed.index;
    out!("snapshot   {}", index.snapshot());
    let bytes = index.pages() * PAGE_SIZE;
    let stored = index.data_len();
    out!("pages      {} ({:.1} MiB) in {} chunks", index.pages(), mib(bytes), index.chunks().len());
    out!("stored     {:.1} MiB, {:.0} %", mib(stored), 100.0 * stored as f64 / bytes.max(1) as f64);
    for (method, (chunks, bytes, stored)) in Compression::ALL.iter().zip(packed.methods) {
        if chunks > 0 {
            out!("  {:<8} {chunks} chunks, {:.1} MiB as {:.1} MiB", method.name(), mib(bytes), mib(stored));
        }
    }
}

/// Lists the snapshots.
pub fn list(pool: &Path, as_json: bool) -> Result<ExitCode, BoxError> {
    let held = AnyPool::open(text(pool)?)?.list()?;
    if as_json {
        out!("{:#}", json!(held))
    } else {
        held.iter().for_each(|snapshot| out!("{snapshot}"))
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows the size of each snapshot.
pub fn show(pool: &Path, as_json: bool) -> Result<ExitCode, BoxError> {
    let store = AnyPool::open(text(pool)?)?;
    let indexes = store.list()?.into_iter().map(|id| store.index(id)).collect::<Result<Vec<_>, _>>()?;
    if as_json {
        let snapshots: Vec<Value> = indexes.iter().map(index_json).collect();
        out!("{:#}", json!({ "pool": store.manifest(), "snapshots": snapshots }));
        return Ok(ExitCode::SUCCESS);
    }
    let manifest = store.manifest();
    out!("cold pool  chunks of {} KiB, compressed for {} MB/s", manifest.chunk_kib, manifest.bandwidth_mbps);
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["snapshot", "MiB", "stored", "%", "chunks", "raw/lz4/zstd"]);
    for index in &indexes {
        let bytes = index.pages() * PAGE_SIZE;
        let stored = index.data_len();
        let count = |method| index.chunks().iter().filter(|chunk| chunk.compression == method).count();
        table.add_row([
            index.snapshot().to_string()[..16].to_string(),
            format!("{:.1}", mib(bytes)),
            format!("{:.1}", mib(stored)),
            format!("{:.0}", 100.0 * stored as f64 / bytes.max(1) as f64),
            index.chunks().len().to_string(),
            Compression::ALL.map(|method| count(method).to_string()).join("/"),
        ]);
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    out!("{table}");
    Ok(ExitCode::SUCCESS)
}

/// The only snapshot in the pool whose id begins with `text`.
fn find(store: &AnyPool, pool: &Path, text: &str) -> Result<SnapshotId, BoxError> {
    let held = store.list()?;
    let mut found = held.iter().filter(|id| !text.is_empty() && id.to_string().starts_with(text));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(*id),
        (None, _) => refuse(format!("{} holds no snapshot whose id begins with `{text}`", pool.display())),
        _ => refuse(format!("{} holds several snapshots whose ids begin with `{text}`", pool.display())),
    }
}

/// Removes a snapshot. VMs that run from it go on while their page server has it open.
pub fn remove(pool: &Path, snapshot: &str) -> Result<ExitCode, BoxError> {
    let store = AnyPool::open(text(pool)?)?;
    let id = find(&store, pool, snapshot)?;
    store.remove(id)?;
    say!("{id} is removed");
    Ok(ExitCode::SUCCESS)
}

/// Removes data that belongs to no snapshot.
pub fn collect(pool: &Path, as_json: bool) -> Result<ExitCode, BoxError> {
    let freed = AnyPool::open(text(pool)?)?.collect()?;
    if as_json {
        out!("{:#}", json!({ "bytes": freed }))
    } else {
        out!("freed      {:.1} MiB", mib(freed))
    }
    Ok(ExitCode::SUCCESS)
}

/// Compares every chunk with its checksum.
pub fn check(pool: &Path, as_json: bool) -> Result<ExitCode, BoxError> {
    let store = AnyPool::open(text(pool)?)?;
    let mut results = Vec::new();
    let mut bad = 0;
    for id in store.list()? {
        let problem = match store.check(id) {
            Ok(checked) if checked.bad_chunks == 0 => None,
            Ok(checked) => Some(format!(
                "{} of {} chunks are damaged, the first {:?}",
                checked.bad_chunks, checked.chunks, checked.bad
            )),
            Err(error) => Some(crate::sys::errors::chain(&error)),
        };
        bad += usize::from(problem.is_some());
        if !as_json {
            out!("{id} {}", problem.as_deref().unwrap_or("good"));
        }
        results.push(json!({ "snapshot": id, "good": problem.is_none(), "problem": problem }));
    }
    if as_json {
        out!("{:#}", json!({ "good": bad == 0, "snapshots": results }));
    }
    match bad {
        0 => Ok(ExitCode::SUCCESS),
        bad => refuse(format!("{bad} snapshots in {} are damaged: remove them, and add them again", pool.display())),
    }
}
