//! `tvmm serve-pages`: serves a cold pool to VMs on other hosts.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::identify::{InputPath, Role};
use crate::backends::cold::serve::{Limits, PageServer, open_store};
use crate::sys::errors::{BoxError, refuse};
use crate::sys::print;
use crate::sys::signals::EndSignals;

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The cold pool (`tvmm pool create --tier remote`)
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Address to listen at: tcp:HOST:PORT, or with RDMA built in rdma:HOST:PORT, an address of an RDMA device, so that
    /// clients read this host's memory; port 0 lets the system choose one
    #[arg(long, value_name = "tcp:HOST:PORT")]
    listen: String,
    /// Limit on concurrent connections; each VM has one to three
    #[arg(long, value_name = "COUNT", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_connections: u32,
    /// Memory for the indexes of open snapshots, MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    memory: u32,
    /// Idle time after which a connection is closed, s, unless it is read by RDMA; clients connect again
    #[arg(long, value_name = "SECONDS", default_value_t = 600,
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    idle_timeout: u64,
    /// Memory that clients may read by RDMA, MiB: the data of the snapshots that they have open, which stays in memory
    /// meanwhile [default: 4096]
    #[cfg(feature = "rdma")]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
    registered: Option<u32>,
}

impl ServeArgs {
    pub fn inputs(&self) -> Vec<InputPath> {
        vec![InputPath::new(&self.dir, Role::Pool)]
    }
}

/// Default memory that clients may read by RDMA, MiB.
#[cfg(feature = "rdma")]
const REGISTERED_MIB: u32 = 4096;

pub fn run(args: &ServeArgs) -> Result<ExitCode, BoxError> {
    let (scheme, address) = match args.listen.split_once(':') {
        Some((scheme @ ("tcp" | "rdma"), address)) => (scheme, address),
        _ => {
            return refuse(format!(
                "Cannot listen at `{}`: it is neither tcp:HOST:PORT nor rdma:HOST:PORT",
                args.listen
            ));
        }
    };
    let mut signals = EndSignals::take()?;
    let limits = Limits {
        connections: args.max_connections as usize,
        index_bytes: (args.memory as usize) << 20,
        idle: Duration::from_secs(args.idle_timeout),
    };
    let server = if scheme == "rdma" {
        listen_rdma(args, address, limits)?
    } else {
        #[cfg(feature = "rdma")]
        if args.registered.is_some() {
            return refuse("Cannot register memory for a tcp: address: --registered is for rdma:HOST:PORT");
        }
        PageServer::listen(open_store(&args.dir)?, address, limits)?
    };
    out!("{scheme}:{}", server.address()?);
    // The reader of the output may have ended; the server outlives it, and reports that at its end.
    let _ = print::finish();
    server.run(&mut signals)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(feature = "rdma")]
fn listen_rdma(args: &ServeArgs, address: &str, limits: Limits) -> Result<PageServer, BoxError> {
    let registered = u64::from(args.registered.unwrap_or(REGISTERED_MIB)) << 20;
    Ok(PageServer::listen_rdma(open_store(&args.dir)?, address, limits, registered)?)
}

#[cfg(not(feature = "rdma"))]
fn listen_rdma(args: &ServeArgs, _: &str, _: Limits) -> Result<PageServer, BoxError> {
    refuse(format!("Cannot listen at `{}`: {}", args.listen, crate::backends::cold::NO_RDMA))
}
