//! One restore request: the options that users write, and the request that they make together.
//!
//! [`RestoreOptions`] is flat: each field is a flag of `tvmm restore` and a key of `tvmm` in `PUT /snapshot/load`, in
//! `snapshot-load` of a config and in the service's requests. [`RestoreRequest::new`] checks them once; after that,
//! options that exclude each other cannot be represented. To add an option, add a field here, take it over in
//! `RestoreRequest::new`, and use it in the file where it acts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::error::InvalidRestore;
use crate::config::overrides::Overrides;
use crate::snapshot::{
    Cold, ColdCache, ColdSpec, DRAM_PRICE_US, ENCRYPTED_MEMORY, InPlaceMapping, KeySource, Policy, PolicyReason, Verify,
};

/// The sources of memory, the budgets, and the clone's settings of a restore. The keys are those of `tvmm` in `PUT
/// /snapshot/load`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema, Args)]
#[serde(deny_unknown_fields, default)]
#[schema(as = LoadOptions)]
pub struct RestoreOptions {
    /// Restore policy: eager, firecracker, firecracker-uffd, catalyzer, trenv, or with --profile reap, faasnap,
    /// aquifer, tiered [default: tiered with --profile, else firecracker]
    #[arg(long, value_name = "NAME")]
    #[schema(ignore)]
    pub policy: Option<Policy>,
    /// Profile of a recorded run (`tvmm profile record`), for policies that need one; without --policy it means tiered
    #[arg(long, value_name = "FILE")]
    #[schema(ignore)]
    pub profile: Option<PathBuf>,
    /// A plan made by `tvmm plan --out`, or in the JSON of `tvmm plan --json`, instead of a policy
    #[arg(long, value_name = "FILE")]
    #[schema(value_type = Option<String>)]
    pub plan: Option<PathBuf>,
    /// Keep plans and working-set images in a folder of this directory. Default: beside the snapshot, or if that cannot
    /// be written in $XDG_CACHE_HOME/tvmm/plans or ~/.cache/tvmm/plans (root: /var/cache/tvmm/plans)
    #[arg(long, value_name = "DIR")]
    #[schema(ignore)]
    pub plan_dir: Option<PathBuf>,
    /// Costs of this host (`tvmm calibrate`); default: its last measurement, else built-in numbers
    #[arg(long, value_name = "FILE")]
    #[schema(value_type = Option<String>)]
    pub costs: Option<PathBuf>,
    /// Local memory for preloaded pages and pages that the guest will write, MiB
    #[arg(long = "dram", value_name = "MIB")]
    pub dram_mib: Option<u64>,
    /// Latency to trade for memory: additional µs per request that saving 1 MiB of preloaded local memory is worth (0
    /// optimises latency only); only `tiered` weighs it [default: 50]
    #[arg(long, value_name = "US")]
    pub dram_price: Option<u64>,
    /// Memory in the CXL tier, MiB
    #[arg(long = "cxl", value_name = "MIB")]
    pub cxl_mib: Option<u64>,
    /// Mapping of pages in place: private, the kernel copies written pages; shared, tvmm copies them, as it must on a
    /// tier without copy-on-write [default: private]
    #[arg(long, value_name = "HOW")]
    pub in_place_mapping: Option<InPlaceMapping>,
    /// When memory is compared with the snapshot's checksums: off; sample, a few chunks before the guest runs;
    /// background, a few chunks before, and the rest while the guest runs; full, everything before [default:
    /// background]
    #[arg(long, value_name = "WHEN")]
    #[schema(ignore)]
    pub verify: Option<Verify>,
    /// Restore only a snapshot that the owner of this public key has signed, and each of its parents (`tvmm snapshot
    /// sign`; docs/signatures.md): all of it is compared with the signature first; repeatable: one of the keys
    #[arg(long = "trust", value_name = "KEYFILE")]
    #[schema(ignore)]
    pub trusted_keys: Option<Vec<PathBuf>>,
    /// Take the snapshot's memory from a cold pool instead of its memory files: a directory, direct:DIR[,depth=N]
    /// (past the page cache), tcp:HOST:PORT[,HOST:PORT…], with RDMA built in rdma:HOST:PORT[,HOST:PORT…], or with
    /// object stores built in s3://BUCKET/PREFIX, gs://, az://, http(s)://; repeatable, nearest first, the next stands
    /// by
    #[arg(long = "cold", value_name = "POOL")]
    #[schema(value_type = Option<Vec<String>>)]
    pub cold_pools: Option<Vec<ColdSpec>>,
    /// Decrypt a snapshot that `tvmm snapshot encrypt` made with this key: a file, or command:CMD, which prints the
    /// key; its memory comes from the snapshot's directory, or from --cold (docs/encryption.md)
    #[arg(long, value_name = "KEY")]
    #[schema(ignore)]
    pub decrypt_key: Option<KeySource>,
    /// Keep chunks that come from other hosts in this directory
    #[arg(long, value_name = "DIR")]
    #[schema(value_type = Option<String>)]
    pub cold_cache: Option<PathBuf>,
    /// Limit on the size of that directory, MiB; chunks used longest ago go first [default: 1024]
    #[arg(long = "cold-cache-size", value_name = "MIB")]
    pub cold_cache_mib: Option<u64>,
    /// Take guest memory from this pool instead of the snapshot's files; several: from the first that has the snapshot
    #[arg(long = "pool", value_name = "POOL")]
    #[schema(value_type = Option<Vec<String>>)]
    pub pools: Option<Vec<PathBuf>>,
    /// Restore everything but the guest's first instruction, and let it run when a request comes: bytes on standard
    /// input, a connection to its vsock device, or `PATCH /vm` with the state Resumed.
    #[arg(skip)]
    #[schema(ignore)]
    pub standby: bool,
    /// Other images for drives.
    #[arg(skip)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Directory for the clone's own copies of drives, for a snapshot that contains copies.
    #[arg(skip)]
    #[schema(ignore)]
    pub drive_dir: Option<PathBuf>,
    /// Other MAC addresses for network interfaces.
    #[arg(skip)]
    pub mac_overrides: Vec<MacOverride>,
    /// Metadata that the clone reads besides the snapshot's, or instead of them: keys and values.
    #[arg(skip)]
    pub metadata: BTreeMap<String, String>,
}

