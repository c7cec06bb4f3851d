# The CPL0 part of the tiny guest kernel (AT&T syntax): two entries, the AP trampoline, the
# descriptor and page tables, interrupt and exception stubs, and the trap that CPL3 calls.
# Everything else is Rust at CPL3, because KVM_PVM emulates every CPL0 instruction (0.65 us each).
#
# Sources: Linux Documentation/arch/x86/boot.rst ("64-bit Boot Protocol"), Xen docs/misc/pvh.pandoc,
# Intel SDM vol. 3 ch. 6 (gates), 7 (TSS, I/O bitmap), 10 (local APIC, INIT-SIPI), 13 (XSAVE).

.set CPUS, 8                      # also MAX_CPUS in src/smp.rs
.set TRAMPOLINE, 0x8000           # also in src/smp.rs: SIPI vector 8
.set STUBS, 0x101000              # fixed by link.ld
.set TSSES, 0x102000              # fixed by link.ld
.set TSS_SIZE, 512
.set IO_BITMAP, 164               # ports 0..0x51f: PIT, PIC, i8042, COM1, firmware configuration
.set TSS_LIMIT, 104 + IO_BITMAP
.set KSTACK_SHIFT, 12
.set KCODE, 0x10
.set KDATA, 0x18
.set UDATA, 0x28 | 3
.set UCODE, 0x30 | 3
.set TSS0, 0x40
.set CR0, 0x80010033              # PG WP NE ET MP PE; not CD NW TS EM
.set CR4, 0x620                   # OSXMMEXCPT OSFXSR PAE; not SMEP SMAP PCIDE FSGSBASE
.set CR4_OSXSAVE, 0x40000
.set APIC_ID, 0xfee00020
.set EOI, 0xfee000b0

# ---------------------------------------------------------------------------------------- entries
.section .boot,"awx"
.code64
# Linux 64-bit boot protocol: long mode, this code identity-mapped, RSI = boot_params.
.globl _start
_start:
    cli
    mov %rsi, boot_params_ptr
    xor %r8d, %r8d
    jmp common64

# Application processor, in long mode on the final page tables. Its slot is its APIC id, exchanged
# with the boot CPU's if that one is not 0 (no shared counter: two could draw the same number).
ap64:
    mov $APIC_ID, %eax
    mov (%rax), %eax
    shr $24, %eax
    xor boot_apic_id, %eax
    cmp $CPUS, %eax
    jae park
    mov %eax, %r8d
    # fall through

# r8d = CPU slot. Loads tables, stacks and SIMD state, then leaves CPL0 for good.
common64:
    mov boot_cr3, %eax
    mov %rax, %cr3
    lgdt gdt_ptr
    lidt idt_ptr
    mov $CR0, %eax
    mov %rax, %cr0
    lea 1(%r8), %eax
    shl $KSTACK_SHIFT, %eax
    add $kstacks, %eax
    mov %rax, %rsp
    mov $KDATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    pushq $KCODE
    pushq $1f
    lretq
1:  mov %r8d, %ecx
    shl $4, %ecx
    add $TSS0, %ecx
    ltr %cx
    # SSE always; AVX and AVX-512 when CPUID leaf 0xD offers their state.
    mov $CR4, %r9d
    mov $1, %eax
    xor %ecx, %ecx
    cpuid
    bt $26, %ecx
    jnc 4f
    or $CR4_OSXSAVE, %r9d
    mov %r9, %cr4
    mov $0xd, %eax
    xor %ecx, %ecx
    cpuid
    and $0xe7, %eax               # x87 SSE AVX, opmask ZMM_Hi256 Hi16_ZMM
    mov %eax, %ecx
    and $0xe4, %ecx
    cmp $0xe4, %ecx               # the three AVX-512 parts need each other and AVX
    je 3f
    and $0x07, %eax
3:  xor %edx, %edx
    xor %ecx, %ecx
    xsetbv
4:  mov %r9, %cr4
    # To CPL3 with IF=0: fn(slot) on its own stack, RSP = 16n-8 as after a call.
    mov %r8, %rdi
    lea 1(%r8), %eax
    shl $USTACK_SHIFT, %eax
    lea ustacks-8(%rax), %rax
    mov $UDATA, %ecx
    mov %ecx, %ds
    mov %ecx, %es
    push %rcx
    push %rax
    # IOPL=3 beside the I/O bitmap: KVM_PVM loses the one, QEMU's TCG does not look at the other
    # once the TSS is busy, as it is after a restore under nested KVM.
    pushq $0x3002
    pushq $UCODE
    mov $guest_main, %eax
    mov $ap_main, %ecx
    test %r8d, %r8d
    cmovnz %ecx, %eax
    push %rax
    iretq

park:
    cli
    hlt
    jmp park

