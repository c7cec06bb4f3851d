//! Chooses the NUMA node of this thread's memory (set_mempolicy(2)).

use std::io;
use std::marker::PhantomData;

/// `MPOL_DEFAULT` and `MPOL_BIND` of Linux `include/uapi/linux/mempolicy.h`.
const DEFAULT: libc::c_long = 0;
const BIND: libc::c_long = 2;
/// Nodes that a mask has room for, as the kernel counts (`MAX_NUMNODES` is at most that).
const NODES: usize = 1024;

/// Takes new memory of this thread from one node only, while it lives.
#[derive(Debug)]
pub struct Bound {
    /// The binding is that of the thread that made it.
    _thread: PhantomData<*const ()>,
}

/// Binds this thread to a node.
pub fn bind(node: u32) -> io::Result<Bound> {
    let mut mask = [0_u64; NODES / 64];
    let word = mask.get_mut(node as usize / 64).ok_or(io::ErrorKind::InvalidInput)?;
    *word |= 1 << (node % 64);
    set(BIND, mask.as_ptr(), NODES + 1)?;
    Ok(Bound { _thread: PhantomData })
}

fn set(mode: libc::c_long, mask: *const u64, bits: usize) -> io::Result<()> {
    // SAFETY: the kernel reads at most `bits - 1` bits from `mask`, which callers have (none, if it is null), and
    // changes only the node of this thread's next pages.
    match unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // The default is always possible.
        let _ = set(DEFAULT, std::ptr::null(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_thread_can_be_bound_to_a_node_that_there_is() {
        match bind(0) {
            Ok(bound) => drop(bound),
            // A kernel without NUMA.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSYS)),
        }
        assert!(bind(1023).is_err() && bind(1 << 20).is_err());
    }
}
