//! The jail: what a process keeps of its host once it runs guest code.
//!
//! A process enters before it starts threads, and for good. In order: files that it needs and will not find are held
//! (`held.rs`, `tun.rs`); it joins cgroups; it makes namespaces and an empty root with the paths that stay (`root.rs`);
//! it becomes another user and gives up capabilities, core dumps and new privileges (`privileges.rs`); Landlock
//! restricts it to the same paths once more (`landlock.rs`). docs/jail.md says what each layer holds.

mod error;
mod landlock;
pub mod namespaces;
mod privileges;
mod root;
#[cfg(debug_assertions)]
mod takeover;
mod types;

use std::fs::File;
use std::sync::OnceLock;
use std::time::Instant;

use super::{held, tun};

pub use error::Error;
pub use types::{InForce, Jail, JailPath, Layers, Network, NetworkInForce, Use, absolute};

static IN_FORCE: OnceLock<InForce> = OnceLock::new();
/// The directory of this process in `/proc`, open for ever: Landlock's rule is on its inode, and the kernel makes a new
/// one when nothing has it open.
static OWN_PROC: OnceLock<File> = OnceLock::new();

/// The jail that this process is in; `None`: it is in none.
pub fn in_force() -> Option<&'static InForce> {
    IN_FORCE.get()
}

/// Enters a jail. This thread must be the only one, and the process must end after an error.
///
/// # Errors
/// The layer that cannot be had, and what to do.
pub fn enter(mut jail: Jail) -> Result<&'static InForce, Error> {
    let start = Instant::now();
    held::hold_all()?;
    let tap = |(name, source)| Error::Tap { name, source };
    let named = matches!(jail.network, Network::Named(_));
    if !named {
        tun::hold(std::mem::take(&mut jail.taps)).map_err(tap)?;
    }
    privileges::join_cgroups(&jail)?;
    jail.normalize();
    jail.paths.extend(root::own_proc());
    let mut namespaces = Vec::new();
    if jail.layers.has_namespaces() {
        namespaces = root::make_namespaces(&jail.network)?;
        if named {
            tun::hold(std::mem::take(&mut jail.taps)).map_err(tap)?;
        }
        root::leave_host(&jail.paths)?;
    }
    if let Ok(own) = File::open("/proc/self") {
        let _ = OWN_PROC.set(own);
    }
    privileges::give_up(&jail)?;
    let has_network = matches!(jail.network, Network::Host(_));
    let restricts = jail.layers.has_landlock();
    let landlock_abi = restricts.then(|| landlock::restrict(jail.paths.iter(), has_network)).transpose()?;
    privileges::hide_memory()?;
    let network = match jail.network {
        Network::Host(why) => NetworkInForce::Host(why),
        _ if !jail.layers.has_namespaces() => NetworkInForce::Host("Landlock has no network namespaces"),
        Network::Named(netns) => NetworkInForce::Named(netns.name().to_owned()),
        Network::Own => NetworkInForce::Own,
    };
    let in_force = InForce {
        layers: jail.layers,
        namespaces,
        network,
        landlock_abi,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        capabilities: privileges::left()?,
        paths: jail.paths,
        entered_us: start.elapsed().as_nanos() as f64 / 1000.0,
    };
    let in_force = IN_FORCE.get_or_init(|| in_force);
    #[cfg(debug_assertions)]
    takeover::try_all();
    Ok(in_force)
}
