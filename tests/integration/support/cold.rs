//! Cold pools under test: a snapshot without its memory, a page server, and a proxy that spoils what goes through it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::{Vm, config, run_ok, scratch, signal, text, tvmm};

/// A guest that has filled memory, snapshotted; a copy of the snapshot without its memory; and a pool that has it.
pub struct Scene {
    pub dir: TempDir,
    /// With its memory.
    pub snapshot: PathBuf,
    /// Without.
    pub bare: PathBuf,
    pub pool: PathBuf,
    /// Of the guest's memory.
    pub digest: String,
}

impl Scene {
    pub fn make() -> Scene {
        let dir = scratch();
        let snapshot = dir.path().join("full");
        let mut vm = Vm::boot(&config(1, 128));
        vm.call("fill pages=6000 seed=4");
        let digest = vm.call("check").digest;
        vm.snapshot(&snapshot, &[]);
        let bare = dir.path().join("bare");
        copy_bare(&snapshot, &bare);
        let pool = dir.path().join("pool");
        run_ok(&["pool", "create", "--tier", "remote", "--at", text(&pool)]);
        run_ok(&["pool", "add", text(&pool), text(&snapshot)]);
        Scene { dir, snapshot, bare, pool, digest }
    }

    /// The data object, or with `.index` the index, of the only snapshot in the pool.
    pub fn object(&self, suffix: &str) -> PathBuf {
        let entries = std::fs::read_dir(self.pool.join("objects")).unwrap();
        let mut paths = entries.map(|entry| entry.unwrap().path());
        paths.find(|path| text(path).ends_with(suffix)).expect("the pool has an object")
    }

    /// Restores the copy without memory from `cold`.
    pub fn restore(&self, policy: &str, cold: &[&str], more: &[&str]) -> Vm {
        let mut args: Vec<&str> = cold.iter().flat_map(|cold| ["--cold", cold]).collect();
        args.extend(more);
        Vm::restore_with(&self.bare, policy, &args)
    }

    /// Serves the pool at `address`.
    pub fn serve(&self, address: &str) -> Server {
        Server::start(&self.pool, address, &[])
    }
}

