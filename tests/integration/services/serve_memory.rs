//! `tvmm serve` in a control group with little memory: VMs that stand by give way, and requests are answered.

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::cgroup::ControlGroup;
use crate::support::scratch;
use crate::support::service::{Service, wait_until};

const RESERVE_MIB: u64 = 96;

/// MiB of the group that are in use and that the kernel cannot simply give back.
fn used_mib(group: &ControlGroup) -> u64 {
    let usage = group.number(&["memory.usage_in_bytes", "memory.current"], "");
    let stat = &["memory.stat"];
    // Version 1 tells of the groups below in other lines.
    let inactive = group.number(stat, "inactive_file ");
    usage.saturating_sub(inactive) >> 20
}

fn standby(service: &Service, key: &str) -> u64 {
    service.get("/functions/touch")["standby_state"][key].as_u64().unwrap()
}

fn touch(more: Value) -> Value {
    let mut body = json!({ "func_name": "touch", "params": "pages=200 write=100" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// `TVMM_STANDBY=500` has so many VMs stand by.
#[test]
fn vms_that_stand_by_give_way_in_a_group_with_little_memory_and_nothing_is_killed() {
    let count = std::env::var("TVMM_STANDBY").map_or(20, |text| text.parse().expect("TVMM_STANDBY is a number"));
    let Some(group) = ControlGroup::new("memory", "memory.limit_in_bytes", "memory.max") else {
        skip!("memcg", "no control group can be made that bounds memory");
        return;
    };
    let dir = scratch();
    let reserve = RESERVE_MIB.to_string();
    let service = Service::start(
        &dir.path().join("state"),
        &["--shells", "0", "--max-vms", "1000", "--memory-reserve", &reserve],
    );
    std::fs::write(group.procs(), service.pid().to_string()).unwrap();
    let booted = service.snapshot_touch("base");
    service.ok("DELETE", &format!("/vms/{booted}"), None);
    service.ok("POST", "/functions", Some(json!({ "func_name": "fill", "mem_size": 64 })));
    let function = json!({ "func_name": "touch", "mem_size": 64, "prepare": "fill pages=512 seed=1",
        "standby": { "min": count, "max": count } });
    service.ok("POST", "/functions", Some(function));
    wait_until("all VMs stand by", || standby(&service, "ready") == count);
    // Room for a few VMs that have written much, and no more.
    let limit_mib = used_mib(&group) + RESERVE_MIB + 64;
    group.set_limit(limit_mib << 20);
    let is_short = || used_mib(&group) + RESERVE_MIB > limit_mib;
    println!("{count} VMs stand by with {} MiB", used_mib(&group));
    let mut kept = Vec::new();
    while standby(&service, "evicted") == 0 {
        assert!(kept.len() < 8, "{} MiB of {limit_mib} are used, and no VM gives way", used_mib(&group));
        let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "touch", "ssId": "base" })));
        let fill = json!({ "func_name": "fill", "params": "pages=6000 seed=1", "vmId": vm["vmId"] });
        service.invoke(fill);
        kept.push(vm["vmId"].as_str().unwrap().to_string());
        wait_until("VMs give way, or memory is not short", || standby(&service, "evicted") > 0 || !is_short());
    }
    for _ in 0..5 {
        let answer = service.invoke(touch(json!({ "keep": false })));
        assert!(answer["origin"] == "standby" || answer["origin"] == "snapshot", "{answer}");
    }
    wait_until("enough have given way", || !is_short() || standby(&service, "ready") == 0);
    println!("{} VMs written to, {} evicted", kept.len(), standby(&service, "evicted"));
    for vm in &kept {
        service.invoke(touch(json!({ "vmId": vm })));
        service.ok("DELETE", &format!("/vms/{vm}"), None);
    }
    wait_until("all VMs stand by again", || standby(&service, "ready") == count);
    assert_eq!(group.number(&["memory.oom_control", "memory.events"], "oom_kill "), 0);
    assert_eq!(standby(&service, "lost"), 0);
}
