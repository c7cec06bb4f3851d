//! Pools on a NUMA node: a tmpfs of huge pages, written by a thread whose memory comes from that node only.
//! `mpol=bind:N` of tmpfs(5) is not used: it would also place the pages that guests copy on write on the node.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The reason why a node cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("This host has no NUMA node {0} with memory; /sys/devices/system/node/has_memory says which have")]
    NoNode(u32),
    #[error(
        "Cannot mount a tmpfs on NUMA node {node} at {path}: that needs root (CAP_SYS_ADMIN)",
        path = path.display()
    )]
    Mount { node: u32, path: PathBuf, source: io::Error },
    #[error("NUMA node {node} has {free_mib} MiB free, {size_mib} were asked for")]
    Full { node: u32, size_mib: u64, free_mib: u64 },
    #[error("Cannot read {path}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
}

fn dir_of(node: u32) -> PathBuf {
    PathBuf::from(format!("/run/tvmm/numa-{node}"))
}

/// Returns the directory in which the node's tmpfs is mounted, if it is.
pub fn mounted(node: u32) -> Result<Option<PathBuf>, Error> {
    let dir = dir_of(node);
    let path = Path::new("/proc/self/mountinfo");
    let mounts = fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let is_here = mounts.lines().any(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at) == dir));
    Ok(is_here.then_some(dir))
}

/// Mounts the tmpfs of a node with room for `size` bytes, unless it is mounted already.
pub fn mount(node: u32, size: u64) -> Result<PathBuf, Error> {
    if !nodes_with_memory()?.contains(&node) {
        return Err(Error::NoNode(node));
    }
    if let Some(dir) = mounted(node)? {
        return Ok(dir);
    }
    let path = dir_of(node);
    let failed = |source: io::Error| Error::Mount { node, path: path.clone(), source };
    fs::create_dir_all(&path).map_err(failed)?;
    let free = free_bytes(node);
    if size > free {
        return Err(Error::Full { node, size_mib: size >> 20, free_mib: free >> 20 });
    }
    let options = format!("huge=always,mode=0700,size={}", size.saturating_add(16 << 20));
    let options = std::ffi::CString::new(options).unwrap_or_default();
    let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
    rustix::mount::mount("tvmm", &path, "tmpfs", flags, options.as_c_str()).map_err(|error| failed(error.into()))?;
    Ok(path)
}

fn nodes_with_memory() -> Result<Vec<u32>, Error> {
    let path = Path::new("/sys/devices/system/node/has_memory");
    let text = match fs::read_to_string(path) {
        // A kernel without NUMA has one node.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![0]),
        text => text.map_err(|source| Error::Read { path: path.to_path_buf(), source })?,
    };
    Ok(parse_list(text.trim()))
}

/// Free memory of a node; no limit if the kernel does not tell.
fn free_bytes(node: u32) -> u64 {
    let text = fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo")).unwrap_or_default();
    let free = text.lines().find_map(|line| line.split_once("MemFree:")?.1.trim().strip_suffix(" kB")?.parse().ok());
    free.map_or(u64::MAX, |kib: u64| kib.saturating_mul(1024))
}

/// The kernel's lists: `0-2,5`.
fn parse_list(text: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?.min(1023))
    };
    text.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(parse_list("0"), [0]);
        assert_eq!(parse_list("0-2,5"), [0, 1, 2, 5]);
        assert!(parse_list("").is_empty());
        assert_eq!(parse_list("x,1"), [1]);
    }
}
