//! Builds the guest kernel of `resources/guest/`, a package of its own for the bare machine, without and with its
//! functions, and gives the crate the paths of the two ELFs.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

fn main() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let guest = Path::new(&variable("CARGO_MANIFEST_DIR")).join("resources/guest");
    for watched in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "boot.s", "link.ld"] {
        println!("cargo::rerun-if-changed={}", guest.join(watched).display());
    }
    let out = PathBuf::from(variable("OUT_DIR"));
    let builds = [("TVMM_GUEST_ELF", "guest", ""), ("TVMM_FUNCTIONS_ELF", "guest-functions", "functions")];
    // Both builds run at once: cargo's job server shares the processors among them.
    let builds = builds.map(|(name, folder, features)| {
        let target_dir = out.join(folder);
        (name, build(&variable("CARGO"), &guest, &target_dir, features), target_dir)
    });
    for (name, mut cargo, target_dir) in builds {
        let status = cargo.wait().unwrap_or_else(|error| panic!("cargo for the guest kernel is lost: {error}"));
        assert!(status.success(), "the guest kernel in {} does not build", guest.display());
        println!("cargo::rustc-env={name}={}", target_dir.join(TARGET).join("release/tvmm-guest").display());
    }
}

/// Always the same target, whatever tvmm itself is built for: the guest has no libc. Its flags are its own too.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn build(cargo: &str, guest: &Path, target_dir: &Path, features: &str) -> Child {
    Command::new(cargo)
        .args(["build", "--release", "--locked", "--target", TARGET, "--features", features, "--manifest-path"])
        .arg(guest.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Crelocation-model=static")
        .env_remove("RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run cargo for the guest kernel: {error}"))
}
