//! Builds the guest kernel of `resources/guest/`, a package of its own for the bare machine, without and with its
//! functions, and gives the crate the paths of the two ELFs. Makes the seccomp filters of `resources/seccomp/` into
//! programs.

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::{Map, Value};

#[path = "resources/seccomp/tree.rs"]
mod seccomp_tree;

fn main() {
    let variable = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let guest = Path::new(&variable("CARGO_MANIFEST_DIR")).join("resources/guest");
    for watched in ["src", "Cargo.toml", "Cargo.lock", "build.rs", "boot.s", "link.ld"] {
        println!("cargo::rerun-if-changed={}", guest.join(watched).display());
    }
    let out = PathBuf::from(variable("OUT_DIR"));
    let filters = Path::new(&variable("CARGO_MANIFEST_DIR")).join("resources/seccomp/x86_64.json");
    println!("cargo::rerun-if-changed={}", filters.display());
    compile_filters(&filters, &out.join("seccomp.rs"));
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

/// The kinds of threads that have filters, in the order of `Kind::ALL` in `src/sys/seccomp.rs`.
const KINDS: [&str; 7] = ["start", "main", "api", "vcpu", "devices", "faults", "loaders"];

/// Writes the programs of the filters in `json` as a Rust constant. A restore then spends no time on compiling them.
fn compile_filters(json: &Path, out: &Path) {
    let place = json.display();
    let text = fs::read_to_string(json).unwrap_or_else(|error| panic!("{place}: {error}"));
    let mut filters: Map<String, Value> =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{place}: {error}"));
    let mut text = format!("static BUILT_IN: [&[sock_filter]; {}] = [\n", KINDS.len());
    for kind in KINDS {
        let filter = filters.remove(kind).unwrap_or_else(|| panic!("{place} has no filter {kind}"));
        text += "    &[\n";
        for step in seccomp_tree::compile(&filter).unwrap_or_else(|why| panic!("{place}, {kind}: {why}")) {
            let fields = format!("code: {}, jt: {}, jf: {}, k: {}", step.code, step.jt, step.jf, step.k);
            writeln!(text, "        sock_filter {{ {fields} }},").expect("a string takes all text");
        }
        text += "    ],\n";
    }
    assert!(filters.is_empty(), "{place} has unknown kinds: {:?}", filters.keys());
    text += "];\n";
    fs::write(out, text).unwrap_or_else(|error| panic!("{}: {error}", out.display()));
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
