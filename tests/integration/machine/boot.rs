//! Booting the built-in guest.

use serde_json::json;

use crate::support::{Vm, config};

#[test]
fn built_in_guest_boots_by_both_protocols_and_answers() {
    for protocol in ["auto", "pvh", "linux64"] {
        let mut config = config(1, 128);
        config["tvmm"] = json!({ "boot_protocol": protocol });
        let mut vm = Vm::boot(&config);
        let expected = if protocol == "linux64" { "linux" } else { "pvh" };
        assert_eq!(vm.call("info").value("boot"), expected);
        assert_eq!(vm.call("hello").digest, "a0ac0ed9675fab36");
        let (status, stderr) = vm.terminate();
        assert!(status.success(), "{stderr}");
    }
}
