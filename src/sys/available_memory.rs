//! The memory that this process may still take.

use std::fs;
use std::io;
use std::path::Path;

/// The files of a control group's memory.
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// The key in `memory.stat` of pages of files that are given back first.
    reclaimable: &'static str,
}

const VERSION_1: GroupFiles =
    GroupFiles { limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes", reclaimable: "total_inactive_file" };
const VERSION_2: GroupFiles = GroupFiles { limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file" };

/// Bytes that the host has left, or fewer if a control group of this process has fewer left.
pub fn available_memory() -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let host = of_meminfo(&meminfo).ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().filter_map(|line| {
        // `0::/path` of version 2, `5:memory:/path` of version 1 (cgroups(7)).
        let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
        match controllers {
            "" => of_groups(Path::new("/sys/fs/cgroup"), path, &VERSION_2),
            "memory" => of_groups(Path::new("/sys/fs/cgroup/memory"), path, &VERSION_1),
            _ => None,
        }
    });
    Ok(own.fold(host, u64::min))
}

/// The least that any of the groups containing `own` has left; `None` if none of them has a limit.
fn of_groups(root: &Path, own: &str, files: &GroupFiles) -> Option<u64> {
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |group: &Path| {
        let limit = number(&group.join(files.limit))?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let value = |line: &str| line.strip_prefix(files.reclaimable)?.trim().parse::<u64>().ok();
        let reclaimable = stat.lines().find_map(value).unwrap_or(0);
        let usage = number(&group.join(files.usage)).unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
    };
    let group = root.join(own);
    group.ancestors().take_while(|group| group.starts_with(root)).filter_map(left).min()
}

fn of_meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_and_each_group_above_count() {
        assert_eq!(of_meminfo("MemTotal:  9 kB\nMemAvailable:    5 kB\n"), Some(5120));
        assert_eq!(of_meminfo("MemTotal:  9 kB\n"), None);
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("a/b");
        fs::create_dir_all(&own).unwrap();
        assert_eq!(of_groups(root.path(), "a/b", &VERSION_2), None);
        fs::write(own.join("memory.max"), "max\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b", &VERSION_2), None);
        fs::write(root.path().join("a/memory.max"), "1000\n").unwrap();
        fs::write(root.path().join("a/memory.current"), "400\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b", &VERSION_2), Some(600));
        fs::write(own.join("memory.max"), "500\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b", &VERSION_2), Some(500));
        fs::write(own.join("memory.current"), "450\n").unwrap();
        fs::write(own.join("memory.stat"), "anon 3\ninactive_file 150\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b", &VERSION_2), Some(200));
        fs::write(own.join("memory.limit_in_bytes"), "300\n").unwrap();
        fs::write(own.join("memory.usage_in_bytes"), "90\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b", &VERSION_1), Some(210));
        assert!(available_memory().unwrap() > 0);
    }
}
