//! `tvmm calibrate`: measures the costs of memory operations on this host. The host's own side is measured in this
//! process; the cost of a guest's touches is read from the built-in guest, restored again and again from its own
//! snapshot.

mod guest_pages;
mod restores;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use guest_pages::{PAGES, guest_us, per};
use restores::{Engine, Trial};

use super::guest;
use super::guest::Guest;
use super::scratch::Scratch;
use crate::bench::host_costs;
use crate::snapshot::HUGE_PAGE_PAGES;
use crate::sys::api_client::Client;
use crate::sys::errors::{BoxError, refuse};
use crate::tiering::costs::Costs;

#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// File for the numbers; default: the one that `tvmm plan` and `tvmm restore` read
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// A directory on the device that snapshots are on; default: that of --out
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Number of measurements of each value; the median counts
    #[arg(long, default_value_t = 7, value_name = "N")]
    rounds: usize,
}

pub fn run(args: &CalibrateArgs) -> Result<ExitCode, BoxError> {
    let Some(out) = args.out.clone().or_else(Costs::default_path) else {
        return refuse("Cannot choose a file for the numbers: neither XDG_CACHE_HOME nor HOME is set. Give --out FILE");
    };
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|error| format!("Cannot make {}: {error}", parent.display()))?;
    let dir = args.dir.as_deref().unwrap_or(parent);
    let mut costs = Costs::default();
    let mut left = host_costs::host(&mut costs, dir, args.rounds)?;
    let scratch = Scratch::make(dir.join(format!("tvmm-calibrate-{}.d", std::process::id())))?;
    if let Err(error) = measure_guest(&mut costs, scratch.path(), args.rounds) {
        left.push(("what only a guest can tell", error.to_string()));
    }
    let implausible = costs.make_plausible();
    costs.save(&out)?;
    out!("{}", table(&costs));
    left.iter().for_each(|(name, why)| say!("not measured: {name}: {why}"));
    for (name, measured, bound) in implausible {
        say!("not plausible: {name} was measured as {measured} ns; {bound} ns is used");
    }
    out!("{}: {}", out.display(), costs.source());
    Ok(ExitCode::SUCCESS)
}

/// Numbers measured by the guest's own clock.
const FROM_GUEST: [&str; 8] = [
    "anon_write_fault_ns",
    "populated_touch_ns",
    "populated_alone_ns",
    "huge_fault_ns",
    "file_read_fault_ns",
    "cow_fault_ns",
    "cow_split_fault_ns",
    "uffd_fault_ns",
];

fn table(costs: &Costs) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["cost", "ns", "from"]);
    for (name, ns) in costs.fields() {
        let from = if !costs.is_measured(name) {
            "built-in"
        } else if FROM_GUEST.contains(&name) {
            "a guest"
        } else {
            "the host"
        };
        table.add_row([name.to_string(), ns.to_string(), from.to_string()]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Pages that the guest touches while a page-fault handler serves them.
const UFFD_PAGES: u64 = 256;

fn measure_guest(costs: &mut Costs, dir: &Path, rounds: usize) -> Result<(), BoxError> {
    let exe = std::env::current_exe()?;
    let sealed = dir.join("snapshot");
    let fill_us = snapshot(&exe, dir, &sealed)?;
    costs.set_measured("anon_write_fault_ns", per(fill_us, PAGES));
    // A copy lies in small folios, like any file that was just written.
    let copy = dir.join("copy");
    std::fs::create_dir(&copy)?;
    for name in ["manifest.json", "vmstate", "pages", "memory"] {
        std::fs::copy(sealed.join(name), copy.join(name))?;
    }
    let trial = |snapshot, policy, function: &str| Trial::by_policy(&exe, snapshot, policy, function.to_string(), dir);
    let blocks = PAGES / HUGE_PAGE_PAGES;
    let all = format!("touch pages={PAGES}");
    let each_block = format!("touch pages={blocks} stride={HUGE_PAGE_PAGES}");
    // The time of one touched page is part of every function: its other accesses fault too.
    let mut one = trial(&sealed, "firecracker", "touch pages=1");
    let mut one_lazy = trial(&sealed, "firecracker-uffd", "touch pages=1");
    let mut huge = trial(&sealed, "firecracker", &each_block);
    let mut split = trial(&sealed, "firecracker", &format!("{each_block} write=100"));
    let mut read = trial(&copy, "firecracker", &all);
    let mut cow = trial(&copy, "firecracker", &format!("{all} write=100"));
    let mut lazy = trial(&sealed, "firecracker-uffd", &format!("touch pages={UFFD_PAGES} stride=31"));
    let mut engine = Engine::new(&exe, &sealed, dir)?;
    // The first round is extra: it makes the derived files. Each round runs all trials, because load on the host comes
    // and goes.
    for round in 0..=rounds.max(1) {
        let policies = [&mut one, &mut one_lazy, &mut huge, &mut split, &mut read, &mut cow, &mut lazy];
        policies.into_iter().try_for_each(Trial::run)?;
        engine.run()?;
        if round == 0 {
            for trial in [&mut one, &mut one_lazy, &mut huge, &mut split, &mut read, &mut cow, &mut lazy] {
                trial.forget();
            }
            engine.forget();
        }
    }
    let one_us = one.guest();
    costs.set_measured("huge_fault_ns", per(huge.guest() - one_us, blocks - 1));
    costs.set_measured("file_read_fault_ns", per(read.guest() - one_us, PAGES));
    costs.set_measured("cow_fault_ns", per(cow.guest() - one_us, PAGES));
    costs.set_measured("cow_split_fault_ns", per(split.guest() - one_us, blocks - 1));
    costs.set_measured("uffd_fault_ns", per(lazy.guest() - one_lazy.guest(), UFFD_PAGES - 1));
    engine.note(costs, one_us);
    Ok(())
}

/// Boots a guest, lets it fill its pages, and snapshots it. Returns how long the guest took to fill them, in µs.
fn snapshot(exe: &Path, dir: &Path, out: &Path) -> Result<f64, BoxError> {
    let config = dir.join("vm.json");
    let socket = dir.join("api.sock");
    let machine = serde_json::json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 } });
    std::fs::write(&config, machine.to_string())?;
    let mut vm = Guest::boot(exe, &config, &socket)?;
    let answered = vm.call(&format!("fill pages={PAGES}"))?;
    guest::snapshot(&Client::new(&socket), &serde_json::json!({ "snapshot_path": out }))?;
    guest_us(&format!("ok fill {}", answered.rest))
}
