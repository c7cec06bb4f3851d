//! Facilities that a process needs from its host, one file each, behind small safe owners.
//!
//! Owns: raw system calls (mappings, userfaultfd, signals, page cache, namespaces), the filters of system calls, clocks
//! and time slices, the log, standard output, worker threads, bounded waits, spans for a collector, TLS. Nothing
//! outside maps memory, signals threads or calls an ioctl that kvm-ioctls lacks.
//! Must not know: the purpose of a call. Of the other rooms it imports only the nouns of `snapshot`.
//! Start reading: `mapping.rs` (ownership of a mapping), `lost.rs` (mapped pages that cannot be read).

pub mod guest_memory;
mod handler_text;
pub(crate) mod handshake;
pub mod held;
pub mod jail;
pub(crate) mod lines;
pub mod logging;
pub mod otlp;
pub(crate) mod own_dir;
pub(crate) mod own_file;
pub mod timed_stream;
pub mod tls;
pub mod unix_socket;
#[macro_use]
pub(crate) mod print;
pub mod api_client;
pub mod available_memory;
pub mod bounded_wait;
pub mod clock;
pub mod coalesced;
pub mod code;
pub mod detach;
pub mod direct_ring;
pub mod dirty_log;
pub mod errors;
pub mod heap;
pub mod idle;
pub mod inherit;
pub mod kick;
pub mod kvm_stats;
pub mod limits;
pub mod locks;
pub mod lost;
pub mod mapping;
pub mod mempolicy;
pub mod netns;
pub mod output;
pub mod page_cache;
pub mod pagemap;
pub mod pagemap_scan;
pub mod pdeathsig;
pub mod prefault;
pub mod process_memory;
pub mod raw_descriptor;
pub mod reap;
pub mod resident;
pub mod seccomp;
pub mod secret_key;
pub mod shared_map;
pub mod signals;
pub mod terminal;
pub mod timeline;
pub mod touch;
pub mod tun;
pub mod uffd;
pub mod verity;
pub mod wait;
pub mod watched;
pub(crate) mod worker;
