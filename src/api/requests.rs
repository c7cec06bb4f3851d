//! Parses request bodies into commands.

use serde::de::DeserializeOwned;

use super::fault::Fault;
use crate::config::bodies::{ActionBody, ActionType, CreateBody, CreateExtension, VmBody, WantedState};
use crate::config::request::{BarrierRequest, Command, CreateSnapshot, DemoteRequest, VacateRequest};
use crate::config::{
    BootSource, CpuConfig, LoadBody, LoggerConfig, MachineConfig, MachineConfigPatch, MetricsConfig, RepurposeBody,
    snapshot_paths,
};

/// A parsed body.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) command: Command,
    /// True if the body has a field that Firecracker calls deprecated; the answer then says so in a header.
    pub(super) is_deprecated: bool,
}

impl From<Command> for Parsed {
    fn from(command: Command) -> Self {
        Self { command, is_deprecated: false }
    }
}

/// Parses the body of one method and path into a command.
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
    // Values that no machine config could have are refused here; the machine checks the result again.
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

pub(super) fn put_actions(body: &[u8]) -> Result<Parsed, Fault> {
    let command = match json::<ActionBody>(body)?.action_type {
        ActionType::InstanceStart => Command::InstanceStart,
        ActionType::SendCtrlAltDel => Command::SendCtrlAltDel,
        ActionType::FlushMetrics => Command::FlushMetrics,
    };
    Ok(command.into())
}

pub(super) fn patch_vm(body: &[u8]) -> Result<Parsed, Fault> {
    let command = match json::<VmBody>(body)?.state {
        WantedState::Paused => Command::Pause,
        WantedState::Resumed => Command::Resume,
    };
    Ok(command.into())
}

pub(super) fn put_snapshot_create(body: &[u8]) -> Result<Parsed, Fault> {
    let create: CreateBody = json(body)?;
    let location = snapshot_paths(create.snapshot_path, create.mem_file_path, "mem_file_path")?;
    let kind = create.snapshot_type;
    let CreateExtension { resume, copy_drives, verify, live, profile } = create.tvmm;
    if live && resume {
        let both = "A live snapshot leaves the machine as it is: give `live` or `resume`, not both.";
        return Err(Fault::bad_request(both));
    }
    if live && profile {
        return Err(Fault::bad_request("A live snapshot has no `profile`: leave one of both out."));
    }
    let create = CreateSnapshot { location, kind, resume, copy_drives, verify, live, profile };
    Ok(Command::CreateSnapshot(create).into())
}

pub(super) fn put_snapshot_load(body: &[u8]) -> Result<Parsed, Fault> {
    let body: LoadBody = json(body)?;
    let is_deprecated = body.is_deprecated();
    Ok(Parsed { command: Command::LoadSnapshot(Box::new(body.check()?)), is_deprecated })
}

pub(super) fn put_repurpose(body: &[u8]) -> Result<Parsed, Fault> {
    let body: RepurposeBody = json(body)?;
    let is_deprecated = body.is_deprecated();
    Ok(Parsed { command: Command::Repurpose(Box::new(body.check()?)), is_deprecated })
}

pub(super) fn put_rewind(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::Rewind(json(body)?).into())
}

pub(super) fn put_demote(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::Demote(json::<DemoteRequest>(body)?).into())
}

pub(super) fn put_barrier(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::Barrier(json::<BarrierRequest>(body)?).into())
}

pub(super) fn put_vacate(body: &[u8]) -> Result<Parsed, Fault> {
    json::<VacateRequest>(body)?;
    Ok(Command::Vacate.into())
}

pub(super) fn put_fork(body: &[u8]) -> Result<Parsed, Fault> {
    Ok(Command::Fork(Box::new(json(body)?)).into())
}
