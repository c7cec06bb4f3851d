use kvm_bindings::{kvm_regs, kvm_sregs};
use proptest::prelude::*;

use super::*;

const RSP: u64 = 0x7000;
const RDI: u64 = 0x2_0000;

fn long_mode() -> kvm_sregs {
    let mut sregs = kvm_sregs { cr0: 0x8000_0011, efer: 0x500, ..Default::default() };
    sregs.cs.l = 1;
    (sregs.ds.base, sregs.fs.base, sregs.gs.base) = (0xbad_0000, 0x10_0000, 0x20_0000);
    sregs
}

fn regs() -> kvm_regs {
    kvm_regs { rip: 0x1000, rax: 0x3000, rbx: 0x10, rcx: 0x40, rsp: RSP, rdi: RDI, rsi: 0x3_0000, ..Default::default() }
}

fn with(regs: &kvm_regs, sregs: &kvm_sregs, bytes: &[u8]) -> Option<Accesses> {
    let extended = || {
        let mut xsave = vec![0; 4096];
        // ZMM1 holds the elements 0, 0x1000, 0x2000, … of 8 bytes.
        let lane = |lane: usize| match lane {
            0..2 => 160 + 16 + 8 * lane,
            2..4 => 576 + 16 + 8 * (lane - 2),
            _ => 1152 + 32 + 8 * (lane - 4),
        };
        (0..8).for_each(|index| xsave[lane(index) + 1] = 0x10 * index as u8);
        Some(Extended { xsave, ymm_high: 576, zmm_high: 1152, zmm_16_to_31: 1664, area_len: 2440 })
    };
    accesses(&Cpu { regs, sregs, extended: &extended }, bytes)
}

fn written(bytes: &[u8]) -> Vec<(u64, u64)> {
    let accesses = with(&regs(), &long_mode(), bytes).expect("an instruction");
    accesses.written.into_iter().map(|span| (span.start, span.len)).collect()
}

#[test]
fn operands_are_where_the_cpu_writes_them() {
    let cases: &[(&str, &[u8], (u64, u64))] = &[
        ("mov [rax], bl", &[0x88, 0x18], (0x3000, 1)),
        ("mov [rax+rbx*4+8], rcx", &[0x48, 0x89, 0x4c, 0x98, 0x08], (0x3048, 8)),
        ("mov [rip+0x10], eax", &[0x89, 0x05, 0x10, 0, 0, 0], (0x1016, 4)),
        ("mov fs:[rax], eax", &[0x64, 0x89, 0x00], (0x10_3000, 4)),
        ("mov gs:[0x28], rax", &[0x65, 0x48, 0x89, 0x04, 0x25, 0x28, 0, 0, 0], (0x20_0028, 8)),
        ("add [rax], ecx", &[0x01, 0x08], (0x3000, 4)),
        ("lock cmpxchg16b [rax]", &[0xf0, 0x48, 0x0f, 0xc7, 0x08], (0x3000, 16)),
        ("xchg [rax], rcx", &[0x48, 0x87, 0x08], (0x3000, 8)),
        ("push rax", &[0x50], (RSP - 8, 8)),
        ("push ax", &[0x66, 0x50], (RSP - 2, 2)),
        ("pushfq", &[0x9c], (RSP - 8, 8)),
        ("call +0", &[0xe8, 0, 0, 0, 0], (RSP - 8, 8)),
        ("pop [rax]", &[0x8f, 0x00], (0x3000, 8)),
        ("pop [rsp+8]", &[0x8f, 0x44, 0x24, 0x08], (RSP + 16, 8)),
        ("stosb", &[0xaa], (RDI, 1)),
        ("rep stosq", &[0xf3, 0x48, 0xab], (RDI, 0x200)),
        ("rep movsb", &[0xf3, 0xa4], (RDI, 0x40)),
        ("rep insb", &[0xf3, 0x6c], (RDI, 0x40)),
        ("fxsave [rax]", &[0x0f, 0xae, 0x00], (0x3000, 512)),
        ("xsave64 [rax]", &[0x48, 0x0f, 0xae, 0x20], (0x3000, 2440)),
        ("xsaveopt64 [rax]", &[0x48, 0x0f, 0xae, 0x30], (0x3000, 2440)),
        ("fnsave [rax]", &[0xdd, 0x30], (0x3000, 108)),
        ("sgdt [rax]", &[0x0f, 0x01, 0x00], (0x3000, 10)),
        ("movups [rax], xmm0", &[0x0f, 0x11, 0x00], (0x3000, 16)),
        ("maskmovdqu xmm1, xmm2", &[0x66, 0x0f, 0xf7, 0xca], (RDI, 16)),
        ("vmovups [rax], ymm0", &[0xc5, 0xfc, 0x11, 0x00], (0x3000, 32)),
        ("vmovups [rax]{k1}, zmm0", &[0x62, 0xf1, 0x7c, 0x49, 0x11, 0x00], (0x3000, 64)),
        ("bts [rax], ebx", &[0x0f, 0xab, 0x18], (0x3000, 4)),
        ("bts [rax], rsi (bit 0x30000)", &[0x48, 0x0f, 0xab, 0x30], (0x3000 + 0x6000, 8)),
        ("bts dword [rax], 200", &[0x0f, 0xba, 0x28, 200], (0x3000, 4)),
    ];
    for (name, bytes, span) in cases {
        assert!(written(bytes).contains(span), "{name}: {:x?}, wanted {span:x?}", written(bytes));
    }
}

