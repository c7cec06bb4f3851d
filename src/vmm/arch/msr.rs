//! Model-specific registers: their values at boot, and the rules for saving and restoring them.

use kvm_bindings::kvm_msr_entry;

pub const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const KVM_WALL_CLOCK: u32 = 0x11;
const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs on, memory is write-back unless one says otherwise.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// The values that firmware would have set before it starts a kernel.
pub fn boot_entries() -> Vec<kvm_msr_entry> {
    [
        (IA32_SYSENTER_CS, 0),
        (IA32_SYSENTER_ESP, 0),
        (IA32_SYSENTER_EIP, 0),
        (IA32_TSC, 0),
        (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
    .to_vec()
}

/// The memory type range registers (SDM volume 3, 12.11) with their values after a reset.
pub fn reset_memory_types() -> Vec<kvm_msr_entry> {
    let variable = 0x200..=0x20f;
    let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
    let all = variable.chain(fixed).chain([IA32_MTRR_DEF_TYPE]);
    all.map(|index| kvm_msr_entry { index, ..Default::default() }).collect()
}

/// Returns whether the register changes by itself: the TSC, and its deadline, which is 0 once it is past.
pub fn changes_with_time(index: u32) -> bool {
    matches!(index, IA32_TSC | IA32_TSC_DEADLINE)
}

/// Returns whether a write to the register makes KVM write the time to guest memory, once.
pub fn is_wall_clock(index: u32) -> bool {
    matches!(index, KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW)
}

/// Puts saved MSRs into the order in which they must be set: the TSC-deadline timer compares with the TSC, so it is
/// armed last. The wall clock's MSRs are left out: a write to one is not state but a request to write the time to an
/// address once (KVM `Documentation/virt/kvm/x86/msr.rst`), and the guest may use that memory for something else by
/// now.
pub fn order_for_restore(entries: &mut Vec<kvm_msr_entry>) {
    entries.retain(|entry| !is_wall_clock(entry.index));
    entries.sort_by_key(|entry| entry.index == IA32_TSC_DEADLINE);
}

/// Returns whether a guest can do without an MSR that this host's KVM refuses to set: a register of read-only facts
/// about the CPU, or one that was 0 in the snapshot.
pub fn may_be_refused(entry: &kvm_msr_entry) -> bool {
    entry.index == IA32_ARCH_CAPABILITIES || entry.data == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_armed_after_everything_else() {
        let entry = |index| kvm_msr_entry { index, ..Default::default() };
        let mut entries = vec![entry(IA32_TSC_DEADLINE), entry(0xc000_0080), entry(IA32_TSC)];
        order_for_restore(&mut entries);
        let order: Vec<u32> = entries.iter().map(|entry| entry.index).collect();
        assert_eq!(order, [0xc000_0080, IA32_TSC, IA32_TSC_DEADLINE]);
    }

    #[test]
    fn the_wall_clock_is_not_written_to_guest_memory_again() {
        let entry = |index| kvm_msr_entry { index, data: 0x1000, ..Default::default() };
        let mut entries = vec![entry(KVM_WALL_CLOCK), entry(IA32_TSC), entry(KVM_WALL_CLOCK_NEW)];
        order_for_restore(&mut entries);
        assert_eq!(entries.len(), 1);
    }
}
