//! `tvmm jail`, and `jailer` by name: starts a VMM in a jail, with the flags and directories of Firecracker's jailer
//! (Firecracker `docs/jailer.md`).

mod cgroups;
mod root;

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Args;

use self::cgroups::{CgroupFile, CgroupVersion};
use self::root::JailRoot;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::jail::namespaces;
use crate::sys::limits::{Limit, limit};
use crate::sys::netns::Netns;
use crate::sys::{clock, detach, inherit};

/// Open files that the VMM may have, unless --resource-limit says otherwise.
const OPEN_FILES: u64 = 2048;

/// A limit of `--resource-limit`: `fsize=BYTES` or `no-file=COUNT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceLimit(Limit, u64);

impl std::str::FromStr for ResourceLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<ResourceLimit, String> {
        let (name, value) = text.split_once('=').ok_or("say RESOURCE=VALUE")?;
        let value = value.parse().map_err(|_| format!("`{value}` is no number"))?;
        match name {
            "fsize" => Ok(ResourceLimit(Limit::FileSize, value)),
            "no-file" => Ok(ResourceLimit(Limit::OpenFiles, value)),
            _ => Err(format!("there is no resource `{name}`; known: fsize, no-file")),
        }
    }
}

/// Parses the id of a jail: it names directories.
fn jail_id(text: &str) -> Result<String, String> {
    let fits = (1..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if fits { Ok(text.to_owned()) } else { Err("an id has 1 to 64 letters, digits and `-`".to_owned()) }
}

#[derive(Debug, Args)]
pub struct JailerArgs {
    /// Id of the VM: a directory, a cgroup and the VMM's --id are named by it
    #[arg(long, value_name = "ID", value_parser = jail_id)]
    id: String,
    /// The VMM to start; it is copied into the jail, where no library is unless you put it there
    #[arg(long, value_name = "FILE")]
    exec_file: PathBuf,
    /// The user it runs as
    #[arg(long, value_name = "UID")]
    uid: u32,
    /// The group it runs as
    #[arg(long, value_name = "GID")]
    gid: u32,
    /// Set this file of the VMM's cgroup, such as cpuset.cpus=0; repeatable
    #[arg(long, value_name = "FILE=VALUE")]
    cgroup: Vec<CgroupFile>,
    /// Version of the host's cgroups
    #[arg(long, value_name = "VERSION", default_value = "1")]
    cgroup_version: CgroupVersion,
    /// The cgroup above the VMM's, below the mount of its hierarchy [default: the name of the VMM]
    #[arg(long, value_name = "PATH")]
    parent_cgroup: Option<PathBuf>,
    /// The directory of all jails
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    chroot_base_dir: PathBuf,
    /// The network namespace that the VMM runs in: a file of one
    #[arg(long, value_name = "FILE")]
    netns: Option<PathBuf>,
    /// Start the VMM in a process namespace of its own, as process 1; this process ends when it has started
    #[arg(long)]
    new_pid_ns: bool,
    /// Start the VMM in a session of its own, with /dev/null as input and output; this process ends when it has
    /// started
    #[arg(long)]
    daemonize: bool,
    /// Limit a resource: fsize=BYTES (largest file) or no-file=COUNT (open files, default 2048); repeatable
    #[arg(long, value_name = "RESOURCE=VALUE")]
    resource_limit: Vec<ResourceLimit>,
    /// Arguments of the VMM
    #[arg(last = true, value_name = "ARGS")]
    extra: Vec<OsString>,
}

/// Builds the jail and becomes the VMM in it, or starts it there.
///
/// # Errors
/// The step that failed. The directories that were made stay, as they do after the VMM has ended.
pub fn run(args: &JailerArgs) -> Result<ExitCode, BoxError> {
    let start_us = clock::monotonic_ns() / 1000;
    inherit::close_others(None).map_err(|error| format!("Cannot close inherited descriptors: {error}"))?;
    let root = JailRoot::make(&args.chroot_base_dir, &args.exec_file, &args.id)?;
    let parent = args.parent_cgroup.clone().unwrap_or_else(|| PathBuf::from(root.exec_name()));
    let wanted = cgroups::Wanted {
        version: args.cgroup_version,
        files: &args.cgroup,
        parent: &parent,
        names_parent: args.parent_cgroup.is_some(),
        id: &args.id,
    };
    cgroups::join(&wanted)?;
    let has_limit = |of: Limit| args.resource_limit.iter().any(|ResourceLimit(limit, _)| *limit == of);
    if !has_limit(Limit::OpenFiles) {
        set_limit(Limit::OpenFiles, OPEN_FILES)?;
    }
    args.resource_limit.iter().try_for_each(|ResourceLimit(of, value)| set_limit(*of, *value))?;
    if let Some(path) = &args.netns {
        Netns::open_path(path)?.enter_now()?;
    }
    let null = args.daemonize.then(|| std::fs::File::options().read(true).write(true).open("/dev/null")).transpose();
    let null = null.map_err(|error| format!("Cannot open /dev/null: {error}"))?;
    root.enter(args.uid, args.gid)?;
    let mut command = Command::new(Path::new("/").join(root.exec_name()));
    command.arg0(root.exec_name()).env_clear().uid(args.uid).gid(args.gid);
    command.args(["--id", &args.id, "--start-time-us", &start_us.to_string()]).args(&args.extra);
    if let Some(null) = &null {
        let copy = || null.try_clone().map(Stdio::from);
        command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        detach::into_own_session(&mut command);
    }
    start(args, &root, command)
}

fn set_limit(of: Limit, value: u64) -> Result<(), BoxError> {
    limit(of, value).map_err(|error| format!("Cannot limit {of} to {value}: {error}").into())
}

/// Becomes the VMM, or starts it and ends. Its process id is in the file `NAME.pid` of the jail's root.
fn start(args: &JailerArgs, root: &JailRoot, mut command: Command) -> Result<ExitCode, BoxError> {
    let failed = |error: io::Error| {
        format!(
            "Cannot start {} in the jail {}: {error}. A VMM that is linked dynamically needs its libraries there",
            args.exec_file.display(),
            root.path().display()
        )
    };
    if !args.new_pid_ns && !args.daemonize {
        root.write_pid(std::process::id())?;
        return refuse(failed(command.exec()));
    }
    if args.new_pid_ns {
        namespaces::for_children().map_err(|error| format!("Cannot make a process namespace: {error}. Run as root"))?;
    }
    let child = command.spawn().map_err(failed)?;
    root.write_pid(child.id())?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_directories() {
        assert!(jail_id("vm-1").is_ok());
        for bad in ["", "..", "a/b", "a_b", &"x".repeat(65)] {
            assert!(jail_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn limits_are_parsed() {
        assert_eq!("fsize=5".parse(), Ok(ResourceLimit(Limit::FileSize, 5)));
        for bad in ["fsize", "fsize=x", "core=1", "no-file=-1"] {
            assert!(bad.parse::<ResourceLimit>().is_err(), "{bad}");
        }
    }
}