/// Another image for a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// The image: a file or block device of the host.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

/// Another MAC address for a network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MacOverride {
    /// The interface.
    pub iface_id: String,
    /// Six hexadecimal bytes with colons between them.
    pub guest_mac: String,
}

/// A request to restore a machine: [`RestoreOptions`] that fit together, and the other fields of Firecracker's request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreRequest {
    /// The snapshot directory or, where memory is in a file of its own, the file of the VM state.
    pub snapshot: PathBuf,
    /// The source of guest memory.
    pub memory: MemoryFrom,
    /// The source of the plan.
    pub plan: PlanFrom,
    /// Directory for plans and working-set images, instead of beside the snapshot.
    pub plan_dir: Option<PathBuf>,
    /// Mapping of pages in place.
    pub in_place_mapping: InPlaceMapping,
    /// The time at which memory is compared with the snapshot's checksums.
    pub verify: Verify,
    /// The host-side settings of the clone's devices.
    pub overrides: Overrides,
    /// True: KVM logs the pages that the guest writes from now on.
    pub track_dirty_pages: bool,
    /// True: the guest's clock is moved to the present; false: no time has passed for it.
    pub clock_realtime: bool,
    /// The state of the machine afterwards.
    pub start: Start,
}

/// The state of a machine after its restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// vCPUs are stopped until the API resumes them.
    #[default]
    Paused,
    /// vCPUs are stopped until a request comes.
    Standby,
    /// vCPUs run.
    Running,
}

/// The source of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryFrom {
    /// The snapshot's own files. In Firecracker's two-file form, memory is in `memory_file`. One of `trusted_keys` must
    /// have signed the snapshot, unless there are none.
    Files { memory_file: Option<PathBuf>, trusted_keys: Vec<PathBuf> },
    /// The first of these pools that has the snapshot; there is one at least. `fallback` stands by for a snapshot that
    /// no pool has.
    Pools { pools: Vec<PathBuf>, fallback: Option<Cold> },
    /// Cold pools.
    Cold(Cold),
    /// A page-fault handler in another process, which listens on this socket.
    Handler(PathBuf),
}