# PVH: 32-bit protected mode, flat segments, paging off, EBX = hvm_start_info.
.code32
pvh_start:
    cli
    mov %ebx, pvh_info_ptr
    mov boot_cr3, %eax
    mov %eax, %cr3
    mov $CR4, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx         # EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    lgdt gdt_ptr
    mov $CR0, %eax
    mov %eax, %cr0
    ljmp $KCODE, $pvh64
.code64
pvh64:
    xor %r8d, %r8d
    jmp common64

.section .note.Xen,"a",@note
.balign 4
    .long 4, 4, 18                # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_start

# ------------------------------------------------------------------------------------- trampoline
# Copied to TRAMPOLINE; real mode -> protected mode -> long mode -> ap64.
.section .rodata
.globl trampoline_start
.globl trampoline_end
trampoline_start:
.code16
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl (TRAMPOLINE + trampoline_gdt_ptr - trampoline_start)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $0x8, $(TRAMPOLINE + trampoline32 - trampoline_start)
.code32
trampoline32:
    mov $KDATA, %eax
    mov %eax, %ds
    mov %eax, %ss
    mov boot_cr3, %eax
    mov %eax, %cr3
    mov $CR4, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov $CR0, %eax
    mov %eax, %cr0
    ljmp $KCODE, $ap64
.code64
.balign 8
trampoline_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff      # 0x08 code32
    .quad 0x00af9b000000ffff      # 0x10 code64
    .quad 0x00cf93000000ffff      # 0x18 data
trampoline_gdt_ptr:
    .word 31
    .long TRAMPOLINE + trampoline_gdt - trampoline_start
trampoline_end:

# -------------------------------------------------------------------------- stubs at fixed places
.section .stubs,"ax"
.globl stub_base
stub_base:
# Exceptions 0..31, 16 bytes each; those without an error code push a zero.
.set i, 0
.rept 32
.org i * 16
  .if i == 3
    jmp trap_entry
  .else
    .if (i==8)||(i==10)||(i==11)||(i==12)||(i==13)||(i==14)||(i==17)||(i==21)||(i==29)||(i==30)
    .else
    pushq $0
    .endif
    pushq $i
    jmp exception
  .endif
.set i, i+1
.endr

.set STUB_SERIAL, 0x200
.set STUB_TIMER, 0x220
.set STUB_WAKE, 0x240
.set STUB_STRAY, 0x260
.set STUB_SPURIOUS, 0x280
.macro irq_stub at, counter
.org \at
    lock incq \counter
    jmp end_of_interrupt
.endm
irq_stub STUB_SERIAL, irq_serial
irq_stub STUB_TIMER, irq_timer
irq_stub STUB_WAKE, irq_wake
irq_stub STUB_STRAY, irq_stray
.org STUB_SPURIOUS                # a spurious interrupt gets no EOI (SDM 10.9)
    iretq

.org 0x2a0
end_of_interrupt:
    push %rax
    mov $EOI, %eax
    movl $0, (%rax)
    pop %rax
    iretq

# Any exception ends the guest: on to fn(vector, error, rip, cr2) at CPL3 on a stack of its own.
exception:
    pop %rdi
    pop %rsi
    mov (%rsp), %rdx
    mov %cr2, %rcx
    movq $exception_main, (%rsp)
    movq $UCODE, 8(%rsp)
    movq $0x2, 16(%rsp)
    movq $(exception_stack_top-8), 24(%rsp)
    movq $UDATA, 32(%rsp)
    iretq

# CPL3 -> CPL0 call by int3: eax = function (src/arch/trap.rs), rdi rcx = arguments, rax rdx = result.
trap_entry:
    cmp $(trap_table_end - trap_table) / 8, %eax
    jae 1f
    jmp *trap_table(,%rax,8)
1:  pushq $0
    pushq $3
    jmp exception
trap_halt:                        # sti takes effect after the next instruction: no wake-up is lost
    sti
    hlt
    iretq
trap_rdmsr:
    rdmsr
    iretq
trap_wrmsr:
    mov %edi, %eax
    mov %rdi, %rdx
    shr $32, %rdx
    wrmsr
    iretq
trap_set_cr3:
    mov %rdi, %cr3
    iretq
trap_sti:                         # IF of the interrupted CPL3 code
    orl $0x200, 16(%rsp)
    iretq
trap_cli:
    andl $~0x200, 16(%rsp)
    iretq
trap_cpuid:                       # ebx would be lost to the compiler: it comes back in esi
    mov %edi, %eax
    mov %rbx, %rdi
    cpuid
    mov %ebx, %esi
    mov %rdi, %rbx
    iretq
trap_triple_fault:
    lidt null_idt
    ud2
