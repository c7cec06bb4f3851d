//! The settings of the service, from its command line.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::restore::RestoreOptions;
use crate::snapshot::ColdSpec;
use crate::sys::tls::TlsFiles;
use crate::tiering::idle::IdleSpec;

/// Limits of the service.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Concurrent VMs.
    pub max_vms: usize,
    /// Guest memory of all of them together, MiB.
    pub memory_mib: u64,
    /// Memory of the host that VMs which stand by leave free, MiB.
    pub memory_reserve_mib: u64,
    /// Concurrent invocations and starts of VMs.
    pub max_running: usize,
    /// Invocations waiting for their turn.
    pub max_queue: usize,
    /// Open connections.
    pub max_connections: usize,
    /// Time limit of an invocation that sets none.
    pub timeout: Duration,
    /// Idle time after which a VM left by an invocation is ended, unless its function or `idle` names another.
    pub idle_timeout: Duration,
    /// The fate of idle VMs whose functions name none.
    pub idle: Option<IdleSpec>,
    /// Disk space of suspended VMs, MiB.
    pub suspend_disk_mib: u64,
    /// Space of the files that idle VMs are spilled to, MiB.
    pub spill_disk_mib: u64,
    /// Bytes that a guest may write before its answer.
    pub max_output_bytes: u64,
    /// VM processes kept ready.
    pub shells: usize,
    /// Time for running invocations to end when the service is stopped.
    pub grace: Duration,
}

/// The processes of VMs that have finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// They may serve VMs of other functions.
    Allowed,
    /// They end.
    Never,
}

/// The clients that may read metrics over TCP without a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricsAccess {
    /// Those on this host.
    Local,
    /// All.
    Open,
}

/// The access of clients.
#[derive(Clone, Debug)]
pub struct AccessOptions {
    /// The files of TLS on the TCP address; None: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// The file of the tokens that TCP clients need; None: they need none.
    pub tokens: Option<PathBuf>,
    /// The use of metrics without a token.
    pub metrics: MetricsAccess,
    /// Origins of other sites whose pages may use the service.
    pub cors_origins: Vec<String>,
    /// The file that each request is recorded in.
    pub audit_log: Option<PathBuf>,
}

/// The settings of the service.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory for the state.
    pub dir: PathBuf,
    /// Directory for the files that idle VMs are spilled to; None: that of the state.
    pub spill_dir: Option<PathBuf>,
    /// A TCP address to listen on.
    pub listen: Option<SocketAddr>,
    /// A Unix socket to listen on.
    pub listen_unix: Option<PathBuf>,
    /// The access of clients.
    pub access: AccessOptions,
    /// Limits.
    pub limits: Limits,
    /// The use of finished VMs' processes.
    pub reuse: Reuse,
    /// Arguments of every process that runs a VM.
    pub vm_args: Vec<OsString>,
    /// Default options of restores.
    pub load: RestoreOptions,
    /// File for all traces, in Chrome's trace format.
    pub trace: Option<PathBuf>,
    /// OpenTelemetry collector for all traces, `http://HOST:PORT`.
    pub otlp: Option<String>,
    /// Names other than those of loopback by which clients call the service, and that identify its own pages.
    pub hosts: Vec<String>,
    /// Directories and files of the host that clients may name, in addition to those of `dir` and `load`.
    pub allow_paths: Vec<PathBuf>,
    /// Cold pools of other hosts that clients may name, in addition to those of `load`.
    pub allow_cold: Vec<ColdSpec>,
}
