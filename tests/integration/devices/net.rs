//! Network interfaces: guests on taps, before, during and after snapshots.

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::network::{HOST, with_network};
use crate::support::{TIMEOUT, Vm, config, run_err, scratch, text};

pub const GUEST: &str = "10.77.0.2";
pub const GUEST_IP: u32 = 0x0a4d_0002;
const MAC: &str = "06:00:ac:10:00:02";

/// A machine with one interface on `tap`; the last byte of its address is `number`.
pub fn with_tap(tap: &str, number: u8) -> Value {
    let mut config = config(1, 64);
    config["network-interfaces"] =
        json!([{ "iface_id": "eth0", "host_dev_name": tap, "guest_mac": format!("06:00:ac:10:00:{number:02x}") }]);
    config
}

/// The device's counters.
fn counters(vm: &Vm, metrics: &Path) -> Value {
    vm.api_ok("PUT", "/actions", Some(json!({ "action_type": "FlushMetrics" })));
    let lines = std::fs::read_to_string(metrics).unwrap();
    let line: Value = serde_json::from_str(lines.lines().last().expect("a line of metrics")).unwrap();
    line["devices"]["eth0"].clone()
}

fn refused_boot(config: &Value) -> String {
    let dir = scratch();
    let path = dir.path().join("vm.json");
    std::fs::write(&path, config.to_string()).unwrap();
    run_err(&["--config", text(&path)])
}

pub fn udp() -> UdpSocket {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// Sends datagrams to the guest, which answers each before the next.
pub fn echo(socket: &UdpSocket, sizes: &[usize]) {
    for (round, &size) in sizes.iter().enumerate() {
        let data: Vec<u8> = (0..size).map(|index| (index * 3 + round) as u8).collect();
        socket.send_to(&data, (GUEST, 7)).unwrap();
        let mut answer = vec![0; 2000];
        let (len, from) = socket.recv_from(&mut answer).expect("the guest answers");
        assert_eq!((&answer[..len], from.ip().to_string().as_str()), (&data[..], GUEST), "{size} bytes");
    }
}

/// One ICMP echo by a raw socket.
fn ping() {
    let socket = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::from(libc::SOCK_RAW),
        Some(socket2::Protocol::ICMPV4),
    );
    let socket = socket.expect("a raw socket, in a network namespace of its own");
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut request = [8, 0, 0, 0, 0x12, 0x34, 0, 1, b'p', b'i', b'n', b'g'];
    let sum: u32 = request.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    request[2..4].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    let guest: std::net::SocketAddr = format!("{GUEST}:0").parse().unwrap();
    socket.send_to(&request, &guest.into()).unwrap();
    let mut answer = [std::mem::MaybeUninit::new(0u8); 100];
    let (len, _) = socket.recv_from(&mut answer).expect("the guest answers the ping");
    // SAFETY: all of it was initialised above.
    let answer = answer.map(|byte| unsafe { byte.assume_init() });
    // The kernel has checked the IP header, not ICMP's checksum.
    let icmp = &answer[20..len];
    let sum: u32 = icmp.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "the checksum is right");
    assert_eq!((icmp[0], &icmp[4..]), (0, &request[4..]));
}

