//! A network of taps on a bridge, in a network namespace of its own that ends with the test's thread.

use std::process::Command;
use std::time::{Duration, Instant};

use super::skip::skip;
use super::{TIMEOUT, finish};

/// The host's address on the bridge.
pub const HOST: &str = "10.77.0.1";

/// The bridge, and the taps that were made.
pub struct Network;

/// Runs `test` with a network of its own; says why not where that is not permitted.
pub fn with_network(test: impl FnOnce(&Network) + Send + 'static) {
    let run = move || {
        // SAFETY: only this thread gets another network namespace; it shares no network state with others.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            skip!("net", "a network namespace cannot be made here: {}", std::io::Error::last_os_error());
            return;
        }
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
            skip!("net", "/dev/net/tun cannot be opened: {error}");
            return;
        }
        if Command::new("ip").arg("-V").output().is_err() {
            skip!("net", "there is no `ip` (package iproute2)");
            return;
        }
        let network = Network;
        network.ip("link set lo up");
        network.ip("link add br0 type bridge");
        network.ip(&format!("address add {HOST}/24 dev br0"));
        network.ip("link set br0 up");
        test(&network);
    };
    // A skip goes by the name of the thread.
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let thread = std::thread::Builder::new().name(name).spawn(run).unwrap();
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Network {
    /// Runs `ip`, which must succeed; what it says.
    pub fn ip(&self, arguments: &str) -> String {
        let output = finish(Command::new("ip").args(arguments.split(' ')));
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Waits until the bridge forwards to and from `tap`: the kernel takes its time to notice that a VMM has opened it.
    pub fn wait_for(&self, tap: &str) {
        self.wait_for_state(tap, "forwarding");
    }

    /// Waits until the bridge has noticed that no process has `tap` open any more.
    pub fn wait_closed(&self, tap: &str) {
        self.wait_for_state(tap, "disabled");
    }

    fn wait_for_state(&self, tap: &str, state: &str) {
        let deadline = Instant::now() + TIMEOUT;
        while !self.ip(&format!("-d link show dev {tap}")).contains(&format!("state {state}")) {
            assert!(Instant::now() < deadline, "the bridge's port {tap} is not {state}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Makes a tap on the bridge, with room for bursts.
    pub fn tap(&self, name: &str) {
        self.ip(&format!("tuntap add dev {name} mode tap"));
        self.ip(&format!("link set {name} txqueuelen 10000 master br0 up"));
    }
}
