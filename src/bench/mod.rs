//! `tvmm bench` and `tvmm calibrate`: the costs of restores and hosts, measured side by side.
//!
//! Owns: experiments and their report, the page-fault handler that a measured VMM needs, the costs of a host, and
//! waiting for child processes.
//! Must not know: the machine. Each measured VM is a fresh process, driven over its API socket; rivals are interleaved.
//! Start reading: `study/mod.rs`, `study/flow.rs` (the compared ways), `restore.rs` (the time slices of one restore).

mod cache;
pub(crate) mod calibrate;
pub(crate) mod child;
mod commands;
mod crossover;
mod error;
mod grid;
pub(crate) mod guest;
pub mod host_costs;
mod load;
pub(crate) mod markup;
pub mod page_fault_handler;
mod report;
mod restore;
mod scratch;
mod study;
mod trace;
mod trial;

pub use error::Error;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Restore a snapshot repeatedly, policies interleaved, and show the time of each slice
    Restore(restore::RestoreBenchArgs),
    /// Compare policies over a grid of working sets: size, share written, dense or scattered, cached or not
    Grid(grid::GridArgs),
    /// Measure functions over every policy, in the experiments of the papers, and draw the results
    Run(study::RunArgs),
    /// Ask many VMs at once: restored for the request, standing by, or rewound
    Burst(study::BurstArgs),
    /// Replay or simulate an arrival trace by policies for VMs between requests: latency and memory of each
    Trace(trace::TraceArgs),
    /// Compare copying the read set to local memory with reading it in place, by the number of reads per page
    Crossover(crossover::CrossoverArgs),
    /// Draw results again
    Report(report::ReportArgs),
    /// Compare two results
    Diff(report::DiffArgs),
}

pub fn run(args: &BenchArgs) -> Result<ExitCode, BoxError> {
    match &args.command {
        BenchCommand::Restore(args) => restore::run(args),
        BenchCommand::Grid(args) => grid::run(args),
        BenchCommand::Run(args) => study::run(args),
        BenchCommand::Burst(args) => study::run_burst(args),
        BenchCommand::Trace(args) => trace::run(args),
        BenchCommand::Crossover(args) => crossover::run(args),
        BenchCommand::Report(args) => report::run(args),
        BenchCommand::Diff(args) => report::run_diff(args),
    }
}
