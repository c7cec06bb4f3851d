//! `tvmm` as a user without rights.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FileType, Mode, mknodat};

use super::tvmm;
use crate::skip::skip;

/// Makes a node in `dir` for the same device as `device`, which every user may open.
fn open_node(device: &Path, dir: &Path) -> std::io::Result<()> {
    let node = dir.join(device.file_name().unwrap());
    if node.exists() {
        return Ok(());
    }
    let number = fs::metadata(device)?.rdev();
    mknodat(rustix::fs::CWD, &node, FileType::CharacterDevice, Mode::from_raw_mode(0o666), number)?;
    // Whatever the umask.
    fs::set_permissions(&node, Permissions::from_mode(0o666))
}

/// `tvmm` as the user `nobody`, who may open /dev/kvm and /dev/userfaultfd, and has `home` to write to. `None`, with
/// the reason printed, if this host cannot start such a process.
pub fn as_nobody(home: &Path, args: &[&str]) -> Option<Command> {
    for device in ["/dev/kvm", "/dev/userfaultfd"].map(Path::new) {
        if let Err(error) = open_node(device, home) {
            skip!("user", "no node for {} can be made: {error}", device.display());
            return None;
        }
    }
    // The host's own nodes are not changed: others lie over them in a mount namespace of the process.
    let script = "mount --bind \"$0/kvm\" /dev/kvm && mount --bind \"$0/userfaultfd\" /dev/userfaultfd && \
                  exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --no-new-privs -- \"$@\"";
    let unshared = |more: &[&OsStr]| {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", script]).arg(home).args(more);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("XDG_CACHE_HOME", home.join("cache"));
        command
    };
    let probe = unshared(&["sh".as_ref(), "-c".as_ref(), "exec 3<>/dev/kvm 4<>/dev/userfaultfd".as_ref()]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        skip!("user", "no process of the user nobody can be started with /dev/kvm: {probe:?}");
        return None;
    }
    let program = tvmm().get_program().to_owned();
    let args = args.iter().map(OsStr::new);
    Some(unshared(&[program.as_os_str()].into_iter().chain(args).collect::<Vec<_>>()))
}
