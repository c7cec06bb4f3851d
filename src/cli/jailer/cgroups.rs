//! The cgroup of a jailed VMM: `MOUNT/PARENT/ID` in each hierarchy that a setting names (cgroups(7)).

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use clap::ValueEnum;

use crate::sys::errors::{BoxError, refuse};

/// A file of a cgroup and its value: `cpuset.cpus=0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupFile {
    file: String,
    value: String,
}

impl CgroupFile {
    /// The controller that the file is of.
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or(&self.file)
    }
}

impl std::str::FromStr for CgroupFile {
    type Err = String;

    fn from_str(text: &str) -> Result<CgroupFile, String> {
        let (file, value) = text.split_once('=').ok_or("say FILE=VALUE, such as cpuset.cpus=0")?;
        let is_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        match file.split_once('.') {
            Some((controller, rest)) if !controller.is_empty() && !rest.is_empty() && file.chars().all(is_name) => {
                Ok(CgroupFile { file: file.to_owned(), value: value.to_owned() })
            }
            _ => Err(format!("`{file}` is no file of a cgroup, such as cpuset.cpus")),
        }
    }
}

/// A version of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CgroupVersion {
    #[value(name = "1")]
    V1,
    #[value(name = "2")]
    V2,
}

/// The cgroup that is asked for.
pub struct Wanted<'a> {
    pub version: CgroupVersion,
    pub files: &'a [CgroupFile],
    /// Relative to the mount of a hierarchy.
    pub parent: &'a Path,
    /// True if the parent was named by the caller.
    pub names_parent: bool,
    pub id: &'a str,
}

/// Makes the cgroups, sets their files, and moves this process into them. Without files, version 2 moves it into the
/// parent, if that was named and is there; version 1 leaves it where it is.
///
/// # Errors
/// A hierarchy that is not mounted, a file that is not there or refuses its value.
pub fn join(wanted: &Wanted<'_>) -> Result<(), BoxError> {
    if !wanted.parent.components().all(|part| matches!(part, Component::Normal(_))) {
        return refuse(format!("The parent cgroup {} must be a relative path without ..", wanted.parent.display()));
    }
    let mounts = fs::read_to_string("/proc/mounts").map_err(|error| format!("Cannot read /proc/mounts: {error}"))?;
    match wanted.version {
        CgroupVersion::V1 => join_v1(wanted, &mounts),
        CgroupVersion::V2 => join_v2(wanted, &mounts),
    }
}

fn join_v1(wanted: &Wanted<'_>, mounts: &str) -> Result<(), BoxError> {
    let mut joined: Vec<PathBuf> = Vec::new();
    for file in wanted.files {
        let controller = file.controller();
        let Some(mount) = mount_of(mounts, "cgroup", Some(controller)) else {
            return refuse(no_hierarchy(controller, "1", "2"));
        };
        let group = mount.join(wanted.parent).join(wanted.id);
        fs::create_dir_all(&group).map_err(failed("make cgroup", &group))?;
        if controller == "cpuset" {
            inherit_cpuset(&mount, &group)?;
        }
        write(&group.join(&file.file), &file.value)?;
        if !joined.contains(&group) {
            joined.push(group);
        }
    }
    joined.iter().try_for_each(|group| write(&group.join("cgroup.procs"), "0"))
}

/// A new cpuset of version 1 is empty, and takes no process until it has CPUs and memory nodes: those of its parent.
fn inherit_cpuset(mount: &Path, group: &Path) -> Result<(), BoxError> {
    let mut above: Vec<&Path> = group.ancestors().take_while(|path| *path != mount).collect();
    above.reverse();
    for dir in above {
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let file = dir.join(name);
            let read = |path: &Path| fs::read_to_string(path).map_err(failed("read", path));
            if read(&file)?.trim().is_empty() {
                let parent = dir.parent().unwrap_or(mount).join(name);
                write(&file, read(&parent)?.trim())?;
            }
        }
    }
    Ok(())
}

fn join_v2(wanted: &Wanted<'_>, mounts: &str) -> Result<(), BoxError> {
    if wanted.files.is_empty() && !wanted.names_parent {
        return Ok(());
    }
    let Some(mount) = mount_of(mounts, "cgroup2", None) else {
        return refuse(no_hierarchy("version 2", "2", "1"));
    };
    let parent = mount.join(wanted.parent);
    if wanted.files.is_empty() {
        if !parent.is_dir() {
            return refuse(format!("There is no cgroup {}: make it, or leave --parent-cgroup out", parent.display()));
        }
        return write(&parent.join("cgroup.procs"), "0");
    }
    let group = parent.join(wanted.id);
    fs::create_dir_all(&group).map_err(failed("make cgroup", &group))?;
    for file in wanted.files.iter().filter(|file| file.controller() != "cgroup") {
        let mut above: Vec<&Path> = parent.ancestors().take_while(|path| path.starts_with(&mount)).collect();
        above.reverse();
        for dir in above {
            write(&dir.join("cgroup.subtree_control"), &format!("+{}", file.controller()))?;
        }
    }
    wanted.files.iter().try_for_each(|file| write(&group.join(&file.file), &file.value))?;
    write(&group.join("cgroup.procs"), "0")
}

/// The mount point of a hierarchy: of the type, and with the controller among its options.
fn mount_of(mounts: &str, kind: &str, controller: Option<&str>) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        let has_kind = fields.next()? == kind;
        let options = fields.next()?;
        let has_controller = controller.is_none_or(|name| options.split(',').any(|option| option == name));
        (has_kind && has_controller).then(|| PathBuf::from(at))
    })
}

fn no_hierarchy(what: &str, version: &str, other: &str) -> String {
    format!(
        "Cannot use cgroups of version {version}: no hierarchy of {what} is mounted. Mount it, or say --cgroup-version \
         {other}"
    )
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> String {
    let what = format!("Cannot {doing} {}", path.display());
    move |error| format!("{what}: {error}")
}

fn write(path: &Path, value: &str) -> Result<(), BoxError> {
    // A file that a cgroup does not have is not made by open(2) with O_CREAT there; without it the error says so.
    let opened = fs::OpenOptions::new().write(true).open(path);
    let written = opened.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    Ok(written.map_err(failed(&format!("write `{value}` to"), path))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_cgroups_are_parsed() {
        let file: CgroupFile = "cpuset.cpus=0,2".parse().unwrap();
        assert_eq!((file.controller(), file.value.as_str()), ("cpuset", "0,2"));
        for bad in ["", "cpuset=1", "cpuset.cpus", "../x.y=1", ".x=1", "x.=1", "a/b.c=1"] {
            assert!(bad.parse::<CgroupFile>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hierarchies_are_found_by_their_controllers() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_of(mounts, "cgroup", Some("cpuacct")), Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(mount_of(mounts, "cgroup", Some("memory")), None);
        assert_eq!(mount_of(mounts, "cgroup2", None), Some("/sys/fs/cgroup/unified".into()));
    }
}
