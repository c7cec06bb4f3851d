//! The deeds of a VMM that its guest has taken over, for tests of debug builds: each is tried, and its result printed.
//!
//! `TVMM_TAKEOVER` has words `KEY=VALUE` that name victims: `file` and `written` (paths), `pid` (a process), `cgroup`
//! (a directory), `address` (an address in that process). Every thread of a VMM has the credentials, the root, the
//! namespaces and the rules of the one that entered the jail, so the deeds are tried in that thread, and in one that it
//! starts.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};

/// The environment variable.
pub const VARIABLE: &str = "TVMM_TAKEOVER";

/// Tries all deeds in this thread and in another, and prints a line `takeover THREAD DEED: done|ERRNO` for each, if the
/// environment asks for it.
pub fn try_all() {
    let Ok(words) = std::env::var(VARIABLE) else { return };
    let victims: BTreeMap<String, String> =
        words.split(' ').filter_map(|word| word.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    print("main", &victims);
    let other = std::thread::Builder::new().name("taken".to_owned()).spawn(move || print("other", &victims));
    if let Ok(thread) = other {
        let _ = thread.join();
    }
}

fn print(thread: &str, victims: &BTreeMap<String, String>) {
    for (deed, result) in deeds(victims) {
        let result = match result {
            Ok(()) => "done".to_owned(),
            Err(error) => error.raw_os_error().unwrap_or_default().to_string(),
        };
        crate::sys::logging::say(&format!("takeover {thread} {deed}: {result}"));
    }
}

type Deed = (&'static str, io::Result<()>);

fn deeds(victims: &BTreeMap<String, String>) -> Vec<Deed> {
    let victim = |key: &str| victims.get(key).cloned().unwrap_or_default();
    let pid: i32 = victim("pid").parse().unwrap_or(0);
    let write = |path: String| OpenOptions::new().write(true).open(path).map(drop);
    vec![
        ("read_file", File::open(victim("file")).map(drop)),
        ("write_file", write(victim("written"))),
        ("make_file", File::create(format!("{}.new", victim("file"))).map(drop)),
        ("list_root", std::fs::read_dir("/proc/1").map(drop)),
        ("open_kvm_by_name", File::open("/dev/kvm").map(drop)),
        ("make_device", make_device()),
        (
            "signal",
            checked(&|| {
                // SAFETY: signal 0 asks whether one could be sent; no memory is involved.
                unsafe { libc::kill(pid, 0) as i64 }
            }),
        ),
        (
            "ptrace",
            checked(&|| {
                // SAFETY: attaches to another process; no memory of this one is involved.
                unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }
            }),
        ),
        ("read_memory", read_memory(pid, victim("address").parse().unwrap_or(0))),
        ("open_memory", File::open(format!("/proc/{pid}/mem")).map(drop)),
        ("mount", mount()),
        (
            "user_namespace",
            checked(&|| {
                // SAFETY: no memory is involved.
                unsafe { libc::unshare(libc::CLONE_NEWUSER) as i64 }
            }),
        ),
        (
            "become_root",
            checked(&|| {
                // SAFETY: no memory is involved. The system call changes this thread alone.
                unsafe { libc::syscall(libc::SYS_setuid, if libc::getuid() == 0 { 1 } else { 0 }) }
            }),
        ),
        (
            "load_module",
            checked(&|| {
                // SAFETY: an empty image is refused before it is read.
                unsafe { libc::syscall(libc::SYS_init_module, std::ptr::null::<u8>(), 0, c"".as_ptr()) }
            }),
        ),
        (
            "leave_root",
            checked(&|| {
                // SAFETY: the path lives through the call.
                unsafe { libc::chroot(c"/".as_ptr()) as i64 }
            }),
        ),
        ("tcp_listen", TcpListener::bind("127.0.0.1:0").map(drop)),
        ("tcp_connect", TcpStream::connect(("127.0.0.1", victim("port").parse().unwrap_or(1))).map(drop)),
        ("udp_send", UdpSocket::bind("0.0.0.0:0").and_then(|s| s.send_to(b"x", "127.0.0.1:9")).map(drop)),
        ("leave_cgroup", write_pid(&victim("cgroup"))),
        ("run_program", std::process::Command::new("/bin/true").status().map(drop)),
    ]
}

fn checked(call: &dyn Fn() -> i64) -> io::Result<()> {
    if call() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn mount() -> io::Result<()> {
    checked(&|| {
        // SAFETY: the strings live through the call.
        unsafe {
            let kind = c"tmpfs".as_ptr();
            libc::mount(kind, c"/".as_ptr(), kind, 0, std::ptr::null()) as i64
        }
    })
}

fn make_device() -> io::Result<()> {
    checked(&|| {
        // SAFETY: the path lives through the call. 1:1 is /dev/mem.
        unsafe { libc::mknod(c"/mem".as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 1)) as i64 }
    })
}

fn read_memory(pid: i32, address: usize) -> io::Result<()> {
    let mut byte = 0_u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 };
    checked(&|| {
        // SAFETY: the kernel writes one byte to `byte`, which outlives the call.
        unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) as i64 }
    })
}

fn write_pid(cgroup: &str) -> io::Result<()> {
    let path = format!("{cgroup}/cgroup.procs");
    OpenOptions::new().write(true).open(path).and_then(|mut file| io::Write::write_all(&mut file, b"0"))
}
