//! Two stock Linux guests on a bridge: ping, and a TCP transfer that goes on in restored guests. They need a host whose
//! KVM runs stock Linux user space; `TVMM_LINUX_GUEST` names the directory with the testbed's guest kernel and initrd.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::network::{Network, with_network};
use crate::support::{TIMEOUT, Vm, scratch, text};

const MIB: u32 = 12;

/// The directory with kernel and initrd. Without one it prints why the calling test is skipped.
fn guest() -> Option<PathBuf> {
    let dir = std::env::var_os("TVMM_LINUX_GUEST").map(PathBuf::from);
    if dir.is_none() {
        skip!("linux", "TVMM_LINUX_GUEST does not name a directory with Linux kernels");
    }
    dir
}

fn machine(dir: &Path, tap: &str, number: u8) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": dir.join("vmlinuz-6.12"),
            "initrd_path": dir.join("initrd-6.12.cpio"),
            "boot_args": "console=ttyS0 quiet reboot=t panic=-1",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 256, "track_dirty_pages": true },
        "network-interfaces": [{
            "iface_id": "eth0", "host_dev_name": tap, "guest_mac": format!("06:00:ac:10:00:{number:02x}"),
            // Slow enough that a transfer can be caught in the middle.
            "tx_rate_limiter": { "bandwidth": { "size": 400_000, "refill_time": 100 } },
        }],
    })
}

/// A guest that has come up with its address, and a shell on its console.
fn up(dir: &Path, tap: &str, number: u8) -> Vm {
    let scratch = scratch();
    let path = scratch.path().join("vm.json");
    std::fs::write(&path, machine(dir, tap, number).to_string()).unwrap();
    let mut vm = Vm::spawn(scratch, &["--config", text(&path)]);
    vm.wait_line(|line| line.starts_with("guest: up "));
    shell(&mut vm, &format!("ip addr add 10.77.0.{number}/24 dev eth0 && ip link set eth0 up"));
    vm
}

/// Runs a command, which must succeed.
fn shell(vm: &mut Vm, command: &str) {
    vm.send(format!("{command}; echo end=$?\n").as_bytes());
    wait_end(vm);
}

fn wait_end(vm: &mut Vm) {
    let end = vm.wait_line(|line| line.strip_prefix("end=").is_some_and(|rest| !rest.starts_with('$')));
    assert_eq!(end.trim_end(), "end=0");
}

/// The digest that a command of the guest prints.
fn wait_sum(vm: &mut Vm) -> String {
    vm.wait_line(|line| line.starts_with("sum=")).trim_end().to_string()
}

#[test]
fn linux_guests_ping_each_other_and_a_transfer_goes_on_between_restored_ones() {
    let Some(dir) = guest() else { return };
    with_network(move |network| {
        ["tap0", "tap1", "tap2", "tap3", "tap4", "tap5"].iter().for_each(|tap| network.tap(tap));
        let mut server = up(&dir, "tap0", 2);
        let mut client = up(&dir, "tap1", 3);
        ["tap0", "tap1"].iter().for_each(|tap| network.wait_for(tap));
        shell(&mut client, "ping -c 3 -w 30 10.77.0.2");
        shell(&mut server, "ping -c 1 -w 30 -s 8000 10.77.0.3");

        client.send(
            format!("dd if=/dev/urandom of=/run/f bs=1M count={MIB}; sha256sum /run/f | sed 's/ .*//;s/^/sum=/'\n")
                .as_bytes(),
        );
        let sum = wait_sum(&mut client);
        server.send(b"nc -l -p 5000 >/run/g; sha256sum /run/g | sed 's/ .*//;s/^/sum=/'\n");
        client.send(b"sleep 1; nc 10.77.0.2 5000 </run/f; echo end=$?\n");
        let sent = |network: &Network| {
            let told: Value = serde_json::from_str(&network.ip("-s -j link show dev tap1")).unwrap();
            told[0]["stats64"]["rx"]["bytes"].as_u64().expect("bytes that the tap got from the guest")
        };
        let deadline = Instant::now() + TIMEOUT;
        while sent(network) < 1 << 20 {
            assert!(Instant::now() < deadline, "the transfer does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        // Both stand still before the first is captured: what one has acknowledged, the other may have forgotten.
        let out = scratch();
        server.pause();
        client.pause();
        assert!(sent(network) < u64::from(MIB) << 20, "in the middle of the transfer");
        for (vm, name) in [(&server, "server"), (&client, "client")] {
            let body = json!({ "snapshot_path": text(&out.path().join(name)), "snapshot_type": "Full" });
            vm.api_ok("PUT", "/snapshot/create", Some(body));
        }
        server.resume();
        client.resume();
        assert_eq!(wait_sum(&mut server), sum, "the transfer goes on here");
        wait_end(&mut client);
        server.snapshot(&out.path().join("server-later"), &[]);
        drop((server, client));
        ["tap0", "tap1"].iter().for_each(|tap| network.wait_closed(tap));

        let restore = |name: &str, tap: &str| {
            let net = format!("eth0={tap}");
            let vm = Vm::restore_with(&out.path().join(name), "firecracker", &["--net", &net]);
            network.wait_for(tap);
            vm
        };
        let (mut server, mut client) = (restore("server", "tap2"), restore("client", "tap3"));
        assert_eq!(wait_sum(&mut server), sum, "and between the restored guests");
        wait_end(&mut client);
        shell(&mut server, "ping -c 3 -w 30 10.77.0.3");
        drop((server, client));
        ["tap2", "tap3"].iter().for_each(|tap| network.wait_closed(tap));

        // A server that is done meets a client in the middle: it does not know the connection and resets it.
        let (mut server, mut client) = (restore("server-later", "tap4"), restore("client", "tap5"));
        let end = client.wait_line(|line| line.starts_with("end="));
        assert_ne!(end.trim_end(), "end=0", "the transfer cannot succeed");
        server.send(b"nc -l -p 5000 >/run/g; sha256sum /run/g | sed 's/ .*//;s/^/sum=/'\n");
        client.send(b"sleep 1; nc 10.77.0.2 5000 </run/f; echo end=$?\n");
        assert_eq!(wait_sum(&mut server), sum, "a new one does");
        wait_end(&mut client);
    });
}
