//! `tvmm serve` and network namespaces: a VM starts in the one of its tap, as FaaSnap's do.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::skip::skip;
use crate::support::service::{Service, wait_until, wait_until_gone};
use crate::support::{TIMEOUT, finish, scratch};

const HOST: &str = "10.78.0.1";
const GUEST: &str = "10.78.0.2";
const GUEST_IP: u32 = 0x0a4e_0002;

/// A named network namespace with one tap, `vmtap0`; removed when this is dropped.
struct Namespace(String);

impl Namespace {
    /// Makes one; why not, where that is not permitted.
    fn make(number: u32) -> Result<Namespace, String> {
        let name = format!("tvmm-{}-{number}", std::process::id());
        ip(&["netns", "add", &name])?;
        let namespace = Namespace(name);
        namespace.ip("tuntap add dev vmtap0 mode tap")?;
        namespace.ip(&format!("address add {HOST}/24 dev vmtap0"))?;
        namespace.ip("link set vmtap0 up")?;
        Ok(namespace)
    }

    fn ip(&self, arguments: &str) -> Result<(), String> {
        ip(&[&["-n", &self.0], &arguments.split(' ').collect::<Vec<_>>()[..]].concat())
    }

    /// Sends a datagram from inside until the guest has sent it back.
    fn echo(&self, data: &[u8]) {
        let file = std::fs::File::open(format!("/var/run/netns/{}", self.0)).unwrap();
        let echo = move |data: Vec<u8>| {
            // SAFETY: only this thread enters the namespace, and ends with it.
            assert_eq!(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }, 0);
            let socket = UdpSocket::bind((HOST, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let deadline = Instant::now() + TIMEOUT;
            let mut answer = [0; 100];
            loop {
                assert!(Instant::now() < deadline, "the guest does not answer");
                // Until the guest polls its device it answers nothing, not even ARP for its hardware address.
                let _ = socket.send_to(&data, (GUEST, 7));
                if let Ok((len, from)) = socket.recv_from(&mut answer) {
                    assert_eq!((&answer[..len], from.ip().to_string().as_str()), (&data[..], GUEST));
                    return;
                }
            }
        };
        let data = data.to_vec();
        std::thread::spawn(move || echo(data)).join().unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.0]);
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    if Command::new("ip").arg("-V").output().is_err() {
        return Err("there is no `ip` (package iproute2)".into());
    }
    let output = finish(Command::new("ip").args(arguments));
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Returns true if a VM's process is in the namespace.
fn is_in(vm: &Value, namespace: &str) -> bool {
    let of_process = std::fs::metadata(format!("/proc/{}/ns/net", vm["pid"])).unwrap();
    std::fs::metadata(namespace).unwrap().ino() == of_process.ino()
}

#[test]
fn vms_with_taps_of_one_name_live_in_their_network_namespaces() {
    let made = Namespace::make(0).and_then(|first| Ok([first, Namespace::make(1)?]));
    let namespaces = match made {
        Ok(namespaces) => namespaces,
        Err(why) => return skip!("namespaces", "{why}"),
    };
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let function = json!({ "func_name": "net", "call": "net_answer", "mem_size": 64 });
    service.ok("POST", "/functions", Some(function));
    for namespace in &namespaces {
        let put = json!({ "host_dev_name": "vmtap0", "guest_mac": "06:00:ac:10:00:02" });
        let kept = service.ok("PUT", &format!("/net-ifaces/{}", namespace.0), Some(put));
        assert_eq!(kept["netns"], json!(namespace.0));
    }
    let start = |namespace: &Namespace, more: Value| {
        let mut body = json!({ "func_name": "net", "namespace": namespace.0 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        service.ok("POST", "/vms", Some(body))
    };
    // The first boots; the second is restored from its snapshot, with the same addresses, in another namespace.
    let booted = start(&namespaces[0], json!({}));
    service.ok("POST", "/snapshots", Some(json!({ "vmId": booted["vmId"], "ssId": "base" })));
    let restored = start(&namespaces[1], json!({ "ssId": "base" }));
    for (vm, namespace) in [&booted, &restored].into_iter().zip(&namespaces) {
        assert!(is_in(vm, &format!("/var/run/netns/{}", namespace.0)) && !is_in(vm, "/proc/self/ns/net"), "{vm}");
        let params = format!("ip={GUEST_IP} frames=1 ms=60000");
        let body = json!({ "func_name": "net", "vmId": vm["vmId"], "params": params });
        std::thread::scope(|scope| {
            let answer = scope.spawn(|| service.invoke(body));
            namespace.echo(namespace.0.as_bytes());
            assert!(answer.join().unwrap()["result"].as_str().unwrap().contains("udp=1"));
        });
    }
    let missing = json!({ "host_dev_name": "other" });
    service.ok("PUT", &format!("/net-ifaces/{}", namespaces[0].0), Some(missing));
    let body = json!({ "func_name": "net", "namespace": namespaces[0].0 });
    assert!(service.refused(422, "POST", "/vms", Some(body)).contains("`other`"));
}

/// The processes of the service in a namespace.
fn processes_in(service: &Service, namespace: &Namespace) -> Vec<u32> {
    let Ok(wanted) = std::fs::metadata(format!("/var/run/netns/{}", namespace.0)) else { return Vec::new() };
    let is_there = |pid: &u32| {
        std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|of_process| of_process.ino() == wanted.ino())
    };
    service.children().into_iter().filter(is_there).collect()
}

#[test]
fn a_process_waits_in_each_network_namespace_that_a_vm_has_used() {
    let mut namespace = match Namespace::make(2) {
        Ok(namespace) => namespace,
        Err(why) => return skip!("namespaces", "{why}"),
    };
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.ok("POST", "/functions", Some(json!({ "func_name": "hello", "mem_size": 64 })));
    let path = format!("/net-ifaces/{}", namespace.0);
    let put = json!({ "host_dev_name": "vmtap0" });
    service.ok("PUT", &path, Some(put.clone()));
    let start = |namespace: &Namespace| {
        let vm = service.ok("POST", "/vms", Some(json!({ "func_name": "hello", "namespace": namespace.0 })));
        assert!(is_in(&vm, &format!("/var/run/netns/{}", namespace.0)), "{vm}");
        let pid = vm["pid"].as_u64().unwrap() as u32;
        let waiting = || processes_in(&service, namespace).into_iter().find(|other| *other != pid);
        wait_until("a process waits", || waiting().is_some());
        let waiting = waiting().unwrap();
        service.invoke(json!({ "func_name": "hello", "vmId": vm["vmId"] }));
        service.ok("DELETE", &format!("/vms/{}", vm["vmId"].as_str().unwrap()), None);
        (pid, waiting)
    };
    let (_, mut next) = start(&namespace);
    for _ in 0..3 {
        let (pid, waiting) = start(&namespace);
        assert_eq!(pid, next, "the process that waited is the VM's");
        next = waiting;
    }
    // Another namespace of the same name is another one.
    drop(namespace);
    namespace = Namespace::make(2).unwrap();
    let (pid, _) = start(&namespace);
    assert_ne!(pid, next);
    wait_until_gone(next);
    // The process goes with the interface, and with the namespace.
    let waiting = processes_in(&service, &namespace);
    assert_eq!(waiting.len(), 1);
    service.ok("DELETE", &path, None);
    wait_until_gone(waiting[0]);
    service.ok("PUT", &path, Some(put));
    let (_, waiting) = start(&namespace);
    drop(namespace);
    wait_until_gone(waiting);
}

#[test]
fn a_network_namespace_that_is_not_there_is_told_by_name() {
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    service.put_touch();
    service.ok("PUT", "/net-ifaces/tvmm-nowhere", Some(json!({ "host_dev_name": "vmtap0" })));
    for path in ["/vms", "/invocations"] {
        let body = json!({ "func_name": "touch", "namespace": "tvmm-nowhere" });
        let refused = service.refused(422, "POST", path, Some(body));
        assert!(refused.contains("`tvmm-nowhere`") && refused.contains("ip netns add tvmm-nowhere"), "{refused}");
    }
    let host = json!({ "host_dev_name": "tvmm-none", "host_netns": true });
    assert_eq!(service.ok("PUT", "/net-ifaces/here", Some(host))["netns"], Value::Null);
    let body = json!({ "func_name": "touch", "namespace": "here" });
    assert!(service.refused(422, "POST", "/vms", Some(body)).contains("tvmm-none"));
}

#[test]
fn a_suspended_vm_is_woken_in_its_network_namespace() {
    let namespace = match Namespace::make(7) {
        Ok(namespace) => namespace,
        Err(why) => return skip!("namespaces", "{why}"),
    };
    let dir = scratch();
    let service = Service::start(&dir.path().join("state"), &[]);
    let idle = json!({ "policy": "suspend", "keep_alive_ms": 500 });
    service.ok("POST", "/functions", Some(json!({ "func_name": "hello", "mem_size": 64, "idle": idle })));
    let put = json!({ "host_dev_name": "vmtap0" });
    service.ok("PUT", &format!("/net-ifaces/{}", namespace.0), Some(put));
    let body = json!({ "func_name": "hello", "namespace": namespace.0 });
    let vm = service.ok("POST", "/vms", Some(body))["vmId"].as_str().unwrap().to_string();
    let path = format!("/vms/{vm}");
    wait_until("the VM is suspended", || service.get(&path)["state"] == "suspended");
    let woken = service.invoke(json!({ "func_name": "hello", "vmId": vm }));
    assert_eq!((&woken["origin"], &woken["vmId"]), (&json!("suspended"), &json!(vm)));
    wait_until("the VM is seen in its namespace", || {
        // It may have been suspended again.
        service.invoke(json!({ "func_name": "hello", "vmId": vm }));
        let record = service.get(&path);
        assert_eq!(record["namespace"], json!(namespace.0));
        std::fs::metadata(format!("/proc/{}/ns/net", record["pid"])).is_ok()
            && is_in(&record, &format!("/var/run/netns/{}", namespace.0))
    });
}
