//! The features of a host that a snapshot depends on.

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};

use super::error::Error;
use crate::snapshot::{FeatureWord, HostFacts};
use crate::vmm::restore::StateError;

/// CPUID words that hold feature bits: leaf, subleaf, register.
const FEATURE_WORDS: [(u32, u32, &str); 12] = [
    (0x1, 0, "ecx"),
    (0x1, 0, "edx"),
    (0x7, 0, "ebx"),
    (0x7, 0, "ecx"),
    (0x7, 0, "edx"),
    (0x7, 1, "eax"),
    (0x7, 1, "edx"),
    (0xd, 1, "eax"),
    (0x8000_0001, 0, "ecx"),
    (0x8000_0001, 0, "edx"),
    (0x8000_0008, 0, "ebx"),
    (0x8000_0021, 0, "eax"),
];
/// CPUID.1:ECX bit 27 mirrors CR4.OSXSAVE: a fact about the running kernel, not about the CPU.
const OSXSAVE: u32 = 1 << 27;

/// Capabilities of KVM that a restore uses.
const CAPABILITIES: [(&str, Cap); 7] = [
    ("irqchip", Cap::Irqchip),
    ("pit2", Cap::Pit2),
    ("pit_state2", Cap::PitState2),
    ("xsave", Cap::Xsave),
    ("xcrs", Cap::Xcrs),
    ("debugregs", Cap::Debugregs),
    ("adjust_clock", Cap::AdjustClock),
];

fn register(words: &std::arch::x86_64::CpuidResult, name: &str) -> u32 {
    match name {
        "eax" => words.eax,
        "ebx" => words.ebx,
        "ecx" => words.ecx,
        _ => words.edx,
    }
}

fn cpuid(leaf: u32, subleaf: u32) -> std::arch::x86_64::CpuidResult {
    // CPUID answers for a leaf above the maximum with another leaf's words (Intel SDM, CPUID); such a leaf counts as
    // zero.
    if __cpuid_count(leaf & 0x8000_0000, 0).eax < leaf {
        return std::arch::x86_64::CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
    }
    __cpuid_count(leaf, subleaf)
}

fn vendor() -> String {
    let words = cpuid(0, 0);
    let bytes: Vec<u8> = [words.ebx, words.edx, words.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn model() -> String {
    let eax = cpuid(1, 0).eax;
    let family = (eax >> 8 & 0xf) + if eax >> 8 & 0xf == 0xf { eax >> 20 & 0xff } else { 0 };
    let model = (eax >> 4 & 0xf) | (eax >> 12 & 0xf0);
    format!("family {family:#x} model {model:#x} stepping {:#x}", eax & 0xf)
}

/// Bits of XCR0 this CPU supports (CPUID.0xD).
fn xcr0_supported() -> u64 {
    let words = cpuid(0xd, 0);
    u64::from(words.edx) << 32 | u64::from(words.eax)
}

/// The facts of this host, for the manifest.
pub fn facts(kvm: &Kvm) -> HostFacts {
    let kernel_release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    HostFacts {
        cpu_vendor: vendor(),
        cpu_model: model(),
        features: FEATURE_WORDS
            .iter()
            .map(|&(leaf, subleaf, name)| FeatureWord {
                leaf,
                subleaf,
                register: name.to_string(),
                value: register(&cpuid(leaf, subleaf), name),
            })
            .collect(),
        xcr0: xcr0_supported(),
        kernel_release: kernel_release.trim().to_string(),
        kvm_capabilities: CAPABILITIES
            .iter()
            .map(|&(name, cap)| (name.to_string(), i64::from(kvm.check_extension_int(cap))))
            .collect(),
    }
}

/// Checks that this host has every feature that the guest has seen on the host of the snapshot. Features that the guest
/// never saw (`guest_cpuid`) are not needed. The error lists all differences.
pub fn check(recorded: &HostFacts, guest_cpuid: &[kvm_cpuid_entry2], guest_xcr0: u64, kvm: &Kvm) -> Result<(), Error> {
    let mut differences = Vec::new();
    let vendor = vendor();
    if recorded.cpu_vendor != vendor {
        differences.push(format!("the CPU is {vendor}, the snapshot was taken on {}", recorded.cpu_vendor));
    }
    for word in &recorded.features {
        let seen = guest_cpuid.iter().find(|entry| entry.function == word.leaf && entry.index == word.subleaf).map_or(
            0,
            |entry| {
                let words =
                    std::arch::x86_64::CpuidResult { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx };
                register(&words, &word.register)
            },
        );
        let osxsave = if (word.leaf, word.register.as_str()) == (1, "ecx") { OSXSAVE } else { 0 };
        let here = register(&cpuid(word.leaf, word.subleaf), &word.register);
        let missing = word.value & seen & !here & !osxsave;
        if missing != 0 {
            differences.push(format!(
                "CPUID leaf {:#x}.{} {} lacks the bits {missing:#010x}",
                word.leaf, word.subleaf, word.register
            ));
        }
    }
    let xcr0_missing = guest_xcr0 & !xcr0_supported();
    if xcr0_missing != 0 {
        differences.push(format!("XCR0 lacks the bits {xcr0_missing:#x}"));
    }
    for (name, value) in &recorded.kvm_capabilities {
        let known = CAPABILITIES.iter().find(|(known, _)| known == name);
        if *value > 0 && known.is_some_and(|&(_, cap)| kvm.check_extension_int(cap) <= 0) {
            differences.push(format!("KVM lacks the capability {name}"));
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(StateError::Host(differences).into()) }
}

/// Returns whether KVM runs guests on their own page tables with a second stage below them (EPT, NPT). Other kinds of
/// KVM walk and mark the guest's page tables themselves, and may deliver events by software.
pub fn has_second_stage_paging() -> bool {
    let is_on = |path| std::fs::read(path).is_ok_and(|text| matches!(text.first(), Some(b'Y' | b'1')));
    is_on("/sys/module/kvm_intel/parameters/ept") || is_on("/sys/module/kvm_amd/parameters/npt")
}
