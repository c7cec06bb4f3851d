//! The seccomp filters of a VM's process.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use crate::sys::errors::BoxError;
use crate::sys::seccomp::{Choice, FilterError, Filters, args_of};

#[derive(Clone, Debug, Default, Args)]
pub struct SeccompArgs {
    /// Let threads make only the system calls that the built-in seccomp filters allow (docs/security.md)
    #[arg(long, overrides_with = "no_seccomp", conflicts_with = "seccomp_filter")]
    seccomp: bool,
    /// The same with the filters of this JSON file
    #[arg(long, value_name = "FILE")]
    seccomp_filter: Option<PathBuf>,
    /// Let threads make any system call: the default; takes back an earlier --seccomp
    #[arg(long, overrides_with = "seccomp", conflicts_with = "seccomp_filter")]
    no_seccomp: bool,
}

impl SeccompArgs {
    /// The filters that were asked for. A file is read.
    pub fn filters(&self) -> Result<Option<Filters>, FilterError> {
        match &self.seccomp_filter {
            Some(path) => Filters::from_file(path).map(Some),
            None => Ok(self.is_asked_for().then(Filters::built_in)),
        }
    }

    fn is_asked_for(&self) -> bool {
        self.seccomp && !self.no_seccomp
    }

    /// The arguments by which the processes of VMs get these filters. A file is checked.
    pub fn for_vms(&self) -> Result<Vec<OsString>, BoxError> {
        let Some(path) = &self.seccomp_filter else {
            return Ok(args_of(if self.is_asked_for() { Choice::BuiltIn } else { Choice::NoFilters }));
        };
        Filters::from_file(path)?;
        Ok(args_of(Choice::File(&std::path::absolute(path)?)))
    }
}
