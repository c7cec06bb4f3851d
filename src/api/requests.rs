//! Request bodies and the commands they mean.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::devices::{DriveOverrideBody, MacOverrideBody, NetworkOverrideBody, VsockOverrideBody};
use super::fault::Fault;
use crate::vmm::cold::ColdPools;
use crate::vmm::config::{
    BootSource, CpuConfig, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig, parse_mac,
};
use crate::vmm::control::{
    Command, CreateSnapshot, DEFAULT_POLICY, InPlaceMapping, LoadSnapshot, NetworkOverride, Overrides, SnapshotKind,
    SnapshotPaths,
};

/// A body that was understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) command: Command,
    /// Whether the body has a field Firecracker calls deprecated; the answer then says so in a header.
    pub(super) is_deprecated: bool,
}

impl From<Command> for Parsed {
    fn from(command: Command) -> Self {
        Self { command, is_deprecated: false }
    }
}

/// Turns the body of one method and path into a command.
pub(super) type Parse = fn(&[u8]) -> Result<Parsed, Fault>;

pub(super) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(json_fault)
}

/// Firecracker's sentence: clients match it.
fn json_fault(error: impl std::fmt::Display) -> Fault {
    Fault::bad_request(format!("An error occurred when deserializing the json body of a request: {error}."))
}

pub(super) fn put_boot_source(body: &[u8]) -> Result<Parsed, Fault> {
    let boot_source: BootSource = json(body)?;
    boot_source.validate()?;
    Ok(Command::PutBootSource(boot_source).into())
}

pub(super) fn put_machine_config(body: &[u8]) -> Result<Parsed, Fault> {
    let machine: MachineConfig = json(body)?;
    machine.validate()?;
    let is_deprecated = machine.cpu_template.is_some();
    Ok(Parsed { command: Command::PutMachineConfig(machine), is_deprecated })
}

pub(super) fn patch_machine_config(body: &[u8]) -> Result<Parsed, Fault> {
    let patch: MachineConfigPatch = json(body)?;
    if patch.is_empty() {
        return Err(Fault::bad_request("Empty PATCH request."));
    }
    // Refuse here what no machine config could take; the machine checks the outcome again.
    MachineConfig::default().patched(&patch)?;
    let is_deprecated = patch.cpu_template.is_some();
    Ok(Parsed { command: Command::PatchMachineConfig(patch), is_deprecated })
}

pub(super) fn put_cpu_config(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::PutCpuConfig(json::<CpuConfig>(body)?).into())
}

pub(super) fn put_logger(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::PutLogger(json::<LoggerConfig>(body)?).into())
}

pub(super) fn put_metrics(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::PutMetrics(json::<MetricsConfig>(body)?).into())
}

#[derive(Deserialize)]
enum ActionType {
    InstanceStart,
    SendCtrlAltDel,
    FlushMetrics,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

pub(super) fn put_actions(body: &[u8]) -> Result<Parsed, Fault> {
    let command = match json::<Action>(body)?.action_type {
        ActionType::InstanceStart => Command::InstanceStart,
        ActionType::SendCtrlAltDel => Command::SendCtrlAltDel,
        ActionType::FlushMetrics => Command::FlushMetrics,
    };
    Ok(command.into())
}

#[derive(Deserialize)]
enum WantedState {
    Paused,
    Resumed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    state: WantedState,
}

pub(super) fn patch_vm(body: &[u8]) -> Result<Parsed, Fault> {
    let command = match json::<Vm>(body)?.state {
        WantedState::Paused => Command::Pause,
        WantedState::Resumed => Command::Resume,
    };
    Ok(command.into())
}

#[derive(Default, Deserialize)]
enum SnapshotType {
    #[default]
    Full,
    Diff,
}

/// What Firecracker's body has no field for.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateExtension {
    /// Let the machine run on afterwards.
    #[serde(default)]
    resume: bool,
    /// Take copies of the drives that the guest can write.
    #[serde(default)]
    copy_drives: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    snapshot_path: PathBuf,
    /// Required by Firecracker; here its absence means that `snapshot_path` is a snapshot directory.
    mem_file_path: Option<PathBuf>,
    #[serde(default)]
    snapshot_type: SnapshotType,
    #[serde(default)]
    tvmm: CreateExtension,
}

pub(super) fn put_snapshot_create(body: &[u8]) -> Result<Parsed, Fault> {
    let create: Create = json(body)?;
    let location = snapshot_paths(create.snapshot_path, create.mem_file_path, "mem_file_path")?;
    let kind = match create.snapshot_type {
        SnapshotType::Full => SnapshotKind::Full,
        SnapshotType::Diff => SnapshotKind::Diff,
    };
    let CreateExtension { resume, copy_drives } = create.tvmm;
    Ok(Command::CreateSnapshot(CreateSnapshot { location, kind, resume, copy_drives }).into())
}

