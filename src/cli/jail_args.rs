//! The arguments of a jail, and the jail that they ask for.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::config::VmConfig;
use crate::config::restore::RestoreRequest;
use crate::session::jail::Needs;
use crate::sys::errors::{BoxError, refuse};
use crate::sys::inherit;
use crate::sys::jail::{self, Error, Jail, JailPath, Layers, Network, Use};
use crate::sys::logging;
use crate::sys::netns::Netns;

/// Layers, by their names on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LayersArg {
    All,
    Namespaces,
    Landlock,
}

/// A path that stays: `PATH` or `PATH:rw`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathArg(JailPath);

impl std::str::FromStr for PathArg {
    type Err = String;

    fn from_str(text: &str) -> Result<PathArg, String> {
        let (path, allowed) = match text.rsplit_once(':') {
            Some((path, "rw")) => (path, Use::Write),
            Some((path, "ro")) => (path, Use::Read),
            _ => (text, Use::Read),
        };
        if path.is_empty() {
            return Err("it names no path; say PATH, or PATH:rw for one that the VM may write".to_owned());
        }
        Ok(PathArg(JailPath::new(path, allowed)))
    }
}

/// The parts of its host that a session uses besides its machine.
pub struct Outputs<'a> {
    /// The socket of the API.
    pub socket: Option<&'a Path>,
    /// Files that are written at the end.
    pub files: Vec<&'a Path>,
    /// True if a collector gets the time slices.
    pub has_collector: bool,
}

/// A jail around the process of a VM (docs/jail.md).
#[derive(Debug, Args)]
pub struct JailArgs {
    /// Jail the VM's process before it runs: it keeps the files that its arguments name, and no privileges. all: an
    /// empty root and namespaces of its own, and Landlock; or one of the two [default: all]
    #[arg(long, value_name = "LAYERS", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    pub jail: Option<LayersArg>,
    /// Keep this file or directory in the jail, to be read, or with :rw to be written too: for requests of the API;
    /// repeatable
    #[arg(long, value_name = "PATH[:rw]", requires = "jail")]
    pub jail_path: Vec<PathArg>,
    /// Attach to this tap before the jail: for requests of the API; repeatable
    #[arg(long, value_name = "NAME", requires = "jail")]
    pub jail_tap: Vec<String>,
    /// Become this user in the jail; its files must be that user's
    #[arg(long, value_name = "UID", requires = "jail")]
    pub jail_uid: Option<u32>,
    /// Become this group in the jail [default: the number of --jail-uid]
    #[arg(long, value_name = "GID", requires = "jail")]
    pub jail_gid: Option<u32>,
    /// Enter this network namespace (`ip netns add NAME`) instead of making a new one, which takes longer
    #[arg(long, value_name = "NAME", requires = "jail")]
    pub jail_netns: Option<String>,
    /// Move the VM into this cgroup, a directory of a cgroup hierarchy, before the jail; repeatable
    #[arg(long, value_name = "DIR", requires = "jail")]
    pub jail_cgroup: Vec<PathBuf>,
}

impl JailArgs {
    /// Closes descriptors that this process has inherited and was not told of. To be called before it opens any.
    pub fn close_inherited(&self, kept: Option<i32>) -> Result<(), BoxError> {
        if self.jail.is_none() {
            return Ok(());
        }
        let closed = inherit::close_others(kept);
        closed.map_err(|error| format!("Cannot close inherited descriptors for the jail: {error}").into())
    }

    /// Enters the jail, if there is to be one. This thread must be the only one.
    ///
    /// # Errors
    /// A file that the VM needs and that cannot be looked at, a layer that cannot be had.
    pub fn enter(
        &self,
        outputs: &Outputs<'_>,
        config: &VmConfig,
        load: Option<&RestoreRequest>,
    ) -> Result<(), BoxError> {
        let Some(layers) = self.jail else { return Ok(()) };
        let mut needs = Needs::of(config, load)?;
        if let Some(socket) = outputs.socket {
            needs.socket(socket);
        }
        for file in &outputs.files {
            needs.overwrite(file)?;
        }
        if outputs.has_collector {
            needs.network = Some("time slices are sent to a collector");
        }
        needs.check()?;
        needs.give_new_files(self.jail_uid, self.jail_gid)?;
        for PathArg(entry) in &self.jail_path {
            check_there(&entry.path)?;
            needs.add(&entry.path, entry.allowed);
        }
        let jail = Jail {
            layers: match layers {
                LayersArg::All => Layers::All,
                LayersArg::Namespaces => Layers::Namespaces,
                LayersArg::Landlock => Layers::Landlock,
            },
            network: self.network(needs.network)?,
            paths: needs.paths,
            taps: needs.taps.into_iter().chain(self.jail_tap.clone()).collect(),
            uid: self.jail_uid,
            gid: self.jail_gid,
            cgroups: self.jail_cgroup.clone(),
        };
        // Log lines are written by a thread that ends with them.
        logging::finish();
        jail::enter(jail)?;
        Ok(())
    }

    fn network(&self, needed: Option<&'static str>) -> Result<Network, BoxError> {
        match (&self.jail_netns, self.jail) {
            (Some(_), Some(LayersArg::Landlock)) => {
                refuse("--jail-netns needs namespaces: ask for --jail or --jail=namespaces")
            }
            (Some(name), _) => Ok(Network::Named(Netns::open(name)?)),
            (None, _) => Ok(needed.map_or(Network::Own, Network::Host)),
        }
    }
}

fn check_there(path: &Path) -> Result<(), Error> {
    if path.exists() { Ok(()) } else { Err(Error::Missing { path: path.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_only_unless_it_says_otherwise() {
        let parse = |text: &str| text.parse::<PathArg>().map(|PathArg(entry)| (entry.path, entry.allowed));
        assert_eq!(parse("/a"), Ok(("/a".into(), Use::Read)));
        assert_eq!(parse("/a:rw"), Ok(("/a".into(), Use::Write)));
        assert_eq!(parse("/a:b"), Ok(("/a:b".into(), Use::Read)));
        assert!(parse(":rw").is_err() && parse("").is_err());
    }
}
