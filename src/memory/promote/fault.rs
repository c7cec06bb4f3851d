//! Finds the page in place that the guest wrote when a vCPU cannot go on.
//!
//! At best KVM names the page. Otherwise the instruction at RIP is decoded: as a rule one of its written operands is
//! the cause. If none of them lies in place, the CPU wrote something that the instruction does not name: accessed and
//! dirty bits in page tables, a stack while it delivered an interrupt, a descriptor. After these come all pages near
//! them, and at last everything. Each step promotes a page or leads to the next, so the guest makes progress; when no
//! page lies in place any more, the cause was another.

use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::operands::{self, Accesses, Cpu, Extended, INSTRUCTION_MAX, Span};
use super::view::{self, LinearView, page_of};
use super::{BLOCK_PAGES, InPlace, Resort, failed, whole_blocks};
use crate::memory::Error;
use crate::snapshot::Extent;
use crate::sys::guest_memory::Memory;
use crate::sys::lost;

/// KVM's report that a vCPU cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// KVM could not write this page.
    Page { gpa: u64 },
    /// KVM could not write a page that it does not name.
    UnknownPage,
    /// KVM could not emulate an instruction: because of its operands, the descriptors it loads, or for no page's sake.
    Emulation,
}

/// A vCPU that has left the guest, and the memory it works on.
pub struct StoppedVcpu<'a> {
    pub vcpu: &'a VcpuFd,
    pub memory: &'a Memory,
    pub in_place: &'a InPlace,
    /// [`InPlace::generation`] before the vCPU entered the guest.
    pub generation: u64,
}

/// The outcome for a vCPU that could not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The vCPU may enter the guest again.
    Promoted,
    /// The guest touched a page that cannot be read, for this reason.
    Lost(String),
    /// No page was the cause.
    Unknown,
}

impl From<bool> for Resolution {
    fn from(promoted: bool) -> Self {
        if promoted { Resolution::Promoted } else { Resolution::Unknown }
    }
}

/// Returns the reason if memory that a stopped vCPU needs is lost. Looks at the page that KVM names, then at the pages
/// of its instruction and those that the CPU itself reads, then at any page behind the end of its file.
pub fn lost_memory(vcpu: &VcpuFd, memory: &Memory, cause: Cause) -> Result<Option<String>, Error> {
    if let Cause::Page { gpa } = cause
        && let Some(why) = lost::at_gpa(gpa)
    {
        return Ok(Some(why));
    }
    let (regs, sregs) = registers(vcpu)?;
    let cpu = Cpu { regs: &regs, sregs: &sregs, extended: &|| extended(vcpu) };
    let view = LinearView::new(memory, &sregs);
    Ok(lost_page(&look(&cpu, &view, &accesses(&cpu, &view))))
}

fn lost_page(seen: &SuspectPages) -> Option<String> {
    seen.all().find_map(|page| lost::within(*page)).or_else(lost::behind_an_end)
}

impl StoppedVcpu<'_> {
    /// Promotes the page that the guest wrote.
    pub fn resolve(&self, cause: Cause) -> Result<Resolution, Error> {
        if let Cause::Page { gpa } = cause {
            if self.promote(Resort::Told, &[page_of(gpa)])? {
                return Ok(Resolution::Promoted);
            }
            if let Some(why) = lost::at_gpa(gpa) {
                return Ok(Resolution::Lost(why));
            }
        }
        let (regs, sregs) = registers(self.vcpu)?;
        let extended = || extended(self.vcpu);
        let (cpu, view) =
            (Cpu { regs: &regs, sregs: &sregs, extended: &extended }, LinearView::new(self.memory, &sregs));
        let accesses = accesses(&cpu, &view);
        if self.promote(Resort::Operand, &view.pages(&accesses.written).0)? {
            return Ok(Resolution::Promoted);
        }
        if self.in_place.generation() != self.generation {
            self.in_place.counts().add_raced();
            return Ok(Resolution::Promoted);
        }
        let seen = look(&cpu, &view, &accesses);
        if let Some(why) = lost_page(&seen) {
            return Ok(Resolution::Lost(why));
        }
        let structures = [
            (Resort::PageTables, &seen.tables),
            (Resort::Stack, &seen.stacks),
            (Resort::Descriptors, &seen.descriptors),
        ];
        for (resort, pages) in structures {
            if self.promote(resort, pages)? {
                return Ok(Resolution::Promoted);
            }
        }
        if cause == Cause::Emulation {
            return Ok(Resolution::Unknown);
        }
        let near: Vec<Extent> = seen.all().map(|page| whole_blocks(*page, BLOCK_PAGES)).collect();
        Ok((self.promote(Resort::Near, &near)? || self.promote_all()?).into())
    }

    /// Returns whether a stack to which an event would be delivered lies in place.
    pub fn is_stack_in_place(&self) -> Result<bool, Error> {
        let (regs, sregs) = registers(self.vcpu)?;
        let (cpu, view) =
            (Cpu { regs: &regs, sregs: &sregs, extended: &|| None }, LinearView::new(self.memory, &sregs));
        Ok(view.pages(&view.stacks(&cpu)).0.iter().any(|page| self.in_place.has(*page)))
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
}

