//! Guest memory by the guest's own addresses, and the structures that the CPU itself reads and writes there.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::operands::{Cpu, Span};
use super::walk::{Paging, Walk};
use crate::snapshot::{Extent, Gfn, PAGE_SIZE};
use crate::sys::guest_memory::Memory;

/// Bytes below a stack pointer that an interrupt may push, with room to spare, and above it that are being pushed.
const PUSHED: u64 = 128;
const BEING_PUSHED: u64 = 16;

/// Guest memory under one vCPU's paging.
pub struct LinearView<'a> {
    memory: &'a Memory,
    paging: Paging,
}

impl<'a> LinearView<'a> {
    pub fn new(memory: &'a Memory, sregs: &kvm_sregs) -> Self {
        LinearView { memory, paging: Paging::of(sregs) }
    }

    fn walk(&self, linear: u64) -> Walk {
        self.paging.walk(linear, |gpa, len| {
            let mut entry = [0; 8];
            self.memory.read_slice(&mut entry[..len], GuestAddress(gpa)).ok()?;
            Some(u64::from_le_bytes(entry))
        })
    }

    /// Returns the pages of the spans, and those of the page tables on the way.
    pub fn pages(&self, spans: &[Span]) -> (Vec<Extent>, Vec<Extent>) {
        let walks: Vec<Walk> = spans.iter().flat_map(addresses).map(|linear| self.walk(linear)).collect();
        let mut tables: Vec<Extent> = walks.iter().flat_map(|walk| &walk.entries).map(|&at| page_of(at)).collect();
        tables.dedup();
        (walks.iter().filter_map(|walk| walk.gpa).map(page_of).collect(), tables)
    }

    /// Reads at a linear address. Returns the number of bytes that could be read.
    pub fn read(&self, linear: u64, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let at = linear.wrapping_add(done as u64);
            let len = ((PAGE_SIZE - at % PAGE_SIZE) as usize).min(bytes.len() - done);
            let Some(gpa) = self.walk(at).gpa.map(GuestAddress) else { break };
            let is_ram = self.memory.check_range(gpa, len, Permissions::Read);
            if !is_ram || self.memory.read_slice(&mut bytes[done..done + len], gpa).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    /// The current stack, and those that interrupts and calls from user mode switch to (Intel SDM vol. 3, 8.7).
    pub fn stacks(&self, cpu: &Cpu) -> Vec<Span> {
        const RSP0: usize = 4;
        const IST1: usize = 36;
        const TSS_LEN: usize = 104;
        let mut tss = [0; TSS_LEN];
        let got = self.read(cpu.sregs.tr.base, &mut tss);
        let slots = (0..3).map(|index| RSP0 + 8 * index).chain((0..7).map(|index| IST1 + 8 * index));
        let pointer =
            |at: usize| tss[..got].get(at..at + 8).map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes));
        let others = slots.filter_map(pointer).filter(|&pointer| pointer != 0);
        let stack = |top: u64| Span { start: top.wrapping_sub(PUSHED), len: PUSHED + BEING_PUSHED };
        std::iter::once(cpu.stack()).chain(others).map(stack).collect()
    }

    /// The page tables that the CPU may write, because accessed and dirty bits are missing there.
    pub fn tables_to_be_written(&self) -> Vec<Extent> {
        let read = |table| {
            let mut entries = vec![0; PAGE_SIZE as usize];
            self.memory.read_slice(&mut entries, GuestAddress(table)).ok()?;
            let (entries, _) = entries.as_chunks::<8>();
            Some(entries.iter().map(|entry| u64::from_le_bytes(*entry)).collect())
        };
        self.paging.tables_to_be_written(read).into_iter().map(page_of).collect()
    }
}

/// Descriptor tables and the task state segment, in which the CPU sets bits.
pub fn descriptors(sregs: &kvm_sregs) -> [Span; 3] {
    [table(sregs.gdt), segment(sregs.ldt), segment(sregs.tr)]
}

/// Only read.
pub fn interrupt_table(sregs: &kvm_sregs) -> Span {
    table(sregs.idt)
}

pub fn page_of(gpa: u64) -> Extent {
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

/// A system segment; the CPU writes nothing beyond its first 64 KiB.
fn segment(segment: kvm_segment) -> Span {
    const WRITTEN_MAX: u32 = 0xffff;
    let len = if segment.present == 0 { 0 } else { u64::from(segment.limit.min(WRITTEN_MAX)) + 1 };
    Span { start: segment.base, len }
}
