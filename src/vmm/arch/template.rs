//! Applies a CPU template.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::super::error::Error;
use crate::config::{CpuConfig, CpuidModifier, CpuidRegister, MsrModifier};
use crate::vmm::kvm_error::KvmError;

fn refused(what: String) -> Error {
    KvmError::CpuTemplate(what).into()
}

/// Checks that this host's KVM has the registers that the template changes, and can save them.
pub fn check_host(template: &CpuConfig, kvm: &Kvm, savable_msrs: &[u32]) -> Result<(), Error> {
    for capability in template.kvm_capabilities.iter().filter(|capability| capability.is_required) {
        if kvm.check_extension_raw(capability.number.into()) <= 0 {
            return Err(refused(format!("this host's KVM lacks the capability {}", capability.number)));
        }
    }
    for modifier in &template.msr_modifiers {
        if !savable_msrs.contains(&modifier.addr) {
            let why = "this host's KVM cannot save it, so a snapshot would lose it";
            return Err(refused(format!("MSR {:#x} cannot be set: {why}", modifier.addr)));
        }
    }
    Ok(())
}

fn entry_of<'a>(table: &'a mut CpuId, modifier: &CpuidModifier) -> Result<&'a mut kvm_cpuid_entry2, Error> {
    let wanted = |entry: &&mut kvm_cpuid_entry2| {
        (entry.function, entry.index, entry.flags) == (modifier.leaf, modifier.subleaf, modifier.flags)
    };
    table.as_mut_slice().iter_mut().find(wanted).ok_or_else(|| {
        let CpuidModifier { leaf, subleaf, flags, .. } = modifier;
        refused(format!("this host's KVM has no CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, flags {flags}"))
    })
}

fn register(entry: &mut kvm_cpuid_entry2, name: CpuidRegister) -> &mut u32 {
    match name {
        CpuidRegister::Eax => &mut entry.eax,
        CpuidRegister::Ebx => &mut entry.ebx,
        CpuidRegister::Ecx => &mut entry.ecx,
        CpuidRegister::Edx => &mut entry.edx,
    }
}

/// Changes the CPUID that KVM supports into the one that the template asks for.
pub fn apply_cpuid(template: &CpuConfig, table: &mut CpuId) -> Result<(), Error> {
    for modifier in &template.cpuid_modifiers {
        let entry = entry_of(table, modifier)?;
        for change in &modifier.modifiers {
            let word = register(entry, change.register);
            *word = change.bitmap.apply(u64::from(*word)) as u32;
        }
    }
    Ok(())
}

/// The component that can override the template.
#[derive(Clone, Copy, Debug)]
pub enum Decider {
    /// The machine sets topology, hypervisor and nested virtualisation bits.
    Machine,
    /// KVM_PVM runs user code of the guest natively on CPUs that may not trap CPUID; such code sees KVM's values.
    Kvm,
}

/// Checks that `table` has the template's bits after `decider` has changed it. Of changes to the same bit the last
/// counts.
pub fn check_cpuid(template: &CpuConfig, table: &CpuId, decider: Decider) -> Result<(), Error> {
    let mut wanted = table.clone();
    for modifier in &template.cpuid_modifiers {
        // The machine leaves out leaves that it does not use, and the template's bits with them.
        let Ok(entry) = entry_of(&mut wanted, modifier) else { continue };
        for change in &modifier.modifiers {
            let word = register(entry, change.register);
            *word = change.bitmap.apply(u64::from(*word)) as u32;
        }
    }
    let differs = wanted.as_slice().iter().zip(table.as_slice()).find(|(wanted, got)| wanted != got);
    match differs {
        None => Ok(()),
        Some((entry, _)) => {
            let why = match decider {
                Decider::Machine => "follow from the machine's shape and cannot be changed",
                Decider::Kvm => "are the host's own on this KVM, which cannot hide them from guests",
            };
            Err(refused(format!("bits of CPUID leaf {:#x}, subleaf {:#x} {why}", entry.function, entry.index)))
        }
    }
}

/// Changes the MSRs of a vCPU.
pub fn apply_msrs(template: &CpuConfig, vcpu: &VcpuFd, index: u8) -> Result<(), Error> {
    template.msr_modifiers.iter().try_for_each(|modifier| apply_msr(modifier, vcpu, index))
}

fn apply_msr(modifier: &MsrModifier, vcpu: &VcpuFd, vcpu_index: u8) -> Result<(), Error> {
    let failed = |doing| move |source| KvmError::Vcpu { doing, vcpu: vcpu_index, source };
    let one = |entry| Msrs::from_entries(&[entry]).map_err(|error| refused(format!("{error:?}")));
    let index = modifier.addr;
    let mut msrs = one(kvm_msr_entry { index, ..Default::default() })?;
    if vcpu.get_msrs(&mut msrs).map_err(failed("read an MSR"))? != 1 {
        return Err(refused(format!("this host's KVM has no MSR {index:#x}")));
    }
    let data = modifier.bitmap.apply(msrs.as_slice()[0].data);
    let msrs = one(kvm_msr_entry { index, data, ..Default::default() })?;
    match vcpu.set_msrs(&msrs).map_err(failed("set an MSR"))? {
        1 => Ok(()),
        _ => Err(KvmError::MsrRefused { vcpu: vcpu_index, index, value: data }.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(leaf: u32, register: &str, bitmap: &str) -> CpuConfig {
        let modifier = serde_json::json!({ "register": register, "bitmap": bitmap });
        let modifiers = serde_json::json!([{
            "leaf": leaf.to_string(), "subleaf": "0", "flags": 0, "modifiers": [modifier]
        }]);
        serde_json::from_value(serde_json::json!({ "cpuid_modifiers": modifiers })).unwrap()
    }

    #[test]
    fn cpuid_bits_are_masked_and_what_the_machine_decides_cannot_be() {
        let leaf = kvm_cpuid_entry2 { function: 1, ebx: 7, ecx: 0b1110, ..Default::default() };
        let mut table = CpuId::from_entries(&[leaf]).unwrap();
        let masked = template(1, "ecx", "0b0x1");
        apply_cpuid(&masked, &mut table).unwrap();
        assert_eq!(table.as_slice()[0].ecx, 0b1011);
        check_cpuid(&masked, &table, Decider::Machine).unwrap();
        let error = check_cpuid(&template(1, "ebx", "0b0"), &table, Decider::Machine).unwrap_err().to_string();
        assert!(error.contains("CPUID leaf 0x1") && error.contains("cannot be changed"), "{error}");
        let error = apply_cpuid(&template(9, "eax", "0b0"), &mut table).unwrap_err().to_string();
        assert!(error.contains("no CPUID leaf 0x9"), "{error}");
    }
}
