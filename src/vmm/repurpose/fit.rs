//! The check that a machine can become that of a snapshot: everything that KVM fixes at its creation must be equal.

use kvm_bindings::kvm_cpuid_entry2;

use super::NotRepurposable;
use crate::devices::VmGenId;
use crate::devices::virtio::id;
use crate::vmm::error::Error;
use crate::vmm::machine::{Machine, Paused, Shape};
use crate::vmm::own_memory::MemoryChange;
use crate::vmm::saved_state::SavedState;
use crate::vmm::state;

impl Machine<Paused> {
    /// Compares the machine with the one of `saved`, whose shape is `wanted`.
    ///
    /// # Errors
    /// The first difference that a repurposed machine cannot have.
    pub(super) fn check_fit(&self, saved: &SavedState, wanted: &Shape) -> Result<(), Error> {
        let core = &self.core;
        let shape = &core.shape;
        check("number of vCPUs", shape.vcpu_count, wanted.vcpu_count)?;
        check("memory in MiB", shape.mem_size_mib, wanted.mem_size_mib)?;
        if shape.track_dirty_pages != wanted.track_dirty_pages {
            return Err(NotRepurposable::Tracking { has: shape.track_dirty_pages }.into());
        }
        let place = |gpa: u64, gsi: u32| format!("at {gpa:#x}, interrupt {gsi}");
        let described = |id: Option<crate::devices::VmGenIdState>| match id {
            Some(id) => place(id.gpa, id.gsi),
            None => "absent".to_owned(),
        };
        let generation_id = core.devices.vmgenid.as_ref().map(VmGenId::save);
        check("VM generation id", described(generation_id), described(saved.vmgenid))?;
        let has = core.devices.virtio.kinds();
        let wants: Vec<_> =
            saved.virtio.iter().map(|saved| (saved.device_type, saved.transport.queue_count())).collect();
        if has.iter().any(|&(device_type, _)| device_type == id::PMEM) {
            return Err(NotRepurposable::Pmem.into());
        }
        check("set of devices", described_devices(&has), described_devices(&wants))?;
        self.check_vcpus(saved)
    }

    fn check_vcpus(&self, saved: &SavedState) -> Result<(), Error> {
        let origin = self.core.own_memory(MemoryChange::Repurpose).map_err(NotRepurposable::from)?;
        let indices = state::msr_indices(&self.core.kvm)?;
        for ((thread, former), saved) in self.state.threads.iter().zip(&origin.saved.vcpus).zip(&saved.vcpus) {
            let vcpu = thread.vcpu();
            let index = vcpu.index;
            if let Some(leaf) = differing_leaf(&former.cpuid()?, &saved.cpuid()?) {
                return Err(NotRepurposable::Cpuid { vcpu: index, leaf }.into());
            }
            let khz = vcpu.fd.get_tsc_khz().unwrap_or(0);
            if !saved.fits_tsc(khz) {
                let has = khz.to_string();
                let wants = saved.tsc_khz().to_string();
                return Err(NotRepurposable::Differs { what: "TSC frequency in kHz", has, wants }.into());
            }
            if let Some(msr) = saved.missing_msr(&vcpu.fd, index, &indices)? {
                return Err(NotRepurposable::Msr { vcpu: index, msr }.into());
            }
        }
        Ok(())
    }
}

fn check<T: PartialEq + ToString>(what: &'static str, has: T, wants: T) -> Result<(), NotRepurposable> {
    if has == wants {
        return Ok(());
    }
    Err(NotRepurposable::Differs { what, has: has.to_string(), wants: wants.to_string() })
}

/// The devices in their order, each with the number of its queues, which tells its optional features.
fn described_devices(devices: &[(u32, usize)]) -> String {
    let name = |device_type| match device_type {
        id::NET => "network".to_owned(),
        id::BLOCK => "drive".to_owned(),
        id::ENTROPY => "entropy".to_owned(),
        id::BALLOON => "balloon".to_owned(),
        id::VSOCK => "vsock".to_owned(),
        id::PMEM => "pmem".to_owned(),
        other => format!("type {other}"),
    };
    let described: Vec<String> =
        devices.iter().map(|&(device_type, queues)| format!("{} with {queues} queues", name(device_type))).collect();
    if described.is_empty() { "empty".to_owned() } else { described.join(", ") }
}

/// The first leaf that differs between two CPUID tables. Bits that follow the guest's own settings are left out,
/// because KVM changes them with the state that is loaded.
fn differing_leaf(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> Option<u32> {
    let differs = |(one, other): (&kvm_cpuid_entry2, &kvm_cpuid_entry2)| {
        (fixed_part(one) != fixed_part(other)).then_some(one.function)
    };
    let first = one.iter().zip(other).find_map(differs);
    let longer = || one.get(other.len()).or(other.get(one.len())).map(|entry| entry.function);
    first.or_else(longer)
}

/// The leaf, its index and its registers, without the bits that KVM derives from the guest's state (Linux
/// `kvm_update_cpuid_runtime`): OSXSAVE, APIC, MONITOR, OSPKE, and the sizes of the XSAVE area.
fn fixed_part(entry: &kvm_cpuid_entry2) -> [u32; 7] {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
    let (ebx, ecx, edx) = match (function, index) {
        (0x1, _) => (ebx, ecx & !(1 << 27 | 1 << 3), edx & !(1 << 9)),
        (0x7, 0) => (ebx, ecx & !(1 << 4), edx),
        (0xd, 0 | 1) => (0, ecx, edx),
        _ => (ebx, ecx, edx),
    };
    [function, index, flags, eax, ebx, ecx, edx]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..Default::default() }
    }

    #[test]
    fn a_feature_differs_and_a_setting_of_the_guest_does_not() {
        let table = [leaf(0, 1), leaf(1, 1 << 27), leaf(7, 0)];
        assert_eq!(differing_leaf(&table, &table), None);
        assert_eq!(differing_leaf(&table, &[leaf(0, 1), leaf(1, 0), leaf(7, 1 << 4)]), None, "OSXSAVE and OSPKE");
        assert_eq!(differing_leaf(&table, &[leaf(0, 1), leaf(1, 1 << 27 | 1), leaf(7, 0)]), Some(1));
        assert_eq!(differing_leaf(&table, &table[..2]), Some(7));
        assert_eq!(differing_leaf(&table[..1], &table), Some(1));
    }
}
