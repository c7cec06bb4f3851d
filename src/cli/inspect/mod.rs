//! `tvmm inspect`: shows and draws a snapshot, and verifies the snapshot, its parents and the files derived from it.

mod derived;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use self::derived::{Derived, State, with_causes};
use super::identify::InputPath;
use super::merge::bytes_bar;
use crate::snapshot::{
    BadChunk, Chain, Extent, Gfn, Location, PAGE_SIZE, PageMap, SectionInfo, Snapshot, TrustedKeys, VerifyReport,
    page_digest,
};
use crate::sys::errors::{BoxError, refuse};

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The snapshot directory, or with --mem-file the state file of Firecracker's two
    #[arg(value_name = "DIR")]
    snapshot: PathBuf,
    /// The memory file of the two-file form
    #[arg(long, value_name = "FILE")]
    mem_file: Option<PathBuf>,
    /// First compare all of the snapshot and its parents with their signatures by this public key; repeatable: by one
    /// of the keys
    #[arg(long, value_name = "KEYFILE")]
    trust: Vec<PathBuf>,
    /// Print JSON
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
    if !args.trust.is_empty() {
        Chain::open_signed(&location, &TrustedKeys::read(&args.trust)?)?;
    }
    // The snapshot is opened first: it can be described even if its parents cannot be opened.
    let snapshot = Snapshot::open(&location)?;
    let map = snapshot.page_map()?;
    let chain = Chain::open(&location);
    let layers = match &chain {
        Ok(chain) => chain.layers().iter().map(verify).collect::<Vec<_>>(),
        Err(_) => vec![verify(&snapshot)],
    };
    let derived = derived::check_all(&snapshot)?;
    let mut damage: Vec<String> = layers.iter().filter_map(Layer::damage).collect();
    let content = match &chain {
        Ok(chain) if damage.is_empty() => Some(page_digest(chain)?.to_string()),
        _ => None,
    };
    damage.extend(missing_drives(&snapshot));
    damage.extend(derived.iter().filter_map(|file| match &file.state {
        State::Damaged(told) => Some(told.clone()),
        State::Intact(_) | State::Unused(_) => None,
    }));
    let is_signed = !args.trust.is_empty();
    let told =
        Findings { snapshot: &snapshot, map, layers: &layers, derived: &derived, damage: &damage, content, is_signed };
    if args.json {
        out!("{:#}", told.to_json(chain.is_ok()));
    } else {
        told.print();
    }
    chain?;
    match damage.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        [only] => refuse(only.clone()),
        [first, others @ ..] => refuse(format!("{first} (and {} more, listed above)", others.len())),
    }
}

/// A layer of the chain, read whole.
struct Layer<'a> {
    snapshot: &'a Snapshot,
    verified: crate::snapshot::Result<VerifyReport>,
}

/// Compares a layer with its checksums.
fn verify(snapshot: &Snapshot) -> Layer<'_> {
    let bar = bytes_bar("verifying");
    let verified = snapshot.verify(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Layer { snapshot, verified }
}

impl Layer<'_> {
    /// Describes its damage, if it has any.
    fn damage(&self) -> Option<String> {
        let verified = match &self.verified {
            Ok(verified) => verified,
            Err(error) => return Some(with_causes(error)),
        };
        let Some(bad) = verified.bad.first() else {
            return verified.clone().into_result(self.snapshot.object()).err().map(|error| with_causes(&error));
        };
        Some(format!(
            "{} is damaged: {} of {} chunks of its memory are not what was written, the first at guest-physical {:#x} \
             (+{} bytes)",
            self.snapshot.object(),
            verified.bad_chunks,
            verified.chunks,
            bad.extent.gpa(),
            bad.extent.bytes()
        ))
    }

    fn to_json(&self) -> Value {
        let stray = |run: &Extent| json!({ "gpa": run.gpa(), "bytes": run.bytes() });
        let bad = |bad: &BadChunk| {
            json!({
                "gpa": bad.extent.gpa(),
                "bytes": bad.extent.bytes(),
                "stored": format!("{:#010x}", bad.stored),
                "computed": format!("{:#010x}", bad.computed),
            })
        };
        let verified = self.verified.as_ref().ok();
        json!({
            "id": self.snapshot.id(),
            "path": self.snapshot.object(),
            "chunks_verified": verified.map(|verified| verified.chunks),
            "chunks_bad": verified.map(|verified| verified.bad_chunks),
            "bad": verified.map(|verified| verified.bad.iter().map(bad).collect::<Vec<_>>()),
            "stray_pages": verified.map(|verified| verified.stray_pages),
            "strays": verified.map(|verified| verified.strays.iter().map(stray).collect::<Vec<_>>()),
        })
    }
}

