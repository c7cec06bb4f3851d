//! The doors of fuzz targets: functions that take any bytes, and that no bytes may make panic, hang or read beyond
//! their memory. `docs/fuzzing.md` lists them.
//!
//! Each room has its doors in a file `doors.rs` of its own, which sees what the rest of the crate does not. `fuzz/` has
//! a target for each door; the test below feeds the corpora and the former findings to all of them on any toolchain.

pub use crate::api::doors::request as api_request;
pub use crate::backends::cold::doors::{page_client, page_server};
pub use crate::config::doors::config;
pub use crate::devices::doors::ports;
pub use crate::devices::virtio::doors::{balloon, block, entropy, net, pmem, vsock};
pub use crate::memory::promote::doors::instruction;
pub use crate::serve::doors::{guest_line, service};
pub use crate::snapshot::doors::{container, manifest, page_map};
pub use crate::tiering::doors::{chunk_bytes, chunk_index, plan, plan_json, pool, profile};
pub use crate::vmm::doors::{kernel, saved_state};

/// A function that takes any bytes.
pub type Door = fn(&[u8]);

/// All doors, with the names of their targets.
pub const DOORS: [(&str, Door); 25] = [
    ("api_request", api_request),
    ("balloon", balloon),
    ("block", block),
    ("chunk_bytes", chunk_bytes),
    ("chunk_index", chunk_index),
    ("config", config),
    ("container", container),
    ("entropy", entropy),
    ("guest_line", guest_line),
    ("instruction", instruction),
    ("kernel", kernel),
    ("manifest", manifest),
    ("net", net),
    ("page_client", page_client),
    ("page_map", page_map),
    ("page_server", page_server),
    ("plan", plan),
    ("plan_json", plan_json),
    ("pmem", pmem),
    ("pool", pool),
    ("ports", ports),
    ("profile", profile),
    ("saved_state", saved_state),
    ("service", service),
    ("vsock", vsock),
];

#[cfg(test)]
mod tests {
    use std::fs;
    use std::panic::catch_unwind;
    use std::path::{Path, PathBuf};

    use super::*;

    fn fuzz() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
    }

    /// The files of a folder, in the order of their names; none if there is no folder.
    fn files(folder: &Path) -> Vec<PathBuf> {
        let found = fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> = found.filter(|path| path.is_file()).collect();
        files.sort();
        files
    }

    #[test]
    fn every_door_has_a_target_and_a_corpus() {
        let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
        let targets: Vec<&str> = manifest.lines().filter_map(|line| line.strip_prefix("path = \"targets/")).collect();
        assert_eq!(targets, DOORS.map(|(name, _)| format!("{name}.rs\"")));
        for (name, _) in DOORS {
            let target = fs::read_to_string(fuzz().join("targets").join(format!("{name}.rs"))).unwrap();
            assert!(target.contains(&format!("tvmm::fuzzing::{name}(data)")), "{name}: {target}");
            assert!(!files(&fuzz().join("corpus").join(name)).is_empty(), "{name} has no corpus");
        }
    }

    #[test]
    fn no_input_of_the_corpora_and_no_former_finding_makes_a_door_panic() {
        let mut wrong = Vec::new();
        for (name, door) in DOORS {
            for input in [&[][..], &[0], &[0xff], &[0; 300], &[0xff; 300]] {
                if catch_unwind(|| door(input)).is_err() {
                    wrong.push(format!("{name}: {input:?}"));
                }
            }
            for folder in ["corpus", "regressions"] {
                for path in files(&fuzz().join(folder).join(name)) {
                    let input = fs::read(&path).unwrap();
                    if catch_unwind(|| door(&input)).is_err() {
                        wrong.push(path.display().to_string());
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