#[derive(Deserialize)]
enum MemBackendType {
    File,
    Uffd,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemBackend {
    backend_type: MemBackendType,
    backend_path: PathBuf,
}

/// What Firecracker's body has no field for.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadExtension {
    /// The name of the restore policy.
    policy: Option<String>,
    /// The profile the policy works from.
    profile: Option<PathBuf>,
    /// A plan made before, instead of a policy's.
    plan: Option<PathBuf>,
    /// Budgets, MiB.
    dram_mib: Option<u64>,
    cxl_mib: Option<u64>,
    /// µs that a request may take longer to save a MiB of local memory.
    dram_price: Option<u64>,
    /// How pages in place are mapped.
    #[serde(default)]
    in_place_mapping: InPlaceMapping,
    /// Cold pools that hold the snapshot's memory, nearest first.
    #[serde(default)]
    cold_pools: Vec<String>,
    /// Where chunks that come from other hosts are kept, and how many MiB of them.
    cold_cache: Option<PathBuf>,
    cold_cache_mib: Option<u64>,
    /// Pools to take guest memory from, in order of preference.
    #[serde(default)]
    pools: Vec<PathBuf>,
    /// Other backing files for drives.
    #[serde(default)]
    drive_overrides: Vec<DriveOverrideBody>,
    /// Where this clone's copies of drives go, for a snapshot that has copies.
    drive_dir: Option<PathBuf>,
    /// Metadata that are new or have other values.
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    /// Other MAC addresses for network interfaces.
    #[serde(default)]
    mac_overrides: Vec<MacOverrideBody>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Load {
    snapshot_path: PathBuf,
    /// Deprecated: `mem_backend` of type `File`.
    mem_file_path: Option<PathBuf>,
    mem_backend: Option<MemBackend>,
    #[serde(default)]
    track_dirty_pages: bool,
    /// Deprecated: `track_dirty_pages`.
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default)]
    network_overrides: Vec<NetworkOverrideBody>,
    vsock_override: Option<VsockOverrideBody>,
    #[serde(default)]
    clock_realtime: bool,
    #[serde(default)]
    tvmm: LoadExtension,
}

pub(super) fn put_snapshot_load(body: &[u8]) -> Result<Parsed, Fault> {
    let mut load: Load = json(body)?;
    let overrides = overrides(load.network_overrides, load.vsock_override, &mut load.tvmm)?;
    let is_deprecated = load.mem_file_path.is_some() || load.enable_diff_snapshots;
    let (memory, memory_key, handler) = match (load.mem_backend, load.mem_file_path) {
        (Some(_), Some(_)) => {
            return Err(json_fault("too many fields: either `mem_backend` or `mem_file_path` exclusively is required"));
        }
        (Some(MemBackend { backend_type: MemBackendType::Uffd, backend_path }), None) => {
            (None, "backend_path", Some(backend_path))
        }
        (Some(backend), None) => (Some(backend.backend_path), "backend_path", None),
        (None, memory) => (memory, "mem_file_path", None),
    };
    let command = Command::LoadSnapshot(Box::new(LoadSnapshot {
        location: snapshot_paths(load.snapshot_path, memory, memory_key)?,
        policy: load.tvmm.policy.unwrap_or_else(|| DEFAULT_POLICY.to_owned()),
        profile: load.tvmm.profile,
        plan: load.tvmm.plan,
        costs: None,
        dram_mib: load.tvmm.dram_mib,
        cxl_mib: load.tvmm.cxl_mib,
        dram_price_us: load.tvmm.dram_price,
        in_place_mapping: load.tvmm.in_place_mapping,
        cold: ColdPools {
            pools: load.tvmm.cold_pools,
            cache: load.tvmm.cold_cache,
            cache_mib: load.tvmm.cold_cache_mib,
        },
        pools: load.tvmm.pools,
        handler,
        overrides,
        track_dirty_pages: load.track_dirty_pages || load.enable_diff_snapshots,
        clock_realtime: load.clock_realtime,
        resume: load.resume_vm,
    }));
    Ok(Parsed { command, is_deprecated })
}

/// What the clone's devices are to have on the host's side.
fn overrides(
    networks: Vec<NetworkOverrideBody>,
    vsock: Option<VsockOverrideBody>,
    tvmm: &mut LoadExtension,
) -> Result<Overrides, Fault> {
    let tap = |body: NetworkOverrideBody| NetworkOverride {
        iface_id: body.iface_id,
        host_dev_name: Some(body.host_dev_name),
        guest_mac: None,
    };
    let mut networks: Vec<NetworkOverride> = networks.into_iter().map(tap).collect();
    for body in std::mem::take(&mut tvmm.mac_overrides) {
        let refused = || Fault::bad_request(format!("`{}` is no MAC address.", body.guest_mac));
        let guest_mac = Some(parse_mac(&body.guest_mac).ok_or_else(refused)?);
        match networks.iter_mut().find(|network| network.iface_id == body.iface_id) {
            Some(network) => network.guest_mac = guest_mac,
            None => networks.push(NetworkOverride { iface_id: body.iface_id, host_dev_name: None, guest_mac }),
        }
    }
    let drives = std::mem::take(&mut tvmm.drive_overrides);
    let drives = drives.into_iter().map(|body| (body.drive_id, body.path_on_host)).collect();
    let metadata = std::mem::take(&mut tvmm.metadata);
    let (drive_dir, vsock) = (tvmm.drive_dir.take(), vsock.map(|body| body.uds_path));
    Ok(Overrides { drives, drive_dir, networks, metadata, vsock })
}

/// Refuses empty paths, which would otherwise be reported as a missing file without a name.
fn snapshot_paths(
    snapshot: PathBuf,
    memory: Option<PathBuf>,
    memory_key: &'static str,
) -> Result<SnapshotPaths, Fault> {
    for (key, path) in [("snapshot_path", Some(&snapshot)), (memory_key, memory.as_ref())] {
        if path.is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(Fault::bad_request(format!("Snapshot's {key} is empty.")));
        }
    }
    Ok(SnapshotPaths { snapshot, memory })
}