/// Copies of drives that are missing or cut. Their bytes have no checksums.
fn missing_drives(snapshot: &Snapshot) -> Vec<String> {
    let drives = snapshot.manifest().drives.iter();
    drives
        .filter_map(|drive| snapshot.open_drive_copy(&drive.drive_id).err())
        .map(|error| with_causes(&error))
        .collect()
}

/// The facts printed about a snapshot.
struct Findings<'a> {
    snapshot: &'a Snapshot,
    map: &'a PageMap,
    /// The whole chain, base first, or the snapshot alone if its parents cannot be opened.
    layers: &'a [Layer<'a>],
    derived: &'a [Derived],
    damage: &'a [String],
    content: Option<String>,
    /// One of the trusted keys has signed every layer.
    is_signed: bool,
}

impl Findings<'_> {
    fn to_json(&self, is_whole: bool) -> Value {
        let section = |info: &SectionInfo| {
            json!({ "kind": format!("{:?}", info.kind),
        "instance": info.instance, "version": info.version, "bytes": info.len() })
        };
        let tip = self.layers.last().map(Layer::to_json).unwrap_or_default();
        json!({
            "manifest": self.snapshot.manifest(),
            "signed": self.is_signed.then_some(true),
            "sections": self.snapshot.sections().iter().map(section).collect::<Vec<_>>(),
            "layers": is_whole.then(|| self.layers.iter().map(Layer::to_json).collect::<Vec<_>>()),
            "memory": {
                "pages_held": self.map.held().len(),
                "pages_zero": self.map.zero().len(),
                "runs": self.map.held().runs().count(),
                "chunks_verified": tip["chunks_verified"],
                "chunks_bad": tip["chunks_bad"],
                "bad": tip["bad"],
                "stray_pages": tip["stray_pages"],
                "content_digest": self.content,
            },
            "derived": self.derived.iter().map(Derived::to_json).collect::<Vec<_>>(),
            "damage": self.damage,
        })
    }

    fn print(&self) {
        let snapshot = self.snapshot;
        let manifest = snapshot.manifest();
        let mib = |pages: u64| pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 20);
        out!("snapshot   {}", manifest.id);
        out!("kind       {:?}, format {}, written by tvmm {}", manifest.kind, manifest.format, manifest.tvmm_version);
        if self.is_signed {
            out!("signature  good, as are those of all parents");
        }
        out!("machine    {} vCPU, {} MiB", manifest.machine.vcpu_count, manifest.machine.mem_size_mib);
        let host = &manifest.host;
        out!("host       {} ({}), kernel {}", host.cpu_vendor, host.cpu_model, host.kernel_release);
        if self.layers.len() > 1 {
            for (index, Layer { snapshot: layer, .. }) in self.layers.iter().enumerate() {
                let held = layer.manifest().pages_held;
                out!("layer {index:<4} {} {:>9.1} MiB  {}", short(&layer.id().to_string()), mib(held), layer.object());
            }
        }
        let held = self.map.held();
        out!("held       {} pages, {:.1} MiB, {} runs", held.len(), mib(held.len()), held.runs().count());
        out!("zero       {} pages recorded as zero", self.map.zero().len());
        out!("digests    vmstate {} pages {}", short_of(&manifest.digests.vmstate), short_of(&manifest.digests.pages));
        if let Some(content) = &self.content {
            out!("content    {content}");
        }
        for drive in &manifest.drives {
            out!("drive      {}  {} bytes, without a checksum", drive.drive_id, drive.len);
        }
        self.derived.iter().for_each(|file| out!("{}", file.line()));
        self.damage.iter().for_each(|damage| out!("damage     {damage}"));
        self.print_sections();
        out!("memory     (each cell {} KiB: blank no page held, ░▒▓█ more)", cell_pages(snapshot) * PAGE_SIZE / 1024);
        for range in manifest.layout.extents() {
            draw(self.map, range, cell_pages(snapshot));
        }
    }

    fn print_sections(&self) {
        out!("sections");
        for info in self.snapshot.sections() {
            out!(
                "           {:<8} {:>2}  version {}  {:>6} bytes",
                format!("{:?}", info.kind),
                info.instance,
                info.version,
                info.len()
            );
        }
    }
}

const COLUMNS: u64 = 64;
const ROWS: u64 = 16;

/// Pages per cell so that the drawing has at most about 16 rows.
fn cell_pages(snapshot: &Snapshot) -> u64 {
    snapshot.layout().pages().div_ceil(COLUMNS * ROWS).next_power_of_two()
}

/// One line per row of cells: the share of each cell that the layer holds.
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
        out!("{:#13x} |{row}|", Gfn(at).gpa());
        at = row_end;
    }
}

fn short(id: &str) -> &str {
    &id[..id.len().min(16)]
}

fn short_of(digest: &impl ToString) -> String {
    short(&digest.to_string()).to_string()
}
