//! Hands the linker the script that places the kernel, whatever the current directory is.

use std::env;

fn main() {
    let root = env::var("CARGO_MANIFEST_DIR").expect("Cargo sets CARGO_MANIFEST_DIR");
    for arg in
        ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", &format!("-Wl,-T,{root}/link.ld")]
    {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
    for file in ["build.rs", "link.ld", "boot.s"] {
        println!("cargo::rerun-if-changed={root}/{file}");
    }
}
