//! Builds the guest kernel of `resources/guest/`, a package of its own for the bare machine, and tells where its ELF is.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let guest = Path::new(&variable("CARGO_MANIFEST_DIR")).join("resources/guest");
    for watched in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "boot.s", "link.ld"] {
        println!("cargo::rerun-if-changed={}", guest.join(watched).display());
    }
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("guest");
    // Always the same target, whatever tvmm itself is built for: the guest has no libc. Its flags are its own too.
    let target = "x86_64-unknown-linux-gnu";
    let status = Command::new(variable("CARGO"))
        .args(["build", "--release", "--locked", "--target", target, "--manifest-path"])
        .arg(guest.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Crelocation-model=static")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()
        .unwrap_or_else(|error| panic!("cannot run cargo for the guest kernel: {error}"));
    assert!(status.success(), "the guest kernel in {} does not build", guest.display());
    println!("cargo::rustc-env=TVMM_GUEST_ELF={}", target_dir.join(target).join("release/tvmm-guest").display());
}
