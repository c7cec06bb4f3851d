//! The contents of a pool: in numbers, and drawn.

use std::collections::HashMap;
use std::process::ExitCode;

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::usage::{self, Resident};
use crate::backends::pool_media::PoolMedium;
use crate::cli::units::mib_of_pages;
use crate::snapshot::PAGE_SIZE;
use crate::sys::errors::BoxError;
use crate::tiering::pool::catalogue::{Catalogue, Head};
use crate::tiering::pool::lease::{self, EXPIRY_S};
use crate::tiering::pool::lease_record::{Holder, Lease};
use crate::tiering::pool::{Medium, Space};

pub fn head_json(head: &Head) -> Value {
    let stats = &head.stats;
    json!({
        "snapshot": head.snapshot,
        "name": head.name,
        "added": head.added,
        "removed": head.retired,
        "guest_pages": stats.guest_pages,
        "nonzero_pages": stats.nonzero,
        "shared_pages": stats.shared,
        "stored_pages": stats.nonzero + stats.padding - stats.shared,
        "stored_again_pages": stats.again,
        "padding_pages": stats.padding,
        "runs": stats.runs,
        "runs_if_all_shared": stats.runs_if_all_shared,
        "huge_blocks": stats.huge_blocks,
    })
}

/// Pages that were shared, pages that were not, and the reasons.
pub fn print_added(head: &Head) {
    let stats = &head.stats;
    out!("snapshot   {} as {}", head.snapshot, head.name);
    out!("not zero   {} pages, {:.1} MiB", stats.nonzero, mib_of_pages(stats.nonzero));
    out!("shared     {} pages, {:.1} MiB, were in the pool", stats.shared, mib_of_pages(stats.shared));
    let stored = stats.nonzero + stats.padding - stats.shared;
    out!("stored     {stored} pages, {:.1} MiB", mib_of_pages(stored));
    if stats.again > 0 {
        out!("           of which {} were in the pool too: sharing them would cost more mappings", stats.again);
    }
    if stats.padding > 0 {
        out!("           of which {} are zero, between others", stats.padding);
    }
    out!(
        "mappings   {} ({} if everything were shared), {} whole 2 MiB blocks",
        stats.runs,
        stats.runs_if_all_shared,
        stats.huge_blocks
    );
}

