//! CPUID's facts about this machine.

use super::trap::cpuid as subleaf;
use core::arch::asm;
use core::arch::x86_64::CpuidResult;

/// Signature of KVM at leaf 0x40000000 (KVM Documentation/virt/kvm/x86/cpuid.rst).
const KVM_SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";
const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
const HYPERVISOR: u32 = 1 << 31;
const OSXSAVE_AND_AVX: u32 = 3 << 27;

fn leaf(leaf: u32) -> CpuidResult {
    subleaf(leaf, 0)
}

fn bytes(words: [u32; 3]) -> [u8; 12] {
    let mut out = [0; 12];
    for (to, w) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *to = w.to_le_bytes();
    }
    out
}

/// The vendor string.
pub fn vendor() -> [u8; 12] {
    let l = leaf(0);
    bytes([l.ebx, l.edx, l.ecx])
}

/// Logical processors: leaf 0xB level 1, else leaf 1.
pub fn processors() -> u32 {
    if leaf(0).eax >= 0xb {
        let cores = subleaf(0xb, 1);
        let kind = cores.ecx >> 8 & 0xff;
        if kind != 0 && cores.ebx & 0xffff != 0 {
            return cores.ebx & 0xffff;
        }
    }
    (leaf(1).ebx >> 16 & 0xff).max(1)
}

/// True if KVM offers kvmclock at the MSRs 0x4b564d00 and 0x4b564d01.
pub fn has_kvmclock() -> bool {
    if leaf(1).ecx & HYPERVISOR == 0 {
        return false;
    }
    let l = leaf(0x4000_0000);
    // An old KVM has 0 here and means 0x40000001.
    bytes([l.ebx, l.ecx, l.edx]) == KVM_SIGNATURE
        && (l.eax == 0 || l.eax > 0x4000_0000)
        && leaf(0x4000_0001).eax & KVM_FEATURE_CLOCKSOURCE2 != 0
}

pub fn has_cmpxchg16b() -> bool {
    leaf(1).ecx & 1 << 13 != 0
}

pub fn has_xsaveopt() -> bool {
    subleaf(0xd, 1).eax & 1 != 0
}

/// The widest registers that boot.s could enable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Simd {
    Sse,
    Avx,
    Avx512,
}

impl Simd {
    pub fn detect() -> Self {
        if leaf(1).ecx & OSXSAVE_AND_AVX != OSXSAVE_AND_AVX {
            return Self::Sse;
        }
        let (xcr0, _high): (u32, u32);
        // SAFETY: CR4.OSXSAVE is set, as CPUID just said, so xgetbv exists at every privilege level
        // (and, unlike CPUID, it tells of this machine everywhere).
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _high,
                 options(nomem, nostack, preserves_flags));
        }
        let avx512f = leaf(0).eax >= 7 && subleaf(7, 0).ebx & 1 << 16 != 0;
        match xcr0 {
            x if x & 0xe6 == 0xe6 && avx512f => Self::Avx512,
            x if x & 0x06 == 0x06 => Self::Avx,
            _ => Self::Sse,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Sse => "sse",
            Self::Avx => "avx",
            Self::Avx512 => "avx512",
        }
    }
}
