//! Skipped tests are counted: a test that this host cannot run says which kind of thing the host lacks, and why.

use std::fs::OpenOptions;
use std::io::Write;

/// Notes that the calling test is skipped. `kind` is one word for what the host lacks (`linux`, `rdma`, `fuse`); `why`
/// is the reason for people. The test must have probed the host for it; it must not conclude it from the answer under
/// test.
///
/// The note is a line `RUN TAB TEST TAB KIND TAB REASON` in the file that `TVMM_SKIPS` names; `tests/run.sh` counts the
/// lines. The name of a test is the name of its thread.
///
/// # Panics
/// If `TVMM_REQUIRE` (kinds with commas between them, or `all`) names the kind: then the host must have the thing.
pub fn skipped(kind: &str, why: &str) {
    let required = std::env::var("TVMM_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|word| word == kind || word == "all");
    assert!(!is_required, "TVMM_REQUIRE asks for tests of the kind {kind}, but this one cannot run: {why}");
    println!("skipped ({kind}): {why}");
    let Some(path) = std::env::var_os("TVMM_SKIPS") else { return };
    let run = std::env::var("TVMM_TEST_RUN").unwrap_or_default();
    let thread = std::thread::current();
    let test = thread.name().expect("a thread that skips has the name of its test");
    let line = format!("{run}\t{test}\t{kind}\t{}\n", why.replace(['\n', '\t'], " "));
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the file of skipped tests can be written");
}

/// `skip!("KIND", "why", …)`: see [`skipped`].
macro_rules! skip {
    ($kind:literal, $($why:tt)*) => { $crate::skip::skipped($kind, &format!($($why)*)) };
}
pub(crate) use skip;
