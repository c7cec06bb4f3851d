//! `tvmm serve-pages`: serves a cold pool to VMs on other hosts.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::{BoxError, refuse};
use crate::vmm::cold::serve::{Limits, PageServer, open_store};
use crate::vmm::sys::signals::EndSignals;

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The cold pool (`tvmm pool create --tier remote`)
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Where to listen: tcp:HOST:PORT; port 0 lets the system choose one
    #[arg(long, value_name = "tcp:HOST:PORT")]
    listen: String,
    /// How many connections are served at once; each VM has one to three
    #[arg(long, value_name = "COUNT", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    max_connections: u32,
    /// Memory for the indexes of the snapshots that are open, MiB
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    memory: u32,
    /// How long a connection may be idle; clients connect again
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    idle_timeout: u64,
}

pub fn run(args: &ServeArgs) -> Result<ExitCode, BoxError> {
    let Some(address) = args.listen.strip_prefix("tcp:") else {
        return refuse(format!("tvmm listens at tcp:HOST:PORT, not at `{}`", args.listen));
    };
    let mut signals = EndSignals::take()?;
    let limits = Limits {
        connections: args.max_connections as usize,
        index_bytes: (args.memory as usize) << 20,
        idle: Duration::from_secs(args.idle_timeout),
    };
    let server = PageServer::listen(open_store(&args.dir)?, address, limits)?;
    println!("tcp:{}", server.address()?);
    std::io::stdout().flush()?;
    server.run(&mut signals)?;
    Ok(ExitCode::SUCCESS)
}
