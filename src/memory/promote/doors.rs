//! Fuzz door of promotion (`docs/fuzzing.md`): the instruction that a guest stopped at, its registers, and its page
//! tables.

use arbitrary::Unstructured;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

use super::operands::{Accesses, Cpu, Extended, INSTRUCTION_MAX, STRING_BYTES_MAX, accesses};
use super::view::{LinearView, descriptors, interrupt_table};
use crate::sys::guest_memory::{Memory, region_bitmap};

/// Guest memory, bytes.
const RAM: usize = 64 << 10;
/// The largest XSAVE area that a guest of the door has.
const AREA: u64 = 8192;

fn registers(input: &mut Unstructured) -> arbitrary::Result<kvm_regs> {
    let mut regs = kvm_regs { rip: input.arbitrary()?, rflags: input.arbitrary()?, ..Default::default() };
    for register in [
        &mut regs.rax,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rbx,
        &mut regs.rsp,
        &mut regs.rbp,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.r8,
        &mut regs.r15,
    ] {
        *register = input.arbitrary()?;
    }
    Ok(regs)
}

fn system(input: &mut Unstructured) -> arbitrary::Result<kvm_sregs> {
    let mode: u8 = input.arbitrary()?;
    let bit = |number: u8| u64::from(mode >> number & 1);
    let segment = |base| kvm_segment { base, limit: u32::MAX, present: 1, db: mode >> 1 & 1, ..Default::default() };
    let table = |base| kvm_dtable { base, limit: u16::MAX, ..Default::default() };
    let base = input.arbitrary()?;
    let mut sregs = kvm_sregs {
        cr0: bit(2) << 31 | bit(3),
        cr3: u64::from(input.arbitrary::<u8>()? & 15) << 12,
        cr4: bit(4) << 4 | bit(5) << 5 | bit(6) << 12,
        efer: bit(7) << 10,
        cs: segment(0),
        ss: segment(base),
        fs: segment(base),
        ldt: segment(base),
        tr: segment(input.arbitrary()?),
        gdt: table(base),
        idt: table(base),
        ..Default::default()
    };
    sregs.cs.l = mode & 1;
    Ok(sregs)
}

/// Memory that begins with the bytes given, again and again: tables that lead to each other.
fn memory(bytes: &[u8]) -> Option<Memory> {
    let builder = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(RAM, region_bitmap(RAM));
    let region: MmapRegion<_> = builder.with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE).build().ok()?;
    let memory = Memory::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0))?]).ok()?;
    let all: Vec<u8> = bytes.iter().copied().cycle().take(if bytes.is_empty() { 0 } else { RAM }).collect();
    vm_memory::Bytes::write_slice(&memory, &all, GuestAddress(0)).ok()?;
    Some(memory)
}

/// The accesses of an instruction, and the pages that they lead to.
pub fn instruction(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let Ok(sregs) = system(&mut input) else { return };
    let Ok(regs) = registers(&mut input) else { return };
    let Ok(code) = input.bytes(INSTRUCTION_MAX.min(input.len())) else { return };
    let fill = data.last().copied().unwrap_or(0);
    let has_extended = fill & 1 == 0;
    let extended = || {
        let xsave = vec![fill; 2696];
        let state = Extended { xsave, ymm_high: 576, zmm_high: 1152, zmm_16_to_31: 1664, area_len: AREA };
        has_extended.then_some(state)
    };
    let cpu = Cpu { regs: &regs, sregs: &sregs, extended: &extended };
    let Accesses { written, read } = accesses(&cpu, code).unwrap_or_default();
    for span in written.iter().chain(&read) {
        assert!(span.len <= STRING_BYTES_MAX, "an instruction accesses {} bytes", span.len);
        let is_within = cpu.bitness() == 64 || span.start <= u64::from(u32::MAX);
        assert!(is_within, "an instruction of a 32-bit guest writes beyond 4 GiB");
    }
    let Some(memory) = memory(input.take_rest()) else { return };
    let view = LinearView::new(&memory, &sregs);
    let _ = view.pages(&written);
    let _ = view.pages(&view.stacks(&cpu));
    let _ = view.pages(&descriptors(&sregs));
    let _ = view.pages(&[interrupt_table(&sregs)]);
    let mut bytes = [0; INSTRUCTION_MAX];
    assert!(view.read(cpu.code(regs.rip), &mut bytes) <= bytes.len());
    let _ = view.tables_to_be_written();
}
