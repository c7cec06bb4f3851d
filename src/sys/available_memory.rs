//! The memory that this process may still take.

use std::fs;
use std::io;
use std::path::Path;

/// Bytes that the host has left, or fewer if a control group of this process (version 2) has fewer left.
pub fn available_memory() -> io::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let host = of_meminfo(&meminfo).ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    Ok(own.and_then(|own| of_groups(Path::new("/sys/fs/cgroup"), own)).map_or(host, |group| group.min(host)))
}

/// The least that any of the groups containing `own` has left; `None` if none of them has a limit.
fn of_groups(root: &Path, own: &str) -> Option<u64> {
    let number = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = |group: &Path| {
        let limit = number(&group.join("memory.max"))?;
        Some(limit.saturating_sub(number(&group.join("memory.current")).unwrap_or(0)))
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
        assert_eq!(of_groups(root.path(), "a/b"), None);
        fs::write(own.join("memory.max"), "max\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b"), None);
        fs::write(root.path().join("a/memory.max"), "1000\n").unwrap();
        fs::write(root.path().join("a/memory.current"), "400\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b"), Some(600));
        fs::write(own.join("memory.max"), "500\n").unwrap();
        assert_eq!(of_groups(root.path(), "a/b"), Some(500));
        assert!(available_memory().unwrap() > 0);
    }
}
