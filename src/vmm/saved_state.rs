//! The state of a snapshot, decoded: the form in which a restore and a rewind apply it.

use serde::de::DeserializeOwned;

use super::arch::layout;
use super::devices::SavedDevice;
use super::error::Error;
use super::restore::StateError;
use super::state::{self, MachineState, VcpuState, VmState};
use crate::config;
use crate::devices::{FwCfgState, I8042State, SerialState, VmGenIdState};
use crate::snapshot::{SectionInfo, SectionKind, Snapshot};

/// The state of a snapshot, decoded.
pub(crate) struct SavedState {
    pub machine: MachineState,
    pub vm: VmState,
    pub vcpus: Vec<VcpuState>,
    pub serial: SerialState,
    /// Machines without ACPI, and those of tvmm 0.1, have none.
    pub vmgenid: Option<VmGenIdState>,
    pub virtio: Vec<SavedDevice>,
    pub fw_cfg: FwCfgState,
}

impl SavedState {
    /// Returns whether the guest has a virtio device of this type.
    pub fn has_device(&self, device_type: u32) -> bool {
        self.virtio.iter().any(|device| device.device_type == device_type)
    }

    /// Decodes the state of `snapshot`; sections that this build does not know are refused.
    pub fn read(snapshot: &Snapshot) -> Result<Self, Error> {
        let machine: MachineState = state::decode(snapshot, SectionKind::Machine, 0)?;
        let count = machine.vcpu_count;
        if !(1..=config::MAX_VCPU_COUNT).contains(&count) {
            return Err(StateError::Section { section: "Machine".into(), what: format!("it has {count} vCPUs") }.into());
        }
        let vcpus = (0..u32::from(count)).map(|index| state::decode(snapshot, SectionKind::Vcpu, index));
        let devices = snapshot.sections().iter().filter(|section| section.kind == SectionKind::Virtio).count();
        let virtio = (0..devices as u32).map(|index| state::decode(snapshot, SectionKind::Virtio, index));
        let state = SavedState {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            vm: state::decode(snapshot, SectionKind::Vm, 0)?,
            serial: state::decode(snapshot, SectionKind::Serial, 0)?,
            vmgenid: decode_vmgenid(snapshot)?,
            virtio: virtio.collect::<Result<_, _>>()?,
            fw_cfg: optional(snapshot, SectionKind::Metadata)?.unwrap_or_default(),
            machine,
        };
        let I8042State {} = state::decode(snapshot, SectionKind::I8042, 0)?;
        snapshot.sections().iter().try_for_each(|section| check_known(section, count))?;
        Ok(state)
    }
}

fn decode_vmgenid(snapshot: &Snapshot) -> Result<Option<VmGenIdState>, Error> {
    let Some(state) = optional::<VmGenIdState>(snapshot, SectionKind::VmGenId)? else { return Ok(None) };
    let known = state.gsi < layout::GSI_COUNT;
    let what = format!("the interrupt controller has no input {}", state.gsi);
    if known { Ok(Some(state)) } else { Err(StateError::Section { section: "VmGenId".into(), what }.into()) }
}

/// The section of an optional kind, of which a snapshot has at most one.
fn optional<T: DeserializeOwned>(snapshot: &Snapshot, kind: SectionKind) -> Result<Option<T>, Error> {
    let there = snapshot.sections().iter().any(|section| section.kind == kind);
    if there { state::decode(snapshot, kind, 0).map(Some) } else { Ok(None) }
}

/// Refuses a section that this build does not know: it may be a device that the guest depends on.
fn check_known(section: &SectionInfo, vcpu_count: u8) -> Result<(), Error> {
    let known = match section.kind {
        SectionKind::Machine
        | SectionKind::Vm
        | SectionKind::Serial
        | SectionKind::I8042
        | SectionKind::VmGenId
        | SectionKind::Metadata => section.instance == 0,
        SectionKind::Vcpu => section.instance < u32::from(vcpu_count),
        SectionKind::Virtio => section.instance < config::MAX_DEVICES as u32,
        _ => false,
    };
    let what = "this build of tvmm does not know it; restore with the version that wrote it".to_string();
    let name = || format!("{:?} {}", section.kind, section.instance);
    if known { Ok(()) } else { Err(StateError::Section { section: name(), what }.into()) }
}
