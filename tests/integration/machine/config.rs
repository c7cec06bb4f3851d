//! Configs and kernels that no machine can be made of: each is refused in one line that names what is wrong.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{finish, refusal, run, run_err, run_ok, scratch, text, tvmm};

/// Returns tvmm's refusal of a config with this text.
fn refused_text(config: &[u8]) -> String {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config).unwrap();
    let said = run_err(&["--config", text(&path)]);
    assert!(said.contains(text(&path)), "the config file is named: {said}");
    said
}

fn refused(config: &Value) -> String {
    refused_text(config.to_string().as_bytes())
}

/// Returns tvmm's refusal of a machine with this `boot-source`.
fn boot_refused(boot_source: &Value) -> String {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, json!({ "boot-source": boot_source }).to_string()).unwrap();
    run_err(&["--config", text(&path)])
}

fn kernel_refused(kernel: &Path) -> String {
    let said = boot_refused(&json!({ "kernel_image_path": kernel }));
    assert!(said.contains(text(kernel)), "the kernel is named: {said}");
    said
}

/// The built-in guest as a file, to be damaged.
fn guest_elf() -> (TempDir, PathBuf, Vec<u8>) {
    let dir = scratch();
    let path = dir.path().join("kernel");
    run_ok(&["guest", "--out", text(&path)]);
    let bytes = std::fs::read(&path).unwrap();
    (dir, path, bytes)
}

/// Offset of the first program header of type PT_LOAD in an ELF file (System V ABI, ELF-64: `e_phoff`, `Elf64_Phdr`).
fn load_header(elf: &[u8]) -> usize {
    const PT_LOAD: u32 = 1;
    let at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap()) as usize;
    let is_load = |header: &usize| elf[*header..*header + 4] == PT_LOAD.to_le_bytes();
    (at(32)..).step_by(56).find(is_load).unwrap()
}

const P_PADDR: usize = 24;
const P_FILESZ: usize = 32;
const P_MEMSZ: usize = 40;

#[test]
fn config_that_is_not_json_is_refused() {
    for config in [&b""[..], b"nope", b"{", b"{\"machine-config\": {\"vcpu_count\": 1,}}", b"[]", b"{} x"] {
        let said = refused_text(config);
        assert!(said.contains("line "), "{said}");
    }
    refused_text(b"\xff\xfe{}");
    assert!(refused_text(&vec![b' '; 2 << 20]).contains("larger than"));
    refused_text(&vec![b'['; 500_000]);
}

#[test]
fn config_with_a_wrong_type_is_refused_and_the_key_named() {
    for (config, key) in [
        (json!({ "machine-config": { "vcpu_count": "two", "mem_size_mib": 128 } }), "machine-config.vcpu_count"),
        (json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": -1 } }), "machine-config.mem_size_mib"),
        (json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 1.5 } }), "machine-config.mem_size_mib"),
        (json!({ "machine-config": { "vcpu_count": 1 } }), "mem_size_mib"),
        (json!({ "machine-config": 7 }), "machine-config"),
        (json!({ "boot-source": { "boot_args": ["a"] } }), "boot-source.boot_args"),
        (json!({ "tvmm": { "boot_protocol": "bios" } }), "tvmm.boot_protocol"),
    ] {
        let said = refused(&config);
        assert!(said.contains(key), "{key}: {said}");
    }
}

#[test]
fn config_with_an_unknown_key_is_refused_wherever_it_is() {
    for config in [
        json!({ "machine-confg": {} }),
        json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 128, "machine-confg": 1 } }),
        json!({ "boot-source": { "machine-confg": "/k" } }),
        json!({ "logger": { "machine-confg": true } }),
        json!({ "tvmm": { "machine-confg": true } }),
    ] {
        let said = refused(&config);
        assert!(said.contains("machine-confg"), "{said}");
    }
}

#[test]
fn config_with_memory_zero_is_refused() {
    let said = refused(&json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 0 } }));
    assert!(said.contains("mem_size_mib is 0"), "{said}");
}

#[test]
fn config_with_memory_over_the_limit_is_refused() {
    for mib in [(1 << 20) + 1, u64::MAX] {
        let said = refused(&json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": mib } }));
        assert!(said.contains(&format!("mem_size_mib is {mib}")), "{said}");
    }
}

#[test]
fn config_with_memory_that_its_kernel_does_not_fit_is_refused() {
    for (mib, expected) in [(1, "1 MiB is too small"), (2, "does not fit into guest memory")] {
        let dir = scratch();
        let path = dir.path().join("vm.json");
        let config = json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": mib } });
        std::fs::write(&path, config.to_string()).unwrap();
        let said = run_err(&["--config", text(&path)]);
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn config_with_vcpus_zero_or_too_many_is_refused() {
    for count in [0, 33, 255] {
        let said = refused(&json!({ "machine-config": { "vcpu_count": count, "mem_size_mib": 128 } }));
        assert!(said.contains(&format!("vcpu_count is {count}")), "{said}");
    }
}

#[test]
fn memory_the_host_cannot_reserve_is_refused() {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    let config = json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 8192 } });
    std::fs::write(&path, config.to_string()).unwrap();
    let binary = tvmm().get_program().to_owned();
    let mut command = std::process::Command::new("prlimit");
    command.arg(format!("--as={}", 4_u64 << 30)).arg(binary).args(["--config", text(&path)]);
    let said = refusal(&finish(&mut command));
    assert!(said.contains("Cannot reserve 5120 MiB of address space for guest memory"), "{said}");
}

