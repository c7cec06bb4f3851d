# The loop of `spin` (AT&T syntax): patterns stay in all SIMD registers and five general ones while
# it reads the clock, like clock.rs does, until the deadline. rdi = struct Loop of spin.rs.

.set CLOCK, 0
.set DEADLINE, 8
.set LAST, 16
.set BACKWARDS, 24
.set ROUNDS, 32
.set GPR_BAD, 40
.set BEFORE, 64
.set AFTER, 64 + 2048
.set VALUE, 0x0123456789abcdef

.macro spin_function name, count, prefix, move
.globl \name
\name:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rdi, %rbx
    .altmacro
    .set i, 0
    .rept \count
    simd_load \move, \prefix, %i
    .set i, i + 1
    .endr
    .noaltmacro
    mov $VALUE + 1, %rbp
    mov $VALUE + 2, %r12
    mov $VALUE + 3, %r13
    mov $VALUE + 4, %r14
    mov $VALUE + 5, %r15
    call spin_until_deadline
    .altmacro
    .set i, 0
    .rept \count
    simd_store \move, \prefix, %i
    .set i, i + 1
    .endr
    .noaltmacro
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
.endm

.macro simd_load move, prefix, n
    \move BEFORE + 64*\n(%rbx), %\prefix\n
.endm
.macro simd_store move, prefix, n
    \move %\prefix\n, AFTER + 64*\n(%rbx)
.endm

.macro gpr_check register, n
    mov $VALUE + \n, %rax
    cmp %rax, \register
    setne %al
    movzbl %al, %eax
    add %rax, GPR_BAD(%rbx)
.endm

.text
spin_until_deadline:
    mov CLOCK(%rbx), %rsi
    mov DEADLINE(%rbx), %rdi
    mov LAST(%rbx), %r8
    xor %r9d, %r9d                # times the clock went backwards
    xor %r10d, %r10d              # rounds
1:  mov (%rsi), %r11d             # version
    test $1, %r11d
    jnz 1b
    lfence
    rdtsc
    lfence
    shl $32, %rdx
    or %rdx, %rax
    sub 8(%rsi), %rax             # tsc_timestamp
    jnc 2f
    xor %eax, %eax
2:  movsbl 28(%rsi), %ecx         # tsc_shift
    test %ecx, %ecx
    js 3f
    shl %cl, %rax
    jmp 4f
3:  neg %ecx
    shr %cl, %rax
4:  mov 24(%rsi), %edx            # tsc_to_system_mul
    mul %rdx
    shrd $32, %rdx, %rax
    add 16(%rsi), %rax            # system_time
    cmp (%rsi), %r11d
    jne 1b
    inc %r10
    cmp %r8, %rax
    jae 5f
    inc %r9
5:  mov %rax, %r8
    cmp %rdi, %rax
    jb 1b
    mov %r8, LAST(%rbx)
    mov %r9, BACKWARDS(%rbx)
    mov %r10, ROUNDS(%rbx)
    movq $0, GPR_BAD(%rbx)
    gpr_check %rbp, 1
    gpr_check %r12, 2
    gpr_check %r13, 3
    gpr_check %r14, 4
    gpr_check %r15, 5
    ret

spin_function spin_sse, 16, xmm, movups
spin_function spin_avx, 16, ymm, vmovups
spin_function spin_avx512, 32, zmm, vmovups