impl Default for MemoryFrom {
    fn default() -> MemoryFrom {
        MemoryFrom::Files { memory_file: None, trusted_keys: Vec::new() }
    }
}

/// The source of the plan that places guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlanFrom {
    /// A plan made before (`tvmm plan --out`).
    File(PathBuf),
    /// The plan that a policy makes.
    Policy(PolicyChoice),
}

impl Default for PlanFrom {
    fn default() -> PlanFrom {
        PlanFrom::Policy(PolicyChoice::default())
    }
}

/// A policy, and the inputs of its plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyChoice {
    /// The policy that the request names. None: [`Policy::default_for`] the profile.
    pub requested: Option<Policy>,
    /// The profile of a recorded run.
    pub profile: Option<PathBuf>,
    /// File of this host's costs, instead of the last calibration or the built-in numbers.
    pub costs: Option<PathBuf>,
    /// Limit on local memory, MiB.
    pub dram_mib: Option<u64>,
    /// Limit on memory in the CXL tier, MiB.
    pub cxl_mib: Option<u64>,
    /// The µs by which a request may take longer to save a MiB of local memory.
    pub dram_price_us: u64,
}

impl Default for PolicyChoice {
    fn default() -> PolicyChoice {
        PolicyChoice {
            requested: None,
            profile: None,
            costs: None,
            dram_mib: None,
            cxl_mib: None,
            dram_price_us: DRAM_PRICE_US,
        }
    }
}

impl PlanFrom {
    /// The reason for the policy of the plan.
    pub fn policy_reason(&self) -> PolicyReason {
        match self {
            PlanFrom::File(_) => PolicyReason::PlanFile,
            PlanFrom::Policy(PolicyChoice { requested: Some(_), .. }) => PolicyReason::Requested,
            PlanFrom::Policy(PolicyChoice { profile: Some(_), .. }) => PolicyReason::Profile,
            PlanFrom::Policy(_) => PolicyReason::NoProfile,
        }
    }
}

impl PolicyChoice {
    /// The policy: the requested one, or the default.
    pub fn policy(&self) -> Policy {
        self.requested.unwrap_or_else(|| Policy::default_for(self.profile.as_deref()))
    }
}

/// The source of memory that a request names outside the options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemorySaid {
    /// Nothing: the snapshot is a directory.
    #[default]
    Nothing,
    /// The memory file of the two-file form, and the name of the key or flag that says so.
    File { path: PathBuf, key: &'static str },
    /// The socket of a page-fault handler.
    Handler(PathBuf),
}

impl InvalidRestore {
    /// The message for users of the command line: options are named by their flags.
    pub fn in_flags(self) -> String {
        match self {
            InvalidRestore::Both { option, other } => {
                format!("{} cannot be used with {}: leave one out", flag(option), flag(other))
            }
            InvalidRestore::Needs { option, needed } => format!("{} needs {}", flag(option), flag(needed)),
            InvalidRestore::Zero { option } => format!("{} must be 1 or more", flag(option)),
            InvalidRestore::PoolAndMemoryFile { key } => {
                format!("a pool cannot be used with {key}: leave one out")
            }
            // The flags of these exclude each other already.
            InvalidRestore::ResumedAndStandby
            | InvalidRestore::PoolAndHandler
            | InvalidRestore::TrustElsewhere
            | InvalidRestore::EncryptedElsewhere => self.to_string(),
        }
    }
}

/// The flag of the option with this key.
fn flag(key: &str) -> String {
    let flags = RestoreOptions::augment_args(clap::Command::new("restore"));
    let found = flags.get_arguments().find(|arg| arg.get_id() == key).and_then(clap::Arg::get_long);
    format!("--{}", found.unwrap_or(key))
}

/// The use of a file or directory that an option names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileUse {
    Read,
    Write,
}

/// A file or directory of this host that an option names.
#[derive(Debug)]
pub struct NamedFile<'a> {
    /// The option's JSON key.
    pub key: &'static str,
    pub path: &'a mut PathBuf,
    pub access: FileUse,
}

