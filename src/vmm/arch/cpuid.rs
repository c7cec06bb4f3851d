//! The guest's CPUID: the features that KVM supports, with the topology of this VM.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use vmm_sys_util::fam;

const LEAF1_ECX_VMX: u32 = 1 << 5;
const LEAF80000001_ECX_SVM: u32 = 1 << 2;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const SIGNIFICANT_INDEX: u32 = 1;

/// CPUID of vCPU `index` of `count`, one core per vCPU in one package, no SMT; APIC id = index.
pub fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> Result<CpuId, fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        // Leaf 0x1f would repeat 0xb; leaving it out makes guests read 0xb. 0x8000_000a describes SVM.
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_000a))
        .copied()
        .collect();
    for entry in &mut entries {
        set_topology(entry, index, count);
    }
    if supported.as_slice().iter().any(|entry| entry.function == 0 && entry.eax >= 0xb) {
        entries.extend(extended_topology(index, count));
    }
    CpuId::from_entries(&entries)
}

/// Bits of an APIC id that number the cores of the package.
fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn set_topology(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | u32::from(index) << 24 | u32::from(count) << 16;
            // KVM emulates the TSC-deadline timer on its own LAPIC but does not list it on every host.
            entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE;
            entry.ecx &= !(LEAF1_ECX_OSXSAVE | LEAF1_ECX_VMX);
            entry.edx = if count > 1 { entry.edx | LEAF1_EDX_HTT } else { entry.edx & !LEAF1_EDX_HTT };
        }
        // Intel's cache leaf: ids per package; each cache is shared by no other core or by all.
        0x4 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { u32::from(count) - 1 } else { 0 };
            let cores = (1u32 << core_bits(count)) - 1;
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | cores << 26;
        }
        // No nested virtualisation: its state could not be saved.
        0x8000_0001 => entry.ecx &= !LEAF80000001_ECX_SVM,
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits(count) << 12 | (u32::from(count) - 1),
        0x8000_001e => {
            entry.eax = u32::from(index);
            entry.ebx = u32::from(index);
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Leaf 0xb (Intel SDM vol. 2A, "Extended Topology Enumeration"; AMD APM vol. 3).
fn extended_topology(index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, shift: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: subleaf,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: kind << 8 | subleaf,
        edx: u32::from(index),
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, core_bits(count), u32::from(count), 2), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_virtualisation_is_hidden() {
        let leaf = |function| kvm_cpuid_entry2 { function, ecx: u32::MAX, ..Default::default() };
        let cpuid =
            for_vcpu(&CpuId::from_entries(&[leaf(1), leaf(0x8000_0001), leaf(0x8000_000a)]).unwrap(), 0, 1).unwrap();
        let ecx = |function| cpuid.as_slice().iter().find(|entry| entry.function == function).map(|entry| entry.ecx);
        assert_eq!(ecx(1).unwrap() & LEAF1_ECX_VMX, 0);
        assert_eq!(ecx(0x8000_0001).unwrap() & LEAF80000001_ECX_SVM, 0);
        assert_eq!(ecx(0x8000_000a), None);
    }

    #[test]
    fn each_vcpu_gets_its_own_apic_id_and_the_same_count() {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let supported = CpuId::from_entries(&[leaf(0, 0x10), leaf(1, 0), leaf(0xb, 7), leaf(0x8000_001e, 0)]).unwrap();
        let cpuid = for_vcpu(&supported, 3, 4).unwrap();
        let find = |function, index| {
            *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
        };
        assert_eq!(find(1, 0).ebx >> 24, 3);
        assert_eq!(find(1, 0).ebx >> 16 & 0xff, 4);
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).edx), (2, 4, 3));
        assert_eq!(find(0x8000_001e, 0).eax, 3);
        assert_eq!(cpuid.as_slice().iter().filter(|entry| entry.function == 0xb).count(), 3);
    }
}