fn registers(vcpu: &VcpuFd) -> Result<(kvm_regs, kvm_sregs), Error> {
    let failed = |source: kvm_ioctls::Error| Error::Os { doing: "read a vCPU's registers", source: source.into() };
    Ok((vcpu.get_regs().map_err(failed)?, vcpu.get_sregs().map_err(failed)?))
}

/// The vector registers, and the number of bytes that XSAVE writes.
fn extended(vcpu: &VcpuFd) -> Option<Extended> {
    const XSAVE_LEAF: u32 = 0xd;
    const COMPONENTS: [u32; 3] = [2, 6, 7];
    let table = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).ok()?;
    let leaf = |index| table.as_slice().iter().find(|entry| entry.function == XSAVE_LEAF && entry.index == index);
    let offset = |index| leaf(index).map_or(usize::MAX / 2, |entry| entry.ebx as usize);
    let [ymm_high, zmm_high, zmm_16_to_31] = COMPONENTS.map(offset);
    // The components enabled now: in the standard format, and (with supervisor state) in the compacted one.
    let area_len = u64::from(leaf(0).map_or(512, |entry| entry.ebx).max(leaf(1).map_or(0, |entry| entry.ebx)));
    let area = vcpu.get_xsave().ok()?;
    let xsave = area.region.iter().flat_map(|word| word.to_le_bytes()).collect();
    Some(Extended { xsave, ymm_high, zmm_high, zmm_16_to_31, area_len })
}

/// The memory accesses of the instruction at RIP; none if it cannot be decoded.
fn accesses(cpu: &Cpu, view: &LinearView) -> Accesses {
    let mut bytes = [0; INSTRUCTION_MAX];
    let got = view.read(cpu.code(cpu.regs.rip), &mut bytes);
    operands::accesses(cpu, &bytes[..got]).unwrap_or_default()
}

/// Collects all other pages that the CPU may have written.
fn look(cpu: &Cpu, view: &LinearView, accesses: &Accesses) -> SuspectPages {
    let mut tables = Vec::new();
    let mut pages = |spans: &[Span]| {
        let (pages, entries) = view.pages(spans);
        tables.extend(entries);
        pages
    };
    let code = Span { start: cpu.code(cpu.regs.rip), len: INSTRUCTION_MAX as u64 };
    let others = [code, view::interrupt_table(cpu.sregs)];
    SuspectPages {
        others: [pages(&accesses.written), pages(&accesses.read), pages(&others)].concat(),
        stacks: pages(&view.stacks(cpu)),
        descriptors: pages(&view::descriptors(cpu.sregs)),
        tables,
    }
}

/// The pages that may have been written, by the kind of access.
#[derive(Debug, Default)]
struct SuspectPages {
    tables: Vec<Extent>,
    stacks: Vec<Extent>,
    descriptors: Vec<Extent>,
    /// Only read, as far as is known.
    others: Vec<Extent>,
}

impl SuspectPages {
    fn all(&self) -> impl Iterator<Item = &Extent> {
        [&self.tables, &self.stacks, &self.descriptors, &self.others].into_iter().flatten()
    }
}
