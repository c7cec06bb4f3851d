//! The ways in which a guest takes requests.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::guest::{GuestAnswer, TIMEOUT};
use crate::sys::bounded_wait::Wait;
use crate::sys::errors::{BoxError, refuse};

/// The way in which a guest takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// Lines on its serial port.
    Console,
    /// Lines on a port of its vsock device. Its console takes no requests.
    Vsock,
}

/// The port on which guests listen.
pub const PORT: u32 = 52;

/// The request by which a guest begins to listen on [`PORT`].
pub const SERVE: &str = "vsock_serve port=52 lines=1";

/// The socket of a guest's vsock device, in the current directory of its VMM.
pub const SOCKET: &str = "v.sock";

/// Pause before a guest that does not listen yet is asked again.
const AGAIN: Duration = Duration::from_millis(5);

/// The id of the only request of a connection.
const ID: &str = "v";

/// Runs a function of the guest behind `socket`, once it listens.
///
/// # Errors
/// See [`call`].
pub fn call_once_served(socket: &Path, function: &str) -> Result<GuestAnswer, BoxError> {
    let mut wait = Wait::new(format!("the guest behind {} to listen", socket.display()), TIMEOUT);
    loop {
        if let Some(line) = Line::open(socket, &mut wait)? {
            return line.call(function);
        }
        if wait.is_over() {
            return does_not_listen(socket);
        }
        std::thread::sleep(AGAIN);
    }
}

/// Runs a function of the guest behind `socket`.
///
/// # Errors
/// If the guest does not listen, refuses the function, ends, or does not answer in time.
pub fn call(socket: &Path, function: &str) -> Result<GuestAnswer, BoxError> {
    let mut wait = Wait::new(format!("the guest behind {}", socket.display()), TIMEOUT);
    match Line::open(socket, &mut wait)? {
        Some(line) => line.call(function),
        None => does_not_listen(socket),
    }
}

fn does_not_listen<T>(socket: &Path) -> Result<T, BoxError> {
    refuse(format!("The guest behind {} does not listen on port {PORT}", socket.display()))
}

/// A connection to a guest.
struct Line<'a> {
    socket: &'a Path,
    reader: BufReader<UnixStream>,
}

impl<'a> Line<'a> {
    /// Connects; `None` if the guest does not listen.
    fn open(socket: &'a Path, wait: &mut Wait) -> Result<Option<Line<'a>>, BoxError> {
        let stream = UnixStream::connect(socket).map_err(|error| failed(socket, &error))?;
        let mut line = Line { socket, reader: BufReader::new(stream) };
        if line.send(&format!("CONNECT {PORT}\n")).is_err() {
            // The VMM has refused at once, and closed the connection.
            return Ok(None);
        }
        match line.read(wait)? {
            Some(said) if said.starts_with("OK ") => Ok(Some(line)),
            Some(said) => refuse(format!("The vsock device behind {} says {said:?}", socket.display())),
            None => Ok(None),
        }
    }

    fn call(mut self, function: &str) -> Result<GuestAnswer, BoxError> {
        let mut wait = Wait::new(format!("the answer of the guest behind {}", self.socket.display()), TIMEOUT);
        self.send(&format!("run {ID} {function}\n"))?;
        loop {
            let Some(said) = self.read(&mut wait)? else {
                return refuse(format!("The guest behind {} ended before it answered", self.socket.display()));
            };
            let at = Instant::now();
            if let Some(rest) = said.strip_prefix(&format!("ok {ID} ")) {
                return Ok(GuestAnswer { rest: rest.to_string(), at });
            }
            if said.starts_with("err ") {
                return refuse(format!("The guest says: {said}"));
            }
        }
    }

    fn send(&mut self, text: &str) -> Result<(), BoxError> {
        Ok(self.reader.get_mut().write_all(text.as_bytes()).map_err(|error| failed(self.socket, &error))?)
    }

    /// Reads a line without its end; `None` if the connection is over.
    fn read(&mut self, wait: &mut Wait) -> Result<Option<String>, BoxError> {
        let mut bytes = Vec::new();
        loop {
            self.reader.get_ref().set_read_timeout(Some(wait.step())).map_err(|error| failed(self.socket, &error))?;
            match self.reader.read_until(b'\n', &mut bytes) {
                Ok(_) if bytes.ends_with(b"\n") => {
                    return Ok(Some(String::from_utf8_lossy(&bytes).trim_end().to_string()));
                }
                Ok(_) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(error) => return Err(failed(self.socket, &error).into()),
            }
            if wait.is_over() {
                return refuse(format!("The guest behind {} did not answer within {TIMEOUT:?}", self.socket.display()));
            }
        }
    }
}

fn failed(socket: &Path, error: &io::Error) -> String {
    format!("Cannot ask the guest behind {}: {error}", socket.display())
}