#[test]
fn guest_answers_the_host_before_and_after_a_restore_on_another_tap() {
    with_network(|network| {
        let dir = scratch();
        let metrics = dir.path().join("metrics");
        network.tap("tap0");
        network.tap("tap1");
        let mut config = with_tap("tap0", 2);
        config["network-interfaces"][0]["mtu"] = json!(1400);
        config["metrics"] = json!({ "metrics_path": text(&metrics) });
        let mut vm = Vm::boot(&config);
        let info = vm.call("net_info");
        assert_eq!((info.value("mac"), info.number("status"), info.number("mtu")), (MAC, 1, 1400));
        network.wait_for("tap0");
        let id = vm.begin(&format!("net_answer ip={GUEST_IP} frames=5 irq=1"));
        ping();
        echo(&udp(), &[0, 1, 500, 1300]);
        let answer = vm.finish(&id);
        assert!(!answer.contains("arp=0 ") && answer.contains("icmp=1 udp=4"), "{answer}");
        let counted = counters(&vm, &metrics);
        assert!(counted["rx_packets_count"].as_u64() >= Some(6), "{counted}");
        assert!(counted["tx_packets_count"].as_u64() >= Some(6), "{counted}");

        let out = dir.path().join("snapshot");
        let id = vm.begin(&format!("net_answer ip={GUEST_IP} frames=3 ms=60000"));
        vm.snapshot(&out, &[]);
        echo(&udp(), &[10, 20, 30]);
        vm.finish(&id);
        drop(vm);
        network.wait_closed("tap0");
        for (policy, tap) in [("eager", "tap1"), ("firecracker", "tap0"), ("firecracker-uffd", "tap1")] {
            let mut clone = Vm::restore_with(&out, policy, &["--net", &format!("eth0={tap}")]);
            clone.wait_for_socket();
            let shown = clone.api_ok("GET", "/vm/config", None);
            assert_eq!(shown["network-interfaces"][0]["host_dev_name"], tap);
            network.wait_for(tap);
            echo(&udp(), &[10, 20, 30]);
            assert!(clone.finish(&id).contains("udp=3"), "{policy}");
            let info = clone.call("net_info");
            assert_eq!((info.number("announced"), info.number("status") & 1, info.value("mac")), (1, 1, MAC));
            assert_eq!(clone.call("net_info").number("announced"), 0, "once");
            drop(clone);
            network.wait_closed(tap);
        }
    });
}

#[test]
fn two_guests_on_a_bridge_exchange_frames_of_every_size() {
    with_network(|network| {
        for tap in ["tap0", "tap1"] {
            network.tap(tap);
            network.ip(&format!("link set {tap} mtu 9000"));
        }
        network.ip("link set br0 mtu 9000");
        let mut a = Vm::boot(&with_tap("tap0", 2));
        let mut b = Vm::boot(&with_tap("tap1", 3));
        ["tap0", "tap1"].iter().for_each(|tap| network.wait_for(tap));
        // 9014 bytes are five of the receiver's buffers.
        for (size, batch, irq) in [(60, 1, 1), (1514, 16, 0), (2036, 3, 1), (2037, 3, 0), (9014, 64, 1)] {
            for (from, to) in [(0, 1), (1, 0)] {
                let guests = [&mut a, &mut b];
                guests[to].call("net_info");
                let id = guests[to].begin(&format!("net_receive count=200 seed=5 ms=30000 irq={irq}"));
                let sent = guests[from].call(&format!("net_send count=200 seed=5 size={size} batch={batch}"));
                let line = guests[to].finish(&id);
                assert!(line.starts_with("ok "), "{line}");
                let got = crate::support::Answer::parse(&line);
                assert_eq!((got.number("lost"), got.number("bad")), (0, 0), "{size}: {line}");
                assert_eq!((got.number("frames"), got.number("bytes")), (200, 200 * size), "{line}");
                assert_eq!(got.digest, sent.digest);
            }
        }
    });
}

#[test]
fn snapshot_under_traffic_goes_on_here_and_in_clones() {
    with_network(|network| {
        let dir = scratch();
        ["tap0", "tap1", "tap2"].iter().for_each(|tap| network.tap(tap));
        let mut sender = Vm::boot(&with_tap("tap0", 2));
        let mut receiver = Vm::boot(&with_tap("tap1", 3));
        receiver.call("net_info");
        ["tap0", "tap1"].iter().for_each(|tap| network.wait_for(tap));
        let receiving = receiver.begin("net_receive count=1000000000 ms=4000");
        let sending = sender.begin("net_send count=60000 size=1000");
        let first = dir.path().join("first");
        let second = dir.path().join("second");
        receiver.snapshot(&first, &[]);
        sender.snapshot(&dir.path().join("sender"), &[]);
        receiver.snapshot(&second, &["--diff"]);
        let healthy = |line: &str| {
            let got = crate::support::Answer::parse(line);
            assert!(got.number("frames") > 0 && got.number("bad") == 0, "{line}");
        };
        for (round, snapshot) in [&first, &second].into_iter().enumerate() {
            let mac = format!("06:00:ac:10:00:0{}", 7 + round);
            let mut clone = Vm::restore_with(snapshot, "firecracker", &["--net", &format!("eth0=tap2,mac={mac}")]);
            network.wait_for("tap2");
            healthy(&clone.finish(&receiving));
            let info = clone.call("net_info");
            assert_eq!((info.value("mac"), info.number("announced")), (mac.as_str(), 1));
            let shown = clone.api_ok("GET", "/vm/config", None);
            assert_eq!(shown["network-interfaces"][0]["guest_mac"], mac.as_str());
            if round == 0 {
                healthy(&receiver.finish(&receiving));
                assert!(sender.finish(&sending).contains("frames=60000"));
            }
            // First receive the frames that were on the way. From here on no frame may be lost.
            while clone.call("net_receive count=1000000000 ms=200").number("frames") > 0 {}
            let id = clone.begin("net_receive count=300 ms=30000");
            let sent = sender.call("net_send count=300 size=700");
            let line = clone.finish(&id);
            assert_eq!(crate::support::Answer::parse(&line).digest, sent.digest, "{line}");
            drop(clone);
            network.wait_closed("tap2");
        }
        drop(sender);
        network.wait_closed("tap0");
        let mut clone = Vm::restore(&dir.path().join("sender"), "firecracker");
        assert!(clone.finish(&sending).contains("frames=60000"), "a sender goes on, too");
    });
}

