//! Fuzz door of `vm.json` (`docs/fuzzing.md`).

use serde_json::Value;

use super::VmConfig;

/// A config file. The text that a config is written as is read as that config, and written in the same way again:
/// some values, such as no CPU template, are not written.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // Another file is not read: its content is no part of the input.
    if serde_json::from_str(text).is_ok_and(|value: Value| value["cpu-config"].is_string()) {
        return;
    }
    let Ok(config) = VmConfig::from_json(text) else { return };
    let written = |config: &VmConfig| serde_json::to_string(config).ok();
    let Some(first) = written(&config) else { return };
    let again = VmConfig::from_json(&first).ok().and_then(|config| written(&config));
    assert_eq!(again, Some(first), "a config changes when it is written");
}
