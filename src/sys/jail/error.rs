//! The reasons why a process cannot be jailed.

use std::io;
use std::path::PathBuf;

use crate::sys::held::Unheld;
use crate::sys::netns;

/// The reason why a process cannot be jailed. It must end: part of the jail may be in force.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that the jail holds.
    #[error(transparent)]
    Held(#[from] Unheld),
    /// A tap that the jail holds.
    #[error("Cannot attach to tap {name} for the jail. It must exist, and be this user's or tvmm run as root")]
    Tap {
        /// The tap.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A named network namespace.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// unshare(2) fails.
    #[error(
        "Cannot make the jail's namespaces. Run as root, or allow users to make user namespaces (sysctl \
         kernel.unprivileged_userns_clone, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or \
         ask for --jail=landlock"
    )]
    Namespaces {
        /// The kernel's error.
        source: io::Error,
    },
    /// A step of building the jail's root.
    #[error("Cannot {doing} for the jail: {}", path.display())]
    Root {
        /// The step.
        doing: &'static str,
        /// Its object.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A key that a command prints.
    #[error("Cannot run a command for a key: a jail starts no programs. Give the key in a file (--decrypt-key FILE)")]
    KeyCommand,
    /// A path that was asked for and is not there.
    #[error(
        "Cannot let {} into the jail: it does not exist. Make it first, or leave its --jail-path out",
        path.display()
    )]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A directory of sockets that other users may write.
    #[error(
        "Cannot let {} into the jail: a socket is to be made there, and every user may write there. Put the sockets of \
         a VM into a directory of its own",
        path.display()
    )]
    SharedDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// A kernel without Landlock, or with too old a version.
    #[error(
        "Cannot jail by Landlock: this kernel has {have}, and signals and abstract sockets need version 6 (Linux \
         6.12). Use a newer kernel, or ask for --jail=namespaces with a user id of its own (--jail-uid)"
    )]
    OldLandlock {
        /// Its version.
        have: String,
    },
    /// A Landlock rule or its enforcement fails.
    #[error("Cannot jail by Landlock: {why}")]
    Landlock {
        /// The reason.
        why: String,
    },
    /// A step of giving privileges up.
    #[error("Cannot {doing} for the jail. {remedy}")]
    Privileges {
        /// The step.
        doing: String,
        /// The remedy.
        remedy: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// A cgroup.
    #[error(
        "Cannot move the VM into cgroup {}. Make the directory in a mounted cgroup hierarchy, and give this user its \
         cgroup.procs",
        path.display()
    )]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}
