//! A function, and the machine it runs in.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::body::{check_line, check_name};
use super::fault::Fault;
use crate::tiering::idle::IdleSpec;
use crate::tiering::policy::Policy;

/// The most guest memory of one function, MiB.
const MAX_MEM_MIB: u64 = 1 << 20;

/// The most VMs of one function that may stand by.
const MAX_STANDBY: usize = 1024;

/// VMs of a function that wait, restored and paused, for its invocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Standby {
    /// VMs that the service restores ahead and keeps ready.
    pub(super) min: usize,
    /// The most that may be ready: VMs that are rewound are added up to this.
    pub(super) max: usize,
    /// The most local memory that VMs which stand by may have together, MiB. None: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dram_mib: Option<u64>,
}

/// The fate of a VM that stood by, or could have, after the answer of its invocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum After {
    /// The VM ends.
    #[default]
    End,
    /// The VM goes back to its snapshot, and stands by again.
    Rewind,
    /// The VM lives on for other requests, as one does that an invocation has started.
    Keep,
}

/// A function and the machine it runs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Function {
    pub(super) func_name: String,
    /// The root image: a file on the host, attached as the drive `root`. None: no drive.
    #[schema(value_type = Option<String>)]
    pub(super) image: Option<PathBuf>,
    /// The kernel: a file on the host. None: the built-in guest.
    #[schema(value_type = Option<String>)]
    pub(super) kernel: Option<PathBuf>,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub(super) vcpu: u8,
    /// Guest memory, MiB.
    #[serde(default = "default_mem")]
    pub(super) mem_size: u64,
    /// The initial RAM disk: a file on the host.
    #[schema(value_type = Option<String>)]
    pub(super) initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub(super) boot_args: Option<String>,
    /// True if the guest may not write to the image. Otherwise each VM writes to its own copy, which ends with it.
    #[serde(default = "yes")]
    pub(super) image_read_only: bool,
    /// The vsock port on which the guest takes requests. None: its serial line.
    pub(super) port: Option<u32>,
    /// The guest's name of the function. None: `func_name`.
    pub(super) call: Option<String>,
    /// A request made of each booted VM before any invocation: `name key=value…`.
    pub(super) prepare: Option<String>,
    /// The restore policy of invocations that name none. None: `tiered` of a snapshot that has a profile, else
    /// `firecracker`.
    pub(super) policy: Option<String>,
    /// Local memory for the pages that a restore preloads, MiB, for policies that weigh it.
    pub(super) dram_mib: Option<u64>,
    /// Time limit of an invocation that names none, ms. None: the daemon's limit.
    pub(super) timeout_ms: Option<u64>,
    /// True if KVM logs the pages that the guest writes, for diff snapshots.
    #[serde(default)]
    pub(super) track_dirty_pages: bool,
    /// VMs of the function's last snapshot that stand by. None: each invocation restores its own.
    pub(super) standby: Option<Standby>,
    /// The fate of such a VM after its answer. None: `end`. Needs `standby`.
    pub(super) after: Option<After>,
    /// The fate of VMs that wait for requests, and their reuse by invocations. None: the daemon's (`--idle`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) idle: Option<IdleSpec>,
}

fn one() -> u8 {
    1
}

fn default_mem() -> u64 {
    128
}

fn yes() -> bool {
    true
}

impl Function {
    /// Refuses values outside their limits.
    pub(super) fn check(&self) -> Result<(), Fault> {
        check_name("function", &self.func_name)?;
        if self.vcpu == 0 || self.vcpu > 32 {
            return Err(Fault::bad("`vcpu` must be 1 to 32."));
        }
        if self.mem_size == 0 || self.mem_size > MAX_MEM_MIB {
            return Err(Fault::bad(format!("`mem_size` is in MiB and must be 1 to {MAX_MEM_MIB}.")));
        }
        for (key, path) in [("image", &self.image), ("kernel", &self.kernel), ("initrd", &self.initrd)] {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(Fault::bad(format!("`{key}` must be an absolute path on the host.")));
            }
        }
        for (key, text) in [("call", &self.call), ("prepare", &self.prepare)] {
            if let Some(text) = text {
                check_line(&format!("`{key}`"), text)?;
                if text.trim().is_empty() {
                    return Err(Fault::bad(format!("`{key}` is empty.")));
                }
            }
        }
        match self.standby {
            Some(Standby { min, max, .. }) if max == 0 || max > MAX_STANDBY || min > max => {
                return Err(Fault::bad(format!(
                    "`standby.max` must be 1 to {MAX_STANDBY}, and `standby.min` not more than it."
                )));
            }
            None if self.after.is_some() => {
                return Err(Fault::bad("`after` says what becomes of standby VMs: it needs `standby`."));
            }
            Some(_) if self.after == Some(After::Rewind) && self.writes_image() => {
                return Err(Fault::bad(
                    "`after` cannot be `rewind` with `image_read_only` false: a VM that writes to its own image does \
                     not go back to its snapshot.",
                ));
            }
            _ => {}
        }
        if let Some(idle) = self.idle {
            idle.check().map_err(|error| Fault::bad(error.to_string()))?;
            if idle.suspends() && self.track_dirty_pages {
                return Err(Fault::bad(
                    "`idle.policy` cannot be `suspend` or `ladder` with `track_dirty_pages`: diffs of a VM build on \
                     its own snapshots.",
                ));
            }
        }
        self.own_policy().map(drop)
    }

    /// The function's policy of restores, if it has one.
    pub(super) fn own_policy(&self) -> Result<Option<Policy>, Fault> {
        self.policy.as_deref().map(known_policy).transpose()
    }

    /// Returns whether each VM needs its own image.
    pub(super) fn writes_image(&self) -> bool {
        self.image.is_some() && !self.image_read_only
    }

    /// The request line for a guest, without `run <id>`.
    pub(super) fn line(&self, params: &str) -> String {
        let call = self.call.as_deref().unwrap_or(&self.func_name);
        format!("{call} {params}").trim().to_string()
    }
}

/// Parses a policy's name.
pub(super) fn known_policy(name: &str) -> Result<Policy, Fault> {
    name.parse::<Policy>().map_err(|error| Fault::bad(error.to_string()))
}