/// Copies a snapshot without its memory file and without what was derived from it.
pub fn copy_bare(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for name in ["manifest.json", "vmstate", "pages"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// A running `tvmm serve-pages`.
pub struct Server {
    child: Child,
    /// Its transport: `tcp` or `rdma`.
    scheme: &'static str,
    /// `IP:PORT`.
    pub address: String,
}

impl Server {
    pub fn start(pool: &Path, address: &str, more: &[&str]) -> Server {
        Server::start_by("tcp", pool, address, more)
    }

    pub fn start_by(scheme: &'static str, pool: &Path, address: &str, more: &[&str]) -> Server {
        let mut command = tvmm();
        command.args(["serve-pages", "--dir", text(pool), "--listen", &format!("{scheme}:{address}")]).args(more);
        let mut child = command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().expect("tvmm starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix(scheme).and_then(|rest| rest.strip_prefix(':'));
        let address = address.unwrap_or_else(|| panic!("no address: {line:?}"));
        Server { address: address.to_string(), scheme, child }
    }

    /// As `--cold` wants it.
    pub fn cold(&self) -> String {
        format!("{}:{}", self.scheme, self.address)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it by SIGTERM.
    pub fn end(&mut self) -> ExitStatus {
        signal(self.child.id(), rustix::process::Signal::TERM);
        self.child.wait().unwrap()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A fault that a proxy makes in the bytes that a server sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spoil {
    Nothing,
    /// Each piece comes so much later.
    Delay(Duration),
    /// A bit of what comes after so many bytes is flipped, on so many connections.
    Flip {
        after: u64,
        connections: usize,
    },
    /// The connection is closed after so many bytes, on so many connections.
    Cut {
        after: u64,
        connections: usize,
    },
    /// After so many bytes nothing more comes, and the connection stays.
    Silence {
        after: u64,
    },
    /// After so many bytes each further one comes by itself, so long after the one before.
    Drip {
        after: u64,
        every: Duration,
    },
    /// Other bytes come after so many.
    Garbage {
        after: u64,
    },
    /// After so many bytes the server's half is closed, and the client's is not.
    HalfClose {
        after: u64,
        connections: usize,
    },
}

/// Stands between client and server.
pub struct Proxy {
    pub address: String,
    scheme: &'static str,
    /// The number of the first connection with the fault, and the fault.
    spoil: Arc<Mutex<(usize, Spoil)>>,
    /// Connections that went through it.
    pub connections: Arc<AtomicUsize>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub fn before(server: &Server, spoil: Spoil) -> Proxy {
        Proxy::to(server.scheme, &server.address, spoil)
    }

    /// In front of any server at `address`, which `scheme` reaches.
    pub fn to(scheme: &'static str, address: &str, spoil: Spoil) -> Proxy {
        let to = address.parse::<SocketAddr>().unwrap();
        // The proxy has the server's IP address, because RDMA goes to the address that the connection goes to.
        let listener = TcpListener::bind((to.ip(), 0)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let spoil = Arc::new(Mutex::new((0, spoil)));
        let connections = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(Mutex::new(Vec::new()));
        let shared = spoil.clone();
        let count = connections.clone();
        let streams = open.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = shared.clone();
                let number = count.fetch_add(1, Ordering::SeqCst);
                streams.lock().unwrap().push(client.try_clone().unwrap());
                std::thread::spawn(move || pass(client, to, &shared, number));
            }
        });
        Proxy { address, scheme, spoil, connections, open }
    }

    pub fn cold(&self) -> String {
        format!("{}:{}", self.scheme, self.address)
    }

    /// Closes the connections there are.
    pub fn cut_all(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// From now on.
    pub fn spoil(&self, spoil: Spoil) {
        self.spoil_from(0, spoil);
    }

    /// From now on, but not the connections before this number.
    pub fn spoil_from(&self, number: usize, spoil: Spoil) {
        *self.spoil.lock().unwrap() = (number, spoil);
    }
}

fn pass(mut client: TcpStream, to: SocketAddr, spoil: &Mutex<(usize, Spoil)>, number: usize) {
    let Ok(mut server) = TcpStream::connect(to) else { return };
    let mut from_client = client.try_clone().unwrap();
    let mut to_server = server.try_clone().unwrap();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    loop {
        let read = match server.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        let bytes = &mut buffer[..read];
        let end = passed + read as u64;
        let (first, spoil) = *spoil.lock().unwrap();
        let spoil = if number < first { Spoil::Nothing } else { spoil };
        match spoil {
            Spoil::Delay(delay) => std::thread::sleep(delay),
            Spoil::Flip { after, connections } if number < connections && (passed..end).contains(&after) => {
                bytes[(after - passed) as usize] ^= 0x10;
            }
            Spoil::Cut { after, connections } if number < connections && end > after => break,
            Spoil::Silence { after } if end > after => {
                std::thread::sleep(Duration::from_secs(600));
                break;
            }
            Spoil::Drip { after, every } if end > after => {
                let whole = after.saturating_sub(passed) as usize;
                let dripped = client.write_all(&bytes[..whole]).and_then(|()| {
                    bytes[whole..].iter().try_for_each(|byte| {
                        std::thread::sleep(every);
                        client.write_all(&[*byte])
                    })
                });
                passed = end;
                if dripped.is_err() {
                    break;
                }
                continue;
            }
            Spoil::Garbage { after } if end > after => {
                let from = after.saturating_sub(passed) as usize;
                bytes[from..]
                    .iter_mut()
                    .zip((0_u8..=250).cycle())
                    .for_each(|(byte, other)| *byte ^= other.wrapping_mul(89) | 1);
            }
            Spoil::HalfClose { after, connections } if number < connections && end > after => {
                let _ = client.shutdown(Shutdown::Write);
                std::thread::sleep(Duration::from_secs(600));
                break;
            }
            _ => {}
        }
        if client.write_all(bytes).is_err() {
            break;
        }
        passed = end;
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}