#[test]
fn kernel_that_is_missing_is_refused() {
    let said = kernel_refused(Path::new("/nonexistent/vmlinux"));
    assert!(said.contains("No such file"), "{said}");
    assert!(boot_refused(&json!({ "kernel_image_path": "" })).contains("kernel_image_path"));
}

#[test]
fn kernel_that_is_no_regular_file_is_refused_without_waiting() {
    let dir = scratch();
    kernel_refused(dir.path());
    kernel_refused(Path::new("/dev/zero"));
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    kernel_refused(&fifo);
}

#[test]
fn kernel_of_garbage_is_refused() {
    let dir = scratch();
    let path = dir.path().join("kernel");
    for bytes in [vec![], vec![0x7f], b"MZ a PE image".to_vec(), (0..100_000_u32).map(|i| (i * 37) as u8).collect()] {
        std::fs::write(&path, bytes).unwrap();
        kernel_refused(&path);
    }
}

#[test]
fn kernel_that_is_cut_short_is_refused() {
    let (_dir, path, elf) = guest_elf();
    let header = load_header(&elf);
    for length in [16, 63, 64, header + 20, 4096, 50_000, elf.len() * 3 / 4] {
        std::fs::write(&path, &elf[..length]).unwrap();
        kernel_refused(&path);
    }
}

#[test]
fn kernel_with_a_segment_outside_memory_is_refused() {
    let (_dir, path, elf) = guest_elf();
    let header = load_header(&elf);
    for (field, value) in [
        (P_PADDR, 128 << 20),
        (P_PADDR, (128 << 20) - 4096),
        (P_PADDR, 0xd000_0000),
        (P_PADDR, u64::MAX - 4095),
        (P_FILESZ, 1 << 40),
        (P_FILESZ, u64::MAX),
        (P_MEMSZ, 128 << 20),
        (P_MEMSZ, u64::MAX),
    ] {
        let mut elf = elf.clone();
        elf[header + field..][..8].copy_from_slice(&value.to_le_bytes());
        std::fs::write(&path, elf).unwrap();
        kernel_refused(&path);
    }
}

#[test]
fn kernel_that_is_entered_outside_memory_ends_without_a_hang() {
    const E_ENTRY: usize = 24;
    let (dir, path, mut elf) = guest_elf();
    elf[E_ENTRY..][..8].copy_from_slice(&0xd000_0000_u64.to_le_bytes());
    std::fs::write(&path, elf).unwrap();
    let config = dir.path().join("vm.json");
    let boot = json!({ "boot-source": { "kernel_image_path": path }, "tvmm": { "boot_protocol": "linux64" } });
    std::fs::write(&config, boot.to_string()).unwrap();
    let said = run_err(&["--config", text(&config), "--run", "hello", "--run-timeout", "5"]);
    assert!(said.contains("The guest "), "{said}");
}

/// Any byte of the headers may be damaged: what then happens is a refusal or a guest that does not come up, never a
/// panic of the VMM.
#[test]
fn kernel_with_any_damaged_header_byte_never_panics_tvmm() {
    let (dir, path, elf) = guest_elf();
    let config = dir.path().join("vm.json");
    std::fs::write(&config, json!({ "boot-source": { "kernel_image_path": path } }).to_string()).unwrap();
    for at in (4..64 + 2 * 56).step_by(3) {
        let mut elf = elf.clone();
        elf[at] ^= 0xff;
        std::fs::write(&path, elf).unwrap();
        let output = run(&["--config", text(&config), "--run", "hello", "--run-timeout", "1"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 1)), "byte {at}: {:?}\n{stderr}", output.status);
        assert!(!stderr.contains("panicked"), "byte {at}: {stderr}");
    }
}

#[test]
fn command_line_that_is_too_long_is_refused() {
    let said = boot_refused(&json!({ "boot_args": "a".repeat(2048) }));
    assert!(said.contains("2048 bytes long, at most 2047 fit"), "{said}");
    let said = boot_refused(&json!({ "boot_args": "naïve" }));
    assert!(said.contains("command line"), "{said}");
    let said = boot_refused(&json!({ "boot_args": "a\0b" }));
    assert!(said.contains("NUL"), "{said}");
}

#[test]
fn what_is_not_built_yet_is_refused_by_name() {
    for (config, name) in [
        (json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 128, "smt": true } }), "Hyper-threads"),
        (json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M" } }), "2M pages"),
        (
            json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2" } }),
            "CPU template T2",
        ),
    ] {
        let said = refused(&config);
        assert!(said.contains(name) && said.contains("not supported yet"), "{said}");
    }
}

#[test]
fn config_that_is_not_there_is_refused() {
    let said = run_err(&["--config", "/nonexistent/vm.json"]);
    assert!(said.contains("/nonexistent/vm.json") && said.contains("No such file"), "{said}");
}