#[test]
fn tap_that_cannot_be_had_is_refused_with_the_remedy() {
    with_network(|network| {
        let dir = scratch();
        network.tap("tap0");
        let said = refused_boot(&with_tap("tap9", 2));
        assert!(said.contains("`eth0` cannot use the tap `tap9`: it does not exist"), "{said}");
        assert!(said.contains("ip tuntap add dev tap9 mode tap"), "{said}");
        assert!(!network.ip("link show").contains("tap9"), "it was not made in passing");
        let said = refused_boot(&with_tap("br0", 2));
        assert!(said.contains("`br0`: it is no tap"), "{said}");
        let vm = Vm::boot(&with_tap("tap0", 2));
        let said = refused_boot(&with_tap("tap0", 3));
        assert!(said.contains("`tap0`: another process has it"), "{said}");

        let out = dir.path().join("snapshot");
        vm.snapshot(&out, &[]);
        let said = run_err(&["restore", "--snapshot", text(&out), "--run", "hello"]);
        assert!(said.contains("`tap0`: another process has it"), "{said}");
        let said = run_err(&["restore", "--snapshot", text(&out), "--run", "hello", "--net", "eth7=tap0"]);
        assert!(said.contains("another process") || said.contains("eth7"), "{said}");
        drop(vm);
        let said = run_err(&["restore", "--snapshot", text(&out), "--run", "hello", "--net", "eth7=tap0"]);
        assert!(said.contains("no network interface `eth7`") && said.contains("eth0"), "{said}");
        let vm = Vm::wait_for_api();
        for (name, what) in [("a/b", "no interface name"), ("tap9", "does not exist")] {
            let overrides = json!([{ "iface_id": "eth0", "host_dev_name": name }]);
            let load = json!({ "snapshot_path": text(&out), "network_overrides": overrides });
            let said = vm.api_fault("PUT", "/snapshot/load", Some(load));
            assert!(said.contains(what), "{said}");
        }
    });
}

#[test]
fn mac_of_an_interface_that_never_had_one_cannot_be_overridden() {
    with_network(|network| {
        let dir = scratch();
        network.tap("tap0");
        let mut config = with_tap("tap0", 2);
        config["network-interfaces"][0].as_object_mut().unwrap().remove("guest_mac");
        let out = dir.path().join("snapshot");
        Vm::boot(&config).snapshot(&out, &[]);
        let mac = format!("eth0=mac={MAC}");
        let said = run_err(&["restore", "--snapshot", text(&out), "--run", "hello", "--net", &mac]);
        assert!(said.contains("it had no guest_mac"), "{said}");
    });
}

