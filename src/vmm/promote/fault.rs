//! A vCPU that cannot go on because the guest wrote to a page in place: which one it was.
//!
//! KVM says it at best. Else the instruction at RIP is decoded: what it writes is the culprit, as a rule. If nothing of that
//! lies in place, the CPU wrote something that the instruction does not name: accessed and dirty bits in page tables, a
//! stack while it delivered an interrupt, a descriptor. After that whatever lies near all of these, and at last everything:
//! each step promotes something or leads to the next, so that the guest makes progress or, when nothing lies in place any
//! more, the cause was another.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::operands::{self, Accesses, Cpu, Extended, INSTRUCTION_MAX, Span};
use super::walk::{Paging, Walk};
use super::{BLOCK_PAGES, InPlace, Resort, failed, whole_blocks};
use crate::devices::virtio::Memory;
use crate::snapshot::{Extent, Gfn, PAGE_SIZE};
use crate::vmm::error::Error;

/// How KVM said that it cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// This page could not be written.
    Told { gpa: u64 },
    /// Something could not be written.
    Untold,
    /// An instruction could not be emulated: because of its operands or the descriptors it loads, or not because of any page.
    Emulation,
}

/// A vCPU out of the guest, and the memory it works on.
pub struct Stuck<'a> {
    pub vcpu: &'a VcpuFd,
    pub memory: &'a Memory,
    pub in_place: &'a InPlace,
    /// [`InPlace::generation`] before the vCPU went into the guest.
    pub generation: u64,
}

/// Below a stack pointer, what an interrupt pushes with room to spare; above it, what is being pushed.
const PUSHED: u64 = 128;
const BEING_PUSHED: u64 = 16;