impl RestoreRequest {
    /// Returns the request that `options` make for `snapshot`. It leaves the machine paused, or standing by, and its
    /// devices as they were; callers set those fields.
    ///
    /// # Errors
    /// Options that exclude each other, or miss an option that they need.
    pub fn new(snapshot: PathBuf, said: MemorySaid, options: RestoreOptions) -> Result<RestoreRequest, InvalidRestore> {
        Ok(RestoreRequest {
            memory: options.memory_from(said, &snapshot)?,
            snapshot,
            plan: options.plan_from()?,
            plan_dir: options.plan_dir,
            in_place_mapping: options.in_place_mapping.unwrap_or_default(),
            verify: options.verify.unwrap_or_default(),
            start: if options.standby { Start::Standby } else { Start::Paused },
            ..RestoreRequest::default()
        })
    }

    /// The memory file of the two-file form.
    pub fn memory_file(&self) -> Option<&Path> {
        match &self.memory {
            MemoryFrom::Files { memory_file, .. } => memory_file.as_deref(),
            _ => None,
        }
    }

    /// The socket of a page-fault handler in another process.
    pub fn handler(&self) -> Option<&Path> {
        match &self.memory {
            MemoryFrom::Handler(socket) => Some(socket),
            _ => None,
        }
    }
}

impl RestoreOptions {
    /// Refuses options that exclude each other, or miss an option that they need.
    pub fn check(&self) -> Result<(), InvalidRestore> {
        self.memory_from(MemorySaid::Nothing, Path::new(""))?;
        self.plan_from().map(drop)
    }

    fn memory_from(&self, said: MemorySaid, snapshot: &Path) -> Result<MemoryFrom, InvalidRestore> {
        let cold = self.cold()?;
        let pools = self.pools.clone().unwrap_or_default();
        let trusted_keys = self.trusted_keys.clone().unwrap_or_default();
        let is_elsewhere =
            !pools.is_empty() || cold.is_some() || self.decrypt_key.is_some() || matches!(said, MemorySaid::Handler(_));
        if is_elsewhere && !trusted_keys.is_empty() {
            return Err(InvalidRestore::TrustElsewhere);
        }
        if let Some(key) = self.decrypt_key.clone() {
            if !pools.is_empty() || !matches!(said, MemorySaid::Nothing) {
                return Err(InvalidRestore::EncryptedElsewhere);
            }
            let beside =
                || Cold { pools: vec![ColdSpec::Dir(snapshot.join(ENCRYPTED_MEMORY))], cache: None, key: None };
            return Ok(MemoryFrom::Cold(Cold { key: Some(key), ..cold.unwrap_or_else(beside) }));
        }
        match (said, pools.is_empty(), cold) {
            (MemorySaid::Nothing, true, None) => Ok(MemoryFrom::Files { memory_file: None, trusted_keys }),
            (MemorySaid::Nothing, true, Some(cold)) => Ok(MemoryFrom::Cold(cold)),
            (MemorySaid::Nothing, false, fallback) => Ok(MemoryFrom::Pools { pools, fallback }),
            (MemorySaid::File { path, .. }, true, None) => {
                Ok(MemoryFrom::Files { memory_file: Some(path), trusted_keys })
            }
            (MemorySaid::File { key, .. }, ..) => Err(InvalidRestore::PoolAndMemoryFile { key }),
            (MemorySaid::Handler(socket), true, None) => Ok(MemoryFrom::Handler(socket)),
            (MemorySaid::Handler(_), ..) => Err(InvalidRestore::PoolAndHandler),
        }
    }

    fn cold(&self) -> Result<Option<Cold>, InvalidRestore> {
        let pools = self.cold_pools.clone().unwrap_or_default();
        if self.cold_cache_mib == Some(0) {
            return Err(InvalidRestore::Zero { option: "cold_cache_mib" });
        }
        if self.cold_cache.is_some() && pools.is_empty() {
            return Err(InvalidRestore::Needs { option: "cold_cache", needed: "cold_pools" });
        }
        if self.cold_cache_mib.is_some() && self.cold_cache.is_none() {
            return Err(InvalidRestore::Needs { option: "cold_cache_mib", needed: "cold_cache" });
        }
        let cache = self.cold_cache.clone().map(|dir| ColdCache { dir, limit_mib: self.cold_cache_mib });
        Ok((!pools.is_empty()).then_some(Cold { pools, cache, key: None }))
    }

