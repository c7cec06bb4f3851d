//! Named network namespaces (ip-netns(8)), and children that start in one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder where iproute2 keeps them.
const FOLDER: &str = "/var/run/netns";

/// The reason why no child can start in a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no namespace of this name.
    #[error("There is no network namespace `{name}` ({}): make it with `ip netns add {name}`.", path.display())]
    Missing {
        /// Its name.
        name: String,
        /// Its expected path.
        path: PathBuf,
    },
    /// It cannot be opened.
    #[error("Network namespace `{name}` cannot be opened ({}).", path.display())]
    Open {
        /// Its name.
        name: String,
        /// Its path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not permit it.
    #[error("Network namespace `{name}` cannot be entered: that needs CAP_SYS_ADMIN.")]
    NotPermitted {
        /// Its name.
        name: String,
    },
    /// A file of this name that is something else.
    #[error("`{name}` is no network namespace ({} is something else).", path.display())]
    NoNamespace {
        /// Its name.
        name: String,
        /// Its path.
        path: PathBuf,
    },
}

/// A named network namespace, open: it lives as long as this.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    file: File,
}

impl Netns {
    /// Opens the namespace. The name must be one that a file can have.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Open`].
    pub fn open(name: &str) -> Result<Netns, Error> {
        Netns::open_at(name.to_owned(), PathBuf::from(FOLDER).join(name))
    }

    /// Opens the namespace by the path of its file.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Open`].
    pub fn open_path(path: &Path) -> Result<Netns, Error> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Netns::open_at(name, path.to_path_buf())
    }

    fn open_at(name: String, path: PathBuf) -> Result<Netns, Error> {
        match File::open(&path) {
            Ok(file) => Ok(Netns { name, path, file }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Missing { name, path }),
            Err(source) => Err(Error::Open { name, path, source }),
        }
    }

    /// The name by which it was opened. Another namespace may have the name by now.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether both are the same namespace. A namespace that was removed and made again is another one.
    pub fn is_same(&self, other: &Netns) -> bool {
        let identity = |netns: &Netns| netns.file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        matches!((identity(self), identity(other)), (Ok(one), Ok(other)) if one == other)
    }

    /// Makes the child of `command` start in this namespace. If it cannot, spawning fails: see [`why`](Self::why).
    pub fn enter(self, command: &mut Command) {
        let enter = move || {
            // SAFETY: an async-signal-safe system call on integers; the descriptor lives as long as this closure.
            match unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: the closure allocates nothing, takes no lock and calls only the system call above.
        unsafe { command.pre_exec(enter) };
    }

    /// Moves this thread into the namespace.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], [`Error::NoNamespace`] or [`Error::Open`].
    pub fn enter_now(&self) -> Result<(), Error> {
        let moved = rustix::thread::move_into_link_name_space(
            self.file.as_fd(),
            Some(rustix::thread::LinkNameSpaceType::Network),
        );
        moved.map_err(|error| {
            let source = io::Error::from(error);
            let why = self.why(&source);
            why.unwrap_or(Error::Open { name: self.name.clone(), path: self.path.clone(), source })
        })
    }

    /// Translates the error of a spawn into one of the namespace; `None` if it has another cause (setns(2)).
    pub fn why(&self, error: &io::Error) -> Option<Error> {
        let name = self.name.clone();
        match error.raw_os_error()? {
            libc::EPERM => Some(Error::NotPermitted { name }),
            libc::EINVAL => Some(Error::NoNamespace { name, path: self.path.clone() }),
            _ => None,
        }
    }

    /// Another handle.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn try_clone(&self) -> io::Result<Netns> {
        Ok(Netns { name: self.name.clone(), path: self.path.clone(), file: self.file.try_clone()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_not_there_is_told_by_name() {
        let said = Netns::open("tvmm-no-such-namespace").unwrap_err().to_string();
        assert!(said.contains("ip netns add tvmm-no-such-namespace"), "{said}");
    }

    #[test]
    fn a_file_that_is_no_namespace_is_not_entered() {
        let file = tempfile::tempfile().unwrap();
        let netns = Netns { name: "x".into(), path: "/x".into(), file };
        let mut command = Command::new("true");
        netns.try_clone().unwrap().enter(&mut command);
        let why = netns.why(&command.spawn().unwrap_err()).unwrap();
        assert!(matches!(why, Error::NoNamespace { .. } | Error::NotPermitted { .. }), "{why}");
    }
}
