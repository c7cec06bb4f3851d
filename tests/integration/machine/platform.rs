//! The description of its machine that a guest gets: ACPI tables, MP table, initrd, CPUID. The tests read it from the
//! memory of a snapshot.

use std::path::Path;

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::{Vm, config, run, run_err, run_ok, scratch, text};

/// Guest memory as a full snapshot has it.
struct Memory(Vec<u8>);

impl Memory {
    fn of(vm: &Vm) -> Memory {
        let dir = scratch();
        vm.snapshot(&dir.path().join("s"), &[]);
        Memory(std::fs::read(dir.path().join("s/memory")).unwrap())
    }

    fn bytes(&self, gpa: u64, len: u64) -> &[u8] {
        &self.0[gpa as usize..][..len as usize]
    }

    fn number(&self, gpa: u64, len: u64) -> u64 {
        self.bytes(gpa, len).iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    /// An ACPI table, its checksum checked.
    fn table(&self, gpa: u64, signature: &[u8; 4]) -> &[u8] {
        assert_eq!(self.bytes(gpa, 4), signature);
        let table = self.bytes(gpa, self.number(gpa + 4, 4));
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(signature));
        table
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
}

const RSDP: u64 = 0xe_0000;
const MP_FLOATING: u64 = 0x9_fc00;
const VMGENID: u64 = 0xf_f000;
const PVH_START_INFO: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;

/// A config that boots the built-in guest from a file, with an initrd if `initrd` has bytes.
fn config_with_files(dir: &Path, initrd: &[u8], mib: u64) -> Value {
    let kernel = dir.join("kernel");
    let image = dir.join("initrd");
    run_ok(&["guest", "--out", text(&kernel)]);
    std::fs::write(&image, initrd).unwrap();
    let mut config = config(1, mib);
    config["boot-source"] = json!({ "kernel_image_path": kernel, "initrd_path": image });
    config
}

#[test]
fn guest_finds_acpi_tables_from_either_boot_protocol_and_where_kernels_look() {
    for (protocol, vcpus) in [("pvh", 1), ("linux64", 3)] {
        let mut config = config(vcpus, 64);
        config["tvmm"] = json!({ "boot_protocol": protocol });
        let memory = Memory::of(&Vm::boot(&config));
        let told = if protocol == "pvh" { PVH_START_INFO + 32 } else { ZERO_PAGE + 0x70 };
        assert_eq!(memory.number(told, 8), RSDP, "{protocol}");
        assert_eq!(memory.bytes(RSDP, 8), b"RSD PTR ");
        assert_eq!((sum(memory.bytes(RSDP, 20)), sum(memory.bytes(RSDP, 36))), (0, 0));
        let xsdt = memory.number(RSDP + 24, 8);
        assert_eq!(memory.table(xsdt, b"XSDT").len(), 36 + 2 * 8);
        let fadt = memory.number(xsdt + 36, 8);
        memory.table(fadt, b"FACP");
        let madt = memory.table(memory.number(xsdt + 44, 8), b"APIC");
        assert_eq!(madt.len(), 44 + 8 * vcpus as usize + 12);
        let dsdt = memory.table(memory.number(fadt + 140, 8), b"DSDT");
        for name in [&b"COM1"[..], b"VGEN", b"VM_Gen_Counter\0", b"ACPI0013\0", b"_S5_"] {
            assert!(dsdt.windows(name.len()).any(|found| found == name), "{}", String::from_utf8_lossy(name));
        }
        let mp = memory.number(MP_FLOATING + 4, 4);
        assert_eq!((memory.bytes(MP_FLOATING, 4), memory.bytes(mp, 4)), (&b"_MP_"[..], &b"PCMP"[..]));
        assert_eq!(sum(memory.bytes(mp, memory.number(mp + 4, 2))), 0);
    }
}

#[test]
fn guest_without_acpi_gets_the_mp_table_alone() {
    let mut config = config(2, 64);
    config["tvmm"] = json!({ "acpi": false, "boot_protocol": "linux64" });
    let mut vm = Vm::boot(&config);
    assert_eq!(vm.call("info").number("vcpus"), 2);
    let memory = Memory::of(&vm);
    assert_eq!(memory.number(ZERO_PAGE + 0x70, 8), 0);
    assert!(memory.bytes(RSDP, VMGENID + 4096 - RSDP).iter().all(|&byte| byte == 0));
    assert_eq!(memory.bytes(MP_FLOATING, 4), b"_MP_");
}

#[test]
fn initrd_is_loaded_high_and_its_place_told() {
    let initrd: Vec<u8> = (0..5000_u32).map(|i| (i * 37) as u8).collect();
    for protocol in ["pvh", "linux64"] {
        let dir = scratch();
        let mut config = config_with_files(dir.path(), &initrd, 64);
        config["tvmm"] = json!({ "boot_protocol": protocol });
        let memory = Memory::of(&Vm::boot(&config));
        let gpa = (64 << 20) - 8192;
        let told = match protocol {
            "pvh" => {
                let module = memory.number(PVH_START_INFO + 16, 8);
                assert_eq!(memory.number(PVH_START_INFO + 12, 4), 1);
                (memory.number(module, 8), memory.number(module + 8, 8))
            }
            _ => (memory.number(ZERO_PAGE + 0x218, 4), memory.number(ZERO_PAGE + 0x21c, 4)),
        };
        assert_eq!(told, (gpa, 5000), "{protocol}");
        assert_eq!(memory.bytes(gpa, 5000), initrd, "{protocol}");
    }
}

#[test]
fn initrd_that_cannot_be_used_is_refused() {
    let dir = scratch();
    let refused = |config: &Value| {
        let path = dir.path().join("vm.json");
        std::fs::write(&path, config.to_string()).unwrap();
        run_err(&["--config", text(&path)])
    };
    let empty = config_with_files(dir.path(), b"", 64);
    assert!(refused(&empty).contains("it is empty"));
    let large = config_with_files(dir.path(), &vec![1; 9 << 20], 8);
    let said = refused(&large);
    assert!(said.contains("does not fit into guest memory") && said.contains("9437184 bytes"), "{said}");
    let mut other = empty.clone();
    for (path, said) in [("/nonexistent/initrd", "No such file"), ("/dev/zero", "regular file"), ("/", "regular file")]
    {
        other["boot-source"]["initrd_path"] = json!(path);
        let refusal = refused(&other);
        assert!(refusal.contains(path) && refusal.contains(said), "{refusal}");
    }
    other["boot-source"] = json!({ "initrd_path": "/x" });
    assert!(refused(&other).contains("needs a kernel_image_path"));
}

/// The first KiB of a bzImage that is 64-bit and relocatable (Linux `Documentation/arch/x86/boot.rst`).
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &256_u32.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x238, &0x7ff_u32.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    image
}

