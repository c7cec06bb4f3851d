//! Guests on the real KVM that write to random places: their own code, their page tables, outside memory. Each exit
//! must promote a page or be the last.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::fault::{Cause, Resolution, StoppedVcpu};
use super::*;
use crate::memory::guest_ram::GuestRam;
use crate::snapshot::MemoryLayout;

const RAM: u64 = 4 << 20;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x1_0000;
const HLT: u8 = 0xf4;
/// The value stored: code that it lands in turns to NOPs.
const NOPS: u64 = 0x9090_9090_9090_9090;

/// Stores of rax (NOPS) to [rdi], and instructions that move rdi on.
const STORES: [&[u8]; 14] = [
    &[0x88, 0x07],
    &[0x48, 0x89, 0x07],
    &[0x48, 0x89, 0x87, 0xfd, 0x0f, 0, 0],
    &[0x48, 0x01, 0x07],
    &[0xf0, 0x48, 0x09, 0x07],
    &[0x48, 0x87, 0x07],
    &[0xf0, 0x0f, 0xb1, 0x07],
    &[0x48, 0xab],
    &[0xf3, 0xaa],
    &[0x50],
    &[0x9c],
    &[0x0f, 0xae, 0x07],
    &[0x0f, 0x11, 0x07],
    &[0x48, 0x81, 0xc7, 0, 0x30, 0, 0],
];

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % end
    }
}

/// Page tables at `TABLES` that map RAM onto itself, some entries without accessed and dirty bits, and random stores
/// from
/// `CODE` on.
fn image(random: &mut Random) -> File {
    let file = tempfile::tempfile().unwrap();
    let noise: Vec<u8> = (0..RAM / 8).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect();
    file.write_all_at(&noise, 0).unwrap();
    let put = |at: u64, value: u64| file.write_all_at(&value.to_le_bytes(), at).unwrap();
    (TABLES..TABLES + 0x5000).step_by(8).for_each(|at| put(at, 0));
    put(TABLES, (TABLES + 0x1000) | 0x27);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 0x27);
    for half in 0..2 {
        put(TABLES + 0x2000 + 8 * half, (TABLES + 0x3000 + 0x1000 * half) | 0x27);
    }
    for page in 0..RAM / 4096 {
        let marks = if random.below(32) == 0 { 0 } else { 0x60 };
        put(TABLES + 0x3000 + 8 * page, (page * 4096) | 0x7 | marks);
    }
    let mut code: Vec<u8> = Vec::new();
    while code.len() < 400 {
        code.extend(STORES[random.below(STORES.len() as u64) as usize]);
    }
    code.push(HLT);
    file.write_all_at(&code, CODE).unwrap();
    file
}

fn vcpu(vm: &kvm_ioctls::VmFd, random: &mut Random) -> VcpuFd {
    let fd = vm.create_vcpu(0).unwrap();
    let mut sregs = fd.get_sregs().unwrap();
    let user = random.below(2) as u8 * 3;
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, dpl: user, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x10 | u16::from(user), type_: 11, l: 1, ..flat };
    sregs.ss = kvm_segment { selector: 0x18 | u16::from(user), type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es) = (sregs.ss, sregs.ss);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0033, TABLES, 0x620, 0x500);
    fd.set_sregs(&sregs).unwrap();
    // Sometimes an address outside memory, or one that is not mapped.
    let wild = [0x40_0000, 0x7f_ffff_f000, RAM - 2, 0xfee0_0000, 1 << 47];
    let rdi = if random.below(4) == 0 { wild[random.below(5) as usize] } else { random.below(RAM) & !15 };
    let rip = if random.below(8) == 0 { wild[random.below(5) as usize] } else { CODE };
    let rsp = random.below(RAM) & !7;
    let rcx = random.below(10_000);
    fd.set_regs(&kvm_regs { rip, rax: NOPS, rdi, rsp, rcx, rflags: 2, ..Default::default() }).unwrap();
    fd
}

/// Runs one guest to its end. Returns the number of promoted pages.
fn run(seed: u64) -> u64 {
    let mut random = Random(seed);
    let layout = MemoryLayout::from_gpa_ranges(&[(0, RAM)]).unwrap();
    let mut ram = GuestRam::reserve(&layout).unwrap();
    let all = Extent { first: Gfn(0), pages: RAM / 4096 };
    ram.map_in_place(all, &image(&mut random), 0).unwrap();
    ram.guard(&[InPlaceExtent { extent: all, align_pages: 1 }]).unwrap();
    let in_place = ram.in_place().unwrap().clone();
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    for (range, host) in ram.slots() {
        let region =
            kvm_userspace_memory_region { memory_size: range.len, userspace_addr: host as u64, ..Default::default() };
        // SAFETY: the memory is there for longer than the VM, which is dropped at the end of this function.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
    }
    vm.set_tss_address(0xfffb_d000).unwrap();
    let mut fd = vcpu(&vm, &mut random);
    for _ in 0..3000 {
        let before = (in_place.pages(), in_place.generation());
        let cause = match fd.run() {
            Ok(VcpuExit::MmioWrite(address, data)) => {
                in_place.take_emulated(ram.view(), address, data);
                continue;
            }
            Ok(VcpuExit::MmioRead(_, data)) => {
                data.fill(HLT);
                continue;
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Cause::Page { gpa },
            Ok(VcpuExit::InternalError) => Cause::Emulation,
            Err(error) if error.errno() == libc::EFAULT => Cause::UnknownPage,
            _ => return all.pages - before.0,
        };
        let stopped = StoppedVcpu { vcpu: &fd, memory: ram.view(), in_place: &in_place, generation: before.1 };
        if stopped.resolve(cause).unwrap() != Resolution::Promoted {
            return all.pages - before.0;
        }
        assert!(in_place.pages() < before.0, "seed {seed}: it goes on and nothing was promoted");
    }
    panic!("seed {seed}: no end");
}

#[test]
fn whatever_the_guest_writes_it_gets_on_or_ends() {
    if Kvm::new().is_err() {
        return crate::skip::skip!("kvm", "there is no /dev/kvm");
    }
    let promoted: Vec<u64> = (0..64).map(run).collect();
    assert!(promoted.iter().sum::<u64>() > 30, "{promoted:?}");
}