#[test]
fn tap_that_vanishes_takes_the_link_down_and_the_guest_lives() {
    with_network(|network| {
        let dir = scratch();
        let metrics = dir.path().join("metrics");
        network.tap("tap0");
        network.tap("tap1");
        let mut config = with_tap("tap0", 2);
        config["metrics"] = json!({ "metrics_path": text(&metrics) });
        let mut vm = Vm::boot(&config);
        vm.call("net_info");
        network.ip("link set tap0 down");
        vm.call("net_send count=10");
        let counted = counters(&vm, &metrics);
        assert_eq!((&counted["tx_fails"], &counted["tap_gone"]), (&json!(10), &json!(false)), "{counted}");
        network.ip("link del tap0");
        let deadline = std::time::Instant::now() + TIMEOUT;
        while vm.call("net_info").number("status") != 0 {
            assert!(std::time::Instant::now() < deadline, "the link stays up");
            std::thread::sleep(Duration::from_millis(5));
        }
        vm.call("net_send count=10");
        let counted = counters(&vm, &metrics);
        assert_eq!((&counted["tx_fails"], &counted["tap_gone"]), (&json!(20), &json!(true)), "{counted}");
        let out = dir.path().join("snapshot");
        vm.snapshot(&out, &[]);
        vm.call("hello");
        drop(vm);
        let mut clone = Vm::restore_with(&out, "eager", &["--net", "eth0=tap1"]);
        assert_eq!(clone.call("net_info").number("status") & 1, 1, "another tap, and the link is up");
    });
}

#[test]
fn limits_slow_frames_down_lose_none_and_can_be_changed() {
    with_network(|network| {
        let dir = scratch();
        let metrics = dir.path().join("metrics");
        network.tap("tap0");
        network.tap("tap1");
        let ops = |size: u64| json!({ "ops": { "size": size, "refill_time": 20 } });
        let mut config = with_tap("tap0", 2);
        config["metrics"] = json!({ "metrics_path": text(&metrics) });
        config["network-interfaces"][0]["tx_rate_limiter"] = ops(10);
        config["network-interfaces"][0]["rx_rate_limiter"] =
            json!({ "bandwidth": { "size": 20000, "refill_time": 20 } });
        let mut limited = Vm::boot(&config);
        let mut other = Vm::boot(&with_tap("tap1", 3));
        let mut exchange = |limited: &mut Vm| {
            ["tap0", "tap1"].iter().for_each(|tap| network.wait_for(tap));
            for limited_sends in [true, false] {
                let (from, to) = if limited_sends { (&mut *limited, &mut other) } else { (&mut other, &mut *limited) };
                // Receive the frames that are left of earlier exchanges.
                while to.call("net_receive count=1000000 ms=50").number("frames") > 0 {}
                let id = to.begin("net_receive count=100 ms=50000");
                let sent = from.call("net_send count=100 size=1000");
                let line = to.finish(&id);
                assert_eq!(crate::support::Answer::parse(&line).digest, sent.digest, "{line}");
            }
        };
        exchange(&mut limited);
        let counted = counters(&limited, &metrics);
        assert!(counted["tx_rate_limiter_throttled"].as_u64() > Some(3), "{counted}");
        assert!(counted["rx_rate_limiter_throttled"].as_u64() > Some(1), "{counted}");
        let out = dir.path().join("snapshot");
        limited.snapshot(&out, &[]);
        // A bucket so slow that its frames come only because it is lifted.
        let slow = json!({ "iface_id": "eth0", "tx_rate_limiter": { "ops": { "size": 1, "refill_time": 3600000 } } });
        limited.api_ok("PATCH", "/network-interfaces/eth0", Some(slow));
        let id = limited.begin("net_send count=20");
        std::thread::sleep(Duration::from_millis(50));
        let none = json!({ "size": 0, "refill_time": 0 });
        let lift = json!({ "iface_id": "eth0", "tx_rate_limiter": { "ops": none } });
        limited.api_ok("PATCH", "/network-interfaces/eth0", Some(lift));
        assert!(limited.finish(&id).contains("frames=20"));
        let shown = limited.api_ok("GET", "/vm/config", None);
        assert_eq!(shown["network-interfaces"][0]["tx_rate_limiter"]["ops"]["size"], 0);
        assert_eq!(shown["network-interfaces"][0]["rx_rate_limiter"]["bandwidth"]["size"], 20000);
        let unknown = json!({ "iface_id": "eth1", "tx_rate_limiter": ops(1) });
        let said = limited.api_fault("PATCH", "/network-interfaces/eth1", Some(unknown));
        assert!(said.contains("no network interface `eth1`"), "{said}");
        drop(limited);
        network.wait_closed("tap0");
        let mut clone = Vm::restore(&out, "eager");
        clone.wait_for_socket();
        let shown = clone.api_ok("GET", "/vm/config", None);
        assert_eq!(shown["network-interfaces"][0]["tx_rate_limiter"], ops(10));
        exchange(&mut clone);
    });
}
