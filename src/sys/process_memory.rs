//! The memory that a process costs the host (kernel `Documentation/filesystems/proc.rst`).

use std::fs;
use std::io;

/// Memory of a process, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Pages that no file backs.
    pub anonymous_kib: u64,
    /// This process's part of files and shared memory: summed over all processes, each page counts once.
    pub shared_kib: u64,
    pub page_tables_kib: u64,
}

impl ProcessMemory {
    /// Reads the memory of process `pid` from `smaps_rollup` and `status`.
    ///
    /// # Errors
    /// The process has ended, or belongs to another user.
    pub fn of(pid: u32) -> io::Result<Self> {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(ProcessMemory {
            anonymous_kib: kib(&rollup, "Pss_Anon"),
            shared_kib: kib(&rollup, "Pss_File") + kib(&rollup, "Pss_Shmem"),
            page_tables_kib: kib(&status, "VmPTE"),
        })
    }

    /// Memory that goes when the process ends.
    pub fn own_kib(&self) -> u64 {
        self.anonymous_kib + self.page_tables_kib
    }
}

impl std::ops::AddAssign for ProcessMemory {
    fn add_assign(&mut self, other: Self) {
        self.anonymous_kib += other.anonymous_kib;
        self.shared_kib += other.shared_kib;
        self.page_tables_kib += other.page_tables_kib;
    }
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_one_that_is_gone_has_none() {
        let own = ProcessMemory::of(std::process::id()).unwrap();
        assert!(own.anonymous_kib > 0 && own.page_tables_kib > 0);
        assert_eq!(own.own_kib(), own.anonymous_kib + own.page_tables_kib);
        assert!(ProcessMemory::of(u32::MAX).is_err());
        assert_eq!(kib("Pss:  9 kB\nPss_Anon:    5 kB\n", "Pss_Anon"), 5);
    }
}