    fn plan_from(&self) -> Result<PlanFrom, InvalidRestore> {
        let Some(plan) = &self.plan else {
            return Ok(PlanFrom::Policy(PolicyChoice {
                requested: self.policy,
                profile: self.profile.clone(),
                costs: self.costs.clone(),
                dram_mib: self.dram_mib,
                cxl_mib: self.cxl_mib,
                dram_price_us: self.dram_price.unwrap_or(DRAM_PRICE_US),
            }));
        };
        let beside = [
            ("policy", self.policy.is_some()),
            ("profile", self.profile.is_some()),
            ("costs", self.costs.is_some()),
            ("dram_mib", self.dram_mib.is_some()),
            ("cxl_mib", self.cxl_mib.is_some()),
            ("dram_price", self.dram_price.is_some()),
        ];
        match beside.into_iter().find(|(_, is_there)| *is_there) {
            Some((other, _)) => Err(InvalidRestore::Both { option: "plan", other }),
            None => Ok(PlanFrom::File(plan.clone())),
        }
    }

    /// The policy of a restore by these options. None: they have a plan.
    pub fn policy(&self) -> Option<Policy> {
        let default = || Policy::default_for(self.profile.as_deref());
        if self.plan.is_some() { None } else { Some(self.policy.unwrap_or_else(default)) }
    }

    /// Returns these options, with missing ones filled in from `defaults`.
    pub fn or(self, defaults: &RestoreOptions) -> RestoreOptions {
        // A cache belongs to the cold pools beside which it was named.
        let cold = if self.cold_pools.is_some() { self.clone() } else { defaults.clone() };
        // A plan replaces the policy and its budgets.
        let budgets = if self.plan.is_some() { RestoreOptions::default() } else { defaults.clone() };
        RestoreOptions {
            policy: self.policy.or(budgets.policy),
            profile: self.profile.or(budgets.profile),
            plan: self.plan,
            plan_dir: self.plan_dir.or_else(|| defaults.plan_dir.clone()),
            costs: self.costs.or(budgets.costs),
            dram_mib: self.dram_mib.or(budgets.dram_mib),
            dram_price: self.dram_price.or(budgets.dram_price),
            cxl_mib: self.cxl_mib.or(budgets.cxl_mib),
            in_place_mapping: self.in_place_mapping.or(defaults.in_place_mapping),
            verify: self.verify.or(defaults.verify),
            decrypt_key: self.decrypt_key.or_else(|| defaults.decrypt_key.clone()),
            trusted_keys: self.trusted_keys.or_else(|| defaults.trusted_keys.clone()),
            cold_pools: cold.cold_pools,
            cold_cache: cold.cold_cache,
            cold_cache_mib: cold.cold_cache_mib,
            pools: self.pools.or_else(|| defaults.pools.clone()),
            drive_overrides: self.drive_overrides,
            standby: self.standby || defaults.standby,
            drive_dir: self.drive_dir,
            mac_overrides: self.mac_overrides,
            metadata: self.metadata,
        }
    }