#[test]
fn kernels_of_the_wrong_kind_are_refused() {
    let dir = scratch();
    let mut elf32 = b"\x7fELF\x01".to_vec();
    elf32.resize(4096, 0);
    let mut arm = elf32.clone();
    let path = dir.path().join("kernel");
    (arm[4], arm[18]) = (2, 183);
    // This image ends where its entry point would be.
    let cut = bzimage()[..1024 + 512].to_vec();
    let mut bz32 = bzimage();
    let mut old = bzimage();
    let mut huge = bzimage();
    bz32[0x236] = 0;
    old[0x206] = 0;
    huge[0x263] = 0x7f;
    for (kernel, said) in [
        (elf32, "32-bit kernel"),
        (arm, "not a kernel for x86-64"),
        (cut, "cut short"),
        (bz32, "32-bit kernel"),
        (old, "older than 2.12"),
        (huge, "does not fit into guest memory"),
        (b"#!/bin/sh".to_vec(), "neither an ELF file nor a bzImage"),
    ] {
        std::fs::write(&path, kernel).unwrap();
        let config = dir.path().join("vm.json");
        std::fs::write(&config, json!({ "boot-source": { "kernel_image_path": path } }).to_string()).unwrap();
        let refusal = run_err(&["--config", text(&config)]);
        assert!(refusal.contains(text(&path)) && refusal.contains(said), "{said}: {refusal}");
    }
    std::fs::write(&path, bzimage()).unwrap();
    let config = dir.path().join("vm.json");
    let pvh = json!({ "boot-source": { "kernel_image_path": path }, "tvmm": { "boot_protocol": "pvh" } });
    std::fs::write(&config, pvh.to_string()).unwrap();
    let refusal = run_err(&["--config", text(&config)]);
    assert!(refusal.contains("it is a bzImage; only ELF kernels have a PVH note"), "{refusal}");
}

/// A bzImage that prints a line and resets the machine.
fn bzimage_that_says_hi() -> Vec<u8> {
    const ENTRY_64: usize = 1024 + 0x200;
    let mut image = bzimage();
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, COM1
    b"hi\n".iter().for_each(|&byte| code.extend([0xb0, byte, 0xee])); // mov al, byte; out dx, al
    code.extend([0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd]); // mov al, 0xfe; out 0x64, al; hlt; jmp to hlt
    image[ENTRY_64..ENTRY_64 + code.len()].copy_from_slice(&code);
    image
}

