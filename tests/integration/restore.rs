//! Snapshot and restore: what a guest remembers.

use crate::support::{Vm, config, scratch};

#[test]
fn memory_survives_in_the_same_and_in_a_new_process() {
    let dir = scratch();
    let out = dir.path().join("full");
    let mut vm = Vm::boot(&config(1, 128));
    vm.call("fill pages=2000 seed=7");
    let before = vm.call("check").digest;
    vm.snapshot(&out, &[]);
    assert_eq!(vm.call("check").digest, before);
    for policy in ["eager", "firecracker"] {
        let mut restored = Vm::restore(&out, policy);
        assert_eq!(restored.call("check").digest, before, "{policy}");
    }
}