#[test]
fn instructions_that_only_read_write_nothing() {
    for bytes in [&[0x8b, 0x00][..], &[0x3b, 0x08], &[0xf3, 0xac], &[0x0f, 0x28, 0x00], &[0xc3], &[0x90]] {
        assert_eq!(written(bytes), [], "{bytes:x?}");
    }
    let read = with(&regs(), &long_mode(), &[0x8b, 0x00]).unwrap().read;
    assert_eq!(read, [Span { start: 0x3000, len: 4 }]);
}

#[test]
fn strings_go_down_with_the_direction_flag_and_stop_at_some_length() {
    let down = kvm_regs { rflags: 1 << 10, ..regs() };
    let spans = |regs: &kvm_regs, bytes: &[u8]| with(regs, &long_mode(), bytes).unwrap().written;
    assert_eq!(spans(&down, &[0xf3, 0x48, 0xab]), [Span { start: RDI - 0x1f8, len: 0x200 }]);
    let none = kvm_regs { rcx: 0, ..regs() };
    assert_eq!(spans(&none, &[0xf3, 0xaa]), []);
    let endless = kvm_regs { rcx: u64::MAX, ..regs() };
    assert_eq!(spans(&endless, &[0xf3, 0x48, 0xab]), [Span { start: RDI, len: STRING_BYTES_MAX }]);
    // 32-bit counter and index.
    let small = kvm_regs { rcx: 0xffff_ffff_0000_0002, rdi: 0xffff_ffff_0000_5000, ..regs() };
    assert_eq!(spans(&small, &[0x67, 0xf3, 0xaa]), [Span { start: 0x5000, len: 2 }]);
}

#[test]
fn every_element_of_a_scatter_counts() {
    // vpscatterqq [rax + zmm1*1] {k1}, zmm2
    let bytes = [0x62, 0xf2, 0xfd, 0x49, 0xa1, 0x14, 0x08];
    let expected: Vec<(u64, u64)> = (0..8).map(|index| (0x3000 + 0x1000 * index, 8)).collect();
    assert_eq!(written(&bytes), expected);
    // vpgatherqq zmm2 {k1}, [rax + zmm1*1] only reads.
    assert_eq!(written(&[0x62, 0xf2, 0xfd, 0x49, 0x91, 0x14, 0x08]), []);
}

#[test]
fn segments_count_outside_long_mode() {
    let mut sregs = kvm_sregs { cr0: 1, ..Default::default() };
    (sregs.ds.base, sregs.ss.base, sregs.cs.base) = (0x1_0000, 0x8_0000, 0xf_0000);
    let cpu = |sregs: &kvm_sregs, bytes: &[u8]| with(&regs(), sregs, bytes).unwrap().written[0];
    // mov [bx+si], al in 16-bit code.
    assert_eq!(cpu(&sregs, &[0x88, 0x00]), Span { start: 0x1_0010, len: 1 });
    assert_eq!(cpu(&sregs, &[0x50]), Span { start: 0x8_0000 + RSP - 2, len: 2 });
    sregs.cs.db = 1;
    assert_eq!(cpu(&sregs, &[0x88, 0x00]), Span { start: 0x1_3000, len: 1 });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn whatever_stands_there_is_no_reason_to_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..=15),
        values in prop::collection::vec(any::<u64>(), 18),
        mode in 0..4_u8,
    ) {
        let mut regs = regs();
        (regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi) =
            (values[0], values[1], values[2], values[3], values[4], values[5]);
        (regs.rsp, regs.rbp, regs.r8, regs.r15, regs.rip, regs.rflags) =
            (values[6], values[7], values[8], values[9], values[10], values[11]);
        let mut sregs = if mode == 0 { long_mode() } else { kvm_sregs { cr0: values[12], ..Default::default() } };
        (sregs.cs.db, sregs.ds.base, sregs.fs.base) = (mode & 1, values[13], values[14]);
        if let Some(accesses) = with(&regs, &sregs, &bytes) {
            for span in accesses.written.iter().chain(&accesses.read) {
                prop_assert!(span.len <= STRING_BYTES_MAX, "{:x?}: {:x?}", bytes, span);
                prop_assert!(mode == 0 || span.start <= u64::from(u32::MAX));
            }
        }
    }
}
