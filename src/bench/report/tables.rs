//! Results as tables.

use comfy_table::{CellAlignment, Table, presets};

use super::super::study::Experiment;
use super::super::study::stats::{axes, geomean, summary};
use super::super::study::store::Results;

/// A table: a header and rows of cells.
pub struct Cells {
    pub title: String,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A number that has a table.
struct Number {
    name: &'static str,
    title: &'static str,
}

/// The numbers of an experiment that have a table.
fn numbers(experiment: Experiment) -> &'static [Number] {
    match experiment {
        Experiment::E1 | Experiment::E2 | Experiment::E4 => &[Number { name: "answer_ms", title: "ms to the answer" }],
        Experiment::E3 => &[
            Number { name: "answer_ms", title: "ms to the answer, median" },
            Number { name: "answer_p95_ms", title: "ms to the answer, p95" },
        ],
        Experiment::E5 => &[
            Number { name: "by_read_pages", title: "pages brought in by reads" },
            Number { name: "by_write_pages", title: "pages brought in by writes" },
            Number { name: "preloaded_pages", title: "pages preloaded" },
            Number { name: "major_faults", title: "vCPU faults that waited for I/O" },
        ],
        Experiment::E6 => &[
            Number { name: "local_mib_per_vm", title: "local MiB per VM, page tables included" },
            Number { name: "all_mib", title: "MiB in all, shared pages once" },
        ],
        Experiment::Burst => &[
            Number { name: "answer_ms", title: "ms from the common start to the answer, p50 of the VMs" },
            Number { name: "answer_p95_ms", title: "ms to the answer, p95 of the VMs" },
            Number { name: "answer_max_ms", title: "ms to the answer, the last VM" },
            Number { name: "to_first_exit_ms", title: "ms from the request to a guest's first exit, p50 of the VMs" },
            Number { name: "load_before_cpus", title: "CPUs that other programs used just before" },
        ],
        Experiment::E7 => &[
            Number { name: "answer_ms", title: "ms to the answer" },
            Number { name: "local_dram_kib", title: "KiB of local memory" },
        ],
    }
}

/// The tables of an experiment.
pub fn tables(results: &Results, experiment: Experiment) -> Vec<Cells> {
    let mut all: Vec<Cells> = numbers(experiment).iter().map(|number| table(results, experiment, number)).collect();
    if experiment == Experiment::E1 {
        all.push(slices(results, experiment));
    }
    all
}

/// The tables as text.
pub fn text(results: &Results, experiment: Experiment) -> String {
    let drawn = tables(results, experiment).iter().map(drawn).collect::<Vec<_>>();
    drawn.join("\n\n")
}

/// A table as text.
pub fn drawn(cells: &Cells) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(&cells.header);
    for row in &cells.rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{}\n{table}", cells.title)
}

fn table(results: &Results, experiment: Experiment, number: &Number) -> Cells {
    let (cases, flows) = axes(results, experiment.name());
    let of = |case: &str, flow: &str| summary(results, experiment.name(), case, flow, number.name);
    let mut rows = Vec::new();
    for case in &cases {
        let cell = |flow: &String| of(case, flow).map_or("–".to_string(), |all| span(all.median, all.min, all.max));
        rows.push(std::iter::once(case.clone()).chain(flows.iter().map(cell)).collect());
    }
    if cases.len() > 1 {
        // Only cases that every flow has, so that all means are over the same cases.
        let whole: Vec<&String> =
            cases.iter().filter(|case| flows.iter().all(|flow| of(case, flow).is_some())).collect();
        let mean = |flow: &String| {
            let medians: Vec<f64> = whole.iter().filter_map(|case| Some(of(case, flow)?.median)).collect();
            let all_count = medians.iter().all(|median| *median > 0.0);
            geomean(&medians).filter(|_| all_count).map_or("–".to_string(), number_text)
        };
        let name = format!("geometric mean of {}", whole.len());
        rows.push(std::iter::once(name).chain(flows.iter().map(mean)).collect());
    }
    let rounds = results.samples.iter().map(|sample| sample.key.round + 1).max().unwrap_or_default();
    let title = format!("{}: median (least–most) of up to {rounds}", number.title);
    Cells { title, header: header(&flows), rows }
}

fn header(flows: &[String]) -> Vec<String> {
    std::iter::once(String::new()).chain(flows.iter().cloned()).collect()
}

/// The time slices of a restore, mean over the functions.
fn slices(results: &Results, experiment: Experiment) -> Cells {
    const SLICES: [&str; 16] = [
        "spawn_ms",
        "setup_ms",
        "state_load_ms",
        "map_ms",
        "preload_ms",
        "vm_create_ms",
        "resume_ms",
        "execute_ms",
        "guest_ms",
        "stop_ms",
        "rewind_ms",
        "fork_ms",
        "stood_still_ms",
        "repurpose_ms",
        "to_entry_ms",
        "to_first_exit_ms",
    ];
    let (cases, flows) = axes(results, experiment.name());
    let mut rows = Vec::new();
    for slice in SLICES {
        let mean = |flow: &String| {
            let medians: Vec<f64> = cases
                .iter()
                .filter_map(|case| Some(summary(results, experiment.name(), case, flow, slice)?.median))
                .collect();
            let count = medians.len();
            if count == 0 { "–".to_string() } else { number_text(medians.iter().sum::<f64>() / count as f64) }
        };
        rows.push(std::iter::once(slice.to_string()).chain(flows.iter().map(mean)).collect());
    }
    let title = "Where the time goes: means over the functions of each median; execute is from the first entry into \
                 the guest to the answer, guest what the guest measured itself; rewind, fork and repurpose come before \
                 the request, to_entry and to_first_exit count from it";
    Cells { title: title.to_string(), header: header(&flows), rows }
}

fn span(median: f64, min: f64, max: f64) -> String {
    if min == max {
        number_text(median)
    } else {
        format!("{} ({}–{})", number_text(median), number_text(min), number_text(max))
    }
}

/// Three significant digits.
pub fn number_text(number: f64) -> String {
    match number {
        number if number == number.round() && number.abs() < 1e9 => format!("{number:.0}"),
        number if number.abs() >= 100.0 => format!("{number:.0}"),
        number if number.abs() >= 10.0 => format!("{number:.1}"),
        number => format!("{number:.2}"),
    }
}
