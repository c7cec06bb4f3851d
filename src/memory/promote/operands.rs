//! The memory that an instruction accesses, as linear addresses: its operands, and accesses that it does not name.

use iced_x86::{
    Decoder, DecoderOptions, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind, Register,
    UsedMemory,
};
use kvm_bindings::{kvm_regs, kvm_sregs};

/// The longest instruction, bytes (Intel SDM vol. 2, 2.3.11).
pub const INSTRUCTION_MAX: usize = 15;
/// Limit for a string instruction, bytes: its repeat count may ask for any amount.
pub(super) const STRING_BYTES_MAX: u64 = 256 << 10;

/// Bytes at a linear address. They may wrap around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    pub len: u64,
}

/// The memory accesses of an instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// Bytes that it writes, or may write.
    pub written: Vec<Span>,
    /// Bytes that it only reads.
    pub read: Vec<Span>,
}

/// CPU state that only few instructions depend on.
#[derive(Clone, Debug, Default)]
pub struct Extended {
    /// The XSAVE area in the standard format.
    pub xsave: Vec<u8>,
    /// Offsets in it of bits 128 to 255 of vector registers 0 to 15, of their bits 256 to 511, and of registers 16 to
    /// 31 (CPUID leaf 0xD).
    pub ymm_high: usize,
    pub zmm_high: usize,
    pub zmm_16_to_31: usize,
    /// Bytes that XSAVE and its relatives write at most.
    pub area_len: u64,
}

/// The CPU's state before the instruction.
pub struct Cpu<'a> {
    pub regs: &'a kvm_regs,
    pub sregs: &'a kvm_sregs,
    /// Called when an instruction needs it.
    pub extended: &'a dyn Fn() -> Option<Extended>,
}

impl Cpu<'_> {
    /// 64, 32 or 16.
    pub fn bitness(&self) -> u32 {
        const LMA: u64 = 1 << 10;
        const PROTECTED: u64 = 1;
        const VIRTUAL_8086: u64 = 1 << 17;
        match (self.sregs.efer & LMA != 0 && self.sregs.cs.l != 0, self.sregs.cs.db != 0) {
            (true, _) => 64,
            _ if self.sregs.cr0 & PROTECTED == 0 || self.regs.rflags & VIRTUAL_8086 != 0 => 16,
            (false, true) => 32,
            (false, false) => 16,
        }
    }

    /// The linear address of an offset in the code segment.
    pub fn code(&self, offset: u64) -> u64 {
        if self.bitness() == 64 { offset } else { self.sregs.cs.base.wrapping_add(offset) & 0xffff_ffff }
    }

    /// The linear address of the stack pointer.
    pub fn stack(&self) -> u64 {
        match self.bitness() {
            64 => self.regs.rsp,
            _ if self.sregs.ss.db != 0 => self.sregs.ss.base.wrapping_add(self.regs.rsp & 0xffff_ffff) & 0xffff_ffff,
            _ => self.sregs.ss.base.wrapping_add(self.regs.rsp & 0xffff) & 0xffff_ffff,
        }
    }

    /// A general register, or the base of a segment.
    fn register(&self, register: Register) -> Option<u64> {
        let regs = self.regs;
        let sregs = self.sregs;
        let is_64 = self.bitness() == 64;
        let flat = |base| if is_64 { 0 } else { base };
        let full = match register.full_register() {
            Register::RAX => regs.rax,
            Register::RCX => regs.rcx,
            Register::RDX => regs.rdx,
            Register::RBX => regs.rbx,
            Register::RSP => regs.rsp,
            Register::RBP => regs.rbp,
            Register::RSI => regs.rsi,
            Register::RDI => regs.rdi,
            Register::R8 => regs.r8,
            Register::R9 => regs.r9,
            Register::R10 => regs.r10,
            Register::R11 => regs.r11,
            Register::R12 => regs.r12,
            Register::R13 => regs.r13,
            Register::R14 => regs.r14,
            Register::R15 => regs.r15,
            Register::FS => return Some(sregs.fs.base),
            Register::GS => return Some(sregs.gs.base),
            Register::CS => return Some(flat(sregs.cs.base)),
            Register::DS => return Some(flat(sregs.ds.base)),
            Register::ES => return Some(flat(sregs.es.base)),
            Register::SS => return Some(flat(sregs.ss.base)),
            _ => return None,
        };
        match (register.size(), register) {
            (8, _) => Some(full),
            (4, _) => Some(full & 0xffff_ffff),
            (2, _) => Some(full & 0xffff),
            (1, Register::AH | Register::BH | Register::CH | Register::DH) => Some(full >> 8 & 0xff),
            (1, _) => Some(full & 0xff),
            _ => None,
        }
    }
}

