//! The built-in guest as a file that any VMM could boot.

use serde_json::json;

use crate::support::{Vm, config, run_err, run_ok, scratch, text};

#[test]
fn written_guest_boots_by_both_protocols_with_its_boot_parameters() {
    let dir = scratch();
    let elf = dir.path().join("guest.elf");
    assert!(run_ok(&["guest", "--out", text(&elf)]).contains("bytes"));
    for (protocol, boot) in [("pvh", "pvh"), ("linux64", "linux")] {
        for (args, pt, init_on_free) in [("pt=4k init_on_free=1", "4k", "1"), ("pt=2m", "2m", "0")] {
            let mut config = config(2, 128);
            config["boot-source"] = json!({ "kernel_image_path": elf, "boot_args": args });
            config["tvmm"] = json!({ "boot_protocol": protocol });
            let mut vm = Vm::boot(&config);
            let info = vm.call("info");
            let found = ["boot", "pt", "init_on_free", "vcpus"].map(|key| info.value(key));
            assert_eq!(found, [boot, pt, init_on_free, "2"], "{protocol} {args}");
            vm.call("fill pages=500 seed=1 cpu=1");
            let digest = vm.call("check").digest;
            let out = dir.path().join(format!("{protocol}-{pt}"));
            vm.snapshot(&out, &[]);
            // The kernel image is not needed any more, its pages are in the snapshot.
            assert_eq!(Vm::restore(&out, "firecracker").call("check").digest, digest);
        }
    }
}

#[test]
fn kernel_that_is_no_elf_is_refused_by_name() {
    let dir = scratch();
    let [kernel, path] = ["kernel", "vm.json"].map(|name| dir.path().join(name));
    for bytes in [&b""[..], b"not a kernel", &[0x7f, b'E', b'L', b'F', 2, 1, 1]] {
        std::fs::write(&kernel, bytes).unwrap();
        let mut config = config(1, 128);
        config["boot-source"] = json!({ "kernel_image_path": kernel });
        std::fs::write(&path, config.to_string()).unwrap();
        let stderr = run_err(&["--config", text(&path), "--run", "hello"]);
        assert!(stderr.contains(text(&kernel)), "{stderr}");
    }
}

#[test]
fn guest_file_that_cannot_be_written_is_an_error() {
    let stderr = run_err(&["guest", "--out", "/nonexistent/guest.elf"]);
    assert!(stderr.contains("/nonexistent/guest.elf"), "{stderr}");
}