    /// Returns all files and directories of this host that the options name. The service lets clients name only those
    /// that its command line allows, so a new option does not compile before it is listed here, as a file or as none.
    pub fn files_mut(&mut self) -> Vec<NamedFile<'_>> {
        let RestoreOptions {
            profile,
            plan,
            plan_dir,
            costs,
            trusted_keys,
            cold_pools,
            cold_cache,
            pools,
            drive_overrides,
            drive_dir,
            policy: _,
            dram_mib: _,
            dram_price: _,
            cxl_mib: _,
            in_place_mapping: _,
            verify: _,
            decrypt_key: _,
            cold_cache_mib: _,
            standby: _,
            mac_overrides: _,
            metadata: _,
        } = self;
        let read = |key, path| NamedFile { key, path, access: FileUse::Read };
        let write = |key, path| NamedFile { key, path, access: FileUse::Write };
        let pools = pools.iter_mut().flatten().map(|pool| read("pools", pool));
        let cold = cold_pools.iter_mut().flatten().filter_map(ColdSpec::dir_mut).map(|dir| read("cold_pools", dir));
        let keys = trusted_keys.iter_mut().flatten().map(|path| read("trusted_keys", path));
        let files = [
            profile.as_mut().map(|path| read("profile", path)),
            plan.as_mut().map(|path| read("plan", path)),
            plan_dir.as_mut().map(|path| write("plan_dir", path)),
            costs.as_mut().map(|path| read("costs", path)),
            cold_cache.as_mut().map(|path| write("cold_cache", path)),
            drive_dir.as_mut().map(|path| write("drive_dir", path)),
        ];
        let drives = drive_overrides.iter_mut().map(|drive| write("drive_overrides", &mut drive.path_on_host));
        pools.chain(cold).chain(keys).chain(files.into_iter().flatten()).chain(drives).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The help names defaults in words, because an option that is left out must differ from one that says the default.
    #[test]
    fn help_names_the_defaults() {
        let mut flags = RestoreOptions::augment_args(clap::Command::new("restore"));
        let default = Policy::default_for;
        let help = flags.render_long_help().to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        for default in [
            format!("tiered [default: {} with --profile, else {}]", default(Some(Path::new("p"))), default(None)),
            format!("weighs it [default: {DRAM_PRICE_US}]"),
            "copy-on-write [default: private]".to_owned(),
            "everything before [default: background]".to_owned(),
        ] {
            assert!(help.contains(&default), "{default}: {help}");
        }
        assert_eq!((InPlaceMapping::default(), Verify::default()), (InPlaceMapping::Private, Verify::Background));
    }

    #[test]
    fn conflicts_are_told_by_flags_and_by_keys() {
        let options = |json: serde_json::Value| serde_json::from_value::<RestoreOptions>(json).unwrap();
        let error = options(serde_json::json!({ "plan": "p", "dram_mib": 1 })).check().unwrap_err();
        assert_eq!(error.to_string(), "Snapshot load has both tvmm.plan and tvmm.dram_mib; leave one out.");
        assert_eq!(error.in_flags(), "--plan cannot be used with --dram: leave one out");
        let error = options(serde_json::json!({ "cold_pools": ["c"], "cold_cache_mib": 1 })).check().unwrap_err();
        assert_eq!(error.in_flags(), "--cold-cache-size needs --cold-cache");
        for elsewhere in [serde_json::json!({ "pools": ["p"] }), serde_json::json!({ "cold_pools": ["c"] })] {
            let options = RestoreOptions { trusted_keys: Some(vec!["k".into()]), ..options(elsewhere) };
            assert_eq!(options.check().unwrap_err(), InvalidRestore::TrustElsewhere);
        }
    }

    #[test]
    fn options_survive_their_json() {
        let text = serde_json::json!({
            "policy": "tiered", "profile": "a", "plan_dir": "b", "costs": "c", "dram_mib": 1, "dram_price": 2,
            "cxl_mib": 3,
            "in_place_mapping": "shared", "verify": "full", "trusted_keys": ["l"], "decrypt_key": "command:m",
            "cold_pools": ["tcp:a:1", "/d"], "cold_cache": "e",
            "cold_cache_mib": 4, "pools": [], "drive_overrides": [{ "drive_id": "f", "path_on_host": "g" }],
            "drive_dir": "h", "mac_overrides": [{ "iface_id": "i", "guest_mac": "06:00:ac:10:00:02" }],
            "metadata": { "j": "k" },
        });
        let options: RestoreOptions = serde_json::from_value(text).unwrap();
        let written = serde_json::to_string(&options).unwrap();
        assert_eq!(serde_json::from_str::<RestoreOptions>(&written).unwrap(), options);
        let written = serde_json::to_string(&RestoreOptions::default()).unwrap();
        assert_eq!(serde_json::from_str::<RestoreOptions>(&written).unwrap(), RestoreOptions::default());
    }
}