impl Stuck<'_> {
    /// Promotes what the guest wrote. Whether it may go on; if not, no page in place was the cause.
    pub fn resolve(&self, cause: Cause) -> Result<bool, Error> {
        if let Cause::Told { gpa } = cause
            && self.promote(Resort::Told, &[page_of(gpa)])?
        {
            return Ok(true);
        }
        let failed = |source| Error::Os { doing: "read a vCPU's registers", source };
        let regs = self.vcpu.get_regs().map_err(|error| failed(error.into()))?;
        let sregs = self.vcpu.get_sregs().map_err(|error| failed(error.into()))?;
        let seen = self.look(&regs, &sregs);
        if self.promote(Resort::Operand, &seen.operands)? {
            return Ok(true);
        }
        if self.in_place.generation() != self.generation {
            self.in_place.counts().add_raced();
            return Ok(true);
        }
        let structures = [
            (Resort::PageTables, &seen.tables),
            (Resort::Stack, &seen.stacks),
            (Resort::Descriptors, &seen.descriptors),
        ];
        for (resort, pages) in structures {
            if self.promote(resort, pages)? {
                return Ok(true);
            }
        }
        if cause == Cause::Emulation {
            return Ok(false);
        }
        let near: Vec<Extent> = seen.all().map(|page| whole_blocks(*page, BLOCK_PAGES)).collect();
        Ok(self.promote(Resort::Near, &near)? || self.promote_all()?)
    }

    fn promote(&self, resort: Resort, pages: &[Extent]) -> Result<bool, Error> {
        let promoted = self.in_place.promote(pages).map_err(failed)?;
        self.in_place.counts().add(resort, promoted);
        Ok(promoted > 0)
    }

    fn promote_all(&self) -> Result<bool, Error> {
        let promoted = self.in_place.promote_all().map_err(failed)?;
        self.in_place.counts().add(Resort::All, promoted);
        Ok(promoted > 0)
    }

    fn look(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Seen {
        let paging = Paging::of(sregs);
        let extended = || self.extended();
        let cpu = Cpu { regs, sregs, extended: &extended };
        let mut seen = Seen::default();
        let code = cpu.code(regs.rip);
        let accesses = self.accesses(&cpu, paging, code);
        let mut tables = Vec::new();
        let mut pages = |spans: &[Span]| {
            let walks: Vec<Walk> = spans.iter().flat_map(addresses).map(|linear| self.walk(paging, linear)).collect();
            tables.extend(walks.iter().flat_map(|walk| &walk.entries).map(|&entry| page_of(entry)));
            walks.iter().filter_map(|walk| walk.gpa).map(page_of).collect::<Vec<Extent>>()
        };
        seen.operands = pages(&accesses.written);
        seen.others = pages(&accesses.read);
        seen.others.extend(pages(&[Span { start: code, len: INSTRUCTION_MAX as u64 }, table(sregs.idt)]));
        seen.stacks = pages(&self.stacks(&cpu, paging));
        seen.descriptors = pages(&[table(sregs.gdt), segment(sregs.ldt), segment(sregs.tr)]);
        tables.push(page_of(sregs.cr3));
        seen.tables = tables;
        seen
    }

    fn accesses(&self, cpu: &Cpu, paging: Paging, code: u64) -> Accesses {
        let mut bytes = [0; INSTRUCTION_MAX];
        let got = self.read(paging, code, &mut bytes);
        operands::accesses(cpu, &bytes[..got]).unwrap_or_default()
    }

    /// The current stack, and those that interrupts and calls from user mode switch to (Intel SDM vol. 3, 8.7).
    fn stacks(&self, cpu: &Cpu, paging: Paging) -> Vec<Span> {
        const RSP0: usize = 4;
        const IST1: usize = 36;
        const TSS_LEN: usize = 104;
        let mut tss = [0; TSS_LEN];
        let got = self.read(paging, cpu.sregs.tr.base, &mut tss);
        let slots = (0..3).map(|index| RSP0 + 8 * index).chain((0..7).map(|index| IST1 + 8 * index));
        let pointer = |at: usize| tss[..got].get(at..at + 8).map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes));
        let others = slots.filter_map(pointer).filter(|&pointer| pointer != 0);
        let stack = |top: u64| Span { start: top.wrapping_sub(PUSHED), len: PUSHED + BEING_PUSHED };
        std::iter::once(cpu.stack()).chain(others).map(stack).collect()
    }

    fn walk(&self, paging: Paging, linear: u64) -> Walk {
        paging.walk(linear, |gpa, len| {
            let mut entry = [0; 8];
            self.memory.read_slice(&mut entry[..len], GuestAddress(gpa)).ok()?;
            Some(u64::from_le_bytes(entry))
        })
    }

    /// Reads guest memory at a linear address; how much of it there is.
    fn read(&self, paging: Paging, linear: u64, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let at = linear.wrapping_add(done as u64);
            let len = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(bytes.len() - done);
            let Some(gpa) = self.walk(paging, at).gpa.map(GuestAddress) else { break };
            let is_ram = self.memory.check_range(gpa, len, Permissions::Read);
            if !is_ram || self.memory.read_slice(&mut bytes[done..done + len], gpa).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// Vector registers, and how much XSAVE writes.
    fn extended(&self) -> Option<Extended> {
        const XSAVE_LEAF: u32 = 0xd;
        const COMPONENTS: [u32; 3] = [2, 6, 7];
        let table = self.vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).ok()?;
        let leaf = |index| table.as_slice().iter().find(|entry| entry.function == XSAVE_LEAF && entry.index == index);
        let offset = |index| leaf(index).map_or(usize::MAX / 2, |entry| entry.ebx as usize);
        let [ymm_high, zmm_high, zmm_16_to_31] = COMPONENTS.map(offset);
        // What is enabled now, in the standard format and (with the supervisor's state) in the compacted one.
        let area_len = u64::from(leaf(0).map_or(512, |entry| entry.ebx).max(leaf(1).map_or(0, |entry| entry.ebx)));
        let area = self.vcpu.get_xsave().ok()?;
        let xsave = area.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        Some(Extended { xsave, ymm_high, zmm_high, zmm_16_to_31, area_len })
    }
}

/// The pages that may have been written, by what would have written them.
#[derive(Debug, Default)]
struct Seen {
    operands: Vec<Extent>,
    tables: Vec<Extent>,
    stacks: Vec<Extent>,
    descriptors: Vec<Extent>,
    /// Not written, as far as is known.
    others: Vec<Extent>,
}

impl Seen {
    fn all(&self) -> impl Iterator<Item = &Extent> {
        [&self.operands, &self.tables, &self.stacks, &self.descriptors, &self.others].into_iter().flatten()
    }
}

fn page_of(gpa: u64) -> Extent {
    Extent { first: Gfn::containing(gpa), pages: 1 }
}

/// One address in each page of a span.
fn addresses(span: &Span) -> impl Iterator<Item = u64> + use<> {
    let Span { start, len } = *span;
    let pages = if len == 0 { 0 } else { (start % PAGE_SIZE + len - 1) / PAGE_SIZE + 1 };
    let rest = (1..pages).map(move |page| (start - start % PAGE_SIZE).wrapping_add(page * PAGE_SIZE));
    (pages > 0).then_some(start).into_iter().chain(rest)
}

fn table(table: kvm_dtable) -> Span {
    Span { start: table.base, len: u64::from(table.limit) + 1 }
}

/// A system segment, of which the CPU writes nothing beyond 64 KiB.
fn segment(segment: kvm_segment) -> Span {
    const WRITTEN_MAX: u32 = 0xffff;
    Span { start: segment.base, len: if segment.unusable != 0 { 0 } else { u64::from(segment.limit.min(WRITTEN_MAX)) + 1 } }
}
