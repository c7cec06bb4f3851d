//! A jail as it is asked for, and as it is in force.

use std::path::{Component, Path, PathBuf};

use serde::Serialize;

use crate::sys::netns::Netns;

/// The layers of a jail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layers {
    /// Both.
    #[default]
    All,
    /// An empty root, and namespaces of its own.
    Namespaces,
    /// Landlock rules, on the host's names.
    Landlock,
}

impl Layers {
    /// Returns whether the process gets a root and namespaces of its own.
    pub fn has_namespaces(self) -> bool {
        self != Layers::Landlock
    }

    /// Returns whether Landlock restricts the process.
    pub fn has_landlock(self) -> bool {
        self != Layers::Namespaces
    }
}

/// The use that a jailed process may make of a path and all below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Use {
    /// Read files and directories.
    Read,
    /// Make and remove Unix sockets in a directory.
    Sockets,
    /// Both of them.
    ReadAndSockets,
    /// Read, write, make and remove.
    Write,
}

impl Use {
    /// Returns whether all that `other` allows is allowed.
    pub fn covers(self, other: Use) -> bool {
        self.with(other) == self
    }

    /// The use that allows both.
    pub fn with(self, other: Use) -> Use {
        match (self, other) {
            (one, other) if one == other => one,
            (Use::Write, _) | (_, Use::Write) => Use::Write,
            _ => Use::ReadAndSockets,
        }
    }
}

/// A path that stays in a jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct JailPath {
    /// As its user names it; made absolute by [`Jail::normalize`].
    pub path: PathBuf,
    /// The use that is allowed.
    #[serde(rename = "use")]
    pub allowed: Use,
}

impl JailPath {
    /// A path for a use.
    pub fn new(path: impl Into<PathBuf>, allowed: Use) -> JailPath {
        JailPath { path: path.into(), allowed }
    }
}

/// The network of a jailed process.
#[derive(Debug, Default)]
pub enum Network {
    /// A new namespace, with nothing in it.
    #[default]
    Own,
    /// This namespace.
    Named(Netns),
    /// The one it starts in, for the reason.
    Host(&'static str),
}

/// A jail as it is asked for.
#[derive(Debug, Default)]
pub struct Jail {
    /// Its layers.
    pub layers: Layers,
    /// The paths that stay. Those that do not exist are left out.
    pub paths: Vec<JailPath>,
    /// Taps to attach to before.
    pub taps: Vec<String>,
    /// Its network, if it has namespaces.
    pub network: Network,
    /// The user to become.
    pub uid: Option<u32>,
    /// The group to become.
    pub gid: Option<u32>,
    /// Directories of cgroups to move into.
    pub cgroups: Vec<PathBuf>,
}

impl Jail {
    /// Makes paths absolute, drops those that do not exist and those that another covers, and sorts them so that a
    /// directory comes before its contents.
    pub fn normalize(&mut self) {
        for entry in &mut self.paths {
            entry.path = absolute(&entry.path);
        }
        // A name that leads through a link is there by both names.
        let real = self.paths.iter().filter_map(|entry| {
            let path = entry.path.canonicalize().ok()?;
            (path != entry.path).then(|| JailPath::new(path, entry.allowed))
        });
        let real: Vec<JailPath> = real.collect();
        self.paths.extend(real);
        self.paths.retain(|entry| entry.path.exists());
        self.paths.sort_by(|one, other| one.path.cmp(&other.path));
        self.paths.dedup_by(|one, kept| {
            let is_same = one.path == kept.path;
            if is_same {
                kept.allowed = kept.allowed.with(one.allowed);
            }
            is_same
        });
        let mut kept: Vec<JailPath> = Vec::new();
        for entry in std::mem::take(&mut self.paths) {
            let covers = |other: &JailPath| entry.path.starts_with(&other.path) && other.allowed.covers(entry.allowed);
            if !kept.iter().any(covers) {
                kept.push(entry);
            }
        }
        self.paths = kept;
    }
}

/// The path from the root, without `.` and `..`.
pub fn absolute(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    clean
}

/// The network of a jail in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkInForce {
    /// A namespace of its own.
    Own,
    /// The namespace of this name.
    Named(String),
    /// The one it started in, for the reason.
    Host(&'static str),
}

/// A jail in force. Part of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct InForce {
    /// Its layers.
    pub layers: Layers,
    /// The namespaces that were made or entered.
    pub namespaces: Vec<&'static str>,
    /// Its network.
    pub network: NetworkInForce,
    /// The version of Landlock's interface whose rules are enforced; `None`: no Landlock.
    pub landlock_abi: Option<i32>,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Capabilities in the effective, permitted and inheritable sets, as bits by their numbers (capabilities(7)).
    pub capabilities: u64,
    /// The paths that stay.
    pub paths: Vec<JailPath>,
    /// Time that entering has taken, µs.
    pub entered_us: f64,
}

impl InForce {
    /// Returns whether taps of the host cannot be looked up any more.
    pub fn has_own_network(&self) -> bool {
        self.network == NetworkInForce::Own
    }

    /// Returns whether `path` may be used so.
    pub fn allows(&self, path: &Path, wanted: Use) -> bool {
        let path = absolute(path);
        let real = path.canonicalize().unwrap_or_else(|_| path.clone());
        let covers = |entry: &JailPath| entry.allowed.covers(wanted) && real.starts_with(&entry.path);
        let is_named = |entry: &JailPath| entry.allowed.covers(wanted) && path.starts_with(&entry.path);
        self.paths.iter().any(covers) || self.paths.iter().any(is_named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_covers_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        std::fs::write(&file, "").unwrap();
        let entry = |path: &Path, allowed| JailPath::new(path, allowed);
        let paths =
            vec![entry(&file, Use::Read), entry(dir.path(), Use::Write), entry(&dir.path().join("no"), Use::Read)];
        let mut jail = Jail { paths, ..Jail::default() };
        jail.normalize();
        assert_eq!(jail.paths, [entry(dir.path(), Use::Write)]);
        let mut jail = Jail { paths: vec![entry(&file, Use::Write), entry(dir.path(), Use::Read)], ..Jail::default() };
        jail.normalize();
        assert_eq!(jail.paths, [entry(dir.path(), Use::Read), entry(&file, Use::Write)]);
        let paths = vec![entry(dir.path(), Use::Sockets), entry(&file, Use::Read)];
        let mut jail = Jail { paths, ..Jail::default() };
        jail.normalize();
        assert_eq!(jail.paths.len(), 2, "a directory of sockets does not let its files be read");
        let paths = vec![entry(dir.path(), Use::Sockets), entry(dir.path(), Use::Read)];
        let mut jail = Jail { paths, ..Jail::default() };
        jail.normalize();
        assert_eq!(jail.paths, [entry(dir.path(), Use::ReadAndSockets)]);
    }

    #[test]
    fn a_path_cannot_climb_out_by_its_name() {
        let in_force = InForce {
            layers: Layers::All,
            namespaces: Vec::new(),
            network: NetworkInForce::Own,
            landlock_abi: Some(6),
            uid: 0,
            gid: 0,
            capabilities: 0,
            paths: vec![JailPath::new("/a/b", Use::Read)],
            entered_us: 0.0,
        };
        assert!(in_force.allows(Path::new("/a/b/c"), Use::Read));
        assert!(!in_force.allows(Path::new("/a/b/../c"), Use::Read));
        assert!(!in_force.allows(Path::new("/a/b/c"), Use::Write));
        assert!(!in_force.allows(Path::new("/a/bc"), Use::Read));
    }
}
