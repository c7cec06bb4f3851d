//! `tvmm fork`: makes copies of a running VM that go on from the same instant.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::overrides::{DeviceArgs, key_value};
use super::units::{mib, ms};
use crate::config::control::Forked;
use crate::config::fork::ForkRequest;
use crate::config::restore::{DriveOverride, MacOverride};
use crate::config::{NetworkOverrideBody, VsockOverrideBody};
use crate::sys::api_client::Client;
use crate::sys::errors::BoxError;

#[derive(Debug, Args)]
#[command(
    mut_arg("drive", |drive| drive.help(DRIVE_HELP)),
    mut_arg("drive_dir", |dir| dir.help("Directory for each child's copies of drives; default: one in the fork point")),
    mut_arg("metadata", |metadata| metadata.help("Set a key of each child's metadata to a value (repeatable)")),
    mut_arg("vsock", |vsock| vsock.help("Unix socket of each child's vsock device"))
)]
pub struct ForkArgs {
    /// The API socket of the VM, which runs on
    #[arg(long, value_name = "PATH")]
    api_sock: PathBuf,
    /// The number of children, at most 256
    #[arg(long, value_name = "N")]
    count: u32,
    /// API socket of each child. In this and all other names an n in braces stands for the number of the child, from 1
    /// on
    #[arg(long, default_value = "vm-{n}.sock", value_name = "PATH")]
    out_sock: PathBuf,
    /// Directory of the fork point, which all children map; it is removed by a later fork there, once all VMs that use
    /// it have ended. Default: that of the sockets
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Write memory while the VM runs: it stands still only for its state and the last pages
    #[arg(long)]
    live: bool,
    /// Leave the children paused until the API resumes them
    #[arg(long)]
    paused: bool,
    /// Let each child copy pages before it runs, of those that the VM has copies of, MiB at most: its first request has
    /// fewer faults, and these pages are not shared
    #[arg(long, default_value_t = 0, value_name = "MIB")]
    dram: u64,
    /// File for the console and the messages of each child; default: they are dropped
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Tap of each child for network interface ID, and MAC address if it gets another, such as 06:00:ac:10:00:{n:02x}
    /// (repeatable)
    #[arg(long, value_name = "ID=TAP[,mac=MAC]", value_parser = network)]
    net: Vec<Network>,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Print the answer of the API as JSON
    #[arg(long)]
    json: bool,
}

const DRIVE_HELP: &str =
    "Image of each child for a drive (repeatable); default: a copy of each drive that the guest can write";

/// The tap of an interface, and its MAC address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Network {
    id: String,
    tap: String,
    mac: Option<String>,
}

fn network(text: &str) -> Result<Network, String> {
    let (id, rest) = key_value(text)?;
    let (tap, mac) = match rest.split_once(",mac=") {
        Some((tap, mac)) => (tap.to_owned(), Some(mac.to_owned())),
        None => (rest, None),
    };
    if tap.is_empty() || tap.contains(['=', ',']) {
        return Err("it is not like eth0=tap{n} or eth0=tap{n},mac=06:00:ac:10:00:{n:02x}".to_owned());
    }
    Ok(Network { id, tap, mac })
}

/// Longest wait for the answer: each child has a limit of its own.
const TIMEOUT: Duration = Duration::from_secs(3600);

pub fn run(args: &ForkArgs) -> Result<ExitCode, BoxError> {
    let body = json!(request(args)?);
    let (_, answer) = Client::new(&args.api_sock).request("PUT", "/tvmm/fork", Some(&body), TIMEOUT)?;
    let answer = answer.unwrap_or_default();
    if args.json {
        out!("{answer:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let forked: Forked = serde_json::from_value(answer)?;
    for child in &forked.children {
        out!("{} pid {}", child.socket.display(), child.pid);
    }
    say!(
        "forked {} VMs in {:.1} ms from {} ({:.1} MiB, {:.1} MiB copied by each); the VM stood still for {:.1} ms",
        forked.children.len(),
        ms(forked.total_us),
        forked.fork_point.display(),
        mib(forked.memory_bytes),
        mib(forked.copied_bytes),
        ms(forked.stood_still_us)
    );
    Ok(ExitCode::SUCCESS)
}

/// The request. Its paths are absolute, because the VMM's current directory may be another.
fn request(args: &ForkArgs) -> Result<ForkRequest, BoxError> {
    let absolute = |path: &Path| std::path::absolute(path);
    let maybe = |path: &Option<PathBuf>| path.as_deref().map(absolute).transpose();
    let devices = &args.devices;
    let mut drive_overrides = Vec::with_capacity(devices.drive.len());
    for (drive_id, path) in &devices.drive {
        drive_overrides.push(DriveOverride { drive_id: drive_id.clone(), path_on_host: absolute(path)? });
    }
    let tap = |net: &Network| NetworkOverrideBody { iface_id: net.id.clone(), host_dev_name: net.tap.clone() };
    let mac = |net: &Network| net.mac.clone().map(|guest_mac| MacOverride { iface_id: net.id.clone(), guest_mac });
    Ok(ForkRequest {
        count: args.count,
        out_sock: absolute(&args.out_sock)?,
        dir: maybe(&args.dir)?,
        live: args.live,
        paused: args.paused,
        dram_mib: args.dram,
        log: maybe(&args.log)?,
        network_overrides: args.net.iter().map(tap).collect(),
        vsock_override: maybe(&devices.vsock)?.map(|uds_path| VsockOverrideBody { uds_path }),
        drive_overrides,
        drive_dir: maybe(&devices.drive_dir)?,
        mac_overrides: args.net.iter().filter_map(mac).collect(),
        metadata: devices.metadata(),
    })
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    #[test]
    fn no_help_has_the_braces_that_clap_makes_a_new_line() {
        let command = ForkArgs::augment_args(Command::new("fork"));
        for argument in command.get_arguments() {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty() && !help.contains("{n}"), "--{}: {help:?}", argument.get_id());
        }
    }

    #[test]
    fn network_takes_a_tap_and_a_mac_with_numbers() {
        let wanted =
            |mac: Option<&str>| Network { id: "eth0".into(), tap: "tap{n}".into(), mac: mac.map(str::to_owned) };
        assert_eq!(network("eth0=tap{n}"), Ok(wanted(None)));
        assert_eq!(network("eth0=tap{n},mac=06:00:00:00:00:{n:02x}"), Ok(wanted(Some("06:00:00:00:00:{n:02x}"))));
        for text in ["eth0", "eth0=", "eth0=,mac=06", "eth0=mac=06", "=tap1", "eth0=a,b"] {
            assert!(network(text).is_err(), "{text}");
        }
    }
}