impl Extended {
    /// Element `index`, of `size` bytes (4 or 8), of a vector register.
    fn lane(&self, register: Register, index: usize, size: usize) -> Option<u64> {
        let number = register.number();
        let at = index * size;
        let offset = match (number, at) {
            (16.., _) => self.zmm_16_to_31 + 64 * (number - 16) + at,
            (_, ..16) => 160 + 16 * number + at,
            (_, 16..32) => self.ymm_high + 16 * number + at - 16,
            _ => self.zmm_high + 32 * number + at - 32,
        };
        let bytes = self.xsave.get(offset..offset + size)?;
        let mut lane = [0; 8];
        lane[..size].copy_from_slice(bytes);
        Some(u64::from_le_bytes(lane))
    }
}

/// The memory accesses of the instruction in `bytes` (at RIP). `None` if it is invalid or incomplete.
pub fn accesses(cpu: &Cpu, bytes: &[u8]) -> Option<Accesses> {
    let mut decoder = Decoder::with_ip(cpu.bitness(), bytes, cpu.regs.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut factory = InstructionInfoFactory::new();
    let mut accesses = Accesses::default();
    let is_64 = cpu.bitness() == 64;
    for memory in factory.info(&instruction).used_memory() {
        let to = if is_write(memory.access()) { &mut accesses.written } else { &mut accesses.read };
        let limit = |span: Span| Span { start: if is_64 { span.start } else { span.start & 0xffff_ffff }, ..span };
        to.extend(spans(cpu, &instruction, memory).into_iter().map(limit));
    }
    Some(accesses)
}

fn is_write(access: OpAccess) -> bool {
    use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite)
}

fn spans(cpu: &Cpu, instruction: &Instruction, memory: &UsedMemory) -> Vec<Span> {
    if memory.vsib_size() != 0 {
        return elements(cpu, instruction, memory);
    }
    let Some(start) = memory.virtual_address(0, |register, _, _| cpu.register(register)) else { return Vec::new() };
    let len = match memory.memory_size() {
        MemorySize::Xsave | MemorySize::Xsave64 => (cpu.extended)().map_or(0, |extended| extended.area_len),
        size => size.size() as u64,
    }
    // An operand without a size known to the decoder starts at its address.
    .max(1);
    if instruction.is_string_instruction() {
        // The decoder gives one element of a repeated instruction, not the whole length.
        let len = (instruction.memory_size().size() as u64).max(1);
        return string(cpu, instruction, memory, Span { start, len });
    }
    let start = match instruction.mnemonic() {
        Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => start.wrapping_add(bit_offset(cpu, instruction, len)),
        _ => start,
    };
    vec![Span { start, len }]
}

/// A bit number may address memory far from the operand (Intel SDM vol. 2, `BTS`).
fn bit_offset(cpu: &Cpu, instruction: &Instruction, len: u64) -> u64 {
    if instruction.op1_kind() != OpKind::Register {
        return 0;
    }
    let value = cpu.register(instruction.op1_register()).unwrap_or(0);
    let unused = 64 - 8 * len.clamp(2, 8) as u32;
    let bit = (value << unused) as i64 >> unused;
    (bit.div_euclid(8 * len as i64) * len as i64) as u64
}

fn string(cpu: &Cpu, instruction: &Instruction, memory: &UsedMemory, first: Span) -> Vec<Span> {
    const DIRECTION: u64 = 1 << 10;
    let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let counter = match memory.base().size() {
        8 => Register::RCX,
        4 => Register::ECX,
        _ => Register::CX,
    };
    let count = if repeats { cpu.register(counter).unwrap_or(0) } else { 1 };
    let count = count.min(STRING_BYTES_MAX / first.len);
    let len = count * first.len;
    match (count, cpu.regs.rflags & DIRECTION) {
        (0, _) => Vec::new(),
        (_, 0) => vec![Span { start: first.start, len }],
        _ => vec![Span { start: first.start.wrapping_sub(len - first.len), len }],
    }
}

/// All elements of a scatter or gather, masked ones included.
fn elements(cpu: &Cpu, instruction: &Instruction, memory: &UsedMemory) -> Vec<Span> {
    let Some(extended) = (cpu.extended)() else { return Vec::new() };
    let len = memory.memory_size().element_size().max(1);
    let data = instruction.op1_register().size().max(len) / len;
    let count = data.min(memory.index().size() / memory.vsib_size() as usize);
    let value = |register: Register, element, size| {
        if register.is_vector_register() { extended.lane(register, element, size) } else { cpu.register(register) }
    };
    let starts = (0..count).filter_map(|element| memory.virtual_address(element, value));
    starts.map(|start| Span { start, len: len as u64 }).collect()
}

#[cfg(test)]
mod tests;