/// QEMU and GRUB start them: memtest86+ rounds `syssize` up past the end of its file.
#[test]
fn kernels_with_wrong_header_fields_that_no_loader_reads_boot() {
    let dir = scratch();
    let path = dir.path().join("kernel");
    let config = dir.path().join("vm.json");
    std::fs::write(&config, json!({ "boot-source": { "kernel_image_path": path } }).to_string()).unwrap();
    for (at, bytes, warned) in [
        (0x1f4, &256_u32.to_le_bytes()[..], false),
        (0x1f4, &0_u32.to_le_bytes(), false),
        (0x1f4, &u32::MAX.to_le_bytes(), true),
        (0x214, &0_u32.to_le_bytes(), false),
        (0x258, &0_u64.to_le_bytes(), false),
        (0x234, &[0], false),
    ] {
        let mut image = bzimage_that_says_hi();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        // The last paragraph is not whole.
        image.pop();
        std::fs::write(&path, image).unwrap();
        let output = run(&["--config", text(&config)]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{at:#x} {bytes:x?}: {said}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "hi\n", "{at:#x} {bytes:x?}: {said}");
        assert_eq!(said.contains("may be cut short"), warned, "{at:#x} {bytes:x?}: {said}");
    }
}

/// A template that clears bits of leaf 1's ECX.
pub fn without_leaf1_ecx(bitmap: &str) -> Value {
    let modifier = json!({ "register": "ecx", "bitmap": bitmap });
    json!({ "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [modifier] }] })
}

/// Returns true if KVM keeps a feature of leaf 1's ECX hidden that a vCPU's table of CPUID leaves out.
pub fn hides_cpuid(feature: u32) -> bool {
    let kvm = kvm_ioctls::Kvm::new().expect("/dev/kvm can be opened");
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut table = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    table.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 1).for_each(|leaf| leaf.ecx &= !feature);
    vcpu.set_cpuid2(&table).unwrap();
    let kept = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    kept.as_slice().iter().filter(|leaf| leaf.function == 1).all(|leaf| leaf.ecx & feature == 0)
}

#[test]
fn cpu_template_masks_features_for_good() {
    // AVX is bit 28.
    let template = without_leaf1_ecx(&format!("0b0{}", "x".repeat(28)));
    let dir = scratch();
    let out = dir.path().join("s");
    let mut config = config(2, 64);
    config["cpu-config"] = template.clone();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    if !hides_cpuid(1 << 28) {
        let said = run_err(&["--config", text(&path), "--run", "hello"]);
        assert!(said.contains("which cannot hide them from guests"), "{said}");
        return skip!("cpuid", "this host's KVM shows guests the host's CPUID");
    }
    let mut vm = Vm::boot(&config);
    assert_eq!(vm.call("info").value("simd"), "sse");
    vm.snapshot(&out, &[]);
    assert_eq!(Vm::restore(&out, "firecracker").call("info").value("simd"), "sse");

    let vm = Vm::wait_for_api();
    assert_eq!(vm.api("PUT", "/cpu-config", Some(template)).0, 204);
    vm.api_ok("PUT", "/actions", Some(json!({ "action_type": "InstanceStart" })));
    assert_eq!(vm.api_ok("GET", "/vm/config", None)["cpu-config"]["cpuid_modifiers"][0]["leaf"], "0x1");
    assert!(vm.api_fault("PUT", "/cpu-config", Some(json!({}))).contains("after starting"));
}

#[test]
fn cpu_template_that_cannot_be_had_is_refused() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    let leaf = |leaf: &str, register: &str| {
        let modifier = json!({ "register": register, "bitmap": "0b0" });
        json!({ "cpuid_modifiers": [{ "leaf": leaf, "subleaf": "0", "flags": 0, "modifiers": [modifier] }] })
    };
    for (template, said) in [
        (leaf("0x7fffffff", "eax"), "no CPUID leaf 0x7fffffff"),
        // Bit 31: that there is a hypervisor.
        (without_leaf1_ecx(&format!("0b0{}", "x".repeat(31))), "CPUID leaf 0x1, subleaf 0x0 follow from the machine"),
        (json!({ "kvm_capabilities": ["99999"] }), "lacks the capability 99999"),
        (json!({ "msr_modifiers": [{ "addr": "0x7fffffff", "bitmap": "0b0" }] }), "MSR 0x7fffffff cannot be set"),
        (json!({ "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b2" }] }), "0b2"),
    ] {
        std::fs::write(&path, json!({ "cpu-config": template }).to_string()).unwrap();
        let refusal = run_err(&["--config", text(&path)]);
        assert!(refusal.contains(said), "{said}: {refusal}");
    }
}
