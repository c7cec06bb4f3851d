//! `tvmm inspect`: what a snapshot is, drawn, and whether it is still what was written.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::identify::InputPath;
use super::merge::bytes_bar;
use super::{BoxError, refuse};
use crate::snapshot::{Chain, Extent, Gfn, Location, PAGE_SIZE, PageMap, Snapshot, VerifyReport, page_digest};

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The snapshot directory, or with --mem-file the state file of Firecracker's two
    #[arg(value_name = "DIR")]
    snapshot: PathBuf,
    /// The memory file of the two-file form
    #[arg(long, value_name = "FILE")]
    mem_file: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

impl InspectArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        InputPath::snapshot(&self.snapshot, self.mem_file.as_deref())
    }
}

pub fn run(args: &InspectArgs) -> Result<ExitCode, BoxError> {
    let location = match &args.mem_file {
        None => Location::Dir(args.snapshot.clone()),
        Some(memory) => Location::Files { snapshot: args.snapshot.clone(), memory: memory.clone() },
    };
    // The snapshot itself comes first: it can be told about when its parents cannot be opened.
    let snapshot = Snapshot::open(&location)?;
    let bar = bytes_bar("verifying");
    let verified = snapshot.verify(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let chain = Chain::open(&location);
    let content = match &chain {
        Ok(chain) if verified.is_good() => Some(page_digest(chain)?.to_string()),
        _ => None,
    };
    let map = snapshot.page_map()?;
    if args.json {
        println!("{:#}", to_json(&snapshot, map, &verified, chain.as_ref().ok(), content.as_deref()));
    } else {
        print(&snapshot, map, chain.as_ref().ok(), content.as_deref());
    }
    chain?;
    match verified.bad.first() {
        None => Ok(ExitCode::SUCCESS),
        Some(bad) => refuse(format!(
            "{} is damaged: {} of {} chunks of its memory are not what was written, the first at guest-physical {:#x} (+{} bytes)",
            snapshot.object(),
            verified.bad_chunks,
            verified.chunks,
            bad.extent.gpa(),
            bad.extent.bytes()
        )),
    }
}

fn to_json(
    snapshot: &Snapshot,
    map: &PageMap,
    verified: &VerifyReport,
    chain: Option<&Chain>,
    content: Option<&str>,
) -> Value {
    let section = |info: &crate::snapshot::SectionInfo| json!({ "kind": format!("{:?}", info.kind), "instance": info.instance, "version": info.version, "bytes": info.len() });
    let layer = |layer: &Snapshot| json!({ "id": layer.id(), "path": layer.object() });
    let bad = |bad: &crate::snapshot::BadChunk| {
        json!({
            "gpa": bad.extent.gpa(),
            "bytes": bad.extent.bytes(),
            "stored": format!("{:#010x}", bad.stored),
            "computed": format!("{:#010x}", bad.computed),
        })
    };
    json!({
        "manifest": snapshot.manifest(),
        "sections": snapshot.sections().iter().map(section).collect::<Vec<_>>(),
        "layers": chain.map(|chain| chain.layers().iter().map(layer).collect::<Vec<_>>()),
        "memory": {
            "pages_held": map.held().len(),
            "pages_zero": map.zero().len(),
            "runs": map.held().runs().count(),
            "chunks_verified": verified.chunks,
            "chunks_bad": verified.bad_chunks,
            "bad": verified.bad.iter().map(bad).collect::<Vec<_>>(),
            "content_digest": content,
        },
    })
}

fn print(snapshot: &Snapshot, map: &PageMap, chain: Option<&Chain>, content: Option<&str>) {
    let manifest = snapshot.manifest();
    let mib = |pages: u64| pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 20);
    println!("snapshot   {}", manifest.id);
    println!("kind       {:?}, format {}, written by tvmm {}", manifest.kind, manifest.format, manifest.tvmm_version);
    println!("machine    {} vCPU, {} MiB", manifest.machine.vcpu_count, manifest.machine.mem_size_mib);
    let host = &manifest.host;
    println!("host       {} ({}), kernel {}", host.cpu_vendor, host.cpu_model, host.kernel_release);
    if let Some(chain) = chain.filter(|chain| chain.layers().len() > 1) {
        for (index, layer) in chain.layers().iter().enumerate() {
            let held = layer.manifest().pages_held;
            println!("layer {index:<4} {} {:>9.1} MiB  {}", short(&layer.id().to_string()), mib(held), layer.object());
        }
    }
    let held = map.held();
    println!("held       {} pages, {:.1} MiB, {} runs", held.len(), mib(held.len()), held.runs().count());
    println!("zero       {} pages recorded as zero", map.zero().len());
    println!("digests    vmstate {} pages {}", short_of(&manifest.digests.vmstate), short_of(&manifest.digests.pages));
    if let Some(content) = content {
        println!("content    {content}");
    }
    println!("sections");
    for info in snapshot.sections() {
        println!(
            "           {:<8} {:>2}  version {}  {:>6} bytes",
            format!("{:?}", info.kind),
            info.instance,
            info.version,
            info.len()
        );
    }
    println!("memory     (each cell {} KiB: blank no page held, ░▒▓█ more)", cell_pages(snapshot) * PAGE_SIZE / 1024);
    for range in manifest.layout.extents() {
        draw(map, range, cell_pages(snapshot));
    }
}

const COLUMNS: u64 = 64;
const ROWS: u64 = 16;

/// Pages per cell so that the drawing has at most about 16 rows.
fn cell_pages(snapshot: &Snapshot) -> u64 {
    snapshot.layout().pages().div_ceil(COLUMNS * ROWS).next_power_of_two()
}

/// One line per row of cells: how much of each cell the layer holds.
fn draw(map: &PageMap, range: Extent, cell: u64) {
    let mut at = range.first.0;
    while at < range.end().0 {
        let row_end = (at + COLUMNS * cell).min(range.end().0);
        let mut row = String::new();
        let mut first = at;
        while first < row_end {
            let pages = cell.min(row_end - first);
            let held = map.held().len_in(Extent { first: Gfn(first), pages });
            let shades = [' ', '░', '▒', '▓', '█'];
            row.push(shades[(held * 4).div_ceil(pages) as usize]);
            first += pages;
        }
        println!("{:#13x} |{row}|", Gfn(at).gpa());
        at = row_end;
    }
}

fn short(id: &str) -> &str {
    &id[..id.len().min(16)]
}

fn short_of(digest: &impl ToString) -> String {
    short(&digest.to_string()).to_string()
}
