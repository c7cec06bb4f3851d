//! `tvmm serve`: arguments of the service.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::failure::ArgumentConflict;
use super::seccomp_args::SeccompArgs;
use crate::backends::cold;
use crate::config::restore::RestoreOptions;
use crate::serve::{self, AccessOptions, Limits, MetricsAccess, Options, Reuse};
use crate::snapshot::{ColdSpec, NoColdPool, TrustedKeys};
use crate::sys::available_memory::available_memory;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::print;
use crate::sys::tls::TlsFiles;
use crate::tiering::idle::{IdlePolicy, IdleSpec};

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Print the OpenAPI document of the service, and exit
    #[arg(long, exclusive = true)]
    openapi: bool,
    /// Directory for functions, snapshots and profiles; made if it does not exist
    #[arg(long, value_name = "DIR", required_unless_present = "openapi")]
    dir: Option<PathBuf>,
    /// Listen on this TCP address; one that other hosts can reach needs --tokens or --tls-client-ca
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Listen on this Unix socket, which only this user can connect to
    #[arg(long, value_name = "PATH")]
    listen_unix: Option<PathBuf>,
    /// Limit on concurrent VMs
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = at_least_one)]
    max_vms: usize,
    /// Limit on the guest memory of all VMs together, MiB; a start beyond it is refused [default: four fifths of the
    /// free memory of the host, or of this process's control group]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    memory: Option<u64>,
    /// Let clients name files in this directory, or this file (kernels, images, pools, caches, plans); repeatable.
    /// Paths in --dir, and those of --pool, --cold and --cold-cache, are always allowed
    #[arg(long, value_name = "PATH")]
    allow_path: Vec<PathBuf>,
    /// Let clients restore from this cold pool of other hosts, or from those below this URL; repeatable. The pools of
    /// --cold are always allowed
    #[arg(long, value_name = "ADDRESS", value_parser = cold_name)]
    allow_cold: Vec<ColdSpec>,
    /// Answer TCP clients that call the service by this name, and pages of this site, besides loopback names and the
    /// address that a client connects to; repeatable
    #[arg(long, value_name = "NAME", value_parser = host_name)]
    host: Vec<String>,
    /// Speak TLS 1.3 on the TCP address with this certificate (PEM, with those between it and a root), in builds with
    /// the feature tls; SIGHUP has it read again
    #[arg(long, value_name = "FILE", requires_all = ["tls_key", "listen"])]
    tls_cert: Option<PathBuf>,
    /// The private key of the certificate (PEM, mode 0600)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Answer TCP clients only if they have a certificate that one of these roots has signed (PEM). Without --tokens,
    /// such a client has all rights
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Answer TCP clients only if they send a token of this file, which `tvmm token new` makes (docs/serve.md). Its
    /// mode must be 0600; SIGHUP has it read again
    #[arg(long, value_name = "FILE", requires = "listen")]
    tokens: Option<PathBuf>,
    /// Give /metrics to all TCP clients; default: to those on this host, and those with a token
    #[arg(long, requires = "tokens")]
    open_metrics: bool,
    /// Let pages of this site, https://HOST[:PORT], send requests through a browser and read the answers; repeatable
    #[arg(long, value_name = "ORIGIN", value_parser = origin, requires = "listen")]
    cors_origin: Vec<String>,
    /// Append a line for each request to this file: time, client, path, status (docs/serve.md). SIGHUP has it opened
    /// again
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// Memory of the host that is left free by VMs that stand by, MiB: with less of it, a quarter of them ends each
    /// second, and no more are restored; default: a twentieth of the free memory
    #[arg(long, value_name = "MIB")]
    memory_reserve: Option<u64>,
    /// Limit on concurrent invocations; default: twice the host's CPUs
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    max_running: Option<usize>,
    /// Limit on invocations waiting for their turn; more are answered 429
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_queue: usize,
    /// Limit on open connections; more are answered 429
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = at_least_one)]
    max_connections: usize,
    /// Time limit of an invocation that names none, s
    #[arg(long, default_value_t = 60, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Idle time after which a VM left by an invocation is ended, s
    #[arg(long, default_value_t = 60, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    idle_timeout: u64,
    /// The fate of VMs that wait for requests, of functions that name none: `keep` ends them after --idle-timeout,
    /// `end` with their answer; `suspend` saves them after --idle-timeout, `ladder` step by step, and a request wakes
    /// them; `faasmem` offloads them bit by bit, and ends them after 600 s. An invocation then takes an idle VM of its
    /// function. Default: as `keep`, and only requests by a VM's id reach it
    #[arg(long, value_name = "POLICY")]
    idle: Option<IdlePolicy>,
    /// Disk space for suspended VMs, MiB: those used longest ago end for others
    #[arg(long, default_value_t = 4096, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=1 << 40))]
    suspend_disk: u64,
    /// Directory for the files that idle VMs are spilled to, compressed; a tmpfs keeps them in memory. They have no
    /// names, and end with their VMs. Default: --dir
    #[arg(long, value_name = "DIR")]
    spill_dir: Option<PathBuf>,
    /// Space for these files, MiB: VMs beyond it are not spilled
    #[arg(long, default_value_t = 4096, value_name = "MIB", value_parser = clap::value_parser!(u64).range(0..=1 << 40))]
    spill_disk: u64,
    /// Limit on the output of a guest before its answer, KiB
    #[arg(long, default_value_t = 4096, value_name = "KIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    max_output: u64,
    /// VM processes kept ready, so that a restore does not wait for a process to start
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = at_most_many)]
    shells: usize,
    /// End the process of each VM that has finished. Default: it may become a VM of another function, whose machine has
    /// the same shape
    #[arg(long)]
    no_repurpose: bool,
    /// Time for running invocations to end when the service is stopped, s
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    grace: u64,
    /// Restore only snapshots that the owner of this public key has signed, and their parents (`tvmm snapshot sign`;
    /// docs/signatures.md); repeatable: one of the keys. Suspended and forked VMs are the service's own
    #[arg(long, value_name = "KEYFILE")]
    trust: Vec<PathBuf>,
    /// Restore from this pool instead of the snapshots' files, unless an invocation says otherwise; several: from the
    /// first that has the snapshot
    #[arg(long, value_name = "POOL")]
    pool: Vec<PathBuf>,
    /// Restore from a cold pool, unless an invocation says otherwise (see `tvmm restore --help`); repeatable, nearest
    /// first
    #[arg(long, value_name = "POOL", value_parser = cold_name)]
    cold: Vec<ColdSpec>,
    /// Keep chunks that come from other hosts in this directory
    #[arg(long, value_name = "DIR")]
    cold_cache: Option<PathBuf>,
    /// Limit on the size of that directory, MiB; chunks used longest ago go first [default: 1024]
    #[arg(long, value_name = "MIB")]
    cold_cache_size: Option<u64>,
    /// Local memory for preloaded pages and pages that the guest will write, MiB, unless function or invocation names
    /// it
    #[arg(long, value_name = "MIB")]
    dram: Option<u64>,
    /// Latency to trade for memory: additional µs per request that saving 1 MiB of preloaded local memory is worth;
    /// only `tiered` weighs it
    #[arg(long, value_name = "US")]
    dram_price: Option<u64>,
    /// Memory in the CXL tier, MiB
    #[arg(long, value_name = "MIB")]
    cxl: Option<u64>,
    /// Write all traces to this file in Chrome's trace format (chrome://tracing, Perfetto)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Send all traces to this OpenTelemetry collector (OTLP over HTTP), http://HOST:4318; in builds with the feature
    /// otel
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    #[command(flatten)]
    seccomp: SeccompArgs,
}

