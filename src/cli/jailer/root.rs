//! The root directory of a jail, in Firecracker's layout: `BASE/NAME/ID/root`, where NAME is that of the VMM's file.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};

use crate::sys::errors::{BoxError, refuse};
use crate::sys::jail::namespaces;

/// A device node of a jail (kernel `Documentation/admin-guide/devices.txt`).
struct Node {
    path: &'static str,
    /// The host's node, from which the number comes; a device that the host does not have is left out.
    host: &'static str,
}

const NODES: [Node; 4] = [
    Node { path: "dev/kvm", host: "/dev/kvm" },
    Node { path: "dev/net/tun", host: "/dev/net/tun" },
    Node { path: "dev/userfaultfd", host: "/dev/userfaultfd" },
    Node { path: "dev/urandom", host: "/dev/urandom" },
];

/// A jail's root.
#[derive(Debug)]
pub struct JailRoot {
    path: PathBuf,
    exec_name: String,
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> String {
    let what = format!("Cannot {doing} {}", path.display());
    move |error| format!("{what}: {error}")
}

impl JailRoot {
    /// Makes the directory, and copies the VMM into it. Directories and files that are there already stay, so that
    /// images and libraries can be put there before.
    pub fn make(base: &Path, exec_file: &Path, id: &str) -> Result<JailRoot, BoxError> {
        let exec = exec_file.canonicalize().map_err(failed("find the VMM", exec_file))?;
        let name = exec.file_name().and_then(|name| name.to_str());
        let Some(name) = name.filter(|_| exec.is_file()) else {
            return refuse(format!(
                "Cannot start {}: it is no file, or has no name that can be printed",
                exec.display()
            ));
        };
        fs::create_dir_all(base).map_err(failed("make the directory of jails", base))?;
        let base = base.canonicalize().map_err(failed("find the directory of jails", base))?;
        let path = base.join(name).join(id).join("root");
        fs::create_dir_all(&path).map_err(failed("make the jail", &path))?;
        let copy = path.join(name);
        fs::copy(&exec, &copy).map_err(failed("copy the VMM to", &copy))?;
        Ok(JailRoot { path, exec_name: name.to_owned() })
    }

    pub fn exec_name(&self) -> &str {
        &self.exec_name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes this directory the root of this process, in a mount namespace of its own, with its devices and a `/proc`
    /// in which processes that may not be traced cannot be seen. The VMM may write in the root directory itself.
    pub fn enter(&self, uid: u32, gid: u32) -> Result<(), BoxError> {
        let nodes: Vec<(&Node, u64)> =
            NODES.iter().filter_map(|node| Some((node, rustix::fs::stat(node.host).ok()?.st_rdev))).collect();
        for dir in ["dev", "dev/net", "proc"] {
            let dir = self.path.join(dir);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => made.map_err(failed("make", &dir))?,
            }
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).map_err(failed("set the mode of", &dir))?;
        }
        for (node, device) in nodes {
            let path = self.path.join(node.path);
            let made = rustix::fs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device);
            match made {
                // Of a VM of the same id before.
                Err(rustix::io::Errno::EXIST) => {}
                made => made.map_err(io::Error::from).map_err(failed("make device", &path))?,
            }
            chown(&path, Some(uid), Some(gid)).map_err(failed("give away", &path))?;
        }
        chown(&self.path, Some(uid), Some(gid)).map_err(failed("give away", &self.path))?;
        namespaces::enter_root(&self.path).map_err(|error| {
            format!("Cannot make {} the root of a jail: {error}. Run as root", self.path.display()).into()
        })
    }

    /// Writes the VMM's process id, as this process sees it. To be called in the jail.
    pub fn write_pid(&self, pid: u32) -> Result<(), BoxError> {
        let path = Path::new("/").join(format!("{}.pid", self.exec_name));
        Ok(fs::write(&path, pid.to_string()).map_err(failed("write the process id to", &path))?)
    }
}
