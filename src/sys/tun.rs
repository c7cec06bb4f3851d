//! Taps of the host (Linux Documentation/networking/tuntap.rst), attached. A tap belongs to a network namespace, so a
//! process that leaves it holds its taps from before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

use rustix::net::{AddressFamily, SocketType, netdevice};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iow_nr;

const TUN: libc::c_uint = 'T' as libc::c_uint;
ioctl_iow_nr!(TUNSETIFF, TUN, 202, libc::c_int);

static HELD: OnceLock<Vec<(String, File)>> = OnceLock::new();

/// The step at which a tap could not be had.
#[derive(Debug)]
pub enum Failed {
    /// /dev/net/tun cannot be opened.
    Open(io::Error),
    /// The tap cannot be attached to.
    Attach(io::Error),
}

/// Attaches to the tap `name`, which must exist: a tap made here would vanish with this process. A held one is
/// duplicated. Frames have a virtio-net header in front; the descriptor does not block.
///
/// # Errors
/// The step that failed, with the kernel's error.
pub fn attach(name: &str) -> Result<File, Failed> {
    if let Some(file) = held(name) {
        return file.try_clone().map_err(Failed::Attach);
    }
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let file = opened.map_err(Failed::Open)?;
    set_interface(&file, name).map_err(Failed::Attach)?;
    Ok(file)
}

/// Attaches to these taps, and holds them until the process ends. To be called once.
///
/// # Errors
/// The name of the tap, and the error.
pub fn hold(names: Vec<String>) -> Result<(), (String, io::Error)> {
    let mut held: Vec<(String, File)> = Vec::new();
    for name in names {
        if held.iter().any(|(other, _)| *other == name) {
            continue;
        }
        // TUNSETIFF would make one that does not exist.
        match check_exists(&name).map_err(Failed::Attach).and_then(|()| attach(&name)) {
            Ok(file) => held.push((name, file)),
            Err(Failed::Open(error) | Failed::Attach(error)) => return Err((name, error)),
        }
    }
    // A second call would hold the same taps.
    let _ = HELD.set(held);
    Ok(())
}

fn held(name: &str) -> Option<&'static File> {
    HELD.get()?.iter().find(|(held, _)| held == name).map(|(_, file)| file)
}

/// Returns whether this process holds the tap.
pub fn is_held(name: &str) -> bool {
    held(name).is_some()
}

/// Fails if the tap does not exist: TUNSETIFF would make it, if permitted.
///
/// # Errors
/// ENODEV for one that does not exist in this network namespace.
pub fn check_exists(name: &str) -> io::Result<()> {
    if is_held(name) {
        return Ok(());
    }
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)
        .or_else(|_| rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None))?;
    netdevice::name_to_index(socket, name)?;
    Ok(())
}

fn set_interface(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: the structure is plain data for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes one `ifreq`, which lives until the call returns.
    let result = unsafe { ioctl_with_mut_ref(file, TUNSETIFF(), &mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