/// Upper bound for counts: more would be idle processes, or numbers beyond any use.
const MANY: usize = 65_536;

fn at_most_many(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number <= MANY).ok_or_else(|| format!("a number from 0 to {MANY} is needed"))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    at_most_many(text).ok().filter(|&number| number > 0).ok_or_else(|| format!("a number from 1 to {MANY} is needed"))
}

/// Parses the name of a cold pool that this build can restore from.
fn cold_name(text: &str) -> Result<ColdSpec, String> {
    let spec: ColdSpec = text.parse().map_err(|error: NoColdPool| error.problem)?;
    cold::check_reachable(&spec)?;
    Ok(spec)
}

/// A host's name or address, without a port.
fn host_name(text: &str) -> Result<String, String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    let is_bracketed = text.starts_with('[') && text.ends_with(']');
    let has_port = text.contains(':') && !is_bracketed;
    if !text.is_empty() && text.chars().all(is_name) && !has_port {
        Ok(text.to_string())
    } else {
        Err("it is no name like tvmm.example and no address like 192.0.2.1 or [2001:db8::1]; leave the port out".into())
    }
}

/// A site as browsers name it in `Origin`.
fn origin(text: &str) -> Result<String, String> {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or_default();
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._:[]".contains(c);
    if !host.is_empty() && host.chars().all(is_name) {
        Ok(text.to_string())
    } else {
        Err("it is no origin like https://app.example or http://app.example:8080, in lower case and without a path"
            .into())
    }
}

