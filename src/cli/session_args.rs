//! The arguments that boot and restore share.

use std::path::PathBuf;

use clap::Args;

use super::jail_args::JailArgs;
use super::seccomp_args::SeccompArgs;
use crate::config::request::DEFAULT_FAULT_TIMEOUT;

/// The API, the request, the report and the limits of one VM.
#[derive(Debug, Args)]
pub struct SessionArgs {
    /// Serve Firecracker's HTTP API on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Serve the API on this inherited descriptor, a connected Unix socket; the VM ends when its other end closes
    #[arg(long, value_name = "FD", conflicts_with = "api_sock")]
    pub api_fd: Option<i32>,
    /// Run in a session of its own (setsid): the end of the terminal, and keys pressed there, do not reach the VM
    #[arg(long)]
    pub own_session: bool,
    /// Restore and run when standard input says so, and end if it ends before: a child of a fork
    #[arg(long, hide = true)]
    pub await_parent: bool,
    /// Name of this instance in answers of the API
    #[arg(long, default_value = "anonymous-instance", value_name = "ID")]
    pub id: String,
    /// Run one function of the guest (`name key=value…`), print its answer, and exit
    #[arg(long, value_name = "FUNCTION")]
    pub run: Option<String>,
    /// Make the request of --run on this vsock port of the guest, instead of on its serial line
    #[arg(long, requires = "run", value_name = "PORT")]
    pub run_port: Option<u32>,
    /// Time limit for the answer to --run, s
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    pub run_timeout: u64,
    /// Longest wait of a restore, or of a restored guest, for a page (a source that hangs or drips, a page-fault
    /// handler that does not answer) before the VM is ended, s
    #[arg(long, default_value_t = DEFAULT_FAULT_TIMEOUT.as_secs(), value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub fault_timeout: u64,
    /// Write the time slices and the VM's memory costs to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Write the time slices in Chrome's trace format (chrome://tracing, Perfetto)
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Send the time slices to this OpenTelemetry collector (OTLP over HTTP) at the end, http://HOST:4318; in builds
    /// with the feature otel
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
    /// Time of the process's spawn, in µs of CLOCK_MONOTONIC; default: the CPU time since the fork counts instead
    #[arg(long, value_name = "US")]
    pub start_time_us: Option<u64>,
    #[command(flatten)]
    pub jail: JailArgs,
    #[command(flatten)]
    pub seccomp: SeccompArgs,
}