trap_stores:                      # rdi = two pages, ecx = which stores; src/functions/stores.rs looks at them
    movabs $0x1122334455667788, %rax
    cmp $1, %ecx
    je 1f
    ja 2f
    mov %rax, 8(%rdi)
    mov %al, 4096+5(%rdi)
    iretq
1:  lock incq 8(%rdi)
    xchg %rax, 4096+8(%rdi)
    iretq
2:  cmp $2, %ecx
    ja 3f
    mov %rsp, %rdx
    lea 4096(%rdi), %rsp
    push %rax
    mov %rdx, %rsp
    push %rdi
    push %rcx
    lea 4096(%rdi), %rdi
    mov $64, %ecx
    rep stosb
    pop %rcx
    pop %rdi
    iretq
3:  fxsave64 (%rdi)
    movups %xmm0, 4096(%rdi)
    iretq

# ---------------------------------------------------------------------------------------- tables
.section .tss,"aw"
.globl tss_base
tss_base:
.set i, 0
.rept CPUS
.org i * TSS_SIZE
    .long 0
    .quad kstacks + ((i + 1) << KSTACK_SHIFT)
.org i * TSS_SIZE + 102
    .word 104                     # I/O bitmap: all zero, so every port up to 0x51f is open to CPL3
.org i * TSS_SIZE + TSS_LIMIT
    .byte 0xff
.set i, i+1
.endr
.org CPUS * TSS_SIZE

.balign 16
.globl gdt
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff      # 0x10 kernel code
    .quad 0x00cf93000000ffff      # 0x18 kernel data
    .quad 0x00cffb000000ffff      # 0x20 user code32 (unused)
    .quad 0x00cff3000000ffff      # 0x28 user data
    .quad 0x00affb000000ffff      # 0x30 user code
    .quad 0
.set i, 0
.rept CPUS                        # 0x40 + 16 * slot
    .quad 0x0000890000000000 + ((TSSES + i * TSS_SIZE) << 16) + TSS_LIMIT, 0
.set i, i+1
.endr
gdt_end:
gdt_ptr:
    .word gdt_end - gdt - 1
    .quad gdt
idt_ptr:
    .word 4095
    .quad idt
null_idt:
    .word 0
    .quad 0

.section .tables,"aw"
.macro gate offset, type
    .word (STUBS + \offset) & 0xffff
    .word KCODE
    .byte 0, \type
    .word STUBS >> 16
    .quad 0
.endm
.balign 4096
idt:
.set i, 0
.rept 256
  .if i == 3
    gate i*16, 0xee               # int3 from CPL3 is the trap call
  .elseif i < 32
    gate i*16, 0x8e
  .elseif i == 0x24
    gate STUB_SERIAL, 0x8e
  .elseif i == 0x40
    gate STUB_TIMER, 0x8e
  .elseif i == 0x41
    gate STUB_WAKE, 0x8e
  .elseif i == 0xff
    gate STUB_SPURIOUS, 0x8e
  .else
    gate STUB_STRAY, 0x8e
  .endif
.set i, i+1
.endr

# Identity map of the first 4 GiB in 2 MiB pages: present, writable, user, accessed, dirty. A and D
# are preset so that the page walker never writes here. The IOAPIC and LAPIC blocks are uncached.
.balign 4096
.globl boot_pml4
boot_pml4:
    .quad boot_pdpt + 0x27
    .fill 511,8,0
boot_pdpt:
    .quad boot_pd + 0x27, boot_pd + 0x1027, boot_pd + 0x2027, boot_pd + 0x3027
    .fill 508,8,0
boot_pd:
.set i, 0
.rept 2048
  .if (i == 0xfec00000 >> 21)||(i == 0xfee00000 >> 21)
    .quad (i<<21) + 0xff
  .else
    .quad (i<<21) + 0xe7
  .endif
.set i, i+1
.endr

.section .data
.balign 8
trap_table:
    .quad trap_halt, trap_rdmsr, trap_wrmsr, trap_set_cr3, trap_sti, trap_cli, trap_cpuid
    .quad trap_triple_fault, trap_stores
trap_table_end:
.globl boot_params_ptr
.globl pvh_info_ptr
.globl boot_cr3
boot_params_ptr: .quad 0
pvh_info_ptr:    .quad 0
boot_cr3:        .quad boot_pml4  # below 4 GiB: the trampoline loads it in 32-bit mode
.globl boot_apic_id
boot_apic_id:    .quad 0          # set before the others start
.globl irq_serial
.globl irq_timer
.globl irq_wake
.globl irq_stray
irq_serial: .quad 0
irq_timer:  .quad 0
irq_wake:   .quad 0
irq_stray:  .quad 0

.section .bss
.balign 4096
kstacks:
    .skip CPUS << KSTACK_SHIFT
ustacks:
    .skip CPUS << USTACK_SHIFT
    .skip 16384
exception_stack_top:
.text