fn table(header: &[&str], rows: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `tvmm pool ls`.
pub fn list(medium: &PoolMedium, json: bool) -> Result<ExitCode, BoxError> {
    let catalogue = Catalogue::read(medium)?;
    if json {
        let heads: Vec<Value> = catalogue.heads.iter().map(head_json).collect();
        out!("{:#}", json!(heads));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = catalogue.heads.iter().map(|head| {
        let stats = &head.stats;
        let state = if head.retired { " (removed)" } else { "" };
        vec![
            format!("{}{state}", head.name),
            head.snapshot.to_string()[..16].to_string(),
            format!("{:.1}", mib_of_pages(stats.nonzero)),
            format!("{:.1}", mib_of_pages(stats.shared)),
            format!("{:.1}", mib_of_pages(stats.nonzero + stats.padding - stats.shared)),
            stats.runs.to_string(),
        ]
    });
    out!("{}", table(&["name", "snapshot", "MiB", "shared", "stored", "mappings"], rows.collect()));
    Ok(ExitCode::SUCCESS)
}

/// The use of the pool's pages.
struct Occupancy {
    /// Number of snapshots that have the page, by page of data.
    users: Vec<u16>,
}

impl Occupancy {
    fn of(catalogue: &Catalogue, medium: &PoolMedium) -> Result<Occupancy, BoxError> {
        let mut users = vec![0_u16; catalogue.geometry().pages() as usize];
        for head in &catalogue.heads {
            for run in catalogue.entry(medium, head)?.runs {
                let pages = &mut users[run.at as usize..(run.at + run.pages) as usize];
                pages.iter_mut().for_each(|count| *count = count.saturating_add(1));
            }
        }
        Ok(Occupancy { users })
    }

    fn used(&self) -> u64 {
        self.users.iter().filter(|users| **users > 0).count() as u64
    }

    fn shared(&self) -> u64 {
        self.users.iter().filter(|users| **users > 1).count() as u64
    }

    fn longest_free(&self) -> u64 {
        let mut space = Space::default();
        let mut at = 0;
        for run in self.users.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            if run[0] == 0 {
                space.release(at, run.len() as u64);
            }
            at += run.len() as u64;
        }
        space.runs().map(|(_, len)| len).max().unwrap_or(0)
    }

    /// The pool as rows of cells: the used share of each, and `+` if most of the used pages are shared.
    fn draw(&self) {
        let cell = (self.users.len() as u64).div_ceil(COLUMNS * ROWS).next_power_of_two() as usize;
        out!(
            "pages      (each cell {} KiB: blank free, ░ ▒ ▓ █ used by one snapshot, + used by several)",
            cell as u64 * PAGE_SIZE / 1024
        );
        for row in self.users.chunks(cell * COLUMNS as usize) {
            let cells: String = row.chunks(cell).map(symbol).collect();
            out!("           |{cells}|");
        }
    }
}

const COLUMNS: u64 = 64;
const ROWS: u64 = 16;

fn symbol(cell: &[u16]) -> char {
    let used = cell.iter().filter(|users| **users > 0).count();
    let shared = cell.iter().filter(|users| **users > 1).count();
    match (used * 4).div_ceil(cell.len().max(1)) {
        0 => ' ',
        _ if shared * 2 > used => '+',
        quarter => ['░', '▒', '▓', '█'][quarter.min(4) - 1],
    }
}

/// `tvmm pool show`.
pub fn show(medium: &PoolMedium, json: bool) -> Result<ExitCode, BoxError> {
    let catalogue = Catalogue::read(medium)?;
    let occupancy = Occupancy::of(&catalogue, medium)?;
    let names: HashMap<_, _> = catalogue.heads.iter().map(|head| (head.snapshot, head.name.clone())).collect();
    let vms = vms(medium, &catalogue)?;
    let me = Holder::of(medium)?;
    let facts = medium.facts();
    let pages = catalogue.geometry().pages();
    let used = occupancy.used();
    let shared = occupancy.shared();
    let nonzero: u64 = catalogue.heads.iter().map(|head| head.stats.nonzero).sum();
    if json {
        let vm = |(lease, resident): &(Lease, Option<Resident>)| {
            let [in_place, preloaded, zero, lazy] = lease.planned;
            json!({
                "pid": lease.holder.pid,
                "this_host": lease.holder.host == me.host,
                "snapshot": lease.snapshot,
                "planned_pages": { "in_place": in_place, "local": preloaded, "zero": zero, "lazy": lazy },
                "resident": resident,
            })
        };
        let json = json!({
            "pool": catalogue.superblock.id,
            "generation": catalogue.superblock.generation,
            "medium": { "kind": facts.kind, "bytes": medium.size(), "align": facts.align, "huge": facts.huge,
                "copy_on_write": facts.copy_on_write },
            "pages": pages,
            "used_pages": used,
            "shared_pages": shared,
            "longest_free_pages": occupancy.longest_free(),
            "nonzero_pages_of_all": nonzero,
            "snapshots": catalogue.heads.iter().map(head_json).collect::<Vec<_>>(),
            "vms": vms.iter().map(vm).collect::<Vec<_>>(),
        });
        out!("{json:#}");
        return Ok(ExitCode::SUCCESS);
    }
    out!("pool       {} on {}, state {}", catalogue.superblock.id, facts.kind, catalogue.superblock.generation);
    out!(
        "used       {:.1} of {:.1} MiB, {:.1} MiB by several snapshots",
        mib_of_pages(used),
        mib_of_pages(pages),
        mib_of_pages(shared)
    );
    out!("free       {:.1} MiB in a row at most", mib_of_pages(occupancy.longest_free()));
    if nonzero > 0 {
        let share = 100.0 * used as f64 / nonzero as f64;
        out!("sharing    {share:.0} % of the {:.1} MiB that its snapshots have", mib_of_pages(nonzero));
    }
    occupancy.draw();
    print_vms(&vms, &names);
    Ok(ExitCode::SUCCESS)
}

/// The holders of leases, and the memory of those on this host.
fn vms(medium: &PoolMedium, catalogue: &Catalogue) -> Result<Vec<(Lease, Option<Resident>)>, BoxError> {
    let metadata = medium.file().metadata()?;
    let me = Holder::of(medium)?;
    let usage =
        |lease: &Lease| if lease.holder.host == me.host { usage::of(lease.holder.pid, &metadata) } else { None };
    let leases = lease::live(medium, EXPIRY_S)?;
    let named = |lease: Lease| {
        let head = catalogue.heads.iter().find(|head| lease.is_of(head.entry.digest));
        Lease { snapshot: head.map_or(lease.snapshot, |head| head.snapshot), ..lease }
    };
    Ok(leases.into_iter().map(|(_, lease)| (named(lease), usage(&lease))).collect())
}

fn print_vms(vms: &[(Lease, Option<Resident>)], names: &HashMap<crate::snapshot::SnapshotId, String>) {
    if vms.is_empty() {
        return out!("VMs        none");
    }
    out!("VMs        (MiB; planned: what their plan gave them; now: as the kernel counts)");
    let rows = vms.iter().map(|(lease, resident)| {
        let mut row = vec![
            lease.holder.pid.to_string(),
            names.get(&lease.snapshot).cloned().unwrap_or_else(|| lease.snapshot.to_string()),
        ];
        row.extend(lease.planned.map(|pages| format!("{:.1}", mib_of_pages(u64::from(pages)))));
        let now = |kib: fn(&Resident) -> u64| {
            resident.as_ref().map_or("another host".to_string(), |now| format!("{:.1}", kib(now) as f64 / 1024.0))
        };
        row.extend([now(|now| now.pool_kib), now(|now| now.local_kib)]);
        row
    });
    let header = ["pid", "snapshot", "in place", "local", "zero", "lazy", "in place now", "local now"];
    out!("{}", table(&header, rows.collect()));
}