/// Refuses to listen where other hosts can connect, unless clients need a token or a certificate there.
fn check_listen(args: &ServeArgs) -> Result<(), BoxError> {
    let has_login = args.tokens.is_some() || args.tls_client_ca.is_some();
    match args.listen {
        Some(address) if !address.ip().to_canonical().is_loopback() && !has_login => refuse(format!(
            "Cannot listen on {address}: other hosts could connect, and run and delete everything. Give --tokens FILE \
             (`tvmm token new` makes tokens) or --tls-client-ca FILE, or listen on 127.0.0.1:{} or a Unix socket",
            address.port()
        )),
        _ => Ok(()),
    }
}

/// The access of clients in the arguments.
fn access_options(args: &ServeArgs) -> AccessOptions {
    let files = |(cert, key): (&PathBuf, &PathBuf)| TlsFiles {
        cert: cert.clone(),
        key: key.clone(),
        client_ca: args.tls_client_ca.clone(),
    };
    AccessOptions {
        tls: args.tls_cert.as_ref().zip(args.tls_key.as_ref()).map(files),
        tokens: args.tokens.clone(),
        metrics: if args.open_metrics { MetricsAccess::Open } else { MetricsAccess::Local },
        cors_origins: args.cors_origin.clone(),
        audit_log: args.audit_log.clone(),
    }
}

/// The restore options in the arguments.
fn load_options(args: &ServeArgs) -> Result<RestoreOptions, BoxError> {
    // A service that cannot restore anything does not start.
    TrustedKeys::read(&args.trust)?;
    let trusted_keys = args.trust.iter().map(std::path::absolute).collect::<Result<Vec<_>, _>>()?;
    Ok(RestoreOptions {
        pools: Some(args.pool.clone()).filter(|pools| !pools.is_empty()),
        cold_pools: Some(args.cold.clone()).filter(|pools| !pools.is_empty()),
        cold_cache: args.cold_cache.clone(),
        cold_cache_mib: args.cold_cache_size,
        dram_mib: args.dram,
        cxl_mib: args.cxl,
        dram_price: args.dram_price,
        trusted_keys: Some(trusted_keys).filter(|keys| !keys.is_empty()),
        ..RestoreOptions::default()
    })
}

/// The free memory, MiB.
fn free_memory_mib() -> Result<u64, BoxError> {
    match available_memory() {
        Ok(bytes) => Ok(bytes >> 20),
        Err(error) => refuse(format!(
            "Cannot find how much memory the host has left: {error}. Give --memory MIB and --memory-reserve MIB"
        )),
    }
}

pub fn run(args: &ServeArgs) -> Result<ExitCode, BoxError> {
    if args.openapi {
        print::write(format_args!("{}", serve::openapi()));
        return Ok(ExitCode::SUCCESS);
    }
    let Some(dir) = args.dir.clone() else { return refuse("Give --dir DIR: where state is kept") };
    if args.listen.is_none() && args.listen_unix.is_none() {
        return refuse("Nowhere to listen: give --listen ADDRESS:PORT, --listen-unix PATH, or both");
    }
    check_listen(args)?;
    let memory_mib = match args.memory {
        Some(mib) => mib,
        // The rest is for the daemon, its processes, and the page cache.
        None => (free_memory_mib()? / 5 * 4).max(1),
    };
    let memory_reserve_mib = match args.memory_reserve {
        Some(mib) => mib,
        None => free_memory_mib()? / 20,
    };
    let load = load_options(args)?;
    load.check().map_err(|invalid| ArgumentConflict { command: "serve", message: invalid.in_flags() })?;
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    serve::run(Options {
        dir,
        spill_dir: args.spill_dir.as_ref().map(std::path::absolute).transpose()?,
        listen: args.listen,
        listen_unix: args.listen_unix.clone(),
        trace: args.trace.clone(),
        load,
        vm_args: args.seccomp.for_vms()?,
        otlp: args.otlp.clone(),
        hosts: args.host.clone(),
        access: access_options(args),
        allow_paths: args.allow_path.clone(),
        allow_cold: args.allow_cold.clone(),
        reuse: if args.no_repurpose { Reuse::Never } else { Reuse::Allowed },
        limits: Limits {
            max_vms: args.max_vms,
            memory_mib,
            memory_reserve_mib,
            max_running: args.max_running.unwrap_or(2 * cpus),
            max_queue: args.max_queue,
            max_connections: args.max_connections,
            timeout: Duration::from_secs(args.timeout),
            idle_timeout: Duration::from_secs(args.idle_timeout),
            idle: args.idle.map(IdleSpec::of),
            suspend_disk_mib: args.suspend_disk,
            spill_disk_mib: args.spill_disk,
            max_output_bytes: args.max_output << 10,
            shells: args.shells,
            grace: Duration::from_secs(args.grace),
        },
    })?;
    Ok(ExitCode::SUCCESS)
}
